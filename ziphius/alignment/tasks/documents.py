"""Tasks as text of pre-training: a question, the reasoning and the answer, as plain lines."""

from __future__ import annotations

from collections.abc import Iterator

from ziphius.alignment.tasks.mixture import Mixture


def task_documents(tasks: Mixture, count: int, *, seed: int, problems: int = 4) -> Iterator[str]:
    """Yield documents of ``problems`` solved training problems each; tests' are never among them.

    Problems whose task writes no answer are left out.
    """
    for number in range(count):
        some = (tasks.problem_at(seed, "train", number * problems + n) for n in range(problems))
        solved = (f"{p.question}\n{p.steps}\n{p.answer}\n" for p in some if p.answer)
        if text := "\n".join(solved):
            yield text
