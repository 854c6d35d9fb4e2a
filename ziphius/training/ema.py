"""An average of the weights over steps, on the CPU (report section 3.2.3; facts 5.7).

It tells what the model would be worth after the learning rate has decayed, before it has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import Tensor

from ziphius.model.transformer import Transformer
from ziphius.parallel.collectives import Axis
from ziphius.parallel.owners import Owners
from ziphius.parallel.spread import held_weights

Models = Transformer | Sequence[Transformer]


class WeightAverage:
    """``average += (1 - decay) * (weight - average)``, by Hugging Face name, at least FP32.

    The decay grows to its value as ``(1 + n) / (10 + n)``, so that the random start is forgotten
    early. Weights on another device are copied to the host, and a thread adds them up while the
    device goes on. Routing biases are averaged too, in FP32.

    Of a model on many ranks, each averages the weights (or the pieces of them) that it ``owns``.
    """

    def __init__(
        self, models: Models, decay: float, owns: Callable[[str], bool] = lambda name: True
    ) -> None:
        self.decay, self.owns = decay, owns
        self.updates = 0
        self.average: dict[str, Tensor] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="weight-average")
        self._pending: Future[None] | None = None
        for name, weight in _weights(models):
            if owns(name) and name not in self.average:
                wide = torch.promote_types(weight.dtype, torch.float32)
                self.average[name] = weight.to("cpu", wide, copy=True)

    def update(self, models: Models) -> None:
        """Take in the weights after an optimizer step."""
        self.wait()
        self.updates += 1
        share = 1 - min(self.decay, (1 + self.updates) / (10 + self.updates))
        own = {name: weight for name, weight in _weights(models) if name in self.average}
        if all(weight.device.type == "cpu" for weight in own.values()):
            self._add(own, share)
        else:
            copies = {name: weight.to("cpu") for name, weight in own.items()}
            self._pending = self._thread.submit(self._add, copies, share)

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
    def in_place_of(
        self, models: Models, owners: Owners | None = None, world: Axis | None = None
    ) -> Iterator[None]:
        """Give a model the average as its weights inside the block, and its own back after it.

        Where ranks average a part each, they do this together: ``owners`` say who has which, and
        weights come over ``world``.
        """
        self.wait()
        own = [(weight, weight.clone()) for _, weight in _weights(models)]
        try:
            with torch.no_grad():
                if owners is None or world is None:
                    for name, weight in _weights(models):
                        weight.copy_(self.average[name])
                else:
                    owners.bring(self.average, _weights(models), world)
            yield
        finally:
            with torch.no_grad():
                for weight, before in own:
                    weight.copy_(before)

    @torch.no_grad()
    def _add(self, weights: Mapping[str, Tensor], share: float) -> None:
        for name, weight in weights.items():
            average = self.average[name]
            average.lerp_(weight.to(average.dtype), share)


def _weights(models: Models) -> Iterator[tuple[str, Tensor]]:
    for model in (models,) if isinstance(models, Transformer) else models:
        yield from held_weights(model)
