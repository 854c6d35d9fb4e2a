"""Rewards by their names, and the judge that a recipe composes of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from ziphius.alignment.endpoint import Endpoint
from ziphius.alignment.rewards.answer import right_answer
from ziphius.alignment.rewards.code import program_passes
from ziphius.alignment.rewards.compose import Composed, Part, Weighted
from ziphius.alignment.rewards.form import marked_answer, think_form, zero_form
from ziphius.alignment.rewards.judge import Judge
from ziphius.alignment.rewards.language import language_consistency
from ziphius.alignment.rewards.length import overlong_penalty, short_and_right
from ziphius.alignment.rewards.math import MathAnswers
from ziphius.alignment.rewards.model import model_reward
from ziphius.alignment.rewards.reward import Response, Reward
from ziphius.alignment.rollout import Judge as JudgeAll
from ziphius.alignment.rollout import Judgement
from ziphius.alignment.tasks.extract import final_answer, last_boxed
from ziphius.alignment.tasks.mixture import Mixture
from ziphius.config.errors import BadInput, in_one_line
from ziphius.config.table import nearest

# Makes a reward of what follows the colon of its name.
Make = Callable[[str], Reward]
_OF_MODELS = ("helpful", "safe")
_THREADS = 8


def find_rewards(spec: str, tasks: Mixture, longest: int, say: Callable[[str], None]) -> Composed:
    """Return the weighted sum of rewards that a recipe names, divided by commas.

    Each is a name, perhaps ``:`` and what it needs, and perhaps ``=`` and its weight, else 1:
    ``answer`` (by the task), ``code`` (by tests), ``math`` (by meaning), ``form`` (think tags),
    ``zero_form`` (R1-Zero's), ``boxed``, ``language:en``, ``overlong:MARGIN``, ``short``;
    ``helpful:CHECKPOINT`` and ``safe:CHECKPOINT`` (reward models, of the summary and of all;
    ``safe:CHECKPOINT:256`` lets it reason in so many tokens first); ``judge:URL#MODEL``, perhaps
    ``#`` and a file with its key: the grade that a model behind a server gives.
    ``longest`` are the tokens that a response may have. Raises BadInput for others.
    """
    weighted = []
    for entry in filter(None, (part.strip() for part in spec.split(","))):
        name, equals, weight = entry.partition("=")
        try:
            value = float(weight) if equals else 1.0
        except ValueError:
            raise BadInput(f"rewards: {entry}: write a reward as name or name=weight") from None
        weighted.append(Weighted(name.strip(), _find(name.strip(), tasks, longest), value))
    # One model answers one after the other; waiting for it is no hanging.
    alone = any(one.name.partition(":")[0] in _OF_MODELS for one in weighted)
    return Composed(weighted, say=say, threads=1 if alone else _THREADS)


def judging(tasks: Mixture, rewards: Composed) -> JudgeAll:
    """Return what judges responses: their rewards, and whether the final answer is right.

    Programs are right where all of their tests pass, by the reward ``code``.
    """

    def judge(responses: Sequence[Response]) -> list[Judgement]:
        return [
            Judgement(scored.total, scored.values, is_right(tasks, response, scored.values))
            for response, scored in zip(responses, rewards.score(responses), strict=True)
        ]

    return judge


def is_right(tasks: Mixture, response: Response, values: Mapping[str, float] | None = None) -> bool:
    """Say whether a response ends with a right answer, whatever it is worth.

    ``values`` are its rewards, as far as they are known: a program that is not among them is run.
    """
    if tasks.task_of(response.problem).judged_by == "code":
        known = (values or {}).get("code")
        return (program_passes()(response) if known is None else known) >= 1
    answer = final_answer(response.summary) if response.finished else ""
    return bool(answer) and tasks.right(answer, response.problem)


def _find(name: str, tasks: Mixture, longest: int) -> Reward:
    kind, _, needs = name.partition(":")
    right = right_answer(tasks.tasks, final_answer)
    makes: dict[str, Make] = {
        "answer": lambda _: right,
        "code": lambda _: program_passes(),
        "math": lambda _: MathAnswers(final_answer, workers=_THREADS),
        "form": lambda _: think_form,
        "zero_form": lambda _: zero_form,
        "boxed": lambda _: marked_answer(last_boxed),
        "language": lambda needs: language_consistency(needs or "en"),
        "overlong": lambda needs: overlong_penalty(longest, _whole(name, needs)),
        "short": lambda _: short_and_right(right, longest),
        "helpful": lambda needs: _model(needs, "summary"),
        "safe": lambda needs: _model(needs, "whole"),
        "judge": lambda needs: _judge(name, needs),
    }
    if kind not in makes:
        raise BadInput(f"reward {name}: is unknown{nearest(kind, makes)}")
    return makes[kind](needs)


def _model(needs: str, part: Part) -> Reward:
    path, _, tokens = needs.rpartition(":")
    if path and tokens.isdecimal():
        return model_reward(path, part=part, reasoning_tokens=int(tokens))
    return model_reward(needs, part=part)


def _judge(name: str, needs: str) -> Reward:
    url, _, rest = needs.partition("#")
    model, _, key_file = rest.partition("#")
    if not (url and model):
        raise BadInput(f"reward {name}: say who judges, as judge:http://HOST/v1#MODEL")
    try:
        key = Path(key_file).read_text("utf-8").strip() if key_file else None
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"reward {name}: its key cannot be read: {in_one_line(error)}") from None
    return Judge(Endpoint(url, model, key))


def _whole(name: str, text: str) -> int:
    if not text.isdecimal():
        raise BadInput(f"reward {name}: say how many tokens, as in overlong:64")
    return int(text)
