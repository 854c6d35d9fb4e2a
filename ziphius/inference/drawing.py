"""The choices of a step that need nothing of their answers, made in one call of a kernel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ziphius.inference.answer import Answer
from ziphius.inference.sampler import Sampled
from ziphius.kernels.draw import Draw, Name


def draw_plain(
    draw: Draw | None, logits_NV: Tensor, places: Sequence[range], answers: Sequence[Answer | None]
) -> list[Sequence[Sampled | None]]:
    """Choose for every answer that is ``plain`` the tokens of its rows of ``logits``, in order.

    Nothing for the others, for rows that no token follows, and without a kernel: those choose by
    themselves, to the same bits. None stands for an answer that chooses nothing now.
    """
    found: list[Sequence[Sampled | None]] = [()] * len(answers)
    if draw is None or logits_NV.dtype != torch.float32:
        return found
    plain = [n for n, answer in enumerate(answers) if answer is not None and answer.plain]
    rows: list[int] = []
    names: list[Name] = []
    temperatures: list[float] = []
    for n in plain:
        answer = answers[n]
        assert answer is not None, "chosen above"
        sampler, length = answer.sampler, len(answer.output)
        rows += places[n]
        names += [sampler.noise.name(length + place) for place in range(len(places[n]))]
        temperatures += [sampler.params.temperature] * len(places[n])
    if not rows:
        return found
    tokens = draw.tokens(logits_NV, rows, names, temperatures)
    known = tokens.clip(0)
    values = logits_NV[rows, known].double().numpy()
    sums, ranks = draw.log_sums(logits_NV, rows, known)
    reports = zip(tokens.tolist(), (values - sums).tolist(), ranks.tolist(), strict=True)
    for n in plain:
        answer, own = answers[n], [next(reports) for _ in places[n]]
        assert answer is not None, "chosen above"
        told = answer.params.logprobs is not None
        found[n] = [
            None if token < 0 else Sampled(token, *(report if told else ()))
            for token, *report in own
        ]
    return found
