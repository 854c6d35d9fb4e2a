"""Numbers as an engineer writes them."""

from __future__ import annotations

import math
from typing import Any

_SIZES = ((1e15, "P"), (1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K"))
# Operations and rates go by the SI's letters.
_SI_SIZES = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "K"))


def short(number: float) -> str:
    """Write a count as the field does: 250K, 1.5M, 14.8T."""
    for size, letter in _SIZES:
        if abs(number) >= size:
            return f"{number / size:.4g}{letter}"
    return f"{number:.4g}"


def si(number: float, unit: str) -> str:
    """Write a quantity with a prefix: 21.4 MFLOP, 105 GFLOP/s."""
    for size, letter in _SI_SIZES:
        if abs(number) >= size:
            return f"{number / size:.4g} {letter}{unit}"
    return f"{number:.4g} {unit}"


def tidy(number: float) -> str:
    """Write a small number without idle zeros: 0.01, 2.2e-4."""
    if number == 0 or 1e-3 <= abs(number) < 1e5:
        return f"{number:.4g}"
    mantissa, _, exponent = f"{number:.3g}".partition("e")
    if not exponent:
        mantissa, _, exponent = f"{number:.2e}".partition("e")
        mantissa = mantissa.rstrip("0").rstrip(".")
    return f"{mantissa}e{int(exponent)}"


def whole(number: float) -> str:
    """Write a count in full: 1,671,168."""
    return f"{number:,.0f}"


def percent(share: float) -> str:
    """Write a share of 1: 11.7 %."""
    return f"{whole(100 * share) if share >= 10 else f'{100 * share:.3g}'} %"


def duration(seconds: float) -> str:
    """Write a time in the two largest units that matter: 4 min 52 s, 3 h 05 min, 2 d 4 h."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    total = round(seconds)
    if total < 3600:
        return f"{total // 60} min {total % 60:02d} s"
    if total < 86400:
        return f"{total // 3600} h {total % 3600 // 60:02d} min"
    return f"{total // 86400} d {total % 86400 // 3600} h"


def size(number: float) -> str:
    """Write a number of bytes: 12.1 MB."""
    return si(number, "B").replace("K", "k")


def plain(value: Any) -> str:
    """Write a value of a file: numbers as they stand there, lists with commas."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if isinstance(value, float):
        return f"{value:.6g}" if math.isfinite(value) else str(value)
    if isinstance(value, list | tuple):
        return ", ".join(plain(part) for part in value) or "none"
    if isinstance(value, dict):
        return ", ".join(f"{key}: {plain(part)}" for key, part in value.items()) or "none"
    return "none" if value is None else str(value)
