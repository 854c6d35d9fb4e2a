"""One call of a tool, read as its text comes: its name, then its arguments."""

from __future__ import annotations

import re

BLANKS = " \t\r\n"

_NAME = re.compile(r"[^\n`{]+")
_FENCE = "```"
_LANGUAGE = re.compile(r"[A-Za-z]*")


class CallReader:
    """Takes the text behind the mark that begins a call, and tells its name and arguments.

    Two spellings are read, told apart by what is there. V3 and R1 write ``function``, the
    separator, the name, and the arguments in a fence of their own lines; V3.1 writes the name, the
    separator and the arguments. A fence is no part of them in either. Where the separator is
    missing, the name ends where arguments begin.

    ``name`` is None until it is known for certain. ``take()`` gives the arguments that have come
    since; blanks and a closing fence are held back, as they may be the end.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self._head = ""  # the text before the separator
        self._separated = False
        self._text = ""  # behind the separator, not read yet
        self._started = self._fenced = False  # arguments
        self._ready = self._held = ""
        self._marked = False  # what is held ends with a mark
        self._json = _Strings()

    @property
    def in_string(self) -> bool:
        """Whether the arguments so far end inside a JSON string, where a mark is but text."""
        return self._json.inside

    def text(self, text: str) -> None:
        """Take more of the call's text."""
        if not self._separated:
            self._head += text
            return
        self._text += text
        if self.name is None:
            self._find_name()
        if self.name is not None:
            self._read()

    def separator(self) -> bool:
        """Take the separator; False where it stands for nothing, because there was one."""
        if self._separated:
            return False
        self._separated = True
        return True

    def mark(self, spelling: str) -> None:
        """Take a mark that stands inside a string: text, unless it is the last thing there is."""
        self._held, self._marked = self._held + spelling, True

    def end(self) -> None:
        """End the call here: what is there is all. ``name`` stays None where there was no call."""
        kind, rest = self._head.strip(BLANKS), self._text
        if self.name is None and not self._separated:
            # Without a separator: it is where the name ends.
            self._separated, self._head, self._text = True, "", kind
            self._find_name()
            if self.name is None and not "function".startswith(kind):
                self.name, self._text = kind, ""
        elif self.name is None:
            left = rest.strip(BLANKS)
            self.name = left or (kind if kind != "function" else "") or None
            self._text = ""
        if self.name is not None:
            self._read()

    def take(self) -> str:
        """Return the arguments that have come since the last call."""
        ready, self._ready = self._ready, ""
        return ready

    def _find_name(self) -> None:
        text, kind = self._text.lstrip(BLANKS), self._head.strip(BLANKS)
        if not text:
            return
        if kind not in ("", "function"):
            self.name = kind
        elif (match := _NAME.match(text)) and match.end() < len(text):
            self.name, self._text = match[0].strip(BLANKS), text[match.end() :]
        elif match is None:  # arguments at once: V3.1's spelling of a tool named "function"
            self.name = kind

    def _read(self) -> None:
        if not self._started and not self._begin():
            return
        new, self._text = self._text, ""
        self._json.read(new)
        seen = self._held + new
        if self._marked and not new.strip(BLANKS):
            self._held = seen
            return
        self._marked = False
        kept = seen if self.in_string else seen.rstrip(BLANKS)
        if self._fenced and not self.in_string:
            kept = kept.rstrip("`").rstrip(BLANKS)
        self._ready, self._held = self._ready + kept, seen[len(kept) :]

    def _begin(self) -> bool:
        """Leave out what stands before the arguments; return whether they have begun."""
        text = self._text.lstrip(BLANKS)
        if not self._fenced and text.startswith(_FENCE):
            language = _LANGUAGE.match(text, len(_FENCE))
            assert language is not None, "it matches nothing too"
            if language.end() == len(text):
                return False  # its name may go on
            self._fenced, text = True, text[language.end() :].lstrip(BLANKS)
        elif not self._fenced and _FENCE.startswith(text):
            return False
        self._text, self._started = text, bool(text)
        return self._started


class _Strings:
    """Whether a JSON object that comes in pieces is inside one of its strings.

    What does not begin as an object or a list is no JSON, and has none.
    """

    def __init__(self) -> None:
        self.inside = self._escaped = False
        self._json: bool | None = None

    def read(self, text: str) -> None:
        if self._json is None and text:
            self._json = text[0] in "{["
        for character in text if self._json else "":
            if self._escaped:
                self._escaped = False
            elif character == '"':
                self.inside = not self.inside
            else:
                self._escaped = self.inside and character == "\\"
