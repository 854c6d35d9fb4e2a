"""The stages after pre-training, in miniature: each a run in a folder of its own (facts 7, 8).

extend/     the base model, its context lengthened in two phases
sft/        short chats, and tasks with their reasoning
grpo/       the expert: SFT, then rewards
distill/    the final model: SFT, then what the expert answers rightly and briefly
records/    the conversations that are learned
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from ziphius.cli.pretrain import telling_how_to_go_on

if TYPE_CHECKING:
    from ziphius.alignment.teachers import Teacher
    from ziphius.cli.display import Display
    from ziphius.config.distill import DistillConfig
    from ziphius.config.recipe import Recipe
    from ziphius.config.run import RunConfig
    from ziphius.data.documents import Document
    from ziphius.training.loop import Stopping
    from ziphius.training.run import Trained
    from ziphius.training.stage import Stage
    from ziphius.training.start import Start
    from ziphius.training.watch import Watch

STAGES = ("pretrain", "extend", "sft", "grpo", "distill")
PRESET = "tiny"
# What each stage has of the minutes, relative to the others that run.
_SHARES = {"pretrain": 48, "extend": 13, "sft": 24, "grpo": 13, "distill": 2}
_PHASES = (0.65, 0.35)  # of the extension's
# Records; every other solution comes without its reasoning.
_WORKED, _CHATS = 8000, 300
_DIALOGUES = 0.1  # of as many as there are records: some of them, one after another
# So many test problems of a task are asked once each after every stage, as the policy samples.
_PROBLEMS, _TEMPERATURE = 100, 1.0
_NEEDLES, _POSITION_BYTES = 1, 120_000  # of a cell; of text whose loss is told by position
# At most: a stage ends when its time is up.
_EPOCHS = {"sft": 12, "distill": 4}
_SUMMARISED = {
    "train_seconds": "seconds",
    **{name: name for name in ("steps", "tokens", "tokens_per_s", "peak_memory_gib")},
    **{name: name for name in ("heldout_bpb_before", "heldout_bpb_after", "mtp_agreement")},
}

Prepare = Callable[["Recipe", "Start", "Watch"], "Stage"]


def seconds_of(stages: Sequence[str], minutes: float) -> dict[str, float]:
    """Divide the minutes of a quickstart among the stages that it runs."""
    parts = sum(_SHARES[stage] for stage in stages)
    return {stage: 60 * minutes * _SHARES[stage] / parts for stage in stages}


def figures_of(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a quickstart tells of a run."""
    return {ours: summary.get(theirs) for theirs, ours in _SUMMARISED.items()}


