"""Problems of a mixture of tasks as prompts, in the form of a chat or in R1-Zero's."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer

from ziphius.alignment.rollout import Asked
from ziphius.alignment.tasks.mixture import Mixture
from ziphius.alignment.tasks.problem import Problem
from ziphius.config.errors import BadInput
from ziphius.config.run import RunConfig
from ziphius.data.tokenizer import BOS_ID, THINK, plain_text_tokenizer
from ziphius.inference.chat import ChatTemplate
from ziphius.inference.formats import opens_reasoning
from ziphius.inference.llm import LLM

# So many answers are written at a time; a question has room for so many tokens.
_AT_A_TIME, _LONGEST_QUESTION, _MOST_WAITING = 64, 512, 100_000
# The form of a prompt without a chat template, for base models (facts 8.7). The words are ours.
ZERO = "zero"
_ZERO_PROMPT = (
    "User asks a question and Assistant solves it. Assistant first thinks the solution through, "
    "inside <think> </think>, and then gives the user the answer, inside <answer> </answer>: "
    "<think> the reasoning </think> <answer> the answer </answer>. User: {question} Assistant:"
)


def mixture_of(tasks: str, where: str = "grpo.tasks") -> Mixture:
    """Read a mixture: names divided by commas, each perhaps with ``=`` and its weight.

    Raises BadInput, which says ``where`` they come from, for names and weights that are none.
    """
    weights: dict[str, float] = {}
    for entry in filter(None, (part.strip() for part in tasks.split(","))):
        name, equals, weight = entry.partition("=")
        try:
            weights[name.strip()] = float(weight) if equals else 1.0
        except ValueError:
            raise BadInput(f"{where}: {entry}: write a task as name or name=weight") from None
    if not weights:
        raise BadInput(f"{where}: none: name some, as sums,gcd:2")
    return Mixture.named(weights)


def open_for_asking(path: Path, run: RunConfig, format: str, longest: int) -> tuple[LLM, Prompter]:
    """Open a checkpoint to answer many problems, each in ``longest`` tokens at most.

    It computes where, and by which kernels, a run does. Raises BadInput for one without words.
    """
    llm = LLM(
        path,
        fast_math=run.device != "cpu",
        kernels=run.kernels,
        kernel_cache=run.cache,
        device=run.device,
        max_running=_AT_A_TIME,
        cache_tokens=_AT_A_TIME * (longest + _LONGEST_QUESTION),
        max_waiting=_MOST_WAITING,
        speculation="off",
    )
    if llm.tokenizer is None:
        raise BadInput(f"{path}: has no tokenizer: it cannot be asked in words")
    return llm, Prompter(llm.tokenizer, format)


def zero_prompt(question: str) -> str:
    """Return a question in R1-Zero's template, which the answer follows."""
    return _ZERO_PROMPT.format(question=question)


class Prompter:
    """Writes problems as the prompts that a model answers.

    ``format`` is a chat format, in which the answer's reasoning is opened where it can be, or
    ``zero``, whose tags are plain text: tokens for them are none that a base model has read.
    """

    def __init__(self, tokenizer: Tokenizer, format: str) -> None:
        self.tokenizer = plain_text_tokenizer(tokenizer) if format == ZERO else tokenizer
        self.template = None if format == ZERO else ChatTemplate(format=format)

    def text(self, question: str) -> str:
        """Return the prompt of a question."""
        if self.template is None:
            return zero_prompt(question)
        return self.template.render([{"role": "user", "content": question}], thinking=True)

    def ask(self, problem: Problem) -> Asked:
        """Return the prompt of a problem as tokens, BOS first."""
        text = self.text(problem.question)
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        if ids[:1] != [BOS_ID]:
            ids = [BOS_ID, *ids]
        return Asked(problem, ids, THINK if opens_reasoning(text) else "")
