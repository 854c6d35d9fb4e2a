"""How a stage has changed a model's answers: right ones by task, and how they are written."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from ziphius.alignment.tasks.mixture import Mixture

FILE = "answers.json"
Measure = Annotated[
    str,
    typer.Option(
        metavar="TASKS",
        help="Ask test problems of these tasks before and after: how many answers are right, and "
        "how they are written.",
    ),
]
Problems = Annotated[
    int, typer.Option(min=1, help="How many problems of each task, with --measure.")
]


@dataclass(frozen=True)
class Questions:
    """What ``--measure`` and ``--problems`` ask. Without ``tasks`` nothing is asked."""

    tasks: str
    problems: int

    def check(self) -> None:
        """Draw the problems. Raises BadInput, before anything is trained, for what is none."""
        from ziphius.alignment.measure import heldout_problems

        if self.tasks:
            heldout_problems(mixture(self.tasks), self.problems)

    def arguments(self) -> list[str]:
        """Return the arguments with which a command that goes on asks the same."""
        if not self.tasks:
            return []
        return ["--measure", self.tasks, "--problems", str(self.problems)]

    def measure(self, stage: str, before: Path, out: Path, console: Console) -> None:
        """Ask a run's start and its end, and write both into its folder."""
        from ziphius.checkpoint.files import write_atomic

        if not self.tasks:
            return
        figures = {
            when: self._figures(path, stage, out)
            for when, path in (("before", before), ("after", out))
        }
        write_atomic(out / FILE, (json.dumps(figures, indent=1) + "\n").encode())
        _tell(console, figures)

    def _figures(self, path: Path, stage: str, out: Path) -> dict[str, Any]:
        from ziphius.alignment.measure import measure
        from ziphius.alignment.questions import open_for_asking
        from ziphius.config.recipe import load_recipe

        recipe = load_recipe(str(out / "recipe.toml"))
        table = getattr(recipe, stage)
        # Fine-tuning says nothing of how long answers may be: a row, less some question.
        longest = getattr(table, "max_tokens", max(1, table.sequence_length // 2))
        form = getattr(table, "prompt", "") or table.format
        llm, prompter = open_for_asking(path, recipe.run, form, longest)
        asked = mixture(self.tasks)
        found = measure(llm, asked, prompter, problems=self.problems, max_tokens=longest)
        return found.describe()


def mixture(tasks: str) -> Mixture:
    """Read the tasks of ``--measure``."""
    from ziphius.alignment.questions import mixture_of

    return mixture_of(tasks, "--measure")


def _tell(console: Console, figures: dict[str, dict[str, Any]]) -> None:
    from rich.table import Table

    before, after = figures["before"], figures["after"]
    table = Table(title="answers to problems that nobody trained on", title_justify="left")
    for column in ("", "before", "after"):
        table.add_column(column, justify="right" if column else "left")
    for task in before["accuracy"]:
        shares = (f"{figure['accuracy'][task]:.0%}" for figure in (before, after))
        table.add_row(f"{task}, right", *shares)
    for name, what, form in (
        ("form", "reasoning in its form", ".0%"),
        ("mixing", "words of other scripts", ".1%"),
        ("repetition", "repeated runs of words", ".1%"),
        ("unfinished", "cut at their longest", ".0%"),
        ("length", "tokens", ".1f"),
    ):
        table.add_row(what, *(f"{figure['style'][name]:{form}}" for figure in (before, after)))
    console.print(table)
