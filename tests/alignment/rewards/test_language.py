"""The share of the reasoning that is in one language."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.alignment.rewards.support import respond
from ziphius.alignment.rewards.language import consistency, language_consistency
from ziphius.config.errors import BadInput


@pytest.mark.parametrize(
    ("language", "thinking", "worth"),
    [
        ("en", "first we add the numbers", 1.0),
        ("en", "first we 加 the numbers", 0.8),
        ("en", "сначала we add it", 0.75),
        ("zh", "首先把两个数相加", 1.0),
        # Each letter without blanks is a word: four of five.
        ("zh", "首先 add 相加", 0.8),
        ("ja", "まず数を足す カタカナ", 1.0),
        ("ko", "먼저 두 수를 더한다", 1.0),
        ("ru", "сначала сложим числа", 1.0),
        ("de", "zuerst fügen wir sie zusammen", 1.0),
        # Formulas, code, commands and variables are in no language.
        ("zh", "所以 x = 3, $y = \\sin(alpha)$ 和 `foo(bar)` \\frac", 1.0),
        ("zh", "看\n```python\nimport os\n```\n好", 1.0),
        ("en", "1 + 2 = 3", 1.0),
        ("en", "", 0.0),
        ("en", "  \n", 0.0),
    ],
)
def test_words_of_the_language_over_words(language: str, thinking: str, worth: float) -> None:
    response = respond(f"<think>{thinking}</think>答案 is 7")
    assert language_consistency(language)(response) == pytest.approx(worth)


def test_without_reasoning_there_is_no_reward() -> None:
    assert language_consistency("en")(respond("all in English")) == 0.0


def test_an_unknown_language_names_those_that_are_known() -> None:
    with pytest.raises(BadInput, match=r"language 'tlh' is not known: use one of ar, .*, zh"):
        language_consistency("tlh")


@given(st.text(max_size=60))
def test_it_is_a_share(text: str) -> None:
    assert 0 <= consistency(text, ("LATIN",)) <= 1


@given(st.integers(0, 20), st.integers(0, 20))
def test_it_is_the_ratio_of_facts(own: int, others: int) -> None:
    text = " ".join(["word"] * own + ["слово"] * others)
    expected = own / (own + others) if own + others else 1.0
    assert consistency(text, ("LATIN",)) == expected
