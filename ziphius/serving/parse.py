"""An answer's reasoning, content and calls of tools, told apart by its tokens while it comes.

A mark is a token, never a spelling: what ordinary tokens spell is text, whatever it looks like.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from types import MappingProxyType
from typing import Literal

from tokenizers import Tokenizer

from ziphius.data.tokenizer import END_THINK, THINK
from ziphius.inference import tools
from ziphius.serving.calls import BLANKS, CallReader

Kind = Literal["reasoning", "content", "call", "arguments"]

SPELLINGS: Mapping[str, str] = MappingProxyType(
    {
        "think": THINK,
        "end_think": END_THINK,
        "calls_begin": tools.CALLS_BEGIN,
        "calls_end": tools.CALLS_END,
        "call_begin": tools.CALL_BEGIN,
        "call_end": tools.CALL_END,
        "outputs_begin": tools.OUTPUTS_BEGIN,
        "outputs_end": tools.OUTPUTS_END,
        "output_begin": tools.OUTPUT_BEGIN,
        "output_end": tools.OUTPUT_END,
        "separator": tools.SEPARATOR,
    }
)


@dataclass(frozen=True)
class Markers:
    """The ids of the tokens that mark parts of an answer; None where a tokenizer has no such."""

    think: int | None = None
    end_think: int | None = None
    calls_begin: int | None = None
    calls_end: int | None = None
    call_begin: int | None = None
    call_end: int | None = None
    outputs_begin: int | None = None
    outputs_end: int | None = None
    output_begin: int | None = None
    output_end: int | None = None
    separator: int | None = None

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Markers:
        """Find them among the tokens that were added to a tokenizer."""
        added = {a.content: i for i, a in tokenizer.get_added_tokens_decoder().items()}
        return cls(**{name: added.get(spelling) for name, spelling in SPELLINGS.items()})

    @cached_property
    def names(self) -> Mapping[int, str]:
        """The name of each mark that there is, by id."""
        given = ((getattr(self, field.name), field.name) for field in fields(self))
        return {token: name for token, name in given if token is not None}


@dataclass(frozen=True)
class Piece:
    """What came next. ``call`` counts calls from 0, for the two kinds that belong to one.

    The text of kind ``call`` is the name of the tool, complete; ``arguments`` are pieces of JSON as
    the model wrote it.
    """

    kind: Kind
    text: str
    call: int | None = None


@dataclass(frozen=True)
class Call:
    """One call of a tool, with the JSON text of its arguments."""

    name: str
    arguments: str


@dataclass(frozen=True)
class Parsed:
    """A whole answer. What there is none of is empty."""

    reasoning: str = ""
    content: str = ""
    calls: tuple[Call, ...] = ()


def collect(pieces: Iterable[Piece]) -> Parsed:
    """Put the pieces of one answer together."""
    texts = {"reasoning": "", "content": ""}
    names: list[str] = []
    arguments: list[str] = []
    for piece in pieces:
        if piece.kind == "call":
            names.append(piece.text)
            arguments.append("")
        elif piece.kind == "arguments":
            assert piece.call is not None, "arguments belong to a call"
            arguments[piece.call] += piece.text
        else:
            texts[piece.kind] += piece.text
    calls = tuple(Call(*both) for both in zip(names, arguments, strict=True))
    return Parsed(texts["reasoning"], texts["content"], calls)


@dataclass
class _Waiting:
    """A mark whose text has not come, or not all: its first character and the one behind it, and
    how many ordinary tokens came since the mark before.
    """

    name: str
    begin: int
    tokens: int
    end: int | None = None


class Parser:
    """Reads one answer. Its pieces, collected, do not depend on how the answer was cut.

    Blank lines next to marks belong to nothing. No other text is lost, and no mark's spelling gets
    into reasoning or content. Inside a call, the tags of thinking are text, and so is every mark
    inside a JSON string of its arguments: an argument may speak of them.

    ``reasoning_tokens`` counts the tokens of the reasoning with the tags that open and close it,
    where the answer has them; calls made inside it do not count.
    """

    def __init__(
        self,
        markers: Markers,
        *,
        in_reasoning: bool,
        split_reasoning: bool = True,
        tools: bool = True,
    ) -> None:
        """``in_reasoning``: the prompt has opened the reasoning. Without ``split_reasoning`` it
        stays in the content, tags and all. Without ``tools`` there are no calls: their marks are
        left out, and their text is content.
        """
        self.reasoning_tokens = 0
        self._names, self._split, self._tools = markers.names, split_reasoning, tools
        self._thinking = in_reasoning
        self._prose = {
            True: _Prose("reasoning", keeps_indent=False, at_mark=in_reasoning),
            False: _Prose("content", keeps_indent=True),
        }
        self._call: CallReader | None = None
        self._calls = 0  # whose names are known
        self._announced = False  # the present call's name
        # Behind the mark of calls: text that may be a call without its own mark.
        self._in_list, self._loose = False, ""
        self._text, self._place = "", 0  # shown and not read yet, and its first character
        self._waiting: deque[_Waiting] = deque()
        self._tokens = 0  # ordinary ones, since the last mark
        self._pieces: list[Piece] = []

    @property
    def called(self) -> bool:
        """Whether the answer has called a tool."""
        return self._calls > 0

    def push(self, text: str, token_ids: Sequence[int], offsets: Sequence[int]) -> list[Piece]:
        """Take what a step has added (see ``Delta``); return what is certain now.

        ``offsets[i]`` is the character of the answer's whole text at which the text of
        ``token_ids[i]`` begins. Text may come later than its token, never before.
        """
        self._text += text
        for token, offset in zip(token_ids, offsets, strict=True):
            if self._waiting and self._waiting[-1].end is None:
                self._waiting[-1].end = offset
            if (name := self._names.get(token)) is None:
                self._tokens += 1
            else:
                self._waiting.append(_Waiting(name, offset, self._tokens))
                self._tokens = 0
        self._advance(ended=False)
        return self._take()

    def finish(self) -> list[Piece]:
        """End the answer; return what was held back. What is incomplete is given as it is."""
        self._advance(ended=True)
        self._end_call()
        self._end_list()
        for prose in self._prose.values():
            self._add(prose.kind, prose.end())
        return self._take()

    # --- from tokens to marks and text ------------------------------------------------------------

    def _advance(self, *, ended: bool) -> None:
        while self._waiting:
            mark = self._waiting[0]
            self._read(self._cut(mark.begin))
            shown = self._place + len(self._text)
            # A mark's text ends where the next token's begins. At a stop string the text may end
            # before either.
            if not ended and (mark.end is None or shown < max(mark.begin, mark.end)):
                return
            self._waiting.popleft()
            self._count(mark.tokens)
            span = self._cut(shown if mark.end is None else mark.end)
            size = _spelled(span, SPELLINGS[mark.name])
            self._read(span[: len(span) - size])
            self._mark(mark.name, span[len(span) - size :])
        self._count(self._tokens)
        self._tokens = 0
        self._read(self._cut(self._place + len(self._text)))

    def _cut(self, end: int) -> str:
        """Take the text up to the answer's character ``end``, as far as it has come."""
        size = max(end - self._place, 0)
        text, self._text = self._text[:size], self._text[size:]
        self._place += len(text)
        return text

    def _count(self, tokens: int) -> None:
        if self._thinking and self._call is None and not self._in_list:
            self.reasoning_tokens += tokens

    # --- from marks and text to pieces ------------------------------------------------------------

    def _read(self, text: str) -> None:
        if self._call is not None:
            self._call.text(text)
            self._tell_call()
        elif self._in_list:
            self._loose += text
        else:
            self._say(text)

    def _mark(self, name: str, spelling: str) -> None:
        """Take a mark; ``spelling`` is what of it is in the text."""
        if name in ("think", "end_think"):
            self._think(name == "think", spelling)
        elif not self._tools:
            self._count(1)
        elif spelling and self._call is not None and self._call.in_string:
            self._call.mark(spelling)
        elif name == "separator":
            self._separate(spelling)
        else:
            self._end_call()
            if name != "call_end":
                self._end_list()
            self._prose_here.mark()
            self._in_list = name in ("calls_begin", "call_end")
            if name == "call_begin":
                self._begin_call()

    def _think(self, opens: bool, spelling: str) -> None:
        if self._call is not None:
            self._read(spelling)
            return
        self._end_list()
        self._thinking, before = opens, self._thinking
        self.reasoning_tokens += opens or before
        if not self._split:
            self._say(spelling)
            return
        for prose in self._prose.values():
            prose.mark()

    def _separate(self, spelling: str) -> None:
        if self._call is not None:
            if not self._call.separator():
                self._read(spelling)
        elif self._in_list and self._loose.strip(BLANKS):
            head, self._loose = self._loose, ""
            self._begin_call()
            self._read(head)
            self._separate(spelling)

    def _begin_call(self) -> None:
        self._call, self._announced = CallReader(), False

    def _end_call(self) -> None:
        if self._call is not None:
            self._call.end()
            self._tell_call()
            self._call = None

    def _end_list(self) -> None:
        """Leave the list of calls; what no call has taken is text."""
        loose, self._loose, self._in_list = self._loose, "", False
        self._say(loose)

    def _tell_call(self) -> None:
        call = self._call
        assert call is not None, "only a call that goes on has news"
        if call.name is not None and not self._announced:
            self._announced = True
            self._pieces.append(Piece("call", call.name, self._calls))
            self._calls += 1
        if self._announced:
            self._add("arguments", call.take(), self._calls - 1)

    @property
    def _prose_here(self) -> _Prose:
        return self._prose[self._thinking and self._split]

    def _say(self, text: str) -> None:
        prose = self._prose_here
        self._add(prose.kind, prose.add(text))

    def _add(self, kind: Kind, text: str, call: int | None = None) -> None:
        last = self._pieces[-1] if self._pieces else None
        if text and last is not None and (last.kind, last.call) == (kind, call):
            self._pieces[-1] = Piece(kind, last.text + text, call)
        elif text:
            self._pieces.append(Piece(kind, text, call))

    def _take(self) -> list[Piece]:
        taken, self._pieces = self._pieces, []
        return taken


