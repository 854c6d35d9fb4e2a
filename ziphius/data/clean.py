"""What is done to a text before anything else, and which texts are not worth training on.

A text is changed only where nothing is lost: a byte order mark goes, and the line breaks of a text
that has CR LF throughout become LF. There is no Unicode normalisation: the tokenizer has none
(facts 6.1), it would change string literals of programs, and bits per byte count the bytes of the
text as it was.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from ziphius.config.data import DataConfig
from ziphius.data.removed import (
    BINARY,
    CONTROL_CHARACTERS,
    EMPTY,
    NOT_UTF8,
    REPEATED_LINES,
    TOO_SHORT,
)

# Controls but the five that lay out text, and the character that decoders put for broken bytes.
_CONTROLS = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x9f\ufffd]")
_MOST_CONTROLS = 0.01


def clean(text: str) -> str:
    """Return the text without a byte order mark and with LF for CR LF, where nothing is lost."""
    return with_unix_line_breaks(without_byte_order_mark(text))


def without_byte_order_mark(text: str) -> str:
    """Remove the U+FEFF that some editors put before a text."""
    return text.removeprefix("\ufeff")


def with_unix_line_breaks(text: str) -> str:
    """Replace CR LF by LF if every CR and every LF of the text is part of one.

    In a text that mixes line breaks they may mean something, so it stays as it is.
    """
    pairs = text.count("\r\n")
    if pairs and pairs == text.count("\r") == text.count("\n"):
        return text.replace("\r\n", "\n")
    return text


def reason_to_remove(text: str, config: DataConfig) -> str | None:
    """Return why a cleaned text is removed, or None.

    A text that cannot be written as UTF-8, or is empty, is no document even without ``clean``.
    """
    if not is_unicode(text):
        return NOT_UTF8
    if not text:
        return EMPTY
    if not config.clean:
        return None
    return next((reason for reason, applies in RULES if applies(text, config)), None)


def is_unicode(text: str) -> bool:
    """Say whether UTF-8 can express the text: JSON can hold halves of surrogate pairs."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def is_binary(text: str, config: DataConfig) -> bool:
    """Say whether there is a NUL in it, which no text file has."""
    return "\0" in text


def is_full_of_controls(text: str, config: DataConfig) -> bool:
    """Say whether over 1 % of it are control characters or marks of broken bytes (U+FFFD)."""
    return len(_CONTROLS.findall(text)) > _MOST_CONTROLS * len(text)


def is_too_short(text: str, config: DataConfig) -> bool:
    """Say whether it has fewer than ``min_characters``, not counting white space at its ends."""
    return len(text.strip()) < config.min_characters


def repeats_lines(text: str, config: DataConfig) -> bool:
    """Say whether more than ``max_repeated_lines`` of its lines repeat an earlier one.

    Blank lines and indentation do not count.
    """
    lines = [stripped for line in text.split("\n") if (stripped := line.strip())]
    return len(lines) - len(set(lines)) > config.max_repeated_lines * len(lines)


RULES: tuple[tuple[str, Callable[[str, DataConfig], bool]], ...] = (
    (BINARY, is_binary),
    (CONTROL_CHARACTERS, is_full_of_controls),
    (TOO_SHORT, is_too_short),
    (REPEATED_LINES, repeats_lines),
)
