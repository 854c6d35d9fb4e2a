"""What a request asks of its answer: how tokens are chosen, and where the text ends."""

from __future__ import annotations

import json
import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

from ziphius.config.errors import BadInput
from ziphius.config.table import nearest

ALL = -1  # as a number of log-probabilities: those of the whole vocabulary


class Constraint(NamedTuple):
    """A grammar the text must follow: its kind (the option's name) and its source."""

    kind: str
    source: str


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to choose tokens and where to stop. Names and defaults are vLLM's.

    An option that is unknown, of a wrong type or out of range raises BadInput. Lists become tuples,
    and None stands for an empty one.
    """

    # Answers to one prompt, each with its own randomness.
    n: int = 1
    # 0 is greedy: the largest logit, the lowest id among equals. The filters below follow it in
    # this order, each on what the one before has left, made to sum to 1 again.
    temperature: float = 1.0
    # Keep tokens at least this many times as probable as the likeliest.
    min_p: float = 0.0
    # Keep this many; 0 or -1 keeps all.
    top_k: int = 0
    # Keep the smallest set of the likeliest whose sum reaches this.
    top_p: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    # None draws a fresh one for each request.
    seed: int | None = None
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    # None goes on to the context's end, or the cache's where that is smaller.
    max_tokens: int | None = 16
    # Nothing but the length ends the answer within so many tokens.
    min_tokens: int = 0
    # How many of the likeliest tokens to report beside each token; 0 reports the token alone.
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    allowed_token_ids: Sequence[int] | None = None
    banned_token_ids: Sequence[int] = ()
    # Strings that the answer's text must not contain.
    bad_words: Sequence[str] = ()
    detokenize: bool = True
    skip_special_tokens: bool = True
    # One of these at most. ``grammar`` is Lark as llguidance has it, or
    # the EBNF of llama.cpp (``root ::= ...``).
    json_schema: Mapping[str, Any] | str | None = None
    regex: str | None = None
    grammar: str | None = None

    def __new__(cls, *args: object, **options: object) -> SamplingParams:
        """Refuse an unknown option with the name of the nearest known one."""
        known = [f.name for f in fields(cls)]
        for name in options:
            if name not in known:
                raise BadInput(f"unknown sampling option '{name}'{nearest(name, known)}")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        self._set("n", _integer("n", self.n, 1))
        self._check_choice()
        self._check_ends()
        self._check_ids()
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                self._set(name, _integer(name, getattr(self, name), ALL))
        given = [n for n in ("json_schema", "regex", "grammar") if getattr(self, n) is not None]
        if len(given) > 1:
            raise BadInput(f"{' and '.join(given)}: give one grammar at most")
        if given:
            source = getattr(self, given[0])
            if given[0] == "json_schema" and isinstance(source, Mapping):
                source = _as_json(source)
            _text(given[0], source)
            if given[0] == "json_schema":
                _check_json(source)
        if not self.detokenize and (self.stop or self.bad_words):
            raise BadInput("stop and bad_words are about the text: they need detokenize = True")

    @property
    def constraint(self) -> Constraint | None:
        """Return the grammar asked for, if there is one; a schema is its JSON text."""
        if self.json_schema is not None:
            source = self.json_schema
            text = source if isinstance(source, str) else _as_json(source)
            return Constraint("json_schema", text)
        if self.regex is not None:
            return Constraint("regex", self.regex)
        return Constraint("grammar", self.grammar) if self.grammar is not None else None

    @property
    def penalises(self) -> bool:
        """Whether the choice depends on which tokens came before."""
        return bool(self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1)

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise BadInput for a token id that a model of ``vocab_size`` does not have."""
        for name in ("stop_token_ids", "logit_bias", "allowed_token_ids", "banned_token_ids"):
            for token in getattr(self, name) or ():
                if token >= vocab_size:
                    raise BadInput(
                        f"{name}: token id {token} is outside the model's vocabulary of "
                        f"{vocab_size}"
                    )

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def _check_choice(self) -> None:
        ranges = {
            "temperature": (0, math.inf, "0 (greedy) or more"),
            "presence_penalty": (-2, 2, "-2 to 2"),
            "frequency_penalty": (-2, 2, "-2 to 2"),
            "min_p": (0, 1, "0 to 1"),
            "top_p": (0, 1, "a share above 0, up to 1"),
            "repetition_penalty": (0, math.inf, "a number above 0; 1 is none"),
        }
        for name, (low, high, usage) in ranges.items():
            value = _number(name, getattr(self, name))
            above = value > low or (value == low and name not in ("top_p", "repetition_penalty"))
            if not (above and value <= high and value < math.inf):
                raise BadInput(f"{name} = {value}: use {usage}")
            self._set(name, value)
        self._set("top_k", max(_integer("top_k", self.top_k, -1), 0))
        if self.seed is not None:
            self._set("seed", _integer("seed", self.seed, 0, 2**63 - 1))

    def _check_ends(self) -> None:
        if self.max_tokens is not None:
            self._set("max_tokens", _integer("max_tokens", self.max_tokens, 1))
        self._set("min_tokens", _integer("min_tokens", self.min_tokens, 0))
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise BadInput(f"min_tokens = {self.min_tokens} is above max_tokens {self.max_tokens}")
        for name in ("stop", "bad_words"):
            value = getattr(self, name)
            texts = (value,) if isinstance(value, str) else _sequence(name, value)
            self._set(name, tuple(_text(name, text) for text in texts))
        for name in (
            "include_stop_str_in_output", "ignore_eos", "detokenize", "skip_special_tokens",
        ):  # fmt: skip
            if not isinstance(getattr(self, name), bool):
                raise BadInput(f"{name} = {getattr(self, name)!r}: use true or false")

    def _check_ids(self) -> None:
        for name in ("stop_token_ids", "banned_token_ids", "allowed_token_ids"):
            value = getattr(self, name)
            if name == "allowed_token_ids":
                if value is None:
                    continue
                if not _sequence(name, value):
                    raise BadInput("allowed_token_ids is empty: allow at least one token")
            self._set(name, tuple(_integer(name, token, 0) for token in _sequence(name, value)))
        bias = {} if self.logit_bias is None else self.logit_bias
        if not isinstance(bias, Mapping):
            raise BadInput(f"logit_bias = {bias!r}: give an object of token ids and numbers")
        self._set("logit_bias", dict(_bias(token, value) for token, value in bias.items()))


