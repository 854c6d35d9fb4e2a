"""``ziphius pretrain``"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from ziphius.cli import options


def pretrain(
    recipe: options.Recipe,
    out: Annotated[Path, typer.Option(help="The run's folder; it must be new or empty.")],
    steps: Annotated[
        int | None, typer.Option(min=1, help="Optimizer steps; short for pretrain.steps.")
    ] = None,
    overrides: options.Overrides = None,
) -> None:
    """Pre-train the network of a RECIPE on its text.

    The folder gets recipe.toml (every setting), metrics.jsonl (a line a step), summary.json and
    checkpoint/, a Hugging Face directory.

    Example: ziphius pretrain tiny --out runs/one --steps 20 --set pretrain.learning_rate=1e-3
    """
    from rich.console import Console
    from rich.markup import escape

    from ziphius.cli.display import Display, program
    from ziphius.config.recipe import load_recipe
    from ziphius.training import run
    from ziphius.training.folder import RunFolder

    changes = [*(overrides or []), *([f"pretrain.steps={steps}"] if steps else [])]
    resolved = run.resolve(load_recipe(recipe, changes))
    console = Console()
    with Display(console) as display:
        trained = run.pretrain(resolved, RunFolder(out), display)
    before, after = (trained.summary[f"heldout_bpb_{when}"] for when in ("before", "after"))
    console.print(
        f"\nheld-out text: {before:.3f} bits per byte before, [bold]{after:.3f}[/bold] after\n"
        f"next: {escape(program())} generate {escape(shlex.quote(str(out)))} 'def'",
        highlight=False,
        soft_wrap=True,
    )
