"""The choice of tokens from rows of logits, for processors: many answers' in one call.

What is computed is written out in ``inference/noise.py`` and ``inference/logprobs.py``: Gumbel
noise by Philox over a seed, a position and an answer's index, and the log-softmax in float64. A
row's results are the same bits alone or among others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ziphius.kernels.cpu.library import Library

_BITS = 2**64


class Name(NamedTuple):
    """Whose noise: a request's seed, a token's position, and which of the request's answers."""

    seed: int
    position: int
    answer: int


class Draw:
    """Chooses from rows ``[R, V]`` in float32 on the processor; threads share the rows."""

    def __init__(self, library: Library) -> None:
        self.library = library

    def tokens(
        self,
        logits_RV: Tensor,
        rows: Sequence[int],
        names: Sequence[Name],
        temperatures: Sequence[float],
    ) -> NDArray[np.int64]:
        """Return a token for each of ``rows``, numbers of rows of ``logits``.

        It is the argmax at temperature 0. It is -1 for a row with NaN or plus infinity, and for one
        of minus infinities: no token is to be drawn.
        """
        logits_RV = logits_RV.contiguous()
        tokens = np.empty(len(rows), np.int64)
        named = np.array([[part % _BITS for part in name] for name in names], np.uint64)
        self._call("draw", logits_RV, rows, named, np.array(temperatures, np.float64), tokens)
        return tokens

    def log_sums(
        self, logits_RV: Tensor, rows: Sequence[int], tokens: NDArray[np.int64]
    ) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Return the log-sum-exp of rows, and the rank of a token in each, from 1.

        Of equal logits the lower token ranks first.
        """
        logits_RV = logits_RV.contiguous()
        sums, ranks = np.empty(len(rows), np.float64), np.empty(len(rows), np.int64)
        self._call("log_sums", logits_RV, rows, np.ascontiguousarray(tokens), sums, ranks)
        return sums, ranks

    def _call(
        self, name: str, logits_RV: Tensor, rows: Sequence[int], *arrays: NDArray[np.generic]
    ) -> None:
        assert logits_RV.dtype == torch.float32, "others are the reference's"
        memory = [torch.from_numpy(array) for array in (np.array(rows, np.int64), *arrays)]
        self.library.call(name, logits_RV.dtype, logits_RV, *memory, len(rows), logits_RV.shape[1])


# None: row by row, as the sampler does it.
VERSIONS: dict[str, Callable[[], Draw] | None] = {"torch": None}
COMPILED = Draw
