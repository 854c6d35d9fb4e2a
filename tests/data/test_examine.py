"""The first operator: what it says of a text depends on that text alone."""

from __future__ import annotations

import hashlib

from hypothesis import given
from hypothesis import strategies as st

from tests.data.texts import prose
from ziphius.config.data import DataConfig
from ziphius.data.deduplicate import HASHES
from ziphius.data.examine import examine
from ziphius.data.readers import Raw
from ziphius.data.removed import Removed


def raw(text: str, name: str = "a.txt", *, decoded: bool = True) -> Raw:
    return Raw(1, name, False, 9, text, decoded)


def test_a_text_that_stays_is_cleaned_measured_and_hashed() -> None:
    text = prose(1, 30)
    (found,) = examine([raw("\ufeff" + text.replace("\n", "\r\n"))], DataConfig())
    assert (found.source, found.name, found.is_record, found.cost) == (1, "a.txt", False, 9)
    assert (found.reason, found.text, found.size) == ("", text, len(text))
    assert found.digest == hashlib.sha256(text.encode()).digest()
    assert len(found.fingerprint) == 4 * HASHES
    assert found.without_text().text == ""
    assert found.without_text().digest == found.digest


def test_a_text_that_goes_has_a_reason_and_a_size_only() -> None:
    raws = [raw("", decoded=False), raw("nul \0 é"), raw("\udc80half")]
    found = examine(raws, DataConfig())
    assert [(f.reason, f.size) for f in found] == [
        ("not UTF-8", 9),
        ("binary", 8),
        ("not UTF-8", 7),
    ]
    assert not any(f.text or f.digest or f.fingerprint for f in found)
    assert found[1].removed() == Removed(1, "a.txt", "binary", 8)


def test_a_fingerprint_is_made_only_where_near_copies_are_asked_for() -> None:
    for asked in ("none", "exact"):
        (found,) = examine([raw(prose(1, 30))], DataConfig(deduplicate=asked))
        assert found.fingerprint == b""


def test_without_cleaning_a_text_stays_as_it_is() -> None:
    text = "\ufeffnul \0\r\n"
    (found,) = examine([raw(text)], DataConfig(clean=False))
    assert found.text == text


@given(st.lists(st.text(max_size=40), max_size=8))
def test_batches_change_nothing(texts: list[str]) -> None:
    raws = [raw(text, str(number)) for number, text in enumerate(texts)]
    together = examine(raws, DataConfig())
    assert together == [found for one in raws for found in examine([one], DataConfig())]
