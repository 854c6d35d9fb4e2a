"""Calls of kernels, made once in Python and then repeated without it.

A step that decodes spends a fifth of its time between kernels. Its calls are the same every time:
only the numbers behind the same addresses change.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ziphius.kernels.cpu.library import Library


class Unrepeatable(Exception):
    """Something was computed that repeating the kernels' calls would leave out."""


class Program:
    """What ``run`` makes of tensors that stay where they are, as a list of kernel calls.

    ``run`` is called once, without gradients, and may compute by kernels of the library alone:
    views and empty tensors are all it has of torch. ``result`` is what it returned; ``repeat``
    computes it again, into the same memory, from what the inputs hold by then.
    Raises Unrepeatable where ``run`` does something else.
    """

    def __init__(self, library: Library, run: Callable[[], Tensor]) -> None:
        with torch.no_grad(), _KernelsOnly() as memory, library.recording() as calls:
            self.result = run()
        self._calls = [(call.function, tuple(call.given)) for call in calls]
        self._kept = [memory.empty, *(call.kept for call in calls)]
        self.nbytes = sum(x.nbytes for x in memory.empty)

    def __len__(self) -> int:
        return len(self._calls)

    def repeat(self) -> Tensor:
        """Make the calls again."""
        for function, given in self._calls:
            function(*given)
        return self.result


# A view of a kind, and a question about dtypes.
_HARMLESS = frozenset({"aten::_unsafe_view", "aten::promote_types"})


class _KernelsOnly(TorchDispatchMode):
    """Lets views and empty tensors pass, and keeps the latter."""

    def __init__(self) -> None:
        super().__init__()
        self.empty: list[Tensor] = []

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # torch would import its compiler, hundreds of MB of modules, to say that this isn't for it.
        return False

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[Any],
        args: Any = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        name = func._schema.name
        made = func(*args, **(kwargs or {}))
        if name in ("aten::empty", "aten::new_empty", "aten::empty_like"):
            self.empty.append(made)
        elif not (func.is_view or name in _HARMLESS):
            raise Unrepeatable(f"{name} is no kernel of the library")
        return made
