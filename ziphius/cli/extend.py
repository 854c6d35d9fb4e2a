"""``ziphius extend``"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ziphius.cli import options

if TYPE_CHECKING:
    from rich.console import Console

    from ziphius.cli.stages import Job
    from ziphius.config.recipe import Recipe as RecipeTables
    from ziphius.training.run import Trained


def extend(
    recipe: options.Recipe,
    checkpoint: options.Start,
    out: options.Out,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on in the phase that the run in --out has come to."),
    ] = False,
    needles: Annotated[
        int,
        typer.Option(
            min=0,
            metavar="N",
            help="Ask N needle-in-a-haystack questions a cell afterwards, before and after.",
        ),
    ] = 0,
    overrides: options.Overrides = None,
) -> None:
    """Lengthen the context of a CHECKPOINT as the table extend of the RECIPE says.

    YaRN slows the rotations that a longer row would take too far, by extend.factor; then some
    steps on long rows teach the network to use them, in phases: extend.lengths, extend.batch_sizes
    and extend.steps have a number for each. Rows are whole files of one project, one behind the
    other, of the same text as in pre-training. Earlier phases are runs in OUT/phase-1 and so on;
    OUT itself is the last one, and its checkpoint says rope_scaling as transformers reads it.

    Long rows can be divided among processes: --set parallel.cp=2 under torchrun.

    With --needles the report shows which facts the network finds again in held-out text of every
    length, and its loss by position, beside the checkpoint as it was and beside the same weights
    without YaRN. A small network finds none unless its text has taught it to.

    Example: ziphius extend tiny runs/one --out runs/long --set "extend.lengths=[1024, 4096]"
    """
    from ziphius.cli.stages import train_on

    def train(chosen: RecipeTables, job: Job) -> Trained:
        from ziphius.training.extend import extend as through_phases

        processes = job.processes
        return through_phases(
            chosen,
            checkpoint,
            out,
            job.display,
            mesh=job.mesh,
            resume=resume,
            restarted=processes.restarts > 0,
            job=processes.job,
            stopping=job.stopping,
        )

    train_on(
        "extend",
        train,
        recipe,
        checkpoint,
        out,
        *(["--needles", str(needles)] if needles else []),
        overrides=overrides,
        heldout="long rows",
        then="generate {out} 'def'",
        measure=partial(_measure, checkpoint, out, needles) if needles else None,
    )


def _measure(before: Path, out: Path, samples: int, trained: Trained, console: Console) -> None:
    console.print("needles in held-out text")
    ask_needles(before, out, samples, trained)


def needle_lengths(out: Path, trained: Trained) -> tuple[int, ...]:
    """Return the lengths of a run's needle prompts: those that have room for facts."""
    from ziphius.config.recipe import load_recipe
    from ziphius.evaluation.long_context import lengths_between
    from ziphius.evaluation.needle import NeedleTest, fewest_tokens

    recipe = load_recipe(str(out / "recipe.toml"))
    assert recipe.extend is not None, "the run has written it down"
    fewest = fewest_tokens(trained.stage.tokenizer, NeedleTest.others)
    between = lengths_between(trained.summary["yarn_original_context"], recipe.extend.lengths)
    return tuple(length for length in between if length >= fewest)


def ask_needles(
    before: Path,
    out: Path,
    samples: int,
    trained: Trained,
    *,
    position_bytes: int | None = None,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Any]:
    """Ask a run's start and its end for facts in held-out text; return and keep the figures.

    Raises BadInput for rows with no room for facts.
    """
    from ziphius.config.errors import BadInput
    from ziphius.config.recipe import load_recipe
    from ziphius.evaluation.long_context import long_context, write_needles
    from ziphius.evaluation.needle import NeedleTest
    from ziphius.training.text import heldout_documents

    recipe = load_recipe(str(out / "recipe.toml"))
    assert recipe.extend is not None, "the run has written it down"
    lengths = needle_lengths(out, trained)
    if not lengths:
        raise BadInput(
            f"--needles: rows of {max(recipe.extend.lengths)} tokens have no room for facts: "
            "the run itself is finished"
        )
    figures = long_context(
        before,
        out,
        heldout_documents(recipe.data),
        NeedleTest(lengths, samples=samples),
        trained=recipe.extend.lengths,
        position_bytes=position_bytes or recipe.run.validate_bytes,
        options={
            "fast_math": recipe.run.device != "cpu",
            "kernel_cache": recipe.run.cache,
            "device": recipe.run.device,
        },
        on_progress=on_progress,
    )
    write_needles(figures, out)
    return figures
