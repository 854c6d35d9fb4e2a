"""Answers that follow a grammar: which tokens may come next (llguidance does the parsing)."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import llguidance
import numpy as np
from llguidance.gbnf_to_lark import any_to_lark
from numpy.typing import NDArray

from ziphius.config.errors import BadInput
from ziphius.inference.errors import RequestError
from ziphius.inference.params import Constraint
from ziphius.inference.vocabulary import Vocabulary

Mask = NDArray[np.bool_]

_KEPT = 128  # compiled grammars; servers see the same few schemas over and over
_LONGEST_REASON = 300
# llguidance's options inside a schema; and the blanks between two parts of JSON, as indented
# objects have them.
_GUIDANCE = "x-guidance"
_BLANKS = r"[ \t\r\n]{0,40}"


class Grammars:
    """Compiles grammars for one tokenizer, each once. Made once for an engine.

    Tokens that the tokenizer added (control tokens, those of dialogue and tools) are no text to a
    grammar: only a Lark grammar may name them, as ``<think>``.
    """

    def __init__(
        self, vocabulary: Vocabulary, end_ids: Collection[int], vocab_size: int | None = None
    ) -> None:
        """``end_ids`` end an answer whose grammar is satisfied. ``vocab_size`` is the model's, if
        it is not the tokenizer's: masks have that many entries.

        Raises BadInput without an end token: a satisfied grammar could not say so.
        """
        if not end_ids:
            raise BadInput("a grammar needs an end token, and this model's config has none")
        self.end_ids = tuple(sorted(end_ids))
        self.vocab_size = vocab_size or len(vocabulary.spellings)
        self.tokenizer = llguidance.LLTokenizer(
            llguidance.TokenizerWrapper(_Spelled(vocabulary, self.vocab_size, self.end_ids)),
            n_vocab=self.vocab_size,
            eos_token=list(self.end_ids),
        )
        self._compiled: OrderedDict[Constraint, Matcher] = OrderedDict()

    def matcher(self, constraint: Constraint) -> Matcher:
        """Return a fresh matcher for one answer.

        Raises BadInput for a grammar that does not compile or that no text satisfies.
        """
        first = self._compiled.pop(constraint, None) or self._compile(constraint)
        self._compiled[constraint] = first
        if len(self._compiled) > _KEPT:
            self._compiled.popitem(last=False)
        return first.clone()

    def _compile(self, constraint: Constraint) -> Matcher:
        try:
            source = _SOURCES[constraint.kind](constraint.source)
        except Exception as error:  # the library raises nothing more precise
            raise BadInput(f"{constraint.kind}: does not compile: {_one_line(error)}") from None
        inner = llguidance.LLMatcher(self.tokenizer, source, log_level=0)
        if inner.is_error():
            raise BadInput(f"{constraint.kind}: does not compile: {_one_line(inner.get_error())}")
        matcher = Matcher(self, inner)
        try:
            possible = bool(matcher.mask().any())
        except RequestError:
            possible = False
        if not possible:
            raise BadInput(
                f"{constraint.kind}: no text that this tokenizer can write satisfies it: "
                "loosen the grammar"
            )
        return matcher


class Matcher:
    """Where one answer stands in its grammar."""

    def __init__(self, grammars: Grammars, inner: llguidance.LLMatcher) -> None:
        self._grammars, self._inner = grammars, inner
        self._ended = False

    @property
    def may_end(self) -> bool:
        """Whether the text so far satisfies the grammar."""
        return bool(self._inner.is_accepting())

    @property
    def must_end(self) -> bool:
        """Whether nothing but an end token can follow."""
        return self._ended or bool(self._inner.is_stopped())

    def mask(self) -> Mask:
        """Return ``[V]``: which tokens may come next, end tokens where the text may end.

        Where the grammar forces bytes, of the tokens that spell them only the usual ones may come.

        Raises RequestError when the grammar has become too complex to follow.
        """
        if self._ended:
            return np.zeros(self._grammars.vocab_size, np.bool_)
        packed = np.frombuffer(self._inner.compute_bitmask(), np.uint8)
        self._check()
        bits = np.unpackbits(packed, count=self._grammars.vocab_size, bitorder="little")
        return bits.view(np.bool_)

    def masks(self, drafts: Sequence[int]) -> list[Mask]:
        """Return the mask before each draft and after the last, and leave the state as it is.

        The list ends early with the mask that forbids a draft: nothing after it matters.
        """
        ahead = self.clone()
        found = [ahead.mask()]
        for draft in drafts:
            if not found[-1][draft]:
                break
            try:
                ahead.advance(draft)
                found.append(ahead.mask())
            except RequestError:  # it comes again if the draft is accepted
                break
        return found

    def advance(self, token: int) -> None:
        """Take the answer's next token. Raises RequestError for one that the grammar forbids."""
        if token in self._grammars.end_ids and self.may_end and not self._ended:
            self._ended = True
            return
        # Asked first: a token that is refused would leave the matcher unusable.
        if self._ended or self._inner.validate_tokens([token]) != 1:
            self._check()
            raise RequestError(f"token {token} cannot follow here: the grammar forbids it")
        self._inner.consume_token(token)
        self._check()

    def rollback(self, count: int) -> None:
        """Take back the last ``count`` tokens."""
        if count and self._ended:
            self._ended = False
            count -= 1
        if count:
            self._inner.rollback(count)

    def clone(self) -> Matcher:
        """Return another answer's matcher that stands where this one does."""
        copy = Matcher(self._grammars, self._inner.deep_copy())
        copy._ended = self._ended
        return copy

    def _check(self) -> None:
        if self._inner.is_error():
            raise RequestError(f"the grammar failed: {_one_line(self._inner.get_error())}")


