"""Weight gradients that wait: a backward pass for the input alone, and the rest when there is time.

Only the gradient of its input is waited for by the stage before (``parallel/pipeline``). Products
are given a queue; while it is open, their backward computes the gradient of the input and leaves
the one of the weight here, as a function that holds what it needs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

Make = Callable[[], Tensor]
PutOff = list[tuple[Tensor, Make]]


class Later:
    """A queue of backward passes, oldest first, each with the weight gradients that it left.

    ``add`` takes a weight and a gradient of it, when it is computed.
    """

    def __init__(self) -> None:
        self.add: Callable[[Tensor, Tensor], None] = add_to_grad
        self._waiting: deque[tuple[Hashable, PutOff]] = deque()
        self._open: PutOff | None = None

    def __len__(self) -> int:
        """How many passes wait."""
        return len(self._waiting)

    @contextmanager
    def open(self, name: Hashable) -> Iterator[None]:
        """Put off what a backward pass would compute of weights; it is queued under a name."""
        with self.collect() as gradients:
            yield
        self.keep(name, gradients)

    @contextmanager
    def collect(self) -> Iterator[PutOff]:
        """Put off the same into a list of the caller's, for ``keep`` or ``add_up``."""
        assert self._open is None, "one backward pass at a time"
        gradients: PutOff = []
        self._open = gradients
        try:
            yield gradients
        finally:
            self._open = None

    def keep(self, name: Hashable, gradients: PutOff) -> None:
        """Queue the weight gradients of a pass."""
        self._waiting.append((name, gradients))

    def put(self, weight: Tensor, make: Make) -> Tensor | None:
        """Return a weight's gradient, or None where it has been put off.

        What is no leaf has nowhere to keep a gradient: that is computed at once.
        """
        if self._open is None or not weight.is_leaf:
            return make()
        self._open.append((weight, make))
        return None

    def run(self, name: Hashable) -> None:
        """Compute the weight gradients of the pass that has waited longest, and add them up.

        Raises ValueError where another pass than ``name`` has waited longest.
        """
        oldest = self._waiting[0][0] if self._waiting else "none"
        if oldest != name:
            raise ValueError(f"weight gradients of {name}: those of {oldest} have waited longest")
        self.add_up(self._waiting.popleft()[1])

    @torch.no_grad()
    def add_up(self, gradients: PutOff) -> None:
        """Compute weight gradients, in order, and add each up."""
        gradients.reverse()
        while gradients:
            weight, make = gradients.pop()  # what it held is free when it is done
            gradient = make()
            self.add(weight, gradient)
            del make, gradient

    def drop(self) -> None:
        """Forget everything: the step has failed."""
        self._waiting.clear()


def add_to_grad(weight: Tensor, gradient: Tensor) -> None:
    """Add up in ``grad``, in the dtype of the weight, at least FP32 in training."""
    weight.grad = gradient if weight.grad is None else weight.grad.add_(gradient)


def put_off(later: Later | None, weight: Tensor, make: Make) -> Tensor | None:
    """Compute a weight's gradient, or leave it to a queue that is open."""
    return make() if later is None else later.put(weight, make)
