"""Cleaning loses nothing that is text, and each rule removes what it names and no more."""

from __future__ import annotations

import unicodedata
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ziphius.config.data import DataConfig
from ziphius.data.clean import clean, reason_to_remove


def reason(text: str, **settings: Any) -> str | None:
    return reason_to_remove(text, DataConfig(**settings))


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("\ufeffa\n", "a\n"),
        ("a\ufeffb", "a\ufeffb"),
        ("a\r\nb\r\n", "a\nb\n"),
        ("a\r\nb\n", "a\r\nb\n"),  # mixed line breaks may mean something
        ("a\rb\r\n", "a\rb\r\n"),
        ("a\rb", "a\rb"),
        ("\ufeffa\r\n", "a\n"),
        ("", ""),
    ],
)
def test_only_a_byte_order_mark_and_line_breaks_change(text: str, cleaned: str) -> None:
    assert clean(text) == cleaned


@given(st.text(st.characters(exclude_characters="\r\ufeff")))
def test_any_other_text_stays_as_it_is(text: str) -> None:
    assert clean(text) == text


@given(st.text(st.characters(exclude_characters="\r\ufeff")))
def test_line_breaks_of_another_system_come_back(text: str) -> None:
    foreign = text.replace("\n", "\r\n")
    assert clean(foreign) == text
    assert clean(foreign).replace("\n", "\r\n") == foreign


def test_programs_that_unicode_normalisation_would_damage_are_kept() -> None:
    program = 'assert "e\u0301" != "\u00e9" and "\u212b" != "\u00c5"\n'
    assert unicodedata.normalize("NFC", program) != program
    assert clean(program) == program
    assert reason(program) is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "empty"),
        ("half of a pair \ud800", "not UTF-8"),
        ("nul \0 inside", "binary"),
        ("\x1b[31mred\x1b[0m" * 5, "control characters"),
        ("caf\ufffd" * 10, "control characters"),
        ("\x85\x92" * 10, "control characters"),
        (" \n\t", "too short"),
        ("same line\n" * 11, "repeated lines"),
        ("  same line\nsame line\n\n" * 6, "repeated lines"),
    ],
)
def test_what_is_no_text_is_removed_with_its_reason(text: str, expected: str) -> None:
    assert reason(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "x",
        "a page\n\x0cnext page\v\n\ttabs\r\n",
        "one escape \x1b in a hundred and more characters " + "x" * 100,
        "same line\n" * 10,  # nine of ten repeat: exactly the share that is allowed
        "一二三\n",
        "\n" * 50 + "def f(): ...\n",
    ],
)
def test_what_is_text_is_kept(text: str) -> None:
    assert reason(text) is None


def test_limits_are_settings() -> None:
    assert reason("four", min_characters=4) is None
    assert reason(" fou ", min_characters=4) == "too short"
    lines = "same\n" * 2 + "other\nand another\n"
    assert reason(lines, max_repeated_lines=0.25) is None
    assert reason(lines, max_repeated_lines=0.24) == "repeated lines"


def test_without_cleaning_only_what_is_no_text_at_all_goes() -> None:
    for text in ("nul \0 inside", " ", "same line\n" * 50, "\x1b" * 9):
        assert reason(text, clean=False) is None
    assert reason("", clean=False) == "empty"
    assert reason("\udcff", clean=False) == "not UTF-8"
