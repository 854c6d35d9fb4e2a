"""Rows, and the heads of their attention, shared by several processes (cp and tp).

A rank computes its own positions of every row (``rowsplit.py``): embedding, norms, residuals,
down-projections, routers and experts. What meets is small. In attention the latent and rotary key
of all positions, C + R numbers a token, come over ``cp`` and ``tp``, and over ``tp`` the query
latents too; each rank of ``tp`` computes its heads for them, and the outputs are summed on the way
back. They meet before their norms: so those are computed again at every place that attends, in
whatever form its products take, and nothing travels when they are recomputed in backward.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ziphius.config.errors import BadInput
from ziphius.config.model import ModelConfig
from ziphius.kernels.attention import OF_RUNS, VERSIONS, Runs
from ziphius.kernels.fp8 import Operand, Tiled
from ziphius.kernels.kept import KeptOutput
from ziphius.model.ffn import Dense
from ziphius.model.layers import Embedding
from ziphius.model.mla import MLA
from ziphius.model.positions import Compressed, Judged
from ziphius.model.rope import Rope
from ziphius.model.transformer import Transformer
from ziphius.parallel.collectives import Axis
from ziphius.parallel.exchange import Plan, join, part
from ziphius.parallel.mesh import Mesh
from ziphius.parallel.rowsplit import RowSplit, spread
from ziphius.parallel.tensor import check_tensor, cut_weights, split_of
from ziphius.parallel.vocabulary import SplitSoftmax, likeliest, look_up, split_cross_entropy


class Way(NamedTuple):
    """How a row of one length meets at one depth, seen from this rank."""

    own: Tensor  # its positions
    joined: Tensor  # those that its queries stand at: its own and those of the other ranks of tp
    mine: Tensor  # which of those are its own, bool
    runs: Runs  # the same as stretches
    queries: Plan  # brings them together
    latents: Plan  # brings the whole row together


class SharedRows:
    """The positions of this rank, and how they meet those of others (see ``Positions``)."""

    def __init__(self, mesh: Mesh) -> None:
        self.cp, self.tp, self.sequence = mesh["cp"], mesh["tp"], mesh["sequence"]
        self.split = RowSplit(self.cp.size, self.tp.size)
        self.device = mesh.device
        self._ways: dict[tuple[int, int], Way] = {}

    def way(self, length: int, depth: int) -> Way:
        """Return how rows of ``length`` meet at a depth. Raises BadInput for what cannot."""
        if (length, depth) not in self._ways:
            self.split.check(length, depth)
            self._ways[length, depth] = self._plan(length, depth)
        return self._ways[length, depth]

    def _plan(self, length: int, depth: int) -> Way:
        split, cp, tp = self.split, self.cp.place, self.tp.place
        # In the order of arrival: the ranks of cp, then those of tp.
        owned = [split.own(length, depth, c, t) for t in range(split.tp) for c in range(split.cp)]
        counts, own = [len(positions) for positions in owned], split.own(length, depth, cp, tp)
        neighbours = [len(split.own(length, depth, cp, t)) for t in range(split.tp)]
        order = [p for positions in owned for p in positions]
        arrived = spread(counts, max(counts)) or range(len(order))
        place = dict(zip(order, arrived, strict=True))
        places = [place[p] for p in range(length - depth)]
        return Way(
            self._tensor(own),
            self._tensor(split.joined(length, depth, cp)),
            self._tensor([t == tp for t, n in enumerate(neighbours) for _ in range(n)], torch.bool),
            split.joined_runs(length, depth, cp),
            Plan(
                tuple(axis for axis in (self.tp,) if axis.size > 1),
                len(own),
                max(neighbours),
                self._places(spread(neighbours, max(neighbours))),
            ),
            Plan(
                tuple(axis for axis in (self.cp, self.tp) if axis.size > 1),
                len(own),
                max(counts),
                self._places(None if places == list(range(max(counts) * len(counts))) else places),
            ),
        )

    def _tensor(self, numbers: list[int], dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.tensor(numbers, dtype=dtype, device=self.device)

    def _places(self, places: list[int] | None) -> Tensor | None:
        return None if places is None else self._tensor(places)

    def count(self, length: int, depth: int = 0) -> int:
        return len(self.way(length, depth).own)

    def own(self, values_BT: Tensor, depth: int) -> Tensor:
        return values_BT[:, self.way(values_BT.shape[1] + depth, depth).own]

    def embed(self, table: Embedding, tokens_BT: Tensor, depth: int) -> Tensor:
        way = self.way(tokens_BT.shape[1] + depth, depth)
        x_BTD: Tensor = table(tokens_BT[:, way.own])
        return x_BTD

    def cross_entropy(
        self, model: Transformer, hidden_BtD: Tensor, targets_BT: Tensor, depth: int
    ) -> Tensor:
        way = self.way(targets_BT.shape[1] + depth, depth)
        return model.cross_entropy(hidden_BtD.flatten(0, 1), targets_BT[:, way.own].flatten())

    def log_probs(
        self, model: Transformer, hidden_BtD: Tensor, targets_BT: Tensor, depth: int
    ) -> Judged:
        way = self.way(targets_BT.shape[1] + depth, depth)
        targets_Bt = targets_BT[:, way.own]
        found_N = model.log_probs(hidden_BtD.flatten(0, 1), targets_Bt.flatten())
        return Judged(found_N.view(targets_Bt.shape), way.own, None)

    def likeliest(self, model: Transformer, hidden_BtD: Tensor, length: int, depth: int) -> Tensor:
        way = self.way(length, depth)
        tokens_Bt1 = self._likeliest_here(model, hidden_BtD, way).unsqueeze(-1)
        tokens_BT1 = join(tokens_Bt1, way.latents)
        assert isinstance(tokens_BT1, Tensor), "numbers, not tiles"
        return tokens_BT1.squeeze(-1)

    def _likeliest_here(self, model: Transformer, hidden_BtD: Tensor, way: Way) -> Tensor:
        logits_BtV: Tensor = model.lm_head(hidden_BtD)
        return logits_BtV.argmax(-1)

    def sum(self, x: Tensor) -> Tensor:
        return self.sequence.all_reduce(x.clone())


class SharedVocabulary(SharedRows):
    """The same where embedding and head are cut over ``tp`` (``vocabulary.py``)."""

    def __init__(self, mesh: Mesh, config: ModelConfig) -> None:
        super().__init__(mesh)
        split = split_of("lm_head.weight", config, self.tp.size, self.tp.place)
        self.first = 0 if split is None else split.start

    def embed(self, table: Embedding, tokens_BT: Tensor, depth: int) -> Tensor:
        """Look up what all ranks of tp need, of this one's stretch of the table."""
        way = self.way(tokens_BT.shape[1] + depth, depth)
        found_BTD = look_up(table.weight, self.first, tokens_BT[:, way.joined])
        return part(found_BTD.to(table.dtype), way.queries)

    def cross_entropy(
        self, model: Transformer, hidden_BtD: Tensor, targets_BT: Tensor, depth: int
    ) -> Tensor:
        way = self.way(targets_BT.shape[1] + depth, depth)
        hidden_BTD = join(hidden_BtD, way.queries)
        assert isinstance(hidden_BTD, Tensor), "a norm for the head gives no tiles"
        weight_vD, dtype = model.lm_head.weight, hidden_BtD.dtype
        return split_cross_entropy(
            self.tp,
            hidden_BTD.flatten(0, 1),
            weight_vD,
            self.first,
            targets_BT[:, way.joined].flatten(),
            way.mine.expand(len(targets_BT), -1).flatten(),
            widened=model.kernels.product_dtype(dtype) != dtype,
        )

    def log_probs(
        self, model: Transformer, hidden_BtD: Tensor, targets_BT: Tensor, depth: int
    ) -> Judged:
        way = self.way(targets_BT.shape[1] + depth, depth)
        hidden_BjD, targets_Bj = join(hidden_BtD, way.queries), targets_BT[:, way.joined]
        assert isinstance(hidden_BjD, Tensor), "a norm for the head gives no tiles"
        softmax = SplitSoftmax(self.tp, self.first)
        found_N = model.log_probs(hidden_BjD.flatten(0, 1), targets_Bj.flatten(), softmax)
        return Judged(found_N.view(targets_Bj.shape), way.joined, way.mine)

    def _likeliest_here(self, model: Transformer, hidden_BtD: Tensor, way: Way) -> Tensor:
        hidden_BTD = join(hidden_BtD, way.queries)
        logits_BTv: Tensor = model.lm_head(hidden_BTD)
        found = likeliest(self.tp, logits_BTv.flatten(0, 1), self.first)
        return found.view(logits_BTv.shape[:2])[:, way.mine]


