"""Which positions of a row this process computes, and what it needs of the others' (design seam).

By default all of them, and nothing. ``parallel/sequence.py`` has the objects for a row, or the
heads of its attention, that several processes share. They are told what is of the whole row: token
ids, targets, documents and rotary tables, which every process has; activations are those of the
process's own positions. At MTP depth k a row of T inputs has T - k positions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

from torch import Tensor

from ziphius.kernels.fp8 import Operand
from ziphius.model.rope import Rope

if TYPE_CHECKING:
    from ziphius.model.layers import Embedding
    from ziphius.model.mla import MLA
    from ziphius.model.transformer import Transformer


class Judged(NamedTuple):
    """Log-probabilities ``[B, j]`` of some positions of a row, which all who judge them have.

    ``where`` are the positions, int64 ``[j]``, and ``counted`` says which of them this process is
    to count, bool ``[j]``; None stands for all. A loss is to have the gradient of all of them: some
    processes hold a part of the head each.
    """

    log_probs_Bj: Tensor
    where: Tensor | None
    counted: Tensor | None

    def pick(self, values_BT: Tensor) -> Tensor:
        """Return a row's values at these positions."""
        return values_BT if self.where is None else values_BT[:, self.where]

    def only_counted(self, values_Bj: Tensor) -> Tensor:
        """Return values with zeros where another process counts."""
        return values_Bj if self.counted is None else values_Bj * self.counted


class Positions(Protocol):
    """Brings a row's ends to the positions of a process; small letters count its own ones."""

    def count(self, length: int, depth: int = 0) -> int:
        """Return how many of the positions that a row of ``length`` inputs has are its own."""
        ...

    def own(self, values_BT: Tensor, depth: int) -> Tensor:
        """Return those of a row's values, ``[B, T - depth, ..]``, that are of its own positions."""
        ...

    def embed(self, table: Embedding, tokens_BT: Tensor, depth: int) -> Tensor:
        """Embed the tokens that a row's positions meet at a depth: ``[B, t, D]``."""
        ...

    def cross_entropy(
        self, model: Transformer, hidden_BtD: Tensor, targets_BT: Tensor, depth: int
    ) -> Tensor:
        """Sum the head's cross entropy over its own positions, in nats."""
        ...

    def log_probs(
        self, model: Transformer, hidden_BtD: Tensor, targets_BT: Tensor, depth: int
    ) -> Judged:
        """Return the targets' log-probabilities at the positions that are judged here."""
        ...

    def likeliest(self, model: Transformer, hidden_BtD: Tensor, length: int, depth: int) -> Tensor:
        """Return the likeliest token of every position of the whole row, ``[B, T - depth]``."""
        ...

    def sum(self, x: Tensor) -> Tensor:
        """Sum over all processes that share the rows; there is no gradient."""
        ...


class AllPositions:
    """A process that computes whole rows, with whole weights."""

    def count(self, length: int, depth: int = 0) -> int:
        return length - depth

    def own(self, values_BT: Tensor, depth: int) -> Tensor:
        return values_BT

    def embed(self, table: Embedding, tokens_BT: Tensor, depth: int) -> Tensor:
        x_BTD: Tensor = table(tokens_BT)
        return x_BTD

    def cross_entropy(
        self, model: Transformer, hidden_BtD: Tensor, targets_BT: Tensor, depth: int
    ) -> Tensor:
        return model.cross_entropy(hidden_BtD.flatten(0, 1), targets_BT.flatten())

    def log_probs(
        self, model: Transformer, hidden_BtD: Tensor, targets_BT: Tensor, depth: int
    ) -> Judged:
        found_N = model.log_probs(hidden_BtD.flatten(0, 1), targets_BT.flatten())
        return Judged(found_N.view(targets_BT.shape), None, None)

    def likeliest(self, model: Transformer, hidden_BtD: Tensor, length: int, depth: int) -> Tensor:
        logits_BTV: Tensor = model.lm_head(hidden_BtD)
        return logits_BTV.argmax(-1)

    def sum(self, x: Tensor) -> Tensor:
        return x


class Compressed(NamedTuple):
    """What a process attends with: queries of some positions, and latents of those they may see.

    ``q`` is the query latent, or whole queries where there is none; ``kv`` the latent and the
    rotary key. Neither is normed or rotated yet: ``rope`` is for the queries, ``key_rope`` for the
    keys.
    """

    q_BtQ: Tensor
    kv_BTc: Tensor
    rope: Rope
    key_rope: Rope


class Meeting(Protocol):
    """How the positions of a row meet in attention."""

    def compress(self, mla: MLA, x_BtD: Operand, rope: Rope) -> Compressed:
        """Down-project this process's positions and bring together what it attends with."""
        ...

    def give_back(self, out_BtD: Tensor, rope: Rope) -> Tensor:
        """Bring the output of every position to its process; of cut heads that is a sum."""
        ...


class InPlace:
    """A process that attends with what it has."""

    def compress(self, mla: MLA, x_BtD: Operand, rope: Rope) -> Compressed:
        return Compressed(*mla.compress(x_BtD), rope, rope)

    def give_back(self, out_BtD: Tensor, rope: Rope) -> Tensor:
        return out_BtD


class Together(Protocol):
    """How rows meet the parts of a feed-forward layer that is cut."""

    def gather(self, u_ND: Operand) -> Operand:
        """Bring together the rows of all processes that have a part of the layer."""
        ...

    def give_back(self, out_ND: Tensor) -> Tensor:
        """Sum the parts' outputs, and bring every row to its process."""
        ...


class Alone:
    """A layer that is whole."""

    def gather(self, u_ND: Operand) -> Operand:
        return u_ND

    def give_back(self, out_ND: Tensor) -> Tensor:
        return out_ND
