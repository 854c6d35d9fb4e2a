"""The policy for steps that go wrong: skip, go back, stop (settings: the [guard] table)."""

from __future__ import annotations

import math
import statistics
from typing import Any

from ziphius.config.guard import GuardConfig

# A median of fewer losses says little, and at first the loss falls too fast for one to matter.
_FEWEST_LOSSES = 10


class Guard:
    """Judges every step before it is applied, and remembers what happened.

    It depends on the losses alone, so a repeated run judges alike; ``state`` is part of every
    checkpoint.
    """

    def __init__(self, config: GuardConfig) -> None:
        self.config = config
        self.turn = 0
        self.losses: list[float] = []
        self.in_row = 0
        self.skipped = 0
        self.rollbacks = 0
        self.largest_spike: dict[str, float] | None = None

    def reading(self, turn: int) -> None:
        """Take note of which text is read: losses of another one start a new history."""
        if turn != self.turn:
            self.turn, self.losses = turn, []

    def judge(self, step: int, loss: float, grad_norm: float) -> str | None:
        """Return why this step must not be applied, or ``None``. Losses and spikes are in nats."""
        reason = self._reason(step, loss, grad_norm)
        if reason is None:
            self.in_row = 0
            self.losses = [*self.losses[-(self.config.window - 1) :], loss]
        else:
            self.in_row += 1
            self.skipped += 1
        return reason

    @property
    def must_go_back(self) -> bool:
        """Whether so many steps in a row were skipped that skipping does not help."""
        return self.in_row >= self.config.patience

    def went_back(self) -> None:
        """Take note of a return to a checkpoint: later losses start a new history."""
        self.rollbacks += 1
        self.in_row = 0
        self.losses = []

    @property
    def may_go_back(self) -> bool:
        """Whether another return to a checkpoint is allowed."""
        return self.rollbacks < self.config.max_rollbacks

    def state(self) -> dict[str, Any]:
        """Return everything it remembers, as numbers that JSON keeps exactly."""
        return {
            "turn": self.turn,
            "losses": self.losses,
            "in_row": self.in_row,
            "skipped": self.skipped,
            "rollbacks": self.rollbacks,
            "largest_spike": self.largest_spike,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue with what ``state`` returned."""
        # Runs from before mixtures could change have read one text.
        for name, value in {"turn": 0, **state}.items():
            setattr(self, name, value)

    def _reason(self, step: int, loss: float, grad_norm: float) -> str | None:
        if not math.isfinite(loss):
            return "loss not finite"
        if not math.isfinite(grad_norm):
            return "gradient not finite"
        if len(self.losses) < _FEWEST_LOSSES:
            return None
        median = statistics.median(self.losses)
        rise = loss - median
        if rise > (self.largest_spike or {"nats": 0.0})["nats"]:
            self.largest_spike = {"step": step, "nats": rise}
        if not self.config.spike:
            return None
        deviation = statistics.median(abs(x - median) for x in self.losses)
        if rise > max(self.config.spike_nats, self.config.spike * deviation):
            return f"loss {rise:.2f} nats above the median"
        return None
