"""The [parallel] table: what is applied to the model from outside."""

from __future__ import annotations

from typing import Literal, cast, get_args

from pydantic import Field, field_validator

from ziphius.config.errors import BadInput
from ziphius.config.table import Table

Recompute = Literal["none", "selective", "full"]


class ParallelConfig(Table):
    """How a run is spread over processes, which ``torchrun`` starts. One process is the default.

    ``world = pp * dp_replicate * dp_shard * cp * tp``; ``dp_shard`` = -1 takes what is left.
    ``ep`` ranks of ``dp_shard * cp`` hold the routed experts together. ``ranks_per_node`` = 0 is
    what ``torchrun`` says; less lets one machine stand for several nodes.

    ``sharding`` says what data-parallel ranks share: the optimizer's state (``zero1``, as in the
    report), or weights and gradients too (``fsdp``; ``hsdp`` inside groups of ``dp_shard``).
    ``schedule`` is the pipeline's, ``layout`` how many blocks each of its stages holds, as in
    ``"15|16|15|15"``; equal shares without it. ``recompute`` trades arithmetic in backward for
    memory (facts 5.7). ``none`` keeps every activation. ``selective`` computes RMSNorm outputs, MLA
    up-projections and SwiGLU outputs again, as the report does. ``full`` keeps only the inputs of
    the block's stages ``attend`` and ``experts``; the experts that were chosen are saved and
    replayed. One word is for all stages of a pipeline, ``"full|selective|none|none"`` for each.

    ``chunks`` cuts a micro-batch for dispatch, so that hops overlap. ``comm_sms`` are the
    multiprocessors of a GPU that communication takes (of 132, facts 5.6): with ``ep`` > 1, kernels
    that would take all of them leave so many. ``deadline`` is how many seconds a rank waits for
    others.
    """

    pp: int = Field(1, ge=1)
    dp_replicate: int = Field(1, ge=1)
    dp_shard: int = Field(-1, ge=-1)
    cp: int = Field(1, ge=1)
    tp: int = Field(1, ge=1)
    ep: int = Field(1, ge=1)
    ranks_per_node: int = Field(0, ge=0)
    sharding: Literal["zero1", "fsdp", "hsdp"] = "zero1"
    schedule: Literal["1f1b", "interleaved", "zb1p", "zbv", "dualpipe", "dualpipev"] = "1f1b"
    layout: str | None = None
    recompute: str = "none"
    chunks: int = Field(1, ge=1)
    comm_sms: int = Field(20, ge=0, le=132)
    deadline: float = Field(600, gt=0)

    @field_validator("recompute")
    @classmethod
    def _policies_are_known(cls, recompute: str) -> str:
        if wrong := [word for word in recompute.split("|") if word not in get_args(Recompute)]:
            known = ", ".join(get_args(Recompute))
            raise ValueError(
                f"'{wrong[0]}' is no policy: use {known}, or one a stage with | between"
            )
        return recompute

    def recompute_of(self, stage: int, stages: int) -> Recompute:
        """Return the policy of a stage. Raises BadInput for as many policies as there are none."""
        words = self.recompute.split("|")
        if len(words) not in (1, stages):
            raise BadInput(
                f"parallel.recompute = '{self.recompute}' has {len(words)} policies, and the "
                f"pipeline has {stages} stages: use one, or one a stage"
            )
        return cast("Recompute", words[stage if len(words) > 1 else 0])
