"""Sizes of memory as a user writes them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from fractions import Fraction
from types import MappingProxyType

_UNITS: Mapping[str, int] = MappingProxyType(
    {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
    | {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
    | {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
)


def read_size(option: str, text: str) -> int:
    """Return the bytes that ``12GiB``, ``500 MB``, ``4G`` or ``1048576`` stand for.

    Raises BadInput, which names the option.
    """
    from ziphius.config.errors import BadInput

    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    if found is None or found[2].upper() not in _UNITS:
        raise BadInput(f"{option} {text}: no size: write bytes, or 500MB, 12GiB and the like")
    return int(Fraction(found[1]) * _UNITS[found[2].upper()])
