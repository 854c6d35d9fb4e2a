"""The passes of a step through a pipeline, for any number of micro-batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ziphius.data.rows import Batch
from ziphius.kernels.later import Later
from ziphius.model.transformer import Transformer
from ziphius.parallel.mesh import Mesh
from ziphius.parallel.passes import Objective, Result
from ziphius.parallel.pipeline.actions import Chunk, Pair, Schedule
from ziphius.parallel.pipeline.families import fewest, forward_only, schedule
from ziphius.parallel.pipeline.runtime import Pipeline
from ziphius.parallel.rows import MicroBatch, own_micro_batches


class Pipelined:
    """A rank's stages and their schedule, whose table is made for each number of micro-batches."""

    def __init__(
        self,
        table: Schedule,
        stages: Mapping[Chunk, Transformer],
        mesh: Mesh,
        later: Later,
        micro_batch_size: int,
        *,
        document_mask: bool = False,
    ) -> None:
        """``table`` is the schedule for some number of micro-batches."""
        self.table, self.stages, self.mesh, self.later = table, stages, mesh, later
        self.size, self.document_mask = micro_batch_size, document_mask
        self.models = in_order(stages)
        self._pipelines: dict[int, Pipeline] = {}

    def cut(self, batch: Batch) -> list[MicroBatch]:
        least, multiple = fewest(self.table.name, self.table.ranks)
        batches = self.mesh["batch"]
        return own_micro_batches(batch, self.size, batches, least=least, multiple=multiple)

    def backwards(self, parts: Sequence[MicroBatch]) -> int | None:
        return None  # DualPipe's two directions share them, and a table of several stages sees more

    def run(self, parts: Sequence[MicroBatch], objective: Objective, scale: float) -> Result:
        if len(parts) not in self._pipelines:
            self._pipelines[len(parts)] = self._pipeline(self._table(len(parts)))
        return self._pipelines[len(parts)].run(parts, objective, scale)

    def measure(self, parts: Sequence[MicroBatch], objective: Objective) -> Result:
        return self._pipeline(forward_only(self.table, len(parts))).measure(parts, objective)

    def _table(self, micro_batches: int) -> Schedule:
        table = self.table
        return schedule(table.name, table.ranks, micro_batches, table.stages)

    def _pipeline(self, table: Schedule) -> Pipeline:
        mask, axis = self.document_mask, self.mesh["pp"]
        overlap = self.mesh.layout.ep > 1 and self.mesh.device == "cpu" and _pairs(table)
        return Pipeline(table, self.stages, axis, self.later, document_mask=mask, overlap=overlap)


def _pairs(table: Schedule) -> bool:
    return any(isinstance(step, Pair) for steps in table.steps for step in steps)


def in_order(stages: Mapping[Chunk, Transformer]) -> tuple[Transformer, ...]:
    """Return the models of stages as the network has them."""
    return tuple(model for _, model in sorted(stages.items(), key=lambda item: item[0].stage))
