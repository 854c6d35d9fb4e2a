"""One Python function from a model that has just learned to write."""

from __future__ import annotations

import ast
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from ziphius.inference.llm import LLM

# The next token brings its own space: a prompt that ends in one would split the usual pieces.
PROMPT = "def"
TRIES = 8


class Function(NamedTuple):
    """What was written after the prompt, by which seed, and whether Python can parse it."""

    text: str
    seed: int
    parses: bool


def write_function(llm: LLM) -> Function:
    """Return the first of ``TRIES`` samples that is valid Python of more than a line, else the
    one of most lines.
    """
    samples = []
    for seed in range(TRIES):
        samples.append(_sample(llm, seed))
        if samples[-1].parses:
            return samples[-1]
    return max(samples, key=lambda sample: sample.text.count("\n"))


def _sample(llm: LLM, seed: int) -> Function:
    """Write one function: up to the first line that belongs to none."""
    from ziphius.inference.params import SamplingParams

    params = SamplingParams(max_tokens=120, temperature=0.4, top_p=0.9, seed=seed)
    text = PROMPT
    for (delta,) in llm.stream(PROMPT, params):
        text += delta.text
        lines = text.split("\n")
        ended = [n for n, line in enumerate(lines[1:-1], 1) if line and not line[0].isspace()]
        if ended:
            text = "\n".join(lines[: ended[0]])
            break
    text = text.rstrip()
    return Function(text, seed, parses="\n" in text and _is_python(text))


def _is_python(text: str) -> bool:
    try:
        ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True
