"""From a column of numbers to what a picture can carry. A missing value is NaN throughout."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

SMOOTH_PARTS = 30  # the smooth line averages over about this part of the run


def half_window(count: int) -> int:
    """Return how many neighbours to either side the smooth line of ``count`` values averages."""
    return max(1, count // (2 * SMOOTH_PARTS))


def smooth(values: Floats, half: int) -> Floats:
    """Average over ``half`` values to either side, leaving out those that are missing.

    The window narrows towards the start, where the loss falls fast, and is cut off at the end, so
    that the last value is an average too. A window without any value gives NaN.
    """
    present = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(present, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(present)])
    places = np.arange(len(values))
    left = places - np.minimum(half, places)
    right = np.minimum(places + np.minimum(half, places), len(values) - 1)
    number = counts[right + 1] - counts[left]
    with np.errstate(invalid="ignore"):
        return np.where(number > 0, (sums[right + 1] - sums[left]) / number, np.nan)


def extremes(x: Floats, y: Floats, limit: int) -> tuple[Floats, Floats]:
    """Keep at most ``limit`` points, so that no peak and no dip is lost.

    Of every stretch of the curve the lowest and the highest point stay, in their order. Missing
    values are dropped.
    """
    present = np.flatnonzero(np.isfinite(y))
    x, y = x[present], y[present]
    if len(y) <= limit:
        return x, y
    # The ends stay too.
    stretches = np.array_split(np.arange(1, len(y) - 1), max(1, limit // 2 - 1))
    kept = {0, len(y) - 1}
    for part in stretches:
        kept |= {int(part[y[part].argmin()]), int(part[y[part].argmax()])}
    places = np.array(sorted(kept))
    return x[places], y[places]


def corners(x: Floats, y: Floats, limit: int) -> tuple[Floats, Floats]:
    """Keep the points of a piecewise constant curve where its value changes, at most ``limit``."""
    present = np.isfinite(y)
    x, y = x[present], y[present]
    changes = np.flatnonzero(np.diff(y) != 0)
    places = np.unique(np.concatenate([[0], changes, changes + 1, [len(y) - 1]]))
    return extremes(x[places], y[places], limit)


def stretches_of_steps(steps: Ints, limit: int) -> Ints:
    """Return for every logged step the column it falls into, of at most ``limit`` columns.

    Columns are equal stretches of steps, so that a picture's axis is true also where lines are
    missing.
    """
    columns = min(limit, len(steps))
    first, last = int(steps[0]), int(steps[-1])
    if columns < 2 or first == last:
        return np.zeros(len(steps), np.int64)
    return np.minimum((steps - first) * columns // (last - first), columns - 1)


def tail(values: Floats) -> Floats:
    """Return the present values of the last tenth, at least one where there is any."""
    present = values[np.isfinite(values)]
    return present[-max(1, len(present) // 10) :]


def head(values: Floats) -> Floats:
    """Return the present values of the first tenth, at least one where there is any."""
    present = values[np.isfinite(values)]
    return present[: max(1, len(present) // 10)]
