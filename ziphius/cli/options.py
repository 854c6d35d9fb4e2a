"""Arguments that several verbs share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Recipe = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A preset (tiny, mini, 16b, 671b) or a TOML file.")
]
Checkpoint = Annotated[
    Path, typer.Argument(metavar="CHECKPOINT", help="A Hugging Face folder or a run folder.")
]
Start = Annotated[
    Path, typer.Argument(metavar="CHECKPOINT", help="The checkpoint or run to begin with.")
]
Out = Annotated[Path, typer.Option(help="The run's folder; new or empty, unless resumed.")]
Resume = Annotated[
    bool, typer.Option("--resume", help="Go on with the run in --out from its newest checkpoint.")
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


def length(steps: int | None = None, *, tokens: int | None = None) -> list[str]:
    """Return the overrides that give a run its length: in steps of a constant batch, or tokens."""
    if steps is not None:
        unset = ("pretrain.tokens=null", "pretrain.batch_size_start=null")
        return [f"pretrain.steps={steps}", *unset]
    return [f"pretrain.tokens={tokens}", "pretrain.steps=null"] if tokens is not None else []


DType = Annotated[
    str | None,
    typer.Option(help="float64, float32 or bfloat16; by default what the checkpoint says."),
]
Speculation = Annotated[
    str,
    typer.Option(
        metavar="auto|on|off",
        help="Draft tokens with the MTP module: where that is faster, always, or never.",
    ),
]
DraftDepth = Annotated[int, typer.Option(help="How many tokens to draft at a time.")]
FastMath = Annotated[
    bool,
    typer.Option(
        "--fast-math/--exact",
        help="Without a C++ compiler much faster, and last bits depend on what else is computed; "
        "with one exact answers are the fastest.",
    ),
]
KernelChoice = Annotated[
    str,
    typer.Option(
        metavar="auto|compiled|torch|triton",
        help="What computes: C++ kernels, built once, plain PyTorch, or Triton's on a GPU; auto: "
        "the fastest that can be.",
    ),
]
Device = Annotated[
    str,
    typer.Option(
        metavar="cpu|cuda|cuda:N",
        help="Where to compute. On a GPU answers depend on what else is computed: it needs "
        "--fast-math.",
    ),
]
CacheTokens = Annotated[
    int, typer.Option(help="Room for the tokens of all prompts and answers that run at a time.")
]
LazyExperts = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE|auto",
        help="Read routed experts when a token first chooses them and keep at most SIZE of them "
        "(8GiB, 500MB), auto: as many as memory has room for. A checkpoint larger than the memory "
        "answers, as fast as the disk brings what it chooses.",
    ),
]
Plan = Annotated[
    bool,
    typer.Option(
        "--plan",
        help="Say what memory all this would take, item by item, whether it fits and how long "
        "loading would take; load and answer nothing.",
    ),
]
Memory = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE", help="With --plan: the memory to plan for, by default what is free here."
    ),
]
Profile = Annotated[
    str,
    typer.Option(metavar="none|r1|v3-0324", help="How the model was published to be asked."),
]
