"""Which rows of the global batch a rank trains on."""

from __future__ import annotations

from typing import NamedTuple

from ziphius.config.errors import BadInput
from ziphius.data.rows import Batch
from ziphius.parallel.collectives import Axis


class MicroBatch(NamedTuple):
    """Rows of one forward and backward pass.

    Without ``counts`` they are another pass's, once more: all ranks make as many passes, because
    experts are reached together, and what this one gives is to be multiplied by zero.
    """

    rows: Batch
    counts: bool


def check_batch(rows: int, ranks: int) -> None:
    """Refuse a global batch of fewer rows than ranks that share it. Raises BadInput."""
    if rows < ranks:
        raise BadInput(
            f"a batch of {rows} rows is shared by {ranks} ranks (parallel.dp_replicate * "
            f"parallel.dp_shard): let batch_size and batch_size_start be {ranks} or more, or start "
            f"fewer processes, so that at most {rows} ranks share a batch"
        )


def own_micro_batches(
    batch: Batch, size: int, axis: Axis, *, least: int = 1, multiple: int = 1
) -> list[MicroBatch]:
    """Cut this rank's rows out of the global batch, in passes of ``size`` rows and a last of fewer.

    Ranks get neighbouring rows, as many or one more than others. Schedules of pipelines ask for
    ``least`` passes or more, a ``multiple`` of some number: passes have fewer rows then, and where
    rows do not suffice some count nothing. Raises BadInput for too few rows.
    """
    rows, ranks, place = len(batch), axis.size, axis.place
    check_batch(rows, ranks)
    own = slice(place * rows // ranks, (place + 1) * rows // ranks)
    mine = batch.rows(own)
    most = -(-rows // ranks)
    number = max(least, -(-most // size))
    number = -(-number // multiple) * multiple
    parts = [MicroBatch(part, counts=True) for part in mine.split(-(-most // number))]
    return parts + [MicroBatch(parts[0].rows, counts=False)] * (number - len(parts))
