"""What is told of a model's answers: by hand for their style, by a fake model for their truth."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import Tokenizer

from ziphius.alignment.measure import measure
from ziphius.alignment.questions import Prompter, mixture_of
from ziphius.alignment.rewards.reward import Response
from ziphius.alignment.style import repetition, style_of
from ziphius.alignment.tasks.problem import Problem
from ziphius.config.errors import BadInput
from ziphius.data.tokenizer import train_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["what is the sum of one and two"], 300)


def response(text: str, tokens: int = 4, finished: bool = True) -> Response:
    return Response(Problem("t", "q", "a", "k"), text, tokens, finished)


def test_repetition_by_hand() -> None:
    """Of the runs a b c d, b c d a, c d a b, d a b c, a b c d the last has been there."""
    assert repetition("a b c d a b c d") == pytest.approx(1 / 5)
    assert repetition("a b c") == 0
    assert repetition("x x x x x x") == pytest.approx(2 / 3)


def test_style_is_a_mean_over_responses() -> None:
    responses = [
        response("<think>one two</think>three", 6),
        response("<think>ein два</think>drei", 2),
        response("no tags", 1, finished=False),
    ]
    style = style_of(responses)
    assert style.form == pytest.approx(2 / 3)
    assert style.mixing == pytest.approx((0 + 1 / 2) / 2)
    assert style.length == pytest.approx(3)
    assert style.unfinished == pytest.approx(1 / 3)
    assert style_of([]).length == 0


class Knowing:
    """A model that knows every ``every``-th answer, and writes nonsense otherwise."""

    def __init__(self, tasks: Any, every: int) -> None:
        self.tasks, self.every = tasks, every
        self.seen: list[Any] = []

    def generate(self, prompts: list[Any], params: Any, on_progress: Any = None) -> list[Any]:
        self.seen += prompts
        self.seeds = [one.seed for one in params]
        return [
            SimpleNamespace(outputs=[self._output(n, prompt)]) for n, prompt in enumerate(prompts)
        ]

    def _output(self, n: int, prompt: Any) -> Any:
        answer = self.tasks[tuple(prompt["prompt_token_ids"])] if n % self.every == 0 else "none"
        text = f"so</think>{answer}"
        return SimpleNamespace(text=text, token_ids=(1, 2, 3), finish_reason="stop")


def test_right_answers_are_counted_by_task(tokenizer: Tokenizer) -> None:
    from ziphius.alignment.measure import _SEED
    from ziphius.alignment.tasks.problem import distinct_problems

    tasks, prompter = mixture_of("sums,gcd"), Prompter(tokenizer, "v3.1")
    known = {
        tuple(prompter.ask(problem).prompt): problem.answer
        for task in tasks.tasks.values()
        for problem in distinct_problems(task, _SEED, "test", 6)
    }
    model: Any = Knowing(known, 2)
    found = measure(model, tasks, prompter, problems=6, max_tokens=9)
    assert found.accuracy == {"sums": 0.5, "gcd": 0.5}
    assert found.style.form == 1
    assert found.style.length == 3
    assert [sample["task"] for sample in found.samples] == ["sums", "gcd"]
    assert found.samples[0]["response"].startswith("<think>so</think>")
    assert len({tuple(p["prompt_token_ids"]) for p in model.seen}) == 12
    assert len(set(model.seeds)) == 12  # or one draw would choose every answer's first word


def test_too_few_problems_are_refused(tokenizer: Tokenizer) -> None:
    tasks, prompter = mixture_of("weekdays"), Prompter(tokenizer, "v3")
    model: Any = Knowing({}, 2)
    with pytest.raises(BadInput, match="weekdays"):
        measure(model, tasks, prompter, problems=500, max_tokens=9)
    assert model.seen == []


def test_a_base_model_is_asked_without_a_chat(tokenizer: Tokenizer) -> None:
    text = Prompter(tokenizer, "zero").text("what is 1 + 1?")
    assert text.startswith("User asks")
    assert text.endswith("User: what is 1 + 1? Assistant:")
    for tag in ("<think>", "</think>", "<answer>", "</answer>"):
        assert tag in text
    asked = Prompter(tokenizer, "zero").ask(Problem("t", "q", "a", "k"))
    assert asked.opened == ""
    assert asked.prompt[0] == 0
