"""Answers in the trainer's own processes: by its module, or by a whole copy on every rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer

from ziphius.alignment.rollout import Answered, Asked
from ziphius.config.errors import ZiphiusError
from ziphius.config.grpo import GrpoConfig
from ziphius.inference.llm import LLM
from ziphius.inference.outputs import CompletionOutput
from ziphius.inference.params import SamplingParams
from ziphius.model.transformer import Transformer
from ziphius.parallel.collectives import Axis, alone
from ziphius.parallel.gather import gather_into
from ziphius.parallel.mesh import CONTROL
from ziphius.parallel.passes import Passes
from ziphius.training.saving import Saver

# So many answers are written at a time.
_AT_A_TIME = 64


class AtOnce:
    """Answers when it is asked: a ticket has the answers."""

    def begin(self, asked: Sequence[Asked], seeds: Sequence[int]) -> list[list[Answered]]:
        """Answer."""
        return self.answer(asked, seeds)

    def collect(self, ticket: list[list[Answered]]) -> list[list[Answered]]:
        """Return the answers."""
        return ticket

    def answer(self, asked: Sequence[Asked], seeds: Sequence[int]) -> list[list[Answered]]:
        """Return a group of answers to every prompt, by the weights of this moment."""
        raise NotImplementedError

    def close(self) -> None:
        """Nothing runs elsewhere."""


class InProcess(AtOnce):
    """The engine over the weights that are trained: nothing is copied, nothing can be stale."""

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        config: GrpoConfig,
        axis: Axis | None = None,
        *,
        kernels: str = "auto",
        kernel_cache: str | None = None,
    ) -> None:
        self.config, self.axis = config, axis or alone()
        device = model.device
        self.llm = LLM.of(
            model,
            tokenizer,
            fast_math=device.type != "cpu",
            kernels=kernels,
            kernel_cache=kernel_cache,
            device=device,
            cache_tokens=_AT_A_TIME * (config.sequence_length + 32),
            max_running=_AT_A_TIME,
            max_waiting=max(1024, config.questions * config.group),
            keep_experts=config.replay,
            speculation="off",  # with so many answers at a time drafts cost more than they save
        )

    def answer(self, asked: Sequence[Asked], seeds: Sequence[int]) -> list[list[Answered]]:
        """Return a group of answers to every prompt, by the weights of this moment."""
        self.llm.weights_changed()
        config = self.config
        params = [
            SamplingParams(
                n=config.group,
                seed=seed,
                temperature=config.temperature,
                max_tokens=config.max_tokens,
                logprobs=0,
            )
            for seed in seeds
        ]
        prompts = [{"prompt_token_ids": list(one.prompt)} for one in asked]
        results = self.llm.generate(prompts, params)
        return [[_answered(output) for output in result.outputs] for result in results]


class Copied(AtOnce):
    """Answers by a copy of a model that lies on several ranks, each with a part of the questions.

    Every rank has room for a whole model beside its part. In exact mode the answers are those of
    one process.
    """

    def __init__(
        self, passes: Passes, saver: Saver, tokenizer: Tokenizer, config: GrpoConfig, **how: Any
    ) -> None:
        first = passes.models[0]
        self.saver, self.world, self.axis = saver, passes.mesh["world"], passes.mesh[CONTROL]
        self.copy = Transformer(
            first.config, first.precision, kernels=first.kernels, device=first.device
        )
        self.inner = InProcess(self.copy, tokenizer, config, **how)

    def answer(self, asked: Sequence[Asked], seeds: Sequence[int]) -> list[list[Answered]]:
        """Bring the weights of this moment together, and answer by them."""
        gather_into(self.copy, self.saver.owners, self.saver.weights(), self.world)
        return self.inner.answer(asked, seeds) if asked else []


def _answered(output: CompletionOutput) -> Answered:
    if output.error is not None:
        raise ZiphiusError(f"an answer could not be sampled: {output.error}")
    assert output.logprobs is not None, "asked for"
    return Answered(
        tokens=output.token_ids,
        log_probs=[scored.logprob for scored in output.logprobs],
        text=output.text,
        finished=output.finish_reason == "stop",
        experts=None if output.experts is None else output.experts.numpy(),
    )
