"""The first operator of data preparation: texts in, clean texts with their fingerprints out.

It sees one text at a time, so that any engine may run it on any batches with the same results.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, replace

from ziphius.config.data import DataConfig
from ziphius.data.clean import clean, is_unicode, reason_to_remove
from ziphius.data.deduplicate import fingerprint
from ziphius.data.readers import Raw
from ziphius.data.removed import NOT_UTF8, Removed


@dataclass(frozen=True, slots=True)
class Examined:
    """What became of a text.

    ``reason`` says why it is removed, and is empty if it is not. ``text`` is then the cleaned text,
    ``size`` its UTF-8 bytes, ``digest`` their SHA-256, and ``fingerprint`` what near copies are
    found by: empty where that was not asked for. ``cost`` is the bytes of the source it took.
    """

    source: int
    name: str
    is_record: bool
    cost: int
    reason: str
    size: int
    text: str = ""
    digest: bytes = b""
    fingerprint: bytes = b""

    def without_text(self) -> Examined:
        """Return all the rest, which is small."""
        return replace(self, text="")

    def removed(self) -> Removed:
        """Return the entry of a text that is removed."""
        return Removed(self.source, self.name, self.reason, self.size)


def examine(raws: Iterable[Raw], config: DataConfig) -> list[Examined]:
    """Clean texts and say which are removed at once, in order."""
    return [_examine(raw, config) for raw in raws]


def _examine(raw: Raw, config: DataConfig) -> Examined:
    common = (raw.source, raw.name, raw.is_record, raw.cost)
    if not raw.is_decoded:
        return Examined(*common, NOT_UTF8, raw.cost)
    text = clean(raw.text) if config.clean else raw.text
    encoded = text.encode() if is_unicode(text) else text.encode(errors="surrogatepass")
    if reason := reason_to_remove(text, config):
        return Examined(*common, reason, len(encoded))
    digest = hashlib.sha256(encoded).digest()
    near = fingerprint(text) if config.deduplicate == "near" else b""
    return Examined(*common, "", len(encoded), text, digest, near)
