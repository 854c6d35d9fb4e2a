"""Needles: what is hidden where, what counts as right, and what training never sees."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from ziphius.config.errors import BadInput
from ziphius.data.tokenizer import train_tokenizer
from ziphius.evaluation.needle import (
    Fact,
    Haystack,
    NeedleTest,
    draw_facts,
    needle_map,
    needle_prompts,
    side_of,
)

TEXTS = [
    "".join(f"value_{number} = compute({number})\n" for number in range(200)),
    "def read(path):\n    with open(path) as file:\n        return file.read()\n\n" * 20,
]
TOKENIZER = train_tokenizer([*TEXTS, "Remember Belon K D W R.\n"], 500)
FACT = Fact("Belon", "K D W R")


@dataclass
class Fake:
    """An engine that answers by a function of the prompt's text."""

    answer: Callable[[str], str]
    tokenizer: Tokenizer | None = TOKENIZER

    def generate(
        self, prompts: Sequence[Any], sampling_params: Any = None, *, on_progress: Any = None
    ) -> list[Any]:
        found = []
        for prompt, params in zip(prompts, sampling_params, strict=True):
            assert params.temperature == 0
            text = TOKENIZER.decode(prompt["prompt_token_ids"])
            ids = TOKENIZER.encode(self.answer(text)).ids[: params.max_tokens]
            found.append(SimpleNamespace(outputs=[SimpleNamespace(text=TOKENIZER.decode(ids))]))
        return found


def lookup(text: str) -> str:
    """Find the question's own sentence, as a perfect reader does."""
    *before, question = text.split("\n")
    sentence = next(line for line in before if line.startswith(question))
    return sentence.removeprefix(question) + "\nand on"


@pytest.mark.parametrize(
    ("text", "right"),
    [
        (" K D W R.\n", True),
        (" K D W R", True),
        ("K D W R. The", True),
        (" K D W R The", True),
        (" K D W.", False),
        (" K D W R S.", False),
        (" K D W r.", False),
        (" K D R W.", False),
        (" X. K D W R.", False),
        (" k d w r.", False),
        (" KDWR.", False),
        (" K D W Rat.", False),
        ("", False),
    ],
)
def test_an_answer_is_the_whole_code_or_wrong(text: str, right: bool) -> None:
    assert FACT.answered_by(text) == right


def test_a_fact_is_its_question_and_its_answer() -> None:
    assert FACT.sentence == "Remember Belon K D W R.\n"
    assert FACT.sentence.startswith(FACT.question)
    assert FACT.answered_by(FACT.sentence.removeprefix(FACT.question))


# --- what is asked --------------------------------------------------------------------------------


@settings(max_examples=40)
@given(st.integers(220, 600), st.floats(0, 1), st.integers(0, 3), st.integers(0, 99))
def test_a_prompt_has_its_length_and_its_needle_at_its_depth(
    length: int, depth: float, others: int, seed: int
) -> None:
    rng = random.Random(seed)
    fact, *rest = draw_facts(1 + others, "test", rng)
    prompt = Haystack(TEXTS, TOKENIZER).prompt(fact, rest, length, depth, rng)
    assert len(prompt.ids) + prompt.answer_tokens == length
    assert prompt.ids[0] == 0
    text = TOKENIZER.decode(prompt.ids)
    assert text.endswith("\n" + fact.question) or text == fact.question
    lines = text.split("\n")
    assert all(f"{one.question} {one.code}." in lines for one in (fact, *rest))
    assert text.count(fact.name) == 2
    before = len(TOKENIZER.encode(text[: text.index(fact.sentence)]).ids)
    own, *sizes = (len(TOKENIZER.encode(one.sentence).ids) for one in (fact, *rest))
    # Of the real text what is before it is its depth, to half a line; other facts may be there too.
    text_before = depth * (length - 1 - 2 * own - sum(sizes))
    assert text_before - 20 <= before <= text_before + 20 + sum(sizes)


