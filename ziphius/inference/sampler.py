"""From logits to a token: greedy, temperature, top-p, by a generator of its own."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ziphius.config.errors import BadInput


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens. Temperature 0 is greedy; ``seed`` repeats a sampled answer."""

    max_tokens: int = 200
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise BadInput(f"max tokens = {self.max_tokens}: at least 1 is needed")
        if not 0 <= self.temperature < float("inf"):
            raise BadInput(f"temperature = {self.temperature}: use 0 (greedy) or more")
        if not 0 <= self.seed < 2**63:
            raise BadInput(f"seed = {self.seed}: use a number from 0 to 2**63 - 1")
        if not 0 < self.top_p <= 1:
            raise BadInput(f"top-p = {self.top_p}: use a share above 0, up to 1")


def probabilities(logits_V: Tensor, params: SamplingParams) -> Tensor:
    """Return the distribution ``[V]`` (float64) that a sampled token is drawn from.

    Temperature divides the logits; top-p then keeps the smallest set of most probable tokens whose
    sum reaches it, at least one.
    """
    # Less the largest, so that no temperature, however small, makes two infinities.
    logits_V = logits_V.double() - logits_V.max()
    p_V = (logits_V / params.temperature).softmax(-1)
    if params.top_p < 1:
        sorted_V, ids_V = p_V.sort(descending=True, stable=True)
        before_V = sorted_V.cumsum(-1) - sorted_V
        p_V = torch.zeros_like(p_V).scatter(0, ids_V, sorted_V.where(before_V < params.top_p, 0.0))
    return p_V / p_V.sum()


def sample(logits_V: Tensor, params: SamplingParams, generator: torch.Generator) -> int:
    """Choose one token id from a position's logits ``[V]``."""
    if params.temperature == 0:
        return int(logits_V.argmax())
    return int(torch.multinomial(probabilities(logits_V.cpu(), params), 1, generator=generator))
