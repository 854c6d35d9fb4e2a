"""``ziphius report``"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run.")],
    out: Annotated[
        Path | None, typer.Option(help="The file to write; report.html in the folder by default.")
    ] = None,
) -> None:
    """Draw a training run as one HTML file that opens anywhere, without a network.

    It is drawn from the files of the folder, so a run that goes on or was broken off has a report
    too.

    Example: ziphius report runs/quickstart
    """
    from ziphius.report.page import write_report

    typer.echo(write_report(run, out))
