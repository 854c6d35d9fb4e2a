"""One request's choice of a token from a position's logits."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ziphius.config.errors import BadInput
from ziphius.inference import logits as rows
from ziphius.inference.bad_words import BadWords
from ziphius.inference.errors import RequestError
from ziphius.inference.logits import Ids, Row
from ziphius.inference.logprobs import Alternative, exp_sum, largest, score
from ziphius.inference.noise import Noise
from ziphius.inference.params import SamplingParams
from ziphius.inference.vocabulary import Vocabulary
from ziphius.kernels.draw import Draw

# Of log-weights for top-p: so many to a factor of e, and the number of the last one.
_STEPS, _LAST_STEP = 32, 4095


class Sampled(NamedTuple):
    """A chosen token. Without ``params.logprobs`` the rest is empty."""

    token: int
    logprob: float | None = None
    rank: int | None = None
    top: tuple[Alternative, ...] = ()


class Kept(NamedTuple):
    """The tokens that may be drawn, ascending, and their logits over the temperature, less the
    largest.
    """

    ids_N: Ids
    scaled_N: NDArray[np.float64]


class Sampler:
    """Chooses the tokens of one answer.

    A token depends on the logits, the tokens before it, the parameters, the seed, the answer's
    ``index`` among n, and the position: not on other requests, nor on how often or in which order
    positions are computed. Above temperature 0 it is the argmax of the filtered log-probabilities
    plus Gumbel noise, a draw from exactly ``distribution``.

    The log-probabilities reported are the model's own, as vLLM's are by default: the log-softmax of
    the raw logits, before bias, penalties, masks and temperature. A token's may therefore be low
    where a grammar forced it, and the ranks are those of the raw logits.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt: Sequence[int],
        noise: Noise,
        *,
        stop_ids: Collection[int] = (),
        vocabulary: Vocabulary | None = None,
        draw: Draw | None = None,
    ) -> None:
        """``stop_ids`` end the answer besides ``params.stop_token_ids``: the model's end tokens.

        ``draw`` computes what it can of rows in float32, which then must come from it everywhere.
        Raises BadInput for ``bad_words`` without the vocabulary that spells them.
        """
        self.params, self.noise, self.draw = params, noise, draw
        ends = set(params.stop_token_ids) | (set() if params.ignore_eos else set(stop_ids))
        self.stop_ids = frozenset(ends)
        self._stop_ids = rows.ids(sorted(ends))
        self._banned = rows.ids(params.banned_token_ids)
        allowed = params.allowed_token_ids
        self._allowed = None if allowed is None else rows.ids(allowed)
        repetition = params.repetition_penalty != 1
        self._prompt = np.unique(rows.ids(prompt)) if repetition else rows.ids(())
        self._bad_words = None
        if params.bad_words:
            if vocabulary is None:
                raise BadInput("bad_words need a tokenizer: this model has none")
            self._bad_words = BadWords(vocabulary, params.bad_words, params.skip_special_tokens)
        self._changes = bool(
            params.logit_bias or params.penalises or params.bad_words or params.banned_token_ids
        ) or (allowed is not None)
        filters = params.min_p > 0 or params.top_k > 0 or params.top_p < 1
        self._filters = filters and params.temperature > 0

    def choose(
        self,
        logits_V: Tensor | Row,
        output: Sequence[int],
        *,
        allowed_V: NDArray[np.bool_] | None = None,
    ) -> Sampled:
        """Choose the token that follows ``output``, the answer's tokens so far, and report on it.

        ``allowed_V`` is a grammar's mask. Raises RequestError for a row with NaN or infinity, and
        where no token is left.
        """
        token = self.token(logits_V, output, allowed_V=allowed_V)
        return self.report(logits_V, token)

    def token(
        self,
        logits_V: Tensor | Row,
        output: Sequence[int],
        *,
        allowed_V: NDArray[np.bool_] | None = None,
    ) -> int:
        """Choose as ``choose`` does, and report nothing."""
        raw_V = as_row(logits_V)
        row_V = self._changed(raw_V, output, allowed_V)
        token = int(row_V.argmax())
        self._check(raw_V, row_V, token, len(output))
        if self._filters:
            kept = self._keep(row_V)
            waits_N = self.noise.exponentials(len(output), len(row_V), kept.ids_N)
            token = int(kept.ids_N[(kept.scaled_N - np.log(waits_N)).argmax()])
        elif self.params.temperature > 0:
            token = self._race(row_V, len(output))
        return token

    def plain(self, length: int) -> bool:
        """Whether the choice behind ``length`` tokens is a kernel's alone: see ``Draw``.

        It is where nothing changes or filters the row and no likeliest tokens are asked for.
        """
        early = length < self.params.min_tokens and len(self._stop_ids) > 0
        return not (self._changes or self._filters or early or self.params.logprobs)

    def _race(self, row_V: Row, position: int) -> int:
        temperature = self.params.temperature
        if self.draw is None or row_V.dtype != np.float32:
            return self.noise.race(position, row_V, temperature)
        names = [self.noise.name(position)]
        return int(self.draw.tokens(rows.alone(row_V), [0], names, [temperature])[0])

    def report(self, logits_V: Tensor | Row, token: int) -> Sampled:
        """Return a token with what the request wants to know of it, by the raw logits."""
        if self.params.logprobs is None:
            return Sampled(token)
        return Sampled(*score(as_row(logits_V), token, self.params.logprobs, self.draw))

    def distribution(
        self,
        logits_V: Tensor | Row,
        output: Sequence[int],
        *,
        allowed_V: NDArray[np.bool_] | None = None,
    ) -> NDArray[np.float64]:
        """Return ``[V]``, what ``choose`` draws from. Greedy puts everything on one token."""
        raw_V = as_row(logits_V)
        row_V = self._changed(raw_V, output, allowed_V)
        best = int(row_V.argmax())
        self._check(raw_V, row_V, best, len(output))
        p_V = np.zeros(len(row_V))
        if self.params.temperature == 0:
            p_V[best] = 1
            return p_V
        kept = self._keep(row_V)
        p_V[kept.ids_N] = np.exp(kept.scaled_N)
        p_V /= p_V.sum()
        return p_V

    def _changed(
        self, raw_V: Row, output: Sequence[int], allowed_V: NDArray[np.bool_] | None
    ) -> Row:
        """Return the row as the request wants it; the same array when it wants no change."""
        params = self.params
        early = len(output) < params.min_tokens and len(self._stop_ids) > 0
        if not (self._changes or early or allowed_V is not None):
            return raw_V
        row_V = raw_V.copy()
        rows.add_bias(row_V, params.logit_bias)
        if params.penalises:
            past = rows.ids(output)
            if params.repetition_penalty != 1:
                seen = np.concatenate((self._prompt, past))
                rows.penalise_repetition(row_V, seen, params.repetition_penalty)
            rows.penalise_output(row_V, past, params.frequency_penalty, params.presence_penalty)
        if self._allowed is not None:
            rows.allow_only(row_V, self._allowed)
        rows.forbid(row_V, self._banned)
        if self._bad_words is not None:
            rows.forbid(row_V, self._bad_words.banned(output))
        if early:
            rows.forbid(row_V, self._stop_ids)
        if allowed_V is not None:
            rows.apply_mask(row_V, allowed_V)
        return row_V

    def _check(self, raw_V: Row, row_V: Row, best: int, position: int) -> None:
        # NaN counts as the largest of a row, so the largest tells of every kind of bad row.
        fine = bool(np.isfinite(row_V[best]))
        if fine and (row_V is raw_V or np.isfinite(raw_V.max())):
            return
        where = f"at output position {position}"
        if np.isnan(raw_V).any() or np.isposinf(raw_V).any():
            raise RequestError(f"the model's logits {where} hold NaN or infinity: no token follows")
        if np.isneginf(raw_V).all():
            raise RequestError(f"the model's logits {where} are all minus infinity")
        if not np.isneginf(row_V[best]):
            raise RequestError(f"penalties and bias {where} overflow: use milder ones")
        raise RequestError(
            f"no token is left to choose {where}: the grammar, allowed_token_ids, "
            "banned_token_ids, bad_words and min_tokens together forbid every one"
        )

    def _keep(self, row_V: Row) -> Kept:
        """Apply temperature, min-p, top-k and top-p, in this order."""
        params = self.params
        top, total = float(row_V.max()), None
        if 0 < params.top_k < len(row_V):
            # Before min-p, which commutes with it, as it leaves less to do.
            ids_N = largest(row_V, params.top_k)
        elif params.min_p > 0:
            ids_N = self._above(row_V, top, np.log(params.min_p))
        elif params.top_p < 1:
            # Tokens below (1 - top_p) / V are, together, less than what may be left out.
            total = exp_sum(row_V, top, params.temperature)
            ids_N = self._above(row_V, top, np.log((1 - params.top_p) / len(row_V) * total))
        else:
            ids_N = np.arange(len(row_V))
        scaled_N = row_V[ids_N].astype(np.float64)
        scaled_N -= top
        # However small the temperature, the largest stays 0.
        with np.errstate(over="ignore"):
            scaled_N /= params.temperature
        if params.min_p > 0:
            chosen_N = scaled_N >= np.log(params.min_p)
            ids_N, scaled_N = ids_N[chosen_N], scaled_N[chosen_N]
        if params.top_p < 1:
            chosen = top_p(scaled_N, params.top_p, total)
            ids_N, scaled_N = ids_N[chosen], scaled_N[chosen]
        return Kept(ids_N, scaled_N)

    def _above(self, row_V: Row, top: float, log_share: float) -> Ids:
        """Return the tokens above a share of the largest, and perhaps some that are just below."""
        room = 0.5 * self.params.temperature + 1e-6 * abs(top)
        with np.errstate(over="ignore"):
            return np.flatnonzero(row_V >= top + self.params.temperature * log_share - room)


