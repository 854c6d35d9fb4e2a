"""Run a Gluon kernel's text on a processor: a thread for every group of warps, tensors for tiles.

It checks what a kernel computes and that barriers let everyone through, not how it lies in memory:
copies and products are done when they are asked for, and layouts mean nothing.
"""

from __future__ import annotations

import threading
import types
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

PATIENCE = 20.0  # seconds after which a barrier is one that nobody comes to


class Pointer:
    """A pointer, or a tensor of them."""

    def __init__(self, memory: Tensor, at: Any = 0) -> None:
        self.memory, self.at = memory, at
        self.dtype = types.SimpleNamespace(element_ty=memory.dtype)

    def __add__(self, more: Any) -> Pointer:
        return Pointer(self.memory, self.at + more)

    def places(self, mask: Any) -> tuple[Tensor, Tensor]:
        at = torch.as_tensor(self.at)
        mask = torch.as_tensor(True if mask is None else mask).expand(at.shape)
        inside = (at >= 0) & (at < self.memory.numel())
        assert bool((inside | ~mask).all()), "outside of what there is"
        return at, mask


class Shared:
    """Shared memory; what nobody wrote is NaN."""

    def __init__(self, data: Tensor) -> None:
        self.data = data

    def index(self, at: Any) -> Shared:
        assert 0 <= int(at) < len(self.data)
        return Shared(self.data[int(at)])

    def permute(self, order: tuple[int, ...]) -> Shared:
        return Shared(self.data.permute(order))

    def load(self, layout: Any) -> Tensor:
        return self.data.clone()

    def store(self, value: Tensor) -> None:
        assert value.shape == self.data.shape
        assert value.dtype == self.data.dtype
        self.data.copy_(value)


