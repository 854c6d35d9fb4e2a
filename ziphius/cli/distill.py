"""``ziphius distill``"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ziphius.cli import answers, options


def distill(
    recipe: options.Recipe,
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CHECKPOINT", help="The student: a checkpoint or run.")
    ],
    out: options.Out,
    teacher: Annotated[
        Path | None,
        typer.Option(help="A checkpoint whose log-probabilities are learned: distill.kl_weight."),
    ] = None,
    resume: options.Resume = False,
    measure: answers.Measure = "",
    problems: answers.Problems = 100,
    overrides: options.Overrides = None,
) -> None:
    """Let a student learn a teacher's answers: the table distill of the RECIPE.

    distill.source are the records that 'ziphius reject' made. They are learned as conversations are
    by 'ziphius sft'; with --teacher and distill.kl_weight the student also learns how probable the
    teacher finds every token.

    Example: ziphius distill tiny runs/one --out runs/final --set distill.source=records.jsonl
    """
    from functools import partial

    from ziphius.alignment.distill import distilling
    from ziphius.cli.stages import run_stage

    begun = ["--teacher", str(teacher)] if teacher is not None else []
    prepare = partial(distilling, teacher=teacher)
    run_stage(
        "distill",
        prepare,
        recipe,
        checkpoint,
        out,
        *begun,
        resume=resume,
        overrides=overrides,
        questions=answers.Questions(measure, problems),
    )
