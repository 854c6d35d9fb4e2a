"""``ziphius convert``"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ziphius.cli import options


def convert(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="The checkpoint to read.")],
    target: Annotated[Path, typer.Argument(metavar="TARGET", help="The folder to write.")],
    to: Annotated[str, typer.Option(help="How weights are stored: bf16 or fp32.")] = "bf16",
    without_mtp: options.WithoutMTP = False,
) -> None:
    """Write a checkpoint in another form, tensor by tensor. FP8 sources are dequantised.

    Example: ziphius convert DeepSeek-V3 DeepSeek-V3-bf16 --to bf16
    """
    from rich.console import Console
    from rich.progress import Progress

    from ziphius.checkpoint.convert import convert as convert_checkpoint

    console = Console()
    with Progress(console=console) as progress:
        task = progress.add_task("tensors", total=None)
        comparison = convert_checkpoint(
            source,
            target,
            to,
            mtp=not without_mtp,
            on_tensor=lambda done, total: progress.update(task, completed=done, total=total),
        )
    console.print(
        f"{target}: {len(comparison.used)} tensors used, {len(comparison.ignored)} ignored",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
