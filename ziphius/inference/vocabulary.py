"""What each token of a byte-level tokenizer stands for, in bytes."""

from __future__ import annotations

import codecs
from bisect import bisect_left, bisect_right
from functools import cached_property
from itertools import accumulate

from tokenizers import Tokenizer, decoders

from ziphius.config.errors import BadInput


class Vocabulary:
    """A tokenizer's tokens as bytes. Make one for a tokenizer and share it among requests.

    Raises BadInput for a tokenizer that is not byte-level: its tokens have no bytes of their own.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        if not isinstance(tokenizer.decoder, decoders.ByteLevel):
            raise BadInput(
                "the tokenizer is not byte-level: give one of the DeepSeek-V3 family, "
                'whose tokenizer.json has a decoder of type "ByteLevel"'
            )
        self.tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder()
        # Left out of an answer's text unless it is asked for.
        self.special = frozenset(token for token, entry in added.items() if entry.special)
        self.added = frozenset(added)
        self._bytes = _byte_alphabet()

    def spell(self, token: int) -> bytes:
        """Return a token's bytes; none for an id that the tokenizer does not have."""
        piece = self.tokenizer.id_to_token(token)
        return b"" if piece is None else self._spell(piece)

    def text_bytes(self, token: int, skip_special: bool) -> bytes:
        """Return what a token adds to an answer's text."""
        return b"" if skip_special and token in self.special else self.spell(token)

    @cached_property
    def spellings(self) -> tuple[bytes, ...]:
        """The bytes of every token, by id. Made when first used (a fifth of a second for 129k)."""
        pieces = self.tokenizer.get_vocab(with_added_tokens=True)
        spelled = [b""] * (max(pieces.values()) + 1)
        for piece, token in pieces.items():
            spelled[token] = self._spell(piece)
        return tuple(spelled)

    @cached_property
    def sorted_tokens(self) -> tuple[tuple[bytes, ...], tuple[int, ...]]:
        """The spellings in ascending order, and their tokens."""
        order = sorted(range(len(self.spellings)), key=self.spellings.__getitem__)
        return tuple(self.spellings[token] for token in order), tuple(order)

    @cached_property
    def joined(self) -> tuple[bytes, tuple[int, ...]]:
        """All spellings one after the other, and where each begins, the end included."""
        starts = accumulate((len(spelling) for spelling in self.spellings), initial=0)
        return b"".join(self.spellings), tuple(starts)

    def containing(self, part: bytes) -> set[int]:
        """Return the tokens that have ``part`` among their bytes."""
        whole, starts = self.joined
        found, place = set(), whole.find(part)
        while place >= 0:
            token = bisect_right(starts, place) - 1
            if place + len(part) <= starts[token + 1]:
                found.add(token)
            place = whole.find(part, place + 1)
        return found

    def beginning_with(self, part: bytes) -> set[int]:
        """Return the tokens whose bytes begin with ``part``."""
        spellings, tokens = self.sorted_tokens
        first = last = bisect_left(spellings, part)
        while last < len(spellings) and spellings[last].startswith(part):
            last += 1
        return set(tokens[first:last])

    def _spell(self, piece: str) -> bytes:
        """Undo the byte-level alphabet; a piece with any other character is text as it stands."""
        try:
            return bytes(self._bytes[character] for character in piece)
        except KeyError:
            return piece.encode()


class ByteDecoder:
    """Bytes to text as they come: a character's text is given once all its bytes are there.

    The text joined is that of all bytes decoded at once, wherever they are cut; bytes that are no
    text become U+FFFD as the tokenizers library has it.
    """

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, data: bytes) -> str:
        """Return the text that ``data`` completes."""
        return self._decoder.decode(data)

    def close(self) -> str:
        """Return what a character that stays incomplete becomes."""
        return self._decoder.decode(b"", True)


def _byte_alphabet() -> dict[str, int]:
    """Return the byte that each character of a byte-level piece stands for (GPT-2's alphabet).

    Printable bytes of Latin-1 are themselves; the others are the characters from U+0100 on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(0x100 + place): byte for place, byte in enumerate(others)}
