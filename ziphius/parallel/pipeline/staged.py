"""One micro-batch on its way through a part of the network, stage by stage of every block.

The stages are those of ``model/block.py``. Each is a piece whose backward can run on its own, and
dispatch and combine are two pieces, their beginning and their end. In backward an end's piece
begins the communication, and a beginning's piece ends it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ziphius.data.rows import EXPERTS, Batch
from ziphius.kernels.later import Later, PutOff
from ziphius.model.block import Block
from ziphius.model.dispatch import Lane
from ziphius.model.mtp import MTPModule
from ziphius.model.rope import Rope
from ziphius.model.router import Routing
from ziphius.model.transformer import Features, Transformer
from ziphius.parallel.passes import Objective, Parts
from ziphius.parallel.pipeline.pieces import Piece


class _Turn(NamedTuple):
    """A block's turn: what it computes with, and the MTP module that it belongs to, if any."""

    layer: int
    block: Block
    module: MTPModule | None
    depth: int
    length: int
    rope: Rope


class Staged:
    """A micro-batch's forward and backward; block ``k`` is counted from the part's first.

    Forward: ``enter``, then for every block its stages in order and ``add``, then ``leave``.
    Backward: ``enter_back``, then for every block, from the last, its stages the other way around
    and ``add_back``, which for the first leaves the input's gradient.
    """

    def __init__(
        self,
        model: Transformer,
        batch: Batch,
        x_BTD: Tensor | None,
        lane: Lane,
        later: Later,
        *,
        document_mask: bool,
    ) -> None:
        self.model, self.batch, self.lane, self.later = model, batch, lane, later
        self.documents_BS = batch.documents_BS if document_mask else None
        self.routings: dict[int, Routing] = {}
        self._pass: AbstractContextManager[None] = model.training_pass()
        self._given = None if x_BTD is None else Piece((x_BTD.requires_grad_(),))
        self._made: dict[tuple[str, int], Piece[Any]] = {}
        self._waiting: dict[tuple[str, int], PutOff] = {}
        self._turns = self._find_turns()
        T = batch.tokens_BS.shape[1] - 1
        self._replayed = model.replayed(batch.fields.get(EXPERTS), T)
        self._main = len(model.layers) - 1  # the main block that is last here, -1 where none is

    @property
    def blocks(self) -> int:
        """How many blocks there are."""
        return len(self._turns)

    def _find_turns(self) -> list[_Turn]:
        model, T = self.model, self.batch.tokens_BS.shape[1] - 1
        ropes, turns = {0: model.rope(T)}, []
        for layer, depth, block in model.blocks():
            if depth not in ropes:
                ropes[depth] = model.rope(T - depth)
            module = model.mtp[depth - 1] if depth else None
            turns.append(_Turn(layer, block, module, depth, T - depth, ropes[depth]))
        return turns

    # Forward

    def _run(self, stage: str, k: int, compute: Callable[[], Any]) -> None:
        with torch.enable_grad(), self._pass:
            self._made[stage, k] = Piece(compute())

    def enter(self) -> None:
        """Embed what this part embeds, and find the first block's input."""
        model, tokens_BS = self.model, self.batch.tokens_BS
        T = tokens_BS.shape[1] - 1

        def embed() -> tuple[Tensor, ...]:
            depths = range(int(self._given is not None), len(model.mtp) + 1)
            positions, table = model.positions, model.embed_tokens
            return tuple(positions.embed(table, tokens_BS[:, k:T], k) for k in depths)

        def first() -> tuple[Tensor, None]:
            x_BTD = (self._given or self._made["embed", -1]).enter()[0]
            return self._normed(x_BTD, -1), None

        if model.part.embeds:
            self._run("embed", -1, embed)
        self._run("add", -1, first)
        if self._given is not None:
            self._given.let_go()

    def _normed(self, x_BTD: Tensor, k: int) -> Tensor:
        """Norm what leaves the network's last main block."""
        last = k == self._main and self.model.part.ends
        return self.model.norm(x_BTD) if last else x_BTD

    def attend(self, k: int) -> None:
        """Run stage ``attend``, of an MTP module with what comes before its block."""
        turn = self._turns[k]
        documents_BS = self.documents_BS
        documents_BT = None if documents_BS is None else documents_BS[:, : turn.length]

        def attend() -> Any:
            x_BTD, _ = self._made["add", k - 1].enter()
            if turn.module is not None:
                embedded = self._made["embed", -1].enter()
                embedded_BTD = embedded[turn.depth - len(self.model.mtp) - 1]
                own = self.model.positions.count(turn.length + turn.depth, turn.depth)
                x_BTD = turn.module.joined(x_BTD[:, :own], embedded_BTD)
            told_NK = self._replayed.get(turn.layer)
            return turn.block.attend(x_BTD, turn.rope, chosen_NK=told_NK, documents_BT=documents_BT)

        self._run("attend", k, attend)

    def begin_dispatch(self, k: int) -> None:
        """Let rows leave for the experts."""
        block, attended = self._turns[k].block, self._made["attend", k]
        self._run("begin dispatch", k, lambda: block.begin_dispatch(attended.enter(), self.lane))

    def end_dispatch(self, k: int) -> None:
        """Wait for them."""
        block, begun = self._turns[k].block, self._made["begin dispatch", k]
        self._run("end dispatch", k, lambda: block.end_dispatch(begun.enter()))
        begun.let_go()

    def experts(self, k: int) -> None:
        """Run stage ``experts``, and the shared experts."""
        block, attended, sent = (
            self._turns[k].block,
            self._made["attend", k],
            self._made["end dispatch", k],
        )

        def experts() -> tuple[Tensor, Tensor | None]:
            shared_ND = block.shared(attended.enter())
            return block.experts(sent.enter()), shared_ND

        self._run("experts", k, experts)

    def begin_combine(self, k: int) -> None:
        """Let the experts' rows leave."""
        block, sent = self._turns[k].block, self._made["end dispatch", k].let_go()
        rows = self._made["experts", k]
        self._run("begin combine", k, lambda: block.begin_combine(rows.enter()[0], sent, self.lane))

    def end_combine(self, k: int) -> None:
        """Wait for them."""
        block, begun = self._turns[k].block, self._made["begin combine", k]
        self._run("end combine", k, lambda: block.end_combine(begun.enter()))
        begun.let_go()

    def add(self, k: int) -> None:
        """Run stage ``add``, and the norms behind the last block and behind an MTP module."""
        turn = self._turns[k]
        attended, experts, sums = (
            self._made[stage, k] for stage in ("attend", "experts", "end combine")
        )

        def add() -> tuple[Tensor, Tensor | None]:
            entered = attended.enter()
            if entered.routed is not None:
                self.routings[turn.layer] = entered.routed.routing
            x_BTD = turn.block.add(entered, sums.enter(), experts.enter()[1])
            if turn.module is not None:
                return x_BTD, turn.module.norm(x_BTD)
            return self._normed(x_BTD, k), None

        self._run("add", k, add)
        for piece in (attended, experts, sums):
            piece.let_go()

    def leave(self, objective: Objective) -> tuple[Parts, Tensor | None]:
        """Return the losses, and what leaves a part that does not end the network."""
        ends = self.model.part.ends

        def lose() -> Parts:
            hidden_BTD = self._made["add", self._main].enter()[0]
            normed = [self._made["add", k].enter()[1] for k in range(self._main + 1, self.blocks)]
            features = Features(hidden_BTD, normed, self.routings)
            return objective(self.model, features, self.batch)

        with torch.enable_grad(), self._pass:
            parts = lose()
        self._made["objective", -1] = total = Piece((parts.total,))
        total.let_go()
        hidden_BTD = None if ends else self._made["add", self._main].value[0].detach()
        # Memory that only a forward pass needs.
        self.routings, self._pass = {}, nullcontext()
        for (stage, _), piece in self._made.items():
            if stage in ("add", "embed"):
                piece.let_go()
        return parts, hidden_BTD

    # Backward

    def _back(self, stage: str, k: int) -> None:
        self._made.pop((stage, k)).back()

    def enter_back(self, dhidden_BTD: Tensor | None, dtotal: Tensor) -> Tensor | None:
        """Run the losses' backward; ``dhidden`` is the gradient of what left.

        Where there is no block, return the input's gradient.
        """
        if dhidden_BTD is not None:
            self._made["add", self._main].ports[0].add(dhidden_BTD)
        for port in self._made["objective", -1].ports:
            port.add(dtotal)
        self._back("objective", -1)
        return self.add_back(self.blocks)

    def begin_combine_back(self, k: int) -> None:
        """Let gradients of the sums leave for the experts."""
        self._back("end combine", k)

    def end_combine_back(self, k: int) -> None:
        """Wait for them."""
        self._back("begin combine", k)

    def experts_back(self, k: int) -> None:
        """Find the gradients of the experts' inputs."""
        with self.later.collect() as self._waiting["experts", k]:
            self._back("experts", k)

    def begin_dispatch_back(self, k: int) -> None:
        """Let gradients of the rows leave for where the rows came from."""
        self._back("end dispatch", k)

    def end_dispatch_back(self, k: int) -> None:
        """Wait for them."""
        self._back("begin dispatch", k)

    def attend_back(self, k: int) -> None:
        """Find the gradient of what stage ``attend`` has read."""
        with self.later.collect() as self._waiting["attend", k]:
            self._back("attend", k)

    def add_back(self, k: int) -> Tensor | None:
        """Do what comes before block ``k`` in the block before it; return the input's gradient."""
        self._back("add", k - 1)
        if k > 0:
            return None
        if self.model.part.embeds:
            self._back("embed", -1)
        assert not self._made, "every piece has run backward"
        return None if self._given is None else self._given.ports[0].gradient

    def weights(self, stage: str, k: int) -> PutOff:
        """Return the weight gradients that a stage's backward has put off."""
        return self._waiting.pop((stage, k))