class SharedAttention:
    """Attention over shared rows at one depth (see ``Meeting``)."""

    def __init__(self, rows: SharedRows, depth: int) -> None:
        self.rows, self.depth = rows, depth

    def _way(self, rope: Rope) -> Way:
        return self.rows.way(len(rope.cos_Tr) + self.depth, self.depth)

    def compress(self, mla: MLA, x_BtD: Operand, rope: Rope) -> Compressed:
        way = self._way(rope)
        if mla.has_query_latent:
            q_BtQ = join(mla.q_a_proj(x_BtD), way.queries)
        else:
            q_BtQ = mla.q_proj(join(x_BtD, way.queries))
        kv_BTc = join(mla.kv_a_proj_with_mqa(x_BtD), way.latents)
        assert isinstance(q_BtQ, Tensor), "projections give no tiles"
        assert isinstance(kv_BTc, Tensor), "projections give no tiles"
        met = Rope(rope.cos_Tr[way.joined], rope.sin_Tr[way.joined])
        return Compressed(q_BtQ, kv_BTc, met if self.rows.split.cp > 1 else rope, rope)

    def give_back(self, out_BtD: Tensor, rope: Rope) -> Tensor:
        return part(out_BtD, self._way(rope).queries)


class AttentionOfRuns:
    """The attention kernel of a model part, for queries of the positions of one place of cp."""

    def __init__(self, version: str, rows: SharedRows, depth: int) -> None:
        self.function, self.rows, self.depth = VERSIONS[version], rows, depth

    def __call__(
        self,
        q_BHtd: Tensor,
        k_BHTd: Tensor,
        v_BHTv: Tensor,
        scale: float,
        documents_BT: Tensor | None = None,
        kept: KeptOutput | None = None,
    ) -> Tensor:
        way = self.rows.way(k_BHTd.shape[2] + self.depth, self.depth)
        out_BHtv: Tensor = self.function(
            q_BHtd, k_BHTd, v_BHTv, scale, documents_BT, kept, runs=way.runs
        )
        return out_BHtv


