"""An average of the weights over steps, on the CPU (report section 3.2.3; facts 5.7).

It tells what the model would be worth after the learning rate has decayed, before it has.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import Tensor

from ziphius.model.transformer import Transformer
from ziphius.model.weights import named_weights


class WeightAverage:
    """``average += (1 - decay) * (weight - average)``, by Hugging Face name, at least FP32.

    The decay grows to its value as ``(1 + n) / (10 + n)``, so that the random start is forgotten
    early. Weights on another device are copied to the host, and a thread adds them up while the
    device goes on. Routing biases are averaged too, in FP32.
    """

    def __init__(self, model: Transformer, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self.average: dict[str, Tensor] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="weight-average")
        self._pending: Future[None] | None = None
        for name, weight in named_weights(model):
            wide = torch.promote_types(weight.dtype, torch.float32)
            self.average[name] = weight.to("cpu", wide, copy=True)

    def update(self, model: Transformer) -> None:
        """Take in the weights after an optimizer step."""
        self.wait()
        self.updates += 1
        share = 1 - min(self.decay, (1 + self.updates) / (10 + self.updates))
        weights = {name: weight.to("cpu") for name, weight in named_weights(model)}
        if model.embed_tokens.weight.device.type == "cpu":
            self._add(weights, share)
        else:
            self._pending = self._thread.submit(self._add, weights, share)

    def wait(self) -> None:
        """Return when every update has been added. Raises what went wrong in the thread."""
        if self._pending is not None:
            self._pending.result()
            self._pending = None

    def load(self, average: Mapping[str, Tensor], updates: int) -> None:
        """Continue from a checkpoint's average."""
        self.wait()
        self.updates = updates
        for name, tensor in self.average.items():
            tensor.copy_(average[name])

    @contextmanager
    def in_place_of(self, model: Transformer) -> Iterator[None]:
        """Give a model the average as its weights inside the block, and its own back after it."""
        self.wait()
        own = {name: weight.clone() for name, weight in named_weights(model)}
        try:
            _copy(self.average, model)
            yield
        finally:
            _copy(own, model)

    @torch.no_grad()
    def _add(self, weights: Mapping[str, Tensor], share: float) -> None:
        for name, weight in weights.items():
            average = self.average[name]
            average.lerp_(weight.to(average.dtype), share)


@torch.no_grad()
def _copy(weights: Mapping[str, Tensor], model: Transformer) -> None:
    for name, weight in named_weights(model):
        weight.copy_(weights[name])
