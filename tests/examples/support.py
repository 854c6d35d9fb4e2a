"""What the tests of examples share."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"


def settings_of(flags: Sequence[str]) -> list[str]:
    """Return what follows every ``--set``."""
    return [value for flag, value in pairwise(flags) if flag == "--set"]


def ziphius_part(command: Sequence[str]) -> Sequence[str]:
    """Return the arguments of ``ziphius`` in a command of torchrun."""
    return command[command.index("ziphius") + 1 :]
