"""What a request does to a row of logits before a token is chosen from it.

The order is fixed, and it is vLLM's: bias, repetition penalty, frequency penalty, presence penalty,
and then the tokens that may not come are set to minus infinity. Only the repetition penalty minds
the order, because it depends on a logit's sign.

Every function takes one row ``[V]`` in float32 or float64 and changes it in place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Row = NDArray[np.floating[Any]]
Ids = NDArray[np.intp]

# Whole rows of float64 or of 64-bit noise are worked through in blocks that stay in a processor's
# cache: memory for a row of 129,280 is fetched anew from the system each time, which costs more.
BLOCK = 8192


def alone(logits_V: Row) -> Tensor:
    """Return a row as a batch of one."""
    return torch.from_numpy(np.ascontiguousarray(logits_V)).unsqueeze(0)


def ids(tokens: Sequence[int]) -> Ids:
    """Return token ids as an array to index a row with."""
    return np.array(tokens, np.intp)


def add_bias(logits_V: Row, bias: Mapping[int, float]) -> None:
    """Add to each token of ``bias`` its number, as OpenAI's ``logit_bias`` does."""
    for token, value in bias.items():
        logits_V[token] += value


def penalise_repetition(logits_V: Row, seen: Ids, penalty: float) -> None:
    """Make tokens of the prompt and the output less likely for a ``penalty`` above 1.

    A positive logit is divided by it, another one multiplied (Keskar et al. 2019, as vLLM and
    transformers). ``seen`` may name a token more than once.
    """
    values = logits_V[seen]
    # An infinite logit is told of where a token is chosen.
    with np.errstate(over="ignore", divide="ignore"):
        logits_V[seen] = np.where(values > 0, values / penalty, values * penalty)


def penalise_output(logits_V: Row, output: Ids, frequency: float, presence: float) -> None:
    """Subtract ``frequency`` times a token's count in the output, and ``presence`` once.

    As OpenAI defines the two: the prompt does not count.
    """
    if not len(output):
        return
    tokens, counts = np.unique(output, return_counts=True)
    logits_V[tokens] -= (counts * frequency + presence).astype(logits_V.dtype)


def allow_only(logits_V: Row, tokens: Ids) -> None:
    """Forbid every token but ``tokens``."""
    kept = logits_V[tokens]
    logits_V.fill(-np.inf)
    logits_V[tokens] = kept


def forbid(logits_V: Row, tokens: Ids) -> None:
    """Forbid ``tokens``."""
    logits_V[tokens] = -np.inf


def apply_mask(logits_V: Row, allowed_V: NDArray[np.bool_]) -> None:
    """Forbid the tokens for which ``allowed_V`` is false, such as those a grammar rules out."""
    with np.errstate(divide="ignore"):
        # Adds 0 or minus infinity, which takes a tenth of the time of a choice by the mask.
        logits_V += np.log(allowed_V.astype(logits_V.dtype))
