"""Calls of kernels, made once in Python and then repeated without it.

A step that decodes spends a fifth of its time between kernels. Its calls are the same every time:
only the numbers behind the same addresses change.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ziphius.kernels.cpu.library import SIGNATURES, Call, Library

T = TypeVar("T")  # what a program computes: a tensor, or several


class Unrepeatable(Exception):
    """Something was computed that repeating the kernels' calls would leave out."""


class Program(Generic[T]):
    """What ``run`` makes of tensors that stay where they are, as a list of kernel calls.

    ``run`` is called once, without gradients, and may compute by kernels of the library alone:
    views and empty tensors are all it has of torch. ``result`` is what it returned; ``repeat``
    computes it again, into the same memory, from what the inputs hold by then.
    Raises Unrepeatable where ``run`` does something else.
    """

    def __init__(self, library: Library, run: Callable[[], T]) -> None:
        with torch.no_grad(), _KernelsOnly() as memory, library.recording() as calls:
            self.result = run()
        self.nbytes = sum(x.nbytes for x in memory.empty)
        words = [_words(call) for call in calls]
        self._calls = (_Call * len(calls))(
            *(_Call(_again(library, c.name), w) for c, w in zip(calls, words, strict=True))
        )
        self._repeat = library.handle.repeat_calls
        self._repeat.argtypes, self._repeat.restype = [ctypes.c_void_p, ctypes.c_int64], None
        self._kept = [words, memory.empty, *(call.kept for call in calls)]

    def __len__(self) -> int:
        return len(self._calls)

    def repeat(self) -> T:
        """Make the calls again."""
        self._repeat(self._calls, len(self._calls))
        return self.result


class _Call(ctypes.Structure):
    _fields_ = (("kernel", ctypes.c_void_p), ("words", ctypes.POINTER(ctypes.c_int64)))


def _again(library: Library, name: str) -> int | None:
    """Return the address of a kernel under its other name (kernels/cpu/repeat.h)."""
    if not hasattr(library.handle, f"{name}_again"):
        raise Unrepeatable(f"{name} is no kernel that can be called again")
    return ctypes.cast(library.handle[f"{name}_again"], ctypes.c_void_p).value


def _words(call: Call) -> ctypes.Array[ctypes.c_int64]:
    words = (ctypes.c_int64 * len(call.given))()
    for place, (letter, given) in enumerate(zip(SIGNATURES[call.name], call.given, strict=True)):
        if letter == "d":
            words[place] = int.from_bytes(struct.pack("<d", given), "little", signed=True)
        elif letter == "p" and isinstance(given, ctypes.Array):
            words[place] = ctypes.addressof(given)
        else:
            words[place] = given or 0
    return words


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