def test_a_length_without_room_is_refused() -> None:
    rng = random.Random(0)
    fact, *rest = draw_facts(4, "test", rng)
    with pytest.raises(BadInput, match="needles of 40 tokens: no room for the facts"):
        Haystack(TEXTS, TOKENIZER).prompt(fact, rest, 40, 0.5, rng)


def test_prompts_depend_on_the_seed_alone() -> None:
    haystack, test = Haystack(TEXTS, TOKENIZER), NeedleTest((150, 200), (0.0, 1.0), samples=2)
    first, again = (list(needle_prompts(haystack, test)) for _ in range(2))
    assert first == again
    assert len({tuple(prompt.ids) for *_, prompt in first}) == 8
    other = NeedleTest((150, 200), (0.0, 1.0), samples=2, seed=1)
    assert [p.ids for *_, p in needle_prompts(haystack, other)] != [p.ids for *_, p in first]
    # A cell is the same in another grid.
    assert list(needle_prompts(haystack, NeedleTest((200,), (1.0,), samples=2))) == [
        (0, 0, prompt) for row, column, prompt in first if (row, column) == (1, 1)
    ]


# --- the map --------------------------------------------------------------------------------------

TEST = NeedleTest((150, 220, 300), (0.0, 0.5), samples=4)


def test_a_perfect_reader_has_every_cell() -> None:
    assert np.array_equal(needle_map(Fake(lookup), TEXTS, TEST), np.ones((3, 2)))


@pytest.mark.parametrize(
    "answer",
    [
        lambda text: "",
        lambda text: lookup(text)[:-13] + ".",  # the last letter is missing
        lambda text: lookup(text).replace(".", " Q."),
        lambda text: lookup(text).lower(),
    ],
)
def test_what_is_nearly_right_counts_nothing(answer: Callable[[str], str]) -> None:
    assert not needle_map(Fake(answer), TEXTS, TEST).any()


def test_any_code_will_not_do() -> None:
    """Whoever repeats the first code of the haystack is right where it is the one asked for."""

    def first(text: str) -> str:
        sentence = next(line for line in text.split("\n") if line.startswith("Remember"))
        return " " + sentence.split(" ", 2)[2]

    shares = needle_map(Fake(first), TEXTS, NeedleTest((300,), (0.0, 0.5, 1.0), samples=16))
    assert shares[0, 0] > 0.5
    assert shares[0, 2] < 0.3


def test_shares_are_of_their_own_cell() -> None:
    """A reader of the last 100 tokens, which is another one at each length."""

    def near(text: str) -> str:
        ids = TOKENIZER.encode(text).ids
        tail = TOKENIZER.decode(ids[-110:])
        try:
            return lookup(tail)
        except StopIteration:
            return " A B C D."

    test = NeedleTest((120, 400), (0.0, 1.0), samples=4, others=1)
    assert needle_map(Fake(near), TEXTS, test).tolist() == [[1, 1], [0, 1]]


@pytest.mark.parametrize(
    "changes",
    [{"lengths": ()}, {"depths": ()}, {"samples": 0}, {"depths": (0.5, 1.1)}, {"depths": (-0.1,)}],
)
def test_an_empty_test_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(BadInput):
        NeedleTest(**{"lengths": (100,), **changes})


def test_what_cannot_be_asked() -> None:
    with pytest.raises(BadInput, match="no tokenizer"):
        needle_map(Fake(lookup, None), TEXTS, TEST)
    with pytest.raises(BadInput, match="a haystack needs text"):
        needle_map(Fake(lookup), ["", "\n\n"], TEST)


# --- what training sees ---------------------------------------------------------------------------


def test_training_never_meets_a_name_or_a_code_of_the_test() -> None:
    rng = random.Random(0)
    sides = {side: draw_facts(3000, side, rng) for side in ("train", "test")}  # type: ignore[arg-type]
    for part in ("name", "code"):
        train, test = ({getattr(fact, part) for fact in sides[side]} for side in sides)
        assert not train & test
        assert len(train) == len(test) == 3000
        assert {side_of(text) for text in train} == {"train"}