def _bias(token: object, value: object) -> tuple[int, float]:
    """Read one bias. A key may be the number's text, as JSON has no other."""
    if isinstance(token, str) and token.isascii() and token.isdigit():
        token = int(token)
    number = _number(f"logit_bias of token {token}", value)
    if not math.isfinite(number):
        raise BadInput(f"logit_bias of token {token} = {number}: use a finite number")
    return _integer("logit_bias", token, 0), number


def _as_json(schema: Mapping[str, Any]) -> str:
    try:
        return json.dumps(dict(schema), ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise BadInput(f"json_schema is no JSON: {error}") from None


def _check_json(schema: str) -> None:
    try:
        json.loads(schema)
    except (ValueError, RecursionError) as error:
        raise BadInput(f"json_schema is no JSON: {error}") from None


def _sequence(name: str, value: Any) -> tuple[Any, ...]:
    if value is None:
        return ()
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
        raise BadInput(f"{name} = {value!r}: give a list")
    return tuple(value)


def _text(name: str, value: object) -> str:
    if not isinstance(value, str) or not value:
        raise BadInput(f"{name} = {value!r}: use text that is not empty")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise BadInput(f"{name} = {value!r}: not valid UTF-8") from None
    return value


def _integer(name: str, value: Any, low: int, high: int | None = None) -> int:
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or number < low or (high is not None and number > high):
        limits = f"of at least {low}" if high is None else f"from {low} to {high}"
        raise BadInput(f"{name} = {value!r}: use a whole number {limits}")
    return number


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadInput(f"{name} = {value!r}: use a number")
    try:
        return float(value)
    except OverflowError:
        raise BadInput(f"{name} = {value!r}: use a smaller number") from None