class Barrier:
    """A barrier in shared memory, with phases, arrivals and bytes that are still to come."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.count = self.left = self.phase = self.bytes = 0

    def change(self, *, arrive: int = 0, bytes: int = 0) -> None:
        with self.changed:
            self.left -= arrive
            self.bytes += bytes
            assert self.left >= 0
            if self.left == 0 and self.bytes == 0:
                self.phase, self.left = self.phase + 1, self.count
                self.changed.notify_all()

    def wait(self, parity: Any) -> None:
        with self.changed:
            done = self.changed.wait_for(lambda: self.phase % 2 != int(parity), PATIENCE)
        assert done, "nobody comes"


class Barriers:
    """What stands in place of ``mbarrier``."""

    MBarrierLayout = staticmethod(lambda: None)

    @staticmethod
    def init(barrier: Barrier, count: int) -> None:
        barrier.count = barrier.left = count

    @staticmethod
    def expect(barrier: Barrier, bytes: int) -> None:
        barrier.change(arrive=1, bytes=bytes)

    @staticmethod
    def arrive(barrier: Barrier, count: int = 1) -> None:
        barrier.change(arrive=count)

    @staticmethod
    def wait(barrier: Barrier, parity: Any) -> None:
        barrier.wait(parity)


class Descriptor:
    """Rows in memory, and the box that is copied at a time."""

    layout = None

    def __init__(self, rows: Tensor, box: list[int]) -> None:
        self.rows, self.box = rows, box

    @classmethod
    def from_tensor(cls, rows: Tensor, box: list[int], layout: Any) -> Descriptor:
        return cls(rows, box)


def copy(source: Descriptor, at: list[Any], barrier: Barrier, target: Shared) -> None:
    """Copy a box; what juts out is zero."""
    row, column = (int(x) for x in at)
    assert list(target.data.shape) == source.box
    assert 0 <= row < len(source.rows)
    assert 0 <= column < source.rows.shape[1]
    found = source.rows[row : row + source.box[0], column : column + source.box[1]]
    target.data.zero_()
    target.data[: found.shape[0], : found.shape[1]] = found
    barrier.change(bytes=-target.data.nbytes)


def multiply(
    a: Shared, b: Shared, sums: Tensor, *, use_acc: bool = True, is_async: bool = False
) -> Tensor:
    product = a.data.float() @ b.data.float()
    assert product.shape == sums.shape
    return sums + product if use_acc else product


def _load(pointer: Pointer, mask: Any = None, other: Any = 0) -> Tensor:
    at, mask = pointer.places(mask)
    return torch.where(mask, pointer.memory.flatten()[at.where(mask, 0)], other)


def _store(pointer: Pointer, value: Tensor, mask: Any = None) -> None:
    at, mask = pointer.places(mask)
    pointer.memory.view(-1)[at[mask]] = value[mask].to(pointer.memory.dtype)


def _allocate(dtype: Any, shape: list[int], layout: Any) -> Any:
    if dtype == torch.int64:
        barriers = [Barrier() for _ in range(shape[0])]
        return types.SimpleNamespace(index=lambda at: barriers[int(at)])
    return Shared(torch.full(shape, float("nan"), dtype=dtype))


def _specialize(parts: list[Any], warps: list[int], registers: list[int]) -> None:
    failures: list[BaseException] = []

    def work(function: Callable[..., None], args: tuple[Any, ...]) -> None:
        try:
            function(*args)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=part) for part in parts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def _language(place: tuple[int, int], grid: tuple[int, int]) -> Any:
    gl = types.SimpleNamespace(load=_load, store=_store)
    gl.bfloat16, gl.float32 = torch.bfloat16, torch.float32
    gl.int32, gl.int64 = torch.int32, torch.int64
    gl.program_id = lambda axis: torch.tensor(place[axis])
    gl.num_programs = lambda axis: grid[axis]
    gl.arange = lambda begin, end, layout: torch.arange(begin, end)
    gl.zeros = lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype)
    gl.full = lambda shape, value, dtype, layout: torch.full(shape, value, dtype=dtype)
    gl.cdiv = lambda a, b: (a + b - 1) // b
    gl.minimum = lambda a, b: torch.minimum(torch.as_tensor(a), torch.as_tensor(b))
    gl.maximum = lambda a, b: torch.maximum(torch.as_tensor(a), torch.as_tensor(b))
    gl.max, gl.min, gl.sum = torch.amax, torch.amin, torch.sum
    gl.where, gl.zeros_like = torch.where, torch.zeros_like
    gl.exp2, gl.log2, gl.expand_dims = torch.exp2, torch.log2, torch.unsqueeze
    gl.convert_layout = lambda x, layout: x
    gl.static_range = range
    gl.allocate_shared_memory, gl.warp_specialize = _allocate, _specialize
    for name in ("BlockedLayout", "SliceLayout", "SwizzledSharedLayout"):
        setattr(gl, name, lambda *_: None)
    gl.NVMMADistributedLayout = lambda *_: None
    gl.NVMMASharedLayout = lambda **_: None
    return gl


class Launcher:
    """Stands in place of a kernel of ``module``, and runs it program by program."""

    def __init__(self, module: Any, name: str) -> None:
        self.name = name
        self.code = {n: f.fn.__code__ for n, f in vars(module).items() if hasattr(f, "fn")}

    def __getitem__(self, grid: tuple[int, int]) -> Callable[..., None]:
        def launch(*args: Any, num_warps: int) -> None:
            given = [Pointer(x) if isinstance(x, Tensor) else x for x in args]
            for second in range(grid[1]):
                for first in range(grid[0]):
                    _functions(self.code, (first, second), grid)[self.name](*given)

        return launch


def _functions(
    code: Mapping[str, Any], place: tuple[int, int], grid: tuple[int, int]
) -> Mapping[str, Any]:
    names: dict[str, Any] = {
        "gl": _language(place, grid),
        "mbarrier": Barriers,
        "LOAD": copy,
        "BARRIER": lambda: None,
        "fence_async_shared": lambda: None,
        "warpgroup_mma": multiply,
        "warpgroup_mma_wait": lambda count, deps: deps[0],
        "range": lambda *bounds: range(*(int(x) for x in bounds)),
    }
    names |= {name: types.FunctionType(body, names, name) for name, body in code.items()}
    return names