class SharedWidth:
    """Rows of the ranks that have a part each of a dense layer (see ``Together``).

    Every rank has as many rows: dense layers stand where rows are whole (depth 0).
    """

    def __init__(self, tp: Axis) -> None:
        self.tp = tp

    def gather(self, u_ND: Operand) -> Operand:
        if isinstance(u_ND, Tiled):
            plan = Plan((self.tp,), len(u_ND.codes), len(u_ND.codes), None)
            tiles = join(Tiled(*(x.unsqueeze(0) for x in u_ND)), plan)
            return Tiled(*(x.squeeze(0) for x in tiles))
        rows = join(u_ND.unsqueeze(0), Plan((self.tp,), len(u_ND), len(u_ND), None))
        assert isinstance(rows, Tensor), "rows come as they are given"
        return rows.squeeze(0)

    def give_back(self, out_ND: Tensor) -> Tensor:
        own = len(out_ND) // self.tp.size
        return part(out_ND.unsqueeze(0), Plan((self.tp,), own, own, None)).squeeze(0)


def apply_sequence(model: Transformer, mesh: Mesh) -> Transformer:
    """Let the ranks of ``cp`` and ``tp`` share the rows of a whole model, in place.

    ``tp`` also cuts heads, dense layers and vocabulary (``tensor.py``); weights that the model has
    are kept. Models that share an embedding may follow one another. All ranks are given the same
    rows from then on: the loss of a rank is the part of its positions. Gradients are to be summed
    as ``gradient_axis`` says, loads over ``stage``. Raises BadInput for what cannot be shared so.
    """
    cp, tp, kernels = mesh["cp"], mesh["tp"], model.kernels
    if cp.size == tp.size == 1:
        return model
    check_tensor(model.config, tp.size)
    if cp.size > 1 and (kernels.attention not in OF_RUNS or kernels.expand != "torch"):
        raise BadInput(
            f"parallel.cp = {cp.size}: kernels attention={kernels.attention} "
            f"expand={kernels.expand} take queries and keys of the same positions only: use one of "
            f"{', '.join(sorted(OF_RUNS))} and torch, or cp = 1"
        )
    rows = SharedVocabulary(mesh, model.config) if tp.size > 1 else SharedRows(mesh)
    model.positions = rows
    for _, depth, block in model.blocks():
        attention = block.self_attn
        attention.meeting = SharedAttention(rows, depth)
        attention.heads = model.config.num_attention_heads // tp.size
        if cp.size > 1:
            attention.attention = AttentionOfRuns(kernels.attention, rows, depth)
        if tp.size > 1 and isinstance(block.mlp, Dense):
            block.mlp.together = SharedWidth(tp)
    cut_weights(model, tp.size, tp.place)
    return model
