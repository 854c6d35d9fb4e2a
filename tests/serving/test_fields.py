"""What requests may hold: much, but not so much that reading it holds up everybody else."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import ValidationError

from ziphius.serving.api import chat, completions, messages_in, responses_in, tokens
from ziphius.serving.api.sampling import Body

MANY = 20_000
# An error for each item of these would be seconds of work and hundreds of megabytes.
WRONG: dict[str, Any] = {
    "objects": [{}] * MANY,
    "a list of objects": [[{}] * MANY],
    "lists of objects": [[{}]] * MANY,
    "numbers and objects": [1, {}] * (MANY // 2),
    "nulls": [None] * MANY,
    "texts": ["a"] * MANY,
    "an object of objects": {str(number): {} for number in range(MANY)},
}


def bodies() -> Iterator[type[Body]]:
    """Yield the body of every route."""
    for module in (chat, completions, messages_in, responses_in, tokens):
        for name, kind in inspect.getmembers(module, inspect.isclass):
            if name.endswith("Fields") and issubclass(kind, Body):
                yield kind


BODIES = sorted(set(bodies()), key=lambda kind: kind.__name__)


def test_the_bodies_are_found() -> None:
    names = {kind.__name__ for kind in BODIES}
    assert {"ChatFields", "CompletionFields", "ResponseFields", "DetokenizeFields"} <= names


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_a_list_is_read_up_to_its_first_mistake(wrong: Any) -> None:
    for kind in BODIES:
        for name in kind.model_fields:
            assert mistakes(kind, {name: wrong}) < 60, f"{kind.__name__}.{name}"


def mistakes(kind: type[Body], values: dict[str, Any]) -> int:
    """Return how many are found."""
    try:
        kind.model_validate(values)
    except ValidationError as error:
        return error.error_count()
    return 0


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("stop", ["a"] * 65),
        ("stop", ["a" * 1001]),
        ("stop", "a" * 1001),
        ("bad_words", ["a"] * 65),
        ("stop_token_ids", [1] * 1025),
        ("logit_bias", {str(number): 1.0 for number in range(4097)}),
        ("prompt_logprobs", 21),
        ("logprobs", 21),
    ],
)
def test_what_costs_at_every_token_is_bounded(field: str, value: Any) -> None:
    with pytest.raises(ValidationError):
        completions.CompletionFields.model_validate({"prompt": "a", field: value})


@pytest.mark.parametrize("field", ["stop", "bad_words"])
def test_as_many_as_anybody_uses_are_taken(field: str) -> None:
    given = {"prompt": "a", field: ["a" * 100] * 64}
    assert completions.CompletionFields.model_validate(given)
