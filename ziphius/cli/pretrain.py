"""``ziphius pretrain``"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from ziphius.cli import options


def pretrain(
    recipe: options.Recipe,
    out: Annotated[Path, typer.Option(help="The run's folder; new or empty, unless resumed.")],
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on with the run in --out from its newest checkpoint."),
    ] = False,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Optimizer steps, in place of the recipe's length.")
    ] = None,
    overrides: options.Overrides = None,
) -> None:
    """Pre-train the network of a RECIPE on its text.

    The folder gets recipe.toml (every setting), metrics.jsonl (a line a step), checkpoints as often
    as run.checkpoint_every says, report.html, summary.json and checkpoint/, a Hugging Face
    directory.

    Ctrl-C and SIGTERM finish the step and save. The same command with --resume goes on, bit for bit
    as if nothing had happened; without a checkpoint it starts from the beginning.

    Example: ziphius pretrain tiny --out runs/one --steps 20 --set data.source=my-texts
    """
    from rich.console import Console
    from rich.markup import escape

    from ziphius.cli.display import Display, program
    from ziphius.cli.signals import saving_on_signals
    from ziphius.config.recipe import load_recipe
    from ziphius.report.page import write_report
    from ziphius.training import run
    from ziphius.training.folder import RunFolder

    chosen = load_recipe(recipe, [*(overrides or []), *options.length(steps)])
    console = Console()
    folder = RunFolder(out, resume=resume)
    with telling_how_to_go_on(out), Display(console) as display:
        stopping = partial(saving_on_signals, console)
        trained = run.pretrain(chosen, folder, display, stopping=stopping)
    report = write_report(folder.path)
    before, after = (trained.summary[f"heldout_bpb_{when}"] for when in ("before", "after"))
    console.print(
        f"\nheld-out text: {before:.3f} bits per byte before, [bold]{after:.3f}[/bold] after\n"
        f"next: {escape(program())} generate {escape(shlex.quote(str(out)))} 'def'\n"
        f"report: {escape(str(report))}",
        highlight=False,
        soft_wrap=True,
    )


@contextmanager
def telling_how_to_go_on(out: Path) -> Iterator[None]:
    """Add the command that goes on with a run to the word of what has stopped it."""
    from ziphius.config.errors import ZiphiusError
    from ziphius.training.loop import Stopped

    try:
        yield
    except Stopped as stopped:
        raise stopped.saying(f"go on with: {resume_command(out)}") from None
    except KeyboardInterrupt:
        if not (out / "recipe.toml").is_file():
            raise
        at_once = ZiphiusError(f"stopped; go on with: {resume_command(out)}")
        at_once.exit_code = 130
        raise at_once from None


def resume_command(out: Path) -> str:
    """Return the command that goes on with a run, whatever began it."""
    from ziphius.cli.display import program

    recipe = shlex.quote(str(out / "recipe.toml"))
    return f"{program()} pretrain {recipe} --out {shlex.quote(str(out))} --resume"
