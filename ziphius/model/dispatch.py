"""How token rows reach their experts: an object that the MoE layer is given (design seam 2)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from torch import Tensor

from ziphius.kernels import permute
from ziphius.kernels.fp8 import Operand, Tiled, permute_tiled
from ziphius.kernels.permute import Sort
from ziphius.kernels.select import Kernels
from ziphius.model.router import Routing


@dataclass(frozen=True)
class LocalSort:
    """The rows of one rank sorted by the slot of their expert, which ends stage ``attend``.

    ``order[m]`` is the flat (token, choice) index of row ``m``, ``inverse`` its inverse,
    ``counts`` the int64 ``[E]`` rows of every slot.
    """

    order_M: Tensor
    inverse_M: Tensor
    counts_E: Tensor
    top_k: int


@dataclass(frozen=True)
class Sent:
    """What stage ``dispatch`` delivers: rows sorted by the experts that live here."""

    rows_MD: Operand
    gates_M: Tensor
    sort: LocalSort

    @cached_property
    def counts(self) -> list[int]:
        """Rows of every slot, for products that are told on the host: that waits for a GPU."""
        counts: list[int] = self.sort.counts_E.tolist()
        return counts


def sort_by_slot(slots_NK: Tensor, n_slots: int, sort: Sort = permute.sort_by_slot) -> LocalSort:
    """Sort (token, choice) pairs by the slot of their expert; in a slot tokens keep their order."""
    return LocalSort(*sort(slots_NK, n_slots), top_k=slots_NK.shape[1])


class Dispatcher(Protocol):
    """Takes rows to the experts and sums what comes back. No row is ever dropped."""

    def dispatch(self, u_ND: Operand, routing: Routing, sort: LocalSort) -> Sent:
        """Send every token's row to its experts."""
        ...

    def combine(self, rows_MD: Tensor, sent: Sent) -> Tensor:
        """Sum every token's expert rows in the order of its choices: ``[N, D]``."""
        ...


class LocalDispatcher:
    """All experts live in this process: dispatch and combine are two permutations."""

    def __init__(self, kernels: Kernels) -> None:
        self.permute = kernels.function("permute")
        self.unpermute = kernels.function("unpermute")
        self.permute_tiles = kernels.function("permute_tiles")

    def dispatch(self, u_ND: Operand, routing: Routing, sort: LocalSort) -> Sent:
        """Copy every token's row next to the other rows of its expert; of tiles only the tiles."""
        where = (sort.order_M, sort.inverse_M, sort.top_k)
        rows_MD: Operand
        if isinstance(u_ND, Tiled):
            rows_MD = permute_tiled(u_ND, *where, self.permute_tiles, self.unpermute)
        else:
            rows_MD = self.permute(u_ND, *where)
        gates_M = routing.weights_NK.flatten().index_select(0, sort.order_M)
        return Sent(rows_MD, gates_M, sort)

    def combine(self, rows_MD: Tensor, sent: Sent) -> Tensor:
        """Bring the rows back into the tokens' order and sum them."""
        sort = sent.sort
        sums_ND: Tensor = self.unpermute(rows_MD, sort.order_M, sort.inverse_M, sort.top_k)
        return sums_ND
