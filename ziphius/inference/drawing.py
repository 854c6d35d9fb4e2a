"""The choices of a step that need nothing of their answers, made in one call of a kernel."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ziphius.inference.answer import Answer
from ziphius.inference.sampler import Sampled
from ziphius.kernels.draw import Draw, Name

# A log-probability and a rank, or nothing.
Told = tuple[float, int] | tuple[()]


def draw_plain(
    draw: Draw | None, logits_NV: Tensor, places: Sequence[range], answers: Sequence[Answer | None]
) -> list[list[Sampled | None]]:
    """Choose for every answer that is ``plain`` the tokens of its rows of ``logits``, in order.

    Nothing for the others, for rows that no token follows, and without a kernel: those choose by
    themselves, to the same bits. ``answers`` has None for one that chooses nothing now.
    """
    found: list[list[Sampled | None]] = [[] for _ in answers]
    if draw is None or logits_NV.dtype != torch.float32:
        return found
    wanted = [
        (n, answer, row, name)
        for n, answer in enumerate(answers)
        if answer is not None and answer.plain
        for row, name in zip(places[n], _names(answer, len(places[n])), strict=False)
    ]
    if not wanted:
        return found
    rows, names = [row for _, _, row, _ in wanted], [name for _, _, _, name in wanted]
    tokens = draw.tokens(logits_NV, rows, names, [a.params.temperature for _, a, _, _ in wanted])
    asked = [a.params.logprobs is not None for _, a, _, _ in wanted]
    told = _told(draw, logits_NV, rows, tokens, asked)
    for (n, _, _, _), token, report in zip(wanted, tokens.tolist(), told, strict=True):
        found[n].append(Sampled(token, *report) if token >= 0 else None)
    return found


def _names(answer: Answer, count: int) -> list[Name]:
    """Return whose noise the answer's next tokens have; nothing where that fails.

    The answer then chooses by itself, and meets the mistake alone.
    """
    length = len(answer.output)
    try:
        return [answer.sampler.noise.name(length + place) for place in range(count)]
    except Exception:
        return []


def _told(
    draw: Draw,
    logits_NV: Tensor,
    rows: Sequence[int],
    tokens: NDArray[np.int64],
    asked: Sequence[bool],
) -> list[Told]:
    """Return what is to be told of the tokens for which it is asked."""
    found: list[Told] = [()] * len(tokens)
    places = np.flatnonzero(asked).tolist()
    if not places:
        return found
    # Where there is no token the report is of nothing, and nobody's.
    known, own = tokens[places].clip(0), [rows[place] for place in places]
    sums, ranks = draw.log_sums(logits_NV, own, known)
    log_probs = logits_NV[own, known].double().numpy() - sums
    for place, report in zip(
        places, zip(log_probs.tolist(), ranks.tolist(), strict=True), strict=True
    ):
        found[place] = report
    return found
