"""How token rows reach their experts: an object that the MoE layer is given (design seam 2)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

from torch import Tensor

from ziphius.kernels import permute
from ziphius.kernels.fp8 import Arrived, Operand, Tiled, permute_tiled
from ziphius.kernels.permute import Sort
from ziphius.kernels.select import Kernels
from ziphius.model.router import Routing

if TYPE_CHECKING:
    from ziphius.model.experts import ExpertStore


@dataclass(frozen=True)
class LocalSort:
    """The rows of one process sorted by the slot of their expert, which ends stage ``attend``.

    ``order[m]`` is the flat (token, choice) index of row ``m``, ``inverse`` its inverse,
    ``counts`` the int64 ``[E]`` rows of every slot.
    """

    order_M: Tensor
    inverse_M: Tensor
    counts_E: Tensor
    top_k: int


@dataclass(frozen=True)
class Sent:
    """What stage ``dispatch`` delivers: rows sorted by the experts that live here.

    ``counts`` are the int64 ``[E]`` rows of every slot. Rows are of at most ``tokens`` tokens, so
    no slot has more. ``way`` is how rows go back: only the dispatcher that made it reads it.
    ``gradient`` is where combine leaves the gradient of the experts' rows, if it travels in FP8.
    """

    rows_MD: Operand
    gates_M: Tensor
    counts_E: Tensor
    tokens: int
    way: object
    gradient: Arrived = field(default_factory=Arrived)

    @cached_property
    def counts(self) -> list[int]:
        """Rows of every slot, for products that are told on the host: that waits for a GPU."""
        counts: list[int] = self.counts_E.tolist()
        return counts


def sort_by_slot(slots_NK: Tensor, n_slots: int, sort: Sort = permute.sort_by_slot) -> LocalSort:
    """Sort (token, choice) pairs by the slot of their expert; in a slot tokens keep their order."""
    return LocalSort(*sort(slots_NK, n_slots), top_k=slots_NK.shape[1])


T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class Promise(Protocol[T_co]):
    """A result that somebody else is making."""

    def result(self) -> T_co:
        """Wait for it. Raises what making it has raised."""
        ...


class Lane(Protocol):
    """Where communication runs: one work after the other, in the order of ``submit``."""

    def submit(self, work: Callable[[], T], /) -> Promise[T]:
        """Let a work be done when those before it have ended."""
        ...


@dataclass(frozen=True)
class _Made(Generic[T]):
    value: T

    def result(self) -> T:
        return self.value


class AtOnce:
    """The lane of who has nothing else to do: work is done where it is submitted."""

    def submit(self, work: Callable[[], T], /) -> Promise[T]:
        """Do it now."""
        return _Made(work())


AT_ONCE = AtOnce()


class Dispatcher(Protocol):
    """Takes rows to the experts and sums what comes back. No row is ever dropped.

    Both ways have a beginning and an end, between which their rank may compute something else. So
    have their backward passes, the other way around: the end's begins to send gradients, and the
    beginning's waits for them. Where nothing travels the beginning does it all, as here.
    """

    def sort(self, chosen_NK: Tensor, store: ExpertStore) -> object:
        """Prepare what this rank's rows need to leave, without communication.

        ``store`` has the experts that live here. Only ``dispatch`` reads the result.
        """
        ...

    def dispatch(self, u_ND: Operand, routing: Routing, sort: object) -> Sent:
        """Send every token's row to its experts."""
        ...

    def combine(self, rows_MD: Tensor, sent: Sent) -> Tensor:
        """Sum every token's expert rows in the order of its choices: ``[N, D]``."""
        ...

    def begin_dispatch(self, u_ND: Operand, routing: Routing, sort: object, lane: Lane) -> object:
        """Begin to send rows; what travels, either way, goes over ``lane``.

        What has a gradient in the result is itself, a ``Sent`` or an item of a tuple.
        """
        return self.dispatch(u_ND, routing, sort)

    def end_dispatch(self, begun: object) -> Sent:
        """Return what has been sent."""
        assert isinstance(begun, Sent), "made by this class"
        return begun

    def begin_combine(self, rows_MD: Tensor, sent: Sent, lane: Lane) -> object:
        """Begin to bring rows back."""
        return self.combine(rows_MD, sent)

    def end_combine(self, begun: object) -> Tensor:
        """Return the sums."""
        assert isinstance(begun, Tensor), "made by this class"
        return begun


class LocalDispatcher(Dispatcher):
    """All experts live in this process: dispatch and combine are two permutations."""

    def __init__(self, kernels: Kernels) -> None:
        self.sort_slots = kernels.function("sort")
        self.permute = kernels.function("permute")
        self.unpermute = kernels.function("unpermute")
        self.permute_tiles = kernels.function("permute_tiles")

    def sort(self, chosen_NK: Tensor, store: ExpertStore) -> LocalSort:
        """Sort rows by the slots of the store, which holds every expert that may be chosen."""
        return sort_by_slot(store.slots(chosen_NK), len(store.slot_to_expert), self.sort_slots)

    def dispatch(self, u_ND: Operand, routing: Routing, sort: object) -> Sent:
        """Copy every token's row next to the other rows of its expert; of tiles only the tiles."""
        assert isinstance(sort, LocalSort), "made by this class"
        where = (sort.order_M, sort.inverse_M, sort.top_k)
        rows_MD: Operand
        if isinstance(u_ND, Tiled):
            rows_MD = permute_tiled(u_ND, *where, self.permute_tiles, self.unpermute)
        else:
            rows_MD = self.permute(u_ND, *where)
        gates_M = routing.weights_NK.flatten().index_select(0, sort.order_M)
        return Sent(rows_MD, gates_M, sort.counts_E, len(routing.chosen_NK), sort)

    def combine(self, rows_MD: Tensor, sent: Sent) -> Tensor:
        """Bring the rows back into the tokens' order and sum them."""
        sort = sent.way
        assert isinstance(sort, LocalSort), "made by this class"
        sums_ND: Tensor = self.unpermute(rows_MD, sort.order_M, sort.inverse_M, sort.top_k)
        return sums_ND
