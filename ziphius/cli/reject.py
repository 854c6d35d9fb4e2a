"""``ziphius reject``"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ziphius.cli import options

if TYPE_CHECKING:
    from ziphius.alignment.teachers import Teacher
    from ziphius.config.recipe import Recipe


def reject(
    recipe: options.Recipe,
    teacher: Annotated[
        str,
        typer.Argument(
            metavar="TEACHER",
            help="A checkpoint or run, http://HOST/v1, a file of records, or 'worked': the tasks' "
            "own solutions.",
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(
            help="The file of records, JSON lines, to write; one that is there is replaced."
        ),
    ],
    model: Annotated[str, typer.Option(help="The model's name, of a server.")] = "",
    key_file: Annotated[
        Path | None, typer.Option(help="A file with the server's key; it is shown nowhere.")
    ] = None,
    overrides: options.Overrides = None,
) -> None:
    """Keep the right and short answers of a TEACHER: the table distill of the RECIPE.

    distill.tasks are asked, distill.tries times each. Every record tells its teacher's SHA-256, its
    seed, how many tries there were and how many were right. Learn them by 'ziphius distill'.

    Example: ziphius reject tiny runs/rl --out records.jsonl --set distill.tasks=sums,gcd
    """
    from dataclasses import asdict

    from rich.console import Console
    from rich.table import Table

    from ziphius.alignment.questions import mixture_of
    from ziphius.alignment.reject import reject as sample
    from ziphius.alignment.reject import write_records
    from ziphius.cli.display import Display
    from ziphius.cli.processes import Processes
    from ziphius.config.distill import DistillConfig
    from ziphius.config.errors import BadInput, ZiphiusError
    from ziphius.config.recipe import load_recipe

    if (ranks := Processes.told().world) > 1:
        raise BadInput(f"{ranks} processes: one asks a teacher and writes --out: start one")
    chosen = load_recipe(recipe, overrides or [])
    config = chosen.distill or DistillConfig()
    tasks = mixture_of(config.tasks, "distill.tasks")
    if out.is_dir():
        raise BadInput(f"--out {out}: is a folder: name a file")
    if not out.absolute().parent.is_dir():
        raise BadInput(f"--out {out}: its folder does not exist: make it first")
    console = Console()
    with Display(console) as display:
        asked = _teacher(teacher, model, key_file, chosen)
        display.say(f"asking {teacher}: {config.problems} problems, {config.tries} tries each")
        found = sample(asked, tasks, config, seed=chosen.run.seed, on_progress=display.progress)
        if found.records:
            write_records(found.records, out)
    table = Table(title="what became of the answers", title_justify="left")
    for column in ("task", "problems", "tries", "right", "kept", "given up", "rejected"):
        table.add_column(column, justify="left" if column == "task" else "right")
    for name, count in sorted(found.counts.items()):
        numbers = [f"{number:,}" for number in asdict(count).values()]
        table.add_row(name, *numbers, f"{count.rejected:.0%}")
    console.print(table)
    if asked.trouble:
        console.print(asked.trouble, highlight=False, markup=False)
    if not found.records:
        raise ZiphiusError(f"no answer was right and in its form: {out} was not written")
    console.print(f"{out}: {len(found.records):,} records", highlight=False, markup=False)


def _teacher(name: str, model: str, key_file: Path | None, recipe: Recipe) -> Teacher:
    from ziphius.alignment.endpoint import Endpoint
    from ziphius.alignment.teachers import (
        CheckpointTeacher,
        EndpointTeacher,
        FileTeacher,
        WorkedTeacher,
    )
    from ziphius.config.distill import DistillConfig
    from ziphius.config.errors import BadInput

    config = recipe.distill or DistillConfig()
    if name == "worked":
        return WorkedTeacher()
    if name.startswith(("http://", "https://")):
        if not model:
            raise BadInput(f"{name}: say which model answers there, by --model")
        key = None
        if key_file is not None:
            try:
                key = key_file.read_text("utf-8").strip()
            except (OSError, UnicodeDecodeError) as error:
                raise BadInput(f"--key-file {key_file}: cannot be read: {error}") from None
        return EndpointTeacher(Endpoint(name, model, key), config)
    if Path(name).is_file():
        return FileTeacher(Path(name))
    return CheckpointTeacher(Path(name), config, recipe.run)
