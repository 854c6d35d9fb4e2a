"""Arguments that several verbs share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Recipe = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A preset (tiny, 16b, 671b) or a TOML file.")
]
Checkpoint = Annotated[
    Path, typer.Argument(metavar="CHECKPOINT", help="A Hugging Face folder or a run folder.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="TABLE.KEY=VALUE",
        help="Change a setting of the recipe; may be repeated. 'null' unsets it.",
    ),
]
WithoutMTP = Annotated[
    bool, typer.Option("--without-mtp", help="Leave multi-token prediction modules out.")
]
DType = Annotated[
    str | None,
    typer.Option(help="float64, float32 or bfloat16; by default what the checkpoint says."),
]
