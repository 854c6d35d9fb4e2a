"""Whether a response has its form: think tags, R1-Zero's two parts, a marked answer."""

from __future__ import annotations

from ziphius.alignment.rewards.answer import Extract
from ziphius.alignment.rewards.reward import Response, Reward
from ziphius.data.tokenizer import END_THINK, THINK

ANSWER, END_ANSWER = "<answer>", "</answer>"


def think_form(response: Response) -> float:
    """Return 1 for a response that reasons and then says something, each between its tags.

    ``<think>``, reasoning, ``</think>``, the rest: each tag once, neither part blank, nothing
    before. An unfinished response has no form.
    """
    parts = _between(response.text, (THINK, END_THINK))
    return float(response.finished and bool(parts and parts[1].strip()))


def zero_form(response: Response) -> float:
    """Return 1 for R1-Zero's form (facts 8.7): reasoning and an answer in tags, and no more.

    ``<think>`` ``</think>`` ``<answer>`` ``</answer>``: each once, in this order, with something
    inside and only blanks elsewhere.
    """
    parts = _between(response.text, (THINK, END_THINK, ANSWER, END_ANSWER))
    whole = parts is not None and bool(parts[2].strip()) and not (parts[1] + parts[3]).strip()
    return float(response.finished and whole)


def marked_answer(extract: Extract) -> Reward:
    """Return a reward of 1 where ``extract`` finds an answer after the reasoning, as in a box."""

    def reward(response: Response) -> float:
        return float(response.finished and bool((extract(response.summary) or "").strip()))

    return reward


def _between(text: str, tags: tuple[str, ...]) -> list[str] | None:
    """Cut a text at tags that each occur once, in order; the first part must not be blank.

    Returns what follows each tag; None where the text has not that form.
    """
    if any(text.count(tag) != 1 for tag in tags):
        return None
    parts, rest = [], text
    for tag in tags:
        before, found, rest = rest.partition(tag)
        if not found:
            return None
        parts.append(before)
    before, *parts = [*parts, rest]
    return parts if not before.strip() and parts[0].strip() else None
