"""A point of a run, as recipes write it: tokens seen, or a share of the whole run."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator

_SHARE = re.compile(r"(\d+(?:\.\d+)?) ?%")


def _check(value: int | str) -> int | str:
    if isinstance(value, int):
        if value < 0:
            raise ValueError(f"{value} is no number of tokens: it is negative")
        return value
    match = _SHARE.fullmatch(value)
    if match is None or float(match[1]) > 100:
        raise ValueError(f"'{value}': write a number of tokens, or a share of the run like '60%'")
    return value


Moment = Annotated[int | str, AfterValidator(_check)]


Span = tuple[int | str, int | str]
"""Two moments: from one to the other."""

WHOLE_RUN: Span = (0, "100%")


def moment_tokens(moment: int | str, total: int) -> int:
    """Return how many tokens are seen at ``moment`` of a run of ``total`` tokens."""
    if isinstance(moment, int):
        return moment
    match = _SHARE.fullmatch(moment)
    assert match is not None, "recipes are checked when they are read"
    return round(total * float(match[1]) / 100)
