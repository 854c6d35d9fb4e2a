"""What a stage measures of the records that it holds out: the numbers of its own objective."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ziphius.alignment.packing import Lay, Unit, packed_rows
from ziphius.data.rows import Batch
from ziphius.parallel.passes import Passes
from ziphius.training.stage import StepObjective


class HeldOut:
    """Units that nothing is learned from; ``objective`` makes what is computed of all of them."""

    def __init__(
        self,
        units: Sequence[Unit],
        lay: Lay,
        objective: Callable[[Batch], StepObjective],
        *,
        sequence_length: int,
        spare: int = 0,
    ) -> None:
        self.units, self.lay, self.objective = units, lay, objective
        self.row, self.room = sequence_length + 1, sequence_length + 1 - spare

    def __call__(self, passes: Passes) -> dict[str, float]:
        """Return the loss and what metrics tell besides, by names that begin with ``heldout_``."""
        if not self.units:
            return {}
        rows = packed_rows(self.units, self.room)
        # Every rank has some row, if an empty one.
        rows += [[] for _ in range(passes.mesh["batch"].size - len(rows))]
        batch = self.lay(rows, self.row).to(passes.models[0].device)
        objective, parts = self.objective(batch), passes.cut(batch)
        objective.prepare(passes, parts)
        sums = passes.measure(parts, objective).over(passes.mesh["world"]).sums.tolist()
        told = dict(zip(objective.extra, sums[4:], strict=True))
        return {f"heldout_{name}": value for name, value in {"loss": sums[0], **told}.items()}
