"""What the experts' loads say: who is overloaded, who got nothing, for how long.

The load of an expert is told relative to the mean load of its layer in that step. MaxVio is
``max load / mean load - 1`` of a layer (facts 2.1). An expert is dead in a logged step if no token
of the step's global batch went to it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ziphius.report.balance import Balance, Layer
from ziphius.report.series import Floats, Ints, stretches_of_steps, tail


@dataclass(frozen=True)
class Stretch:
    """The longest time that one expert went without a token: logged steps, first and last."""

    expert: int
    first: int
    last: int
    lines: int


@dataclass(frozen=True)
class LayerFigures:
    """What there is to say about a layer. ``dead_R`` counts experts without a token by step."""

    layer: Layer
    violation_R: Floats
    dead_R: Ints
    ever_dead: int
    worst: Stretch | None

    @property
    def index(self) -> int:
        """The layer's number in the network."""
        return self.layer.index

    @property
    def experts(self) -> int:
        """How many routed experts the layer has."""
        return self.layer.loads_RE.shape[1]

    @property
    def late_violation(self) -> float:
        """The mean MaxVio of the last tenth of the logged steps."""
        values = tail(self.violation_R)
        return float(values.mean()) if len(values) else np.nan

    @property
    def last_violation(self) -> float:
        """MaxVio in the last logged step."""
        values = self.violation_R[np.isfinite(self.violation_R)]
        return float(values[-1]) if len(values) else np.nan

    @property
    def last_dead(self) -> int:
        """How many experts had no token in the last logged step."""
        return int(self.dead_R[-1])

    @property
    def last_bias(self) -> tuple[float, float, float] | None:
        """Smallest, mean and largest routing bias in the last logged step."""
        low, mean, high = (float(value) for value in self.layer.bias_R3[-1])
        return (low, mean, high) if np.isfinite([low, mean, high]).all() else None


def layer_figures(balance: Balance) -> tuple[LayerFigures, ...]:
    """Work out the figures of every layer that has loads."""
    return tuple(
        _figures(layer, balance.steps) for layer in balance.layers if layer.loads_RE.shape[1]
    )


def _figures(layer: Layer, steps: Ints) -> LayerFigures:
    relative_RE = relative(layer.loads_RE)
    dead_RE = (layer.loads_RE == 0) & np.isfinite(relative_RE)
    return LayerFigures(
        layer=layer,
        violation_R=(relative_RE.max(axis=1) - 1).astype(np.float64),
        dead_R=dead_RE.sum(axis=1),
        ever_dead=int(dead_RE.any(axis=0).sum()),
        worst=_longest(dead_RE, steps),
    )


def relative(loads_RE: np.ndarray) -> np.ndarray:
    """Return loads as multiples of their row's mean; NaN in a row without tokens or loads."""
    mean_R1 = loads_RE.mean(axis=1, keepdims=True)
    return np.divide(loads_RE, mean_R1, out=np.full_like(loads_RE, np.nan), where=mean_R1 > 0)


def _longest(dead_RE: np.ndarray, steps: Ints) -> Stretch | None:
    """Find the longest run of logged steps in which one expert was dead; the earliest of equals."""
    best = Stretch(expert=-1, first=0, last=0, lines=0)
    length_E = np.zeros(dead_RE.shape[1], np.int64)
    for i, dead_E in enumerate(dead_RE):
        length_E = np.where(dead_E, length_E + 1, 0)
        expert = int(length_E.argmax())
        lines = int(length_E[expert])
        if lines > best.lines:
            best = Stretch(expert, int(steps[i - lines + 1]), int(steps[i]), lines)
    return best if best.lines else None


def by_column(values_RE: np.ndarray, steps: Ints, limit: int) -> np.ndarray:
    """Sum rows into at most ``limit`` columns that are equal stretches of steps: ``[E, C]``.

    A column that no row falls into repeats the one before: what was logged last still stands. A
    row of NaN is left out; a column that has nothing else is NaN.
    """
    column_R = stretches_of_steps(steps, limit)
    count = int(column_R[-1]) + 1
    present_R = np.isfinite(values_RE).all(axis=1)
    sums_CE = np.zeros((count, values_RE.shape[1]))
    np.add.at(sums_CE, column_R[present_R], values_RE[present_R])
    filled_C = np.bincount(column_R[present_R], minlength=count) > 0
    sums_CE[~filled_C] = np.nan
    seen_C = np.bincount(column_R, minlength=count) > 0
    latest_C = np.maximum.accumulate(np.where(seen_C, np.arange(count), 0))
    return sums_CE[latest_C].T


def load_map(figures: LayerFigures, steps: Ints, limit: int) -> np.ndarray:
    """Return loads relative to the mean, ``[E, C]``: the picture of one layer.

    A column adds up the tokens of its steps, so 0 means no token in any of them.
    """
    return relative(by_column(figures.layer.loads_RE, steps, limit).T).T


def violation_map(layers: tuple[LayerFigures, ...], steps: Ints, limit: int) -> np.ndarray:
    """Return MaxVio by layer and column, ``[L, C]``: of a column's steps the mean."""
    violation_LR = np.stack([figures.violation_R for figures in layers])
    present_LR = np.isfinite(violation_LR)
    sums_LC = by_column(np.where(present_LR, violation_LR, 0.0).T, steps, limit)
    counts_LC = by_column(present_LR.astype(float).T, steps, limit)
    return np.divide(sums_LC, counts_LC, out=np.full_like(sums_LC, np.nan), where=counts_LC > 0)
