"""``LLM``: a checkpoint that answers, under the names that vLLM's users know."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from tokenizers import Tokenizer

from ziphius.checkpoint.huggingface import TOKENIZER_FILE, checkpoint_folder
from ziphius.checkpoint.in_place import load_in_place
from ziphius.config.errors import BadInput
from ziphius.data.tokenizer import read_tokenizer
from ziphius.inference.engine import Engine, EngineOptions
from ziphius.inference.outputs import Delta, RequestOutput
from ziphius.inference.params import SamplingParams
from ziphius.inference.request import Request
from ziphius.inference.vocabulary import Vocabulary
from ziphius.kernels.select import Kernels, answering_kernels, fast_kernels, has_compiler
from ziphius.model.transformer import Transformer

Prompt = str | Sequence[int] | Mapping[str, Any]


def choose_kernels(name: str, folder: Path | None, *, exact: bool) -> Kernels:
    """Return the kernels that ``name`` means: ``auto``, ``compiled`` or ``torch``.

    Raises BadInput for another name, and for ``compiled`` where there is no compiler.
    """
    if name not in ("auto", "compiled", "torch"):
        raise BadInput(f"kernels = '{name}': use auto, compiled or torch")
    compiled = name == "compiled" or (name == "auto" and has_compiler())
    folder = folder or Path("~/.cache/ziphius").expanduser()
    choose = answering_kernels if exact else fast_kernels
    return choose(folder if compiled else None)


class LLM:
    """Loads a checkpoint and answers prompts, many at once.

    ``path`` is a Hugging Face folder or a run folder. ``dtype`` is what to compute in, by default
    what the config says. ``fast_math`` gives up that answers are the same bits whatever else is
    computed. ``speculation`` is ``auto``, ``on`` or ``off``; ``kernels`` is ``auto``, ``compiled``
    or ``torch``. Quantised weights stay codes in memory. With ``expert_bytes`` routed experts are
    read when they are first chosen, and at most so many bytes of them are kept. Raises BadInput for
    a checkpoint or an option that can't be used.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        dtype: str | torch.dtype | None = None,
        fast_math: bool = False,
        kernels: str = "auto",
        kernel_cache: str | os.PathLike[str] | None = None,
        mtp: bool = True,
        verify: bool = True,
        expert_bytes: int | None = None,
        **options: Any,
    ) -> None:
        folder = checkpoint_folder(Path(path))
        known = EngineOptions.__dataclass_fields__
        for name in options:
            if name not in known or name == "exact":
                from ziphius.config.table import nearest

                raise BadInput(f"unknown option '{name}'{nearest(name, known)}")
        cache = None if kernel_cache is None else Path(kernel_cache)
        chosen = choose_kernels(kernels, cache, exact=not fast_math)
        loaded = load_in_place(
            folder, chosen, dtype, mtp=mtp, verify=verify, expert_bytes=expert_bytes
        )
        tokenizer = None
        if (folder / TOKENIZER_FILE).is_file():
            tokenizer = read_tokenizer(folder / TOKENIZER_FILE)
        self.folder, self.loaded = folder, loaded
        self._init(loaded.model, tokenizer, EngineOptions(exact=not fast_math, **options))

    @classmethod
    def of(cls, model: Transformer, tokenizer: Tokenizer | None = None, **options: Any) -> LLM:
        """Answer with a model that is in memory: the trainer's own, in one process."""
        llm = cls.__new__(cls)
        llm._init(model, tokenizer, EngineOptions(**options))
        return llm

    def _init(
        self, model: Transformer, tokenizer: Tokenizer | None, options: EngineOptions
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        vocabulary = None if tokenizer is None else Vocabulary(tokenizer)
        self.engine = Engine(model, vocabulary, options)

    # --- answers ----------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> list[RequestOutput]:
        """Answer every prompt; the outputs have the order of the prompts.

        A prompt is a text, token ids, or ``{"prompt": ...}`` or ``{"prompt_token_ids": ...}``. One
        ``sampling_params`` serves all, or there is one a prompt. ``on_progress`` gets (answered,
        all). A prompt that can't be answered raises BadInput before anything is computed.
        """
        many = _as_list(prompts)
        params = _as_params(sampling_params, len(many))
        encoded = [self.encode(prompt) for prompt in many]
        requests = [
            self.engine.add(ids, p, prompt=text)
            for (text, ids), p in zip(encoded, params, strict=True)
        ]
        self._run(requests, on_progress)
        return [request.result() for request in requests]

    def score(
        self, prompts: Prompt | Sequence[Prompt], prompt_logprobs: int = 0
    ) -> list[RequestOutput]:
        """Return the log-probability of every prompt's tokens, in ``prompt_logprobs``."""
        params = SamplingParams(prompt_logprobs=prompt_logprobs, max_tokens=1)
        encoded = [self.encode(prompt) for prompt in _as_list(prompts)]
        requests = [
            self.engine.add(ids, params, prompt=text, score_only=True) for text, ids in encoded
        ]
        self._run(requests, None)
        return [request.result() for request in requests]

    def stream(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None
    ) -> Iterator[list[Delta]]:
        """Yield what every step adds to the answers of one prompt, until they have ended.

        Leaving the loop early cancels the request.
        """
        text, ids = self.encode(prompt)
        request = self.engine.add(ids, sampling_params or SamplingParams(), prompt=text)
        try:
            while not request.finished:
                self.engine.step()
                deltas = [answer.pull() for answer in request.answers]
                if any(d.token_ids or d.text or d.finish_reason for d in deltas):
                    yield deltas
        finally:
            if not request.finished:
                self.engine.cancel(request)

    def encode(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        """Return a prompt's text and token ids; a text begins with the config's first token."""
        if isinstance(prompt, Mapping):
            if set(prompt) == {"prompt_token_ids"}:
                return None, list(prompt["prompt_token_ids"])
            if set(prompt) != {"prompt"}:
                raise BadInput(f"a prompt has 'prompt' or 'prompt_token_ids', not {list(prompt)}")
            prompt = str(prompt["prompt"])
        if not isinstance(prompt, str):
            return None, list(prompt)
        if self.tokenizer is None:
            raise BadInput("this checkpoint has no tokenizer.json: give token ids")
        try:
            prompt.encode()
        except UnicodeEncodeError:
            raise BadInput("the prompt is not valid UTF-8: give text in UTF-8") from None
        ids = self.tokenizer.encode(prompt, add_special_tokens=False).ids
        return prompt, [self.model.config.bos_token_id, *ids]

    def _run(
        self, requests: Sequence[Request], on_progress: Callable[[int, int], None] | None
    ) -> None:
        try:
            while True:
                done = sum(request.finished for request in requests)
                if on_progress is not None:
                    on_progress(done, len(requests))
                if done == len(requests):
                    return
                self.engine.step()
        except BaseException:
            for request in requests:
                self.engine.cancel(request)
            raise


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str | Mapping):
        return [prompts]
    if prompts and all(isinstance(item, int) for item in prompts):
        return [cast("Sequence[int]", prompts)]
    return list(cast("Sequence[Prompt]", prompts))


def _as_params(
    params: SamplingParams | Sequence[SamplingParams] | None, count: int
) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    if len(params) != count:
        raise BadInput(f"{len(params)} sampling parameters for {count} prompts: give one or each")
    return list(params)