class _Spelled:
    """A vocabulary in the form that llguidance wants."""

    def __init__(self, vocabulary: Vocabulary, vocab_size: int, end_ids: tuple[int, ...]) -> None:
        spelled = vocabulary.spellings[:vocab_size]
        self.tokens = [*spelled, *[b""] * (vocab_size - len(spelled))]
        self.special_token_ids = sorted(t for t in vocabulary.added if t < vocab_size)
        self.eos_token_id, self.bos_token_id = end_ids[0], None
        self._tokenizer = vocabulary.tokenizer

    def __call__(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids


def lark_regex(text: str) -> str:
    r"""Return a regular expression as Lark has it between slashes; ``\d`` is 0 to 9 alone.

    Digits of other scripts depend on the version of Unicode, so a reader might not take them.
    Raises ValueError for one that can't be read.
    """
    if (len(text) - len(text.rstrip("\\"))) % 2:
        raise ValueError("it ends in a single backslash")  # which the library would drop
    return str(llguidance.regex_to_lark(text, use_ascii="d"))


def as_lark(text: str) -> str:
    """Return a grammar in Lark, also for one in the EBNF of llama.cpp, whose rules have ``::=``."""
    return str(any_to_lark(text)) if "::=" in text else text


def _from_regex(text: str) -> str:
    """Read a regular expression that the whole answer must match."""
    return llguidance.LLMatcher.grammar_from_lark(f"start: /{lark_regex(text)}/")


def _from_grammar(text: str) -> str:
    return llguidance.LLMatcher.grammar_from_lark(as_lark(text))


def bounded_blanks(schema: Any) -> Any:
    """Return a JSON schema whose texts have few blanks at a place, unless it says otherwise.

    Without a bound a model that is unsure fills its answer with them, and never closes the object.
    """
    if isinstance(schema, Mapping) and _GUIDANCE not in schema:
        return {**schema, _GUIDANCE: {"whitespace_pattern": _BLANKS}}
    return schema


def _from_schema(text: str) -> str:
    """Read a JSON schema."""
    schema = json.dumps(bounded_blanks(json.loads(text)), ensure_ascii=False)
    return llguidance.LLMatcher.grammar_from_json_schema(schema)


_SOURCES: Mapping[str, Callable[[str], str]] = {
    "json_schema": _from_schema,
    "regex": _from_regex,
    "grammar": _from_grammar,
}


def _one_line(reason: object) -> str:
    text = " ".join(str(reason).split())
    return text if len(text) <= _LONGEST_REASON else text[:_LONGEST_REASON] + "..."
