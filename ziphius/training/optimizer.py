"""AdamW with BF16 moments over FP32 master weights (report section 3.3; facts 4.1, 6.3).

torch's AdamW keeps moments in the dtype of the weights; the report keeps them in BF16, and that is
why this one exists. With ``moments="float32"`` it computes what torch's does.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ziphius.config.pretrain import TrainingConfig
from ziphius.kernels.adamw import Rates
from ziphius.kernels.grouped import keep_gradient
from ziphius.kernels.select import Kernels
from ziphius.parallel.rectangles import Rectangle, SplitOf, place_of, unsplit

_MOMENT_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Size(NamedTuple):
    """The global norm of the gradients before clipping, and what a step multiplies them by."""

    norm: float
    factor: float


Named = Iterable[tuple[str, Tensor]]


class Optimizer(ABC):
    """What a step of training asks of an optimizer, wherever its state lies.

    A step is ``begin``, backward passes, ``measure``, and ``step`` if the update may be made.
    ``weights`` are what ``named_weights`` gives of the model.
    """

    config: TrainingConfig
    steps = 0  # that were applied
    answers = True  # for its moments in a checkpoint; False where another rank has the same

    @abstractmethod
    def begin(self, backwards: int | None = None) -> None:
        """Drop gradients; so many backward passes will bring new ones, if that is known."""

    @abstractmethod
    def measure(self, scale: float = 1.0) -> Size:
        """Measure the gradients of a loss that was multiplied by ``scale``, a power of two.

        The factor takes the scale away and brings them to the norm of the recipe, if they are
        beyond it. Gradients stay as they are: the update multiplies them.
        """

    @abstractmethod
    def step(self, learning_rate: float, factor: float = 1.0) -> None:
        """Apply the gradients, times ``factor``, and drop them."""

    @abstractmethod
    def named_moments(self, weights: Named) -> Iterator[tuple[str, Tensor]]:
        """Yield (``first.`` or ``second.`` and the weight's name, moment), whole, to be read."""

    @abstractmethod
    def load_moments(self, weights: Named, read: Callable[[str], Tensor]) -> None:
        """Continue with moments that ``read`` returns by the names of ``named_moments``."""

    @abstractmethod
    def held_moments(self, weights: Named, split_of: SplitOf = unsplit) -> Iterator[Rectangle]:
        """Yield this process's part of the moments, by the names of ``named_moments``: views.

        ``split_of`` says, by a weight's name, which part of the whole weight is held here.
        """

    def size(self, scaled_norm: float, scale: float) -> Size:
        """Return the norm without its scale, and the factor that belongs to it."""
        norm = scaled_norm / scale
        clipping = self.config.clip_norm / (norm + 1e-6)
        # A norm that is no number is no reason to go on as if it were small.
        return Size(norm, (1.0 if clipping >= 1 else clipping) / scale)

    def rates(self, parameter: Tensor, learning_rate: float, factor: float) -> Rates:
        """Return the numbers of step ``steps`` for (a piece of) a parameter."""
        c = self.config
        decay = 1 - learning_rate * c.weight_decay if parameter.ndim > 1 else 1.0
        rate = learning_rate / (1 - c.beta1**self.steps)
        correction2 = 1 - c.beta2**self.steps
        return Rates(c.beta1, c.beta2, decay, rate, correction2, c.adam_eps, factor)


def zero_moments(like: Tensor, config: TrainingConfig) -> Tensor:
    """Return moments for weights, in the recipe's dtype; float64 weights keep full ones in it."""
    moments = _MOMENT_DTYPES[config.moments]
    dtype = moments if moments == torch.bfloat16 else torch.promote_types(like.dtype, moments)
    return torch.zeros_like(like, dtype=dtype)


class AdamW(Optimizer):
    """Decoupled weight decay on matrices; vectors (norm gains) decay in no recipe of ours.

    The arithmetic is in the weights' dtype; only what is kept between steps is rounded to the
    moments' dtype. Moments of float64 weights stay float64 unless they are BF16.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        config: TrainingConfig,
        kernels: Kernels | None = None,
    ) -> None:
        self.update = (kernels or Kernels()).function("adamw")
        self.parameters = [p for p in parameters if p.requires_grad]
        self.config = config
        self.first = [zero_moments(p, config) for p in self.parameters]
        self.second = [zero_moments(p, config) for p in self.parameters]

    def begin(self, backwards: int | None = None) -> None:
        for p in self.parameters:
            p.grad = None

    @torch.no_grad()
    def measure(self, scale: float = 1.0) -> Size:
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        return self.size(nn.utils.get_total_norm(gradients).item(), scale)

    @torch.no_grad()
    def step(self, learning_rate: float, factor: float = 1.0) -> None:
        self.steps += 1
        for p, m_kept, v_kept in zip(self.parameters, self.first, self.second, strict=True):
            if p.grad is not None:
                self.update(p, p.grad, m_kept, v_kept, self.rates(p, learning_rate, factor))
                keep_gradient(p)

    def named_moments(self, weights: Named) -> Iterator[tuple[str, Tensor]]:
        """Yield views of the moments."""
        named = list(weights)
        for kind, moments in (("first", self.first), ("second", self.second)):
            # A weight is a view of its parameter; its moment is the same view of the parameter's.
            owners = {
                parameter.untyped_storage().data_ptr(): moment
                for parameter, moment in zip(self.parameters, moments, strict=True)
            }
            for name, weight in named:
                moment = owners.get(weight.untyped_storage().data_ptr())
                if moment is not None:  # a routing bias has none
                    where = (weight.shape, weight.stride(), weight.storage_offset())
                    yield f"{kind}.{name}", moment.as_strided(*where)

    def held_moments(self, weights: Named, split_of: SplitOf = unsplit) -> Iterator[Rectangle]:
        for name, moment in self.named_moments(weights):
            split = split_of(name.partition(".")[2])
            yield Rectangle(name, *place_of(moment.shape, split), moment)

    @torch.no_grad()
    def load_moments(self, weights: Named, read: Callable[[str], Tensor]) -> None:
        for name, moment in self.named_moments(weights):
            moment.copy_(read(name))