def top_p(scaled_N: NDArray[np.float64], share: float, total: float | None = None) -> Ids:
    """Return, ascending, the places of the fewest likeliest tokens that reach ``share`` of the sum.

    ``scaled_N`` are log-weights, the largest 0. Of equal weights the first count first. ``total``
    is the sum when it is that of more tokens than these.

    No sort of all: the weights are summed in steps of their logarithm, and only the step in which
    the sum is reached is sorted.
    """
    weights_N = np.exp(scaled_N)
    steps_N = np.minimum(scaled_N * -_STEPS, _LAST_STEP).astype(np.int32)
    sums = np.bincount(steps_N, weights_N).cumsum()
    wanted = share * (float(sums[-1]) if total is None else total)
    last = min(int(np.searchsorted(sums, wanted)), len(sums) - 1)
    inside = np.flatnonzero(steps_N == last)
    order = inside[np.argsort(-weights_N[inside], kind="stable")]
    reached = weights_N[order].cumsum() + (sums[last - 1] if last else 0.0)
    within = order[: int(np.searchsorted(reached, wanted)) + 1]
    chosen_N = steps_N < last
    chosen_N[within] = True
    return np.flatnonzero(chosen_N)


def as_row(logits_V: Tensor | Row) -> Row:
    """Return a row of logits as an array in float32 or wider, on the processor."""
    if isinstance(logits_V, np.ndarray):
        return logits_V
    if logits_V.dtype not in (torch.float32, torch.float64):
        logits_V = logits_V.float()
    row_V: Row = logits_V.detach().cpu().numpy()
    return row_V
