"""The [guard] table: what a run does when a step goes wrong."""

from __future__ import annotations

from pydantic import Field

from ziphius.config.table import Table


class GuardConfig(Table):
    """A step whose loss or gradient is not finite is never applied.

    Neither is one whose loss lies above the median of the last ``window`` losses by more than
    ``spike`` times their median deviation from it and by more than ``spike_nats``. Its batch is
    spent. After ``patience`` steps in a row that were not applied the run goes back to its newest
    checkpoint at a multiple of ``run.checkpoint_every`` and on with the text that follows; after
    ``max_rollbacks`` of these it stops.
    ``spike`` = 0 watches for values that are not finite only.
    """

    window: int = Field(100, ge=10)
    spike: float = Field(20.0, ge=0)
    spike_nats: float = Field(1.0, ge=0)
    patience: int = Field(10, ge=1)
    max_rollbacks: int = Field(3, ge=0)
