"""What the verbs share that train a checkpoint on."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ziphius.cli.pretrain import telling_how_to_go_on
from ziphius.cli.processes import Processes, joined

if TYPE_CHECKING:
    from rich.console import Console

    from ziphius.cli.answers import Questions
    from ziphius.cli.display import Display
    from ziphius.config.recipe import Recipe
    from ziphius.parallel.mesh import Mesh
    from ziphius.training.loop import Stopping
    from ziphius.training.run import Trained
    from ziphius.training.stage import Stage
    from ziphius.training.start import Start
    from ziphius.training.watch import Watch

# What is told of a run's end: a figure of the summary, what it is of, and how it is written.
_TOLD = (
    ("bpb", "bits per byte of {heldout}", ".3f"),
    ("loss", "loss", ".4f"),
    ("accuracy", "share that is judged right", ".1%"),
)


@dataclass(frozen=True)
class Job:
    """Where a verb trains: its processes, how they meet, who follows, and what may stop them."""

    processes: Processes
    mesh: Mesh
    display: Display
    stopping: Stopping


def run_stage(
    verb: str,
    prepare: Callable[[Recipe, Start, Watch], Stage],
    recipe: str,
    checkpoint: Path,
    out: Path,
    *begun: str,
    resume: bool,
    overrides: Sequence[str] | None,
    network: Mapping[str, Any] | None = None,
    questions: Questions | None = None,
) -> Trained:
    """Train a checkpoint through a stage into a run folder, and say what came of it.

    ``begun`` are further arguments that a command needs that goes on. ``network`` are dimensions
    in which the stage's network differs from the checkpoint's. ``questions`` are asked before and
    after.
    """
    from ziphius.parallel.mesh import CONTROL
    from ziphius.training import run
    from ziphius.training.folder import RunFolder
    from ziphius.training.start import open_start

    def train(chosen: Recipe, job: Job) -> Trained:
        processes = job.processes
        folder = RunFolder(out, verb, resume=resume, job=processes.job)
        folder.resume |= processes.restarts > 0 and folder.is_of(processes.job)
        job.display.say(f"opening {checkpoint}")
        start = open_start(checkpoint, job.mesh[CONTROL])
        return run.train(
            start.into(chosen, network),
            lambda settled, watch: prepare(settled, start, watch),
            folder,
            job.display,
            mesh=job.mesh,
            stopping=job.stopping,
        )

    if questions is None:
        return train_on(verb, train, recipe, checkpoint, out, *begun, overrides=overrides)
    questions.check()
    return train_on(
        verb,
        train,
        recipe,
        checkpoint,
        out,
        *begun,
        *questions.arguments(),
        overrides=overrides,
        measure=lambda trained, console: questions.measure(verb, checkpoint, out, console),
    )


def train_on(
    verb: str,
    train: Callable[[Recipe, Job], Trained],
    recipe: str,
    checkpoint: Path,
    out: Path,
    *begun: str,
    overrides: Sequence[str] | None,
    heldout: str = "answers",
    then: str = "chat {out}",
    measure: Callable[[Trained, Console], None] | None = None,
) -> Trained:
    """Let the processes of this job train a checkpoint on, and say what came of it.

    ``heldout`` is what bits per byte are of, ``then`` what a user may do next; ``measure`` comes
    before the report is drawn, in the first process.
    """
    from rich.console import Console
    from rich.markup import escape

    from ziphius.cli.display import Display, program
    from ziphius.cli.signals import saving_on_signals
    from ziphius.config.recipe import load_recipe
    from ziphius.report.page import write_report

    chosen = load_recipe(recipe, overrides or [])
    processes = Processes.told()
    console = Console(quiet=processes.rank > 0)
    with (
        telling_how_to_go_on(out, processes, verb, str(checkpoint), *begun),
        joined(chosen, processes) as mesh,
        Display(console) as display,
    ):
        trained = train(chosen, Job(processes, mesh, display, partial(saving_on_signals, console)))
    if processes.rank == 0:
        report = write_report(out)  # whatever becomes of what is measured
        if measure is not None:
            measure(trained, console)
            report = write_report(out)
        following = f"{program()} {then.format(out=shlex.quote(str(out)))}"
        console.print(
            f"\n{_measured(trained.summary, heldout)}next: {escape(following)}\n"
            f"report: {escape(str(report))}",
            highlight=False,
            soft_wrap=True,
        )
    return trained


def _measured(summary: Mapping[str, Any], heldout: str) -> str:
    told = ""
    for name, what, form in _TOLD:
        before, after = (summary.get(f"heldout_{name}_{when}") for when in ("before", "after"))
        if before is not None and after is not None:
            figure = what.format(heldout=heldout)
            told += (
                f"held-out {figure}: {before:{form}} before, [bold]{after:{form}}[/bold] after\n"
            )
    return told
