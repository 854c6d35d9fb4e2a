"""Every initial value, in one table; each depends only on the seed and the weight's name."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from ziphius.model.transformer import Transformer
from ziphius.model.weights import ROUTING_BIAS, Split, named_weights


def initialise(
    model: Transformer, seed: int, split_of: Callable[[str], Split | None] | None = None
) -> None:
    """Set every weight of a model in place (facts 1.2).

    Norm gains start at 1, routing biases at 0, everything else at N(0, std^2) with the config's
    ``init_std``. The draw is FP32 on the CPU, so any dtype, device and sharding starts from the
    same numbers. ``split_of`` says of a name which stretch of the whole tensor the model has.
    """
    std = model.config.init_std

    @torch.no_grad()
    def set_one(named: tuple[str, Tensor]) -> None:
        name, tensor = named
        split = split_of(name) if split_of is not None else None
        shape = tensor.shape if split is None else split.whole_shape(tensor.shape)
        whole = _rule(name)(name, shape, std, seed)
        tensor.copy_(whole if split is None else split.cut(whole))

    # One draw is one thread's work, whatever torch has.
    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        list(threads.map(set_one, named_weights(model)))


def _rule(name: str) -> Callable[[str, torch.Size, float, int], Tensor]:
    """The initialisation table: what the name ends in decides."""
    if name.endswith(ROUTING_BIAS):
        return lambda name, shape, std, seed: torch.zeros(shape)
    if name.endswith("norm.weight"):
        return lambda name, shape, std, seed: torch.ones(shape)
    return lambda name, shape, std, seed: _normal(name, shape, seed) * std


def _normal(name: str, shape: torch.Size, seed: int) -> Tensor:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return torch.randn(shape, generator=generator, dtype=torch.float32)
