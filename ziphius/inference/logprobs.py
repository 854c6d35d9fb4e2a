"""Log-probabilities to report: the model's own, before anything a request does to them."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from ziphius.inference.logits import BLOCK, Ids, Row, alone
from ziphius.inference.params import ALL
from ziphius.kernels.draw import Draw

# Rows are cut into so many pieces; the largest of each say what the largest of all must exceed.
_PIECE = 64


class Alternative(NamedTuple):
    """A token that might have come: its log-probability, and its rank from 1."""

    token: int
    logprob: float
    rank: int


class Scored(NamedTuple):
    """A token, its log-probability and rank, and the likeliest tokens in the order of rank.

    Among equally likely tokens the lower id ranks first.
    """

    token: int
    logprob: float
    rank: int
    top: tuple[Alternative, ...]


def score(logits_V: Row, token: int, count: int, draw: Draw | None = None) -> Scored:
    """Return ``token``'s log-softmax in a row, and the ``count`` likeliest (-1: every token).

    The softmax is taken in float64, by ``draw`` where it can. The row must have no NaN and no plus
    infinity.
    """
    value = logits_V[token]
    if draw is not None and logits_V.dtype == np.float32:
        sums, ranks = draw.log_sums(alone(logits_V), [0], np.array([token]))
        normaliser, rank = float(sums[0]), int(ranks[0])
    else:
        normaliser = log_sum_exp(logits_V)
        above, equal = logits_V > value, logits_V[:token] == value
        rank = 1 + int(np.count_nonzero(above) + np.count_nonzero(equal))
    best = largest(logits_V, len(logits_V) if count == ALL else count)
    order = best[np.argsort(-logits_V[best], kind="stable")]
    top = tuple(
        Alternative(other, logit - normaliser, place)
        for place, (other, logit) in enumerate(
            zip(order.tolist(), logits_V[order].tolist(), strict=True), 1
        )
    )
    return Scored(token, float(value) - normaliser, rank, top)


def log_sum_exp(logits_V: Row) -> float:
    """Return the logarithm of the sum of exponentials, in float64."""
    top = float(logits_V.max())
    return top + math.log(exp_sum(logits_V, top))


def exp_sum(logits_V: Row, top: float, temperature: float = 1.0) -> float:
    """Return the sum of ``exp((logit - top) / temperature)``, in float64."""
    total = 0.0
    with np.errstate(over="ignore"):  # a small temperature makes minus infinities
        for start in range(0, len(logits_V), BLOCK):
            block = logits_V[start : start + BLOCK].astype(np.float64)
            block -= top
            if temperature != 1:
                block /= temperature
            total += float(np.exp(block, out=block).sum())
    return total


def largest(logits_V: Row, count: int) -> Ids:
    """Return the ids of the ``count`` largest entries, ascending; of equal ones the lowest ids.

    No sort of the row: the ``count``-th largest of the pieces' maxima is a lower bound of the
    ``count``-th largest entry, and few entries reach it.
    """
    V = len(logits_V)
    if count >= V:
        return np.arange(V)
    if count == 0:
        return np.empty(0, np.intp)
    pieces = V // _PIECE
    candidates = None
    if count <= pieces // 2:
        # Piece p holds the entries p, p + pieces, ...: the maximum then runs along rows.
        maxima = logits_V[: pieces * _PIECE].reshape(_PIECE, pieces).max(axis=0)
        bound = np.partition(maxima, pieces - count)[pieces - count]
        candidates = np.flatnonzero(logits_V >= bound)
    values = logits_V if candidates is None else logits_V[candidates]
    smallest = np.partition(values, len(values) - count)[len(values) - count]
    above = np.flatnonzero(values > smallest)
    level = np.flatnonzero(values == smallest)[: count - len(above)]
    chosen = np.sort(np.concatenate((above, level)))
    return chosen if candidates is None else candidates[chosen]
