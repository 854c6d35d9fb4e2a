"""Texts on the disk for a while."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ziphius.data.spool import Spool, read_spans


@given(st.lists(st.text(max_size=20)), st.randoms())
def test_texts_come_back_in_any_order(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], shuffle
) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path_factory.mktemp("spool") / "texts"
    with Spool(path) as spool:
        for text in texts:
            spool.append(text)
        spool.flush()
        order = list(range(len(texts)))
        shuffle.shuffle(order)
        assert [spool.text(place) for place in order] == [texts[place] for place in order]
        spans = [spool.span(place) for place in order]
        assert list(read_spans(path, spans)) == [texts[place] for place in order]
    assert not path.exists()


def test_the_file_goes_whatever_happens(tmp_path: Path) -> None:
    with pytest.raises(UnicodeEncodeError), Spool(tmp_path / "texts") as spool:
        spool.append("half of a pair \ud800")
    assert not (tmp_path / "texts").exists()
