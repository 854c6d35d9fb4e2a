"""The stage that learns from rewards: questions in, answers of the policy, steps of GRPO."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ziphius.alignment.answerers import Copied, InProcess
from ziphius.alignment.grpo import Grpo, aim
from ziphius.alignment.questions import ZERO, Prompter, mixture_of
from ziphius.alignment.reference import KeptNear
from ziphius.alignment.rewards.find import find_rewards, judging
from ziphius.alignment.rollout import Answerers, Ask, Asked, Judge, Rollouts
from ziphius.alignment.samplers import RaySamplers
from ziphius.config.errors import BadInput
from ziphius.config.grpo import GrpoConfig
from ziphius.config.recipe import Recipe
from ziphius.data.rows import Batch
from ziphius.inference.chat import TEMPLATE_FILE
from ziphius.inference.template import chat_template_of
from ziphius.parallel.passes import Passes
from ziphius.training.saving import Saver
from ziphius.training.schedule import StepSettings
from ziphius.training.stage import Stage
from ziphius.training.start import Start
from ziphius.training.watch import Watch


class Reinforcement(KeptNear):
    """What a stage of GRPO holds besides the policy: rollouts, and the reference."""

    def __init__(self, recipe: Recipe, start: Start, rollouts: Rollouts, watch: Watch) -> None:
        self.recipe, self.start, self.rollouts, self.watch = recipe, start, rollouts, watch
        self.config = rollouts.config

    def begin(self, passes: Passes, saver: Saver) -> Mapping[str, Mapping[str, Tensor]]:
        """Let the model answer; return what checkpoints are to keep."""
        self.rollouts.least_rows = passes.mesh["batch"].size
        self.rollouts.answerers = self._answerers(passes, saver)
        if not self.config.kl_weight:
            return {}
        return super().begin(passes, saver)

    def _answerers(self, passes: Passes, saver: Saver) -> Answerers:
        run, tokenizer, config = self.recipe.run, self.start.tokenizer, self.config
        how: dict[str, Any] = {"kernels": run.kernels, "kernel_cache": run.cache}
        world = passes.mesh.layout.world
        if config.samplers and world > 1:
            raise BadInput(
                f"grpo.samplers = {config.samplers}: they serve one trainer's process, here are "
                f"{world}, which answer by themselves: use samplers = 0"
            )
        if config.samplers:
            return RaySamplers(
                passes.models[0],
                tokenizer,
                config,
                count=config.samplers,
                deadline=config.sampler_seconds,
                say=self.watch.say,
                address=config.samplers_address,
                threads=config.sampler_threads,
                **how,
            )
        if world == 1:
            return InProcess(passes.models[0], tokenizer, config, **how)
        return Copied(passes, saver, tokenizer, config, **how)

    def aim(self, batch: Batch, settings: StepSettings) -> Grpo:
        """Return what a step minimises."""
        return aim(self.config, batch, self.reference)

    def renew(self, rollout: int) -> None:
        """Let the reference follow the policy, before a rollout, where it is time."""
        every = self.config.reference_every
        if self.reference is not None and every and rollout and rollout % every == 0:
            self.reference.take()


def learning_from_rewards(recipe: Recipe, start: Start, watch: Watch) -> Stage:
    """Return the stage of a recipe's table [grpo], with the tasks and the rewards that it names.

    Raises BadInput for what is unknown.
    """
    config = recipe.grpo or GrpoConfig()
    tasks = mixture_of(config.tasks)
    prompter = Prompter(start.tokenizer, config.prompt)
    rewards = find_rewards(config.rewards, tasks, config.max_tokens, watch.say)

    def ask(rollout: int, place: int) -> Asked:
        number = rollout * config.questions + place
        return prompter.ask(tasks.problem_at(recipe.run.seed, "train", number))

    identity = hashlib.sha256(f"{config.tasks}/{config.rewards}/{config.prompt}".encode())
    return reinforcing(recipe, start, watch, ask, judging(tasks, rewards), identity.hexdigest())


def reinforcing(
    recipe: Recipe, start: Start, watch: Watch, ask: Ask, judge: Judge, identity: str
) -> Stage:
    """Return the stage of a recipe's table [grpo]. ``identity`` says what is asked."""
    config = recipe.grpo or GrpoConfig()
    if config.steps is None:
        raise BadInput("grpo.steps: say how many steps, by --set grpo.steps=1000")
    rollouts = Rollouts(config, ask, judge, seed=recipe.run.seed)
    work = Reinforcement(recipe, start, rollouts, watch)
    rollouts.before = work.renew
    files = {}
    if config.prompt != ZERO:
        files = {TEMPLATE_FILE: chat_template_of(config.prompt)}
    return Stage(
        table="grpo",
        spells=False,
        steps_together=config.steps_per_rollout,
        config=config,
        tokenizer=start.tokenizer,
        batches=rollouts,
        aim=work.aim,
        identity=identity,
        document_mask=True,
        start=start.folder,
        files=files,
        about=start.about,
        begin=work.begin,
        ready=work.ready,
        notes=lambda: rollouts.told,
    )
