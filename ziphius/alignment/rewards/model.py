"""A trained reward model as a reward (facts 8.2, 8.8): it scores a response, or its summary.

``ziphius reward`` trains them.
"""

from __future__ import annotations

import threading
from pathlib import Path

import torch
from tokenizers import Tokenizer

from ziphius.alignment.records import encode_pieces, written
from ziphius.alignment.rewards.compose import Part, seen
from ziphius.alignment.rewards.reward import Response
from ziphius.checkpoint.folder import TOKENIZER_FILE, checkpoint_folder
from ziphius.checkpoint.huggingface import load
from ziphius.config.errors import BadInput, ZiphiusError
from ziphius.data.tokenizer import END_THINK, THINK, read_tokenizer
from ziphius.inference.chat import ChatTemplate
from ziphius.inference.llm import LLM
from ziphius.inference.params import SamplingParams
from ziphius.model.transformer import Transformer


class ModelReward:
    """Scores responses one after another: what a response is worth depends on it alone.

    A model that was trained with reasoning writes it, ``reasoning_tokens`` at most, and is scored
    at its end; with 0 the score is read at the end of the answer.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        *,
        format: str = "v3.1",
        part: Part = "whole",
        reasoning_tokens: int = 0,
    ) -> None:
        """Raises BadInput for a model without a head for scores."""
        if model.config.num_labels != 1:
            raise BadInput(
                f"a model with num_labels = {model.config.num_labels} gives no score: train one "
                "that does by 'ziphius reward'"
            )
        self.model, self.tokenizer, self.part = model.eval(), tokenizer, part
        self.template, self.reasoning_tokens = ChatTemplate(format=format), reasoning_tokens
        self._marks = [tokenizer.token_to_id(token) or 0 for token in (THINK, END_THINK)]
        if reasoning_tokens and not all(self._marks):
            raise BadInput(f"the tokenizer has no {THINK} and {END_THINK}: no reasoning is written")
        self.llm: LLM | None = None
        if reasoning_tokens:
            device = model.device
            self.llm = LLM.of(model, tokenizer, fast_math=device.type != "cpu", device=device)
        self._lock = threading.Lock()  # several threads may ask

    def __call__(self, response: Response) -> float:
        """Return what a response is worth."""
        return self.grade(response.problem.question, seen(response, self.part).text)

    def grade(self, prompt: str, answer: str) -> float:
        """Return what an answer to a prompt is worth; an empty one has a score too."""
        return self.judge(prompt, answer)[0]

    def judge(self, prompt: str, answer: str) -> tuple[float, str]:
        """Return the score, and the reasoning that leads to it if there is any."""
        message = {"role": "assistant", "content": answer}
        question = self.template.render(
            [{"role": "user", "content": prompt}], thinking=END_THINK in answer
        )
        said = written(message, question, self.template)
        tokens = encode_pieces([(question, False), (said, False)], self.tokenizer).tokens.tolist()
        with self._lock:
            reasoning = ""
            if self.llm is not None:
                tokens, reasoning = self._reason(self.llm, tokens)
            return self._score(tokens), reasoning

    def _reason(self, llm: LLM, tokens: list[int]) -> tuple[list[int], str]:
        """Let the model write its reasoning behind an answer; return all tokens, and the text."""
        begin, end = self._marks
        prompt = [*tokens, begin]
        params = SamplingParams(
            temperature=0.0, max_tokens=self.reasoning_tokens, stop_token_ids=[end]
        )
        output = llm.generate({"prompt_token_ids": prompt}, params)[0].outputs[0]
        if output.error is not None:
            raise ZiphiusError(f"a reward's reasoning could not be written: {output.error}")
        own = [token for token in output.token_ids if token != end]
        return [*prompt, *own, end], self.tokenizer.decode(own)

    @torch.no_grad()
    def _score(self, tokens: list[int]) -> float:
        device = self.model.device
        hidden_BTD, _ = self.model.trunk(torch.tensor([tokens], device=device))
        return self.model.scores(hidden_BTD[:, -1:]).item()


def model_reward(
    checkpoint: str | Path,
    *,
    format: str = "v3.1",
    part: Part = "whole",
    reasoning_tokens: int = 0,
    dtype: str | None = None,
    device: str = "cpu",
) -> ModelReward:
    """Return a reward by the model of a checkpoint or a run: see ``ModelReward``.

    Raises BadInput for one without a tokenizer, or without a head for scores.
    """
    folder = checkpoint_folder(Path(checkpoint))
    if not (folder / TOKENIZER_FILE).is_file():
        raise BadInput(f"{folder}: has no {TOKENIZER_FILE}: scoring needs the tokenizer")
    return ModelReward(
        load(folder, dtype, device, mtp=False),
        read_tokenizer(folder / TOKENIZER_FILE),
        format=format,
        part=part,
        reasoning_tokens=reasoning_tokens,
    )
