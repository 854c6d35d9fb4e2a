"""What the verbs that answer share: how experts are kept, and ``--plan``."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from ziphius.cli.sizes import read_size


def expert_bytes(lazy_experts: str | None) -> int | Literal["auto"] | None:
    """Return what ``--lazy-experts`` means to ``LLM``. Raises BadInput for no size."""
    if lazy_experts is None:
        return None
    return "auto" if lazy_experts == "auto" else read_size("--lazy-experts", lazy_experts)


def show_plan(checkpoint: Path, memory: str | None, how: dict[str, Any]) -> None:
    """Print what ``LLM(checkpoint, **how)`` would hold, and load nothing."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from ziphius.inference.llm import LLM
    from ziphius.planning.memory import ITEMS

    given = None if memory is None else read_size("--memory", memory)
    plan = LLM.plan(checkpoint, memory_bytes=given, **how)
    table = Table(title=Text(str(plan.path)), show_header=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_column(style="dim")
    for name, value, note in plan.rows():
        if name in ("weights", "latent cache", "together", "bytes to read"):
            table.add_section()
        style = "dim" if name in ITEMS else "bold" if name == "together" else ""
        table.add_row(Text(name, style), Text(value, style), Text(note, _colour(note)))
    Console().print(table)


def _colour(note: str) -> str:
    if note.startswith("does not fit"):
        return "bold red"
    return "bold green" if note == "fits" else ""
