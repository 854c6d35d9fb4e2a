"""Times as people read them."""

from __future__ import annotations


def shown(seconds: float) -> str:
    """Return a time for people: 850 µs, 12.3 ms, 1.25 s."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if abs(seconds) >= 0.9995 * size:
            return f"{_three(seconds / size)} {unit}"
    return f"{_three(seconds * 1e6)} µs" if seconds else "0"


def _three(value: float) -> str:
    """Return three digits, or all of a larger whole number."""
    return f"{value:.0f}" if abs(value) >= 999.5 else f"{value:.3g}"