@dataclass(frozen=True)
class Miniature:
    """The later stages of a quickstart whose pre-training is the run in ``out``.

    ``settings`` are those of all stages, ``extension`` more of the extension; ``seconds`` are what
    every stage may train for. ``steps``, where these are counted instead, bounds every later
    stage's.
    """

    out: Path
    settings: Sequence[str]
    seconds: Mapping[str, float]
    steps: int | None
    display: Display
    stopping: Stopping
    extension: Sequence[str] = ()

    def check(self) -> None:
        """Read the tables and draw the test problems. Raises BadInput for what cannot be."""
        from ziphius.alignment.measure import heldout_problems
        from ziphius.alignment.questions import mixture_of

        heldout_problems(mixture_of(self._asked().tasks, "distill.tasks"), _PROBLEMS)
        for stage in STAGES[1:]:
            self._recipe(stage)

    def run(self, stage: str, documents: Sequence[Document]) -> dict[str, Any]:
        """Run a stage; return its figures. ``documents`` are what pre-training has read."""
        if stage == "extend":
            return self._extend()
        if stage == "sft":
            return self._sft(documents)
        return self._grpo() if stage == "grpo" else self._distill()

    def folder(self, stage: str) -> Path:
        """Return a stage's run folder."""
        return self.out if stage == "pretrain" else self.out / stage

    def _extend(self) -> dict[str, Any]:
        from ziphius.training.extend import extend

        folder = self.folder("extend")
        seconds = [share * self.seconds["extend"] for share in _PHASES]
        with telling_how_to_go_on(folder, None, "extend", str(self.out)):
            trained = extend(
                self._recipe("extend"),
                self.out,
                folder,
                self.display,
                seconds=() if self.steps else seconds,
                stopping=self.stopping,
            )
        return figures_of(self._both(trained)) | {"needles": self._needles(trained)}

    def _both(self, trained: Trained) -> dict[str, Any]:
        """Return the summary of both phases together: the last one's, with sums."""
        import json

        file = self.folder("extend") / "phase-1" / "summary.json"
        first, last = json.loads(file.read_text("utf-8")), trained.summary
        sums = {name: first[name] + last[name] for name in ("train_seconds", "steps", "tokens")}
        speed = sums["tokens"] / sums["train_seconds"]
        return {**last, **sums, "tokens_per_s": speed}

    def _needles(self, trained: Trained) -> dict[str, float]:
        """Ask needles before and after; return the share that is found, by map.

        Nothing where rows are too short for them: the stages after this one need none.
        """
        from ziphius.cli.extend import ask_needles, needle_lengths
        from ziphius.evaluation.long_context import write_needles
        from ziphius.report.page import write_report

        folder = self.folder("extend")
        if not needle_lengths(folder, trained):
            self.display.say("rows are too short for needles: none are asked")
            write_report(folder)
            return {}
        self.display.say("asking needles of several lengths")

        def tell(name: str, done: int, total: int) -> None:
            self.display.progress(done, total)

        found = ask_needles(
            self.out,
            folder,
            _NEEDLES,
            trained,
            position_bytes=_POSITION_BYTES,
            on_progress=tell,
        )
        write_needles(found, self.out)  # the whole report shows them too
        write_report(folder)
        return {name: fmean(map(fmean, rows)) for name, rows in found["maps"].items()}

    def _sft(self, documents: Sequence[Document]) -> dict[str, Any]:
        from ziphius.alignment.chats import docstring_chats
        from ziphius.alignment.reject import write_records
        from ziphius.alignment.sft import fine_tuning
        from ziphius.alignment.teachers import WorkedTeacher

        config = self._asked().model_copy(update={"problems": _WORKED, "tries": 1})
        worked, _ = self._rejected(WorkedTeacher(), config)
        for record in worked[::2]:
            record["messages"][-1]["reasoning_content"] = ""  # rewards are to find what it is for
        chats = docstring_chats(documents, _CHATS, seed=self._run().seed)
        write_records(chats, self.records("chats"))
        self._write("sft", worked)
        return self.train("sft", "extend", fine_tuning, self.source("sft", "sft"))

    def _grpo(self) -> dict[str, Any]:
        from ziphius.alignment.reinforce import learning_from_rewards

        return self.train("grpo", "sft", learning_from_rewards)

    def _distill(self) -> dict[str, Any]:
        from ziphius.alignment.distill import distilling
        from ziphius.alignment.teachers import CheckpointTeacher

        config = self._asked()
        self.display.say(f"asking the expert {config.problems} problems, {config.tries} times each")
        teacher = CheckpointTeacher(self.folder("grpo"), config, self._run())
        kept, rejected = self._rejected(teacher, config)
        self._write("distill", kept)
        # Where the expert answers nothing rightly, what it has learned from is learned again.
        source = self.source("distill", "distill" if kept else "sft")
        figures = self.train("distill", "sft", partial(distilling, teacher=None), source)
        return figures | {"kept": len(kept), "rejected": rejected}

    def train(self, stage: str, begin: str, prepare: Prepare, *settings: str) -> dict[str, Any]:
        """Train the checkpoint of the stage ``begin``, and ask it problems of every task."""
        from ziphius.report.page import write_report
        from ziphius.training import run
        from ziphius.training.folder import RunFolder
        from ziphius.training.start import open_start

        folder, before = self.folder(stage), self.folder(begin)
        start, recipe = open_start(before), self._recipe(stage, *settings)
        with telling_how_to_go_on(folder, None, stage, str(before)):
            trained = run.train(
                start.into(recipe),
                lambda settled, watch: prepare(settled, start, watch),
                RunFolder(folder, stage),
                self.display,
                seconds=math.inf if self.steps else self.seconds[stage],
                stopping=self.stopping,
            )
        found = self._answers(folder)
        write_report(folder)
        return figures_of(trained.summary) | found

    def _answers(self, path: Path) -> dict[str, Any]:
        """Return shares of right answers by task, and how answers are written."""
        from ziphius.alignment.measure import measure
        from ziphius.alignment.questions import mixture_of, open_for_asking

        config = self._asked()
        self.display.say(f"asking {_PROBLEMS} problems of every task that nobody trains on")
        llm, prompter = open_for_asking(path, self._run(), config.format, config.max_tokens)
        found = measure(
            llm,
            mixture_of(config.tasks, "distill.tasks"),
            prompter,
            problems=_PROBLEMS,
            max_tokens=config.max_tokens,
            temperature=_TEMPERATURE,
        )
        return found.describe()

    def _rejected(
        self, teacher: Teacher, config: DistillConfig
    ) -> tuple[list[dict[str, Any]], dict[str, float]]:
        """Return a teacher's records, and the share of tries that became none, by task."""
        from ziphius.alignment.questions import mixture_of
        from ziphius.alignment.reject import reject

        tasks, seed = mixture_of(config.tasks, "distill.tasks"), self._run().seed
        found = reject(teacher, tasks, config, seed=seed)
        return found.records, {name: count.rejected for name, count in found.counts.items()}

    def _asked(self) -> DistillConfig:
        recipe = self._recipe("distill")
        assert recipe.distill is not None, "the preset has the table"
        return recipe.distill

    def _run(self) -> RunConfig:
        return self._recipe("distill").run

    def _recipe(self, stage: str, *settings: str) -> Recipe:
        """Return a stage's recipe: what is set by hand goes before what the stage sets."""
        from ziphius.config.recipe import load_recipe

        length: list[str] = []
        if self.steps:
            number = [self.steps] * len(_PHASES) if stage == "extend" else self.steps
            length = [f"{stage}.steps={number}"]
        elif stage in _EPOCHS and not any(s.startswith(f"{stage}.epochs") for s in self.settings):
            length = [f"{stage}.epochs={_EPOCHS[stage]}"]
        own = self.extension if stage == "extend" else ()
        return load_recipe(PRESET, [*self.settings, *own, *settings, *length])

    def _write(self, name: str, records: Sequence[dict[str, Any]]) -> None:
        from ziphius.alignment.chats import dialogues
        from ziphius.alignment.reject import write_records

        talks = dialogues(records, round(_DIALOGUES * len(records)), seed=self._run().seed)
        write_records(records, self.records(name))
        write_records(talks, self.records(f"{name}-dialogues"))

    def source(self, stage: str, name: str) -> str:
        """Return the setting by which a stage learns some records, dialogues of them and chats."""
        names = (name, f"{name}-dialogues", "chats")
        files = [str(path) for path in map(self.records, names) if path.stat().st_size]
        return f"{stage}.source={','.join(files)}"

    def records(self, name: str) -> Path:
        """Return the file of some conversations that are learned."""
        folder = self.out / "records"
        folder.mkdir(exist_ok=True)
        return folder / f"{name}.jsonl"
