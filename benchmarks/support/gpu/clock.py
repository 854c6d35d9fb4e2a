"""How long a kernel takes: graphs of calls on a GPU, over inputs that its cache cannot hold."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

# Inputs in turn take four times the cache; sets are few enough to be made in no time.
_CACHES, _MOST_SETS = 4, 16
# Seconds that a graph should take, so that events are exact, and that a measurement should.
_GRAPH, _MEASUREMENT = 1e-3, 0.03
_FEWEST, _MOST, _MOST_TURNS = 5, 50, 64


class GpuClock:
    """Captures calls in a CUDA graph, so that no launch is waited for, and replays it.

    Memory of every call's outputs lives as long as one turn over the inputs, so that outputs are
    not written into the cache either.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cache_bytes = torch.cuda.get_device_properties(device).L2_cache_size

    def sets(self, one: Any) -> int:
        """Return how many sets of inputs to rotate among, given one."""
        nbytes = max(1, count_bytes(one))
        return max(1, min(_MOST_SETS, -(-_CACHES * self.cache_bytes // nbytes)))

    def seconds(self, run: Callable[[Any], Any], sets: Sequence[Any]) -> float:
        """Return the median seconds of a call."""
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            for inputs in sets:
                run(inputs)
        torch.cuda.current_stream(self.device).wait_stream(side)
        once = self._replayed(_captured(run, sets, 1), times=3)
        turns = max(1, min(_MOST_TURNS, round(_GRAPH / max(once, 1e-6))))
        graph = _captured(run, sets, turns)
        times = max(_FEWEST, min(_MOST, round(_MEASUREMENT / max(once * turns, 1e-6))))
        return self._replayed(graph, times) / (turns * len(sets))

    def _replayed(self, graph: torch.cuda.CUDAGraph, times: int) -> float:
        stream = torch.cuda.current_stream(self.device)
        graph.replay()
        return statistics.median(self._timed(stream, graph.replay) for _ in range(times))

    def _timed(self, stream: torch.cuda.Stream, run: Callable[[], Any]) -> float:
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record(stream)
        run()
        ended.record(stream)
        ended.synchronize()
        return began.elapsed_time(ended) / 1e3


def _captured(run: Callable[[Any], Any], sets: Sequence[Any], turns: int) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(turns):
            kept = [run(inputs) for inputs in sets]
            del kept
    return graph


class HostClock:
    """Times calls on a processor by the clock on the wall."""

    cache_bytes = 0

    def sets(self, one: Any) -> int:
        """Return how many sets of inputs to rotate among: they are small here, one will do."""
        return 1

    def seconds(self, run: Callable[[Any], Any], sets: Sequence[Any]) -> float:
        """Return the median seconds of a call: five, or as many as a quarter of a second allows."""
        taken: list[float] = []
        began = time.perf_counter()
        while len(taken) < _FEWEST and (not taken or time.perf_counter() - began < 0.25):
            before = time.perf_counter()
            run(sets[len(taken) % len(sets)])
            taken.append(time.perf_counter() - before)
        return statistics.median(taken)


Clock = GpuClock | HostClock


def count_bytes(inputs: Any) -> int:
    """Count the bytes of all tensors in tuples, lists and dataclasses of them."""
    if isinstance(inputs, Tensor):
        return inputs.nbytes
    if isinstance(inputs, (tuple, list)):
        return sum(count_bytes(x) for x in inputs)
    return sum(count_bytes(x) for x in vars(inputs).values()) if hasattr(inputs, "__dict__") else 0