class _Prose:
    """Reasoning or content: its text without the blank lines next to marks.

    Blanks at the end are held back until more text comes, also over a mark: so two stretches that
    a mark divides stay as far apart as the first one's end says.
    """

    def __init__(self, kind: Kind, *, keeps_indent: bool, at_mark: bool = False) -> None:
        """With ``keeps_indent`` the first line behind a mark keeps its blanks."""
        self.kind = kind
        self._keeps_indent, self._at_mark = keeps_indent, at_mark
        self._begun, self._held, self._blanks = False, "", ""

    def add(self, text: str) -> str:
        """Return what can be given of the text so far."""
        if self._at_mark:
            seen = self._blanks + text
            text = seen.lstrip(BLANKS)
            self._blanks = seen[: len(seen) - len(text)]
            if not text:
                return ""
            self._at_mark = False
            if self._keeps_indent:
                text = self._blanks.rpartition("\n")[2] + text
            self._blanks = ""
        seen = self._held + text
        given = seen.rstrip(BLANKS)
        self._held = seen[len(given) :]
        self._begun = self._begun or bool(given)
        return given

    def mark(self) -> None:
        """Take a mark here."""
        self._at_mark, self._blanks = True, ""
        if not self._begun:
            self._held = ""

    def end(self) -> str:
        """Return the blanks at the end; a mark there has taken them."""
        return "" if self._at_mark else self._held


def _spelled(span: str, spelling: str) -> int:
    """Return how many characters at the end of ``span``, a mark's own text, spell the mark.

    None where marks are not shown, fewer than all where a stop string has cut it. Before them may
    be what became of half a character.
    """
    sizes = range(len(spelling), 0, -1)
    return next((size for size in sizes if span.endswith(spelling[:size])), 0)
