"""``LLM``: a checkpoint that answers, under the names that vLLM's users know."""

from __future__ import annotations

import operator
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast

import torch
from tokenizers import Tokenizer

from ziphius.checkpoint.folder import TOKENIZER_FILE, checkpoint_folder
from ziphius.checkpoint.in_place import Loaded, load_in_place
from ziphius.config.errors import BadInput
from ziphius.config.table import nearest
from ziphius.data.tokenizer import read_tokenizer
from ziphius.inference.chat import ChatTemplate, Message, read_chat_template
from ziphius.inference.choose import CPU, choose_device, choose_kernels, require_known
from ziphius.inference.engine import Engine, EngineOptions
from ziphius.inference.outputs import Delta, RequestOutput
from ziphius.inference.params import SamplingParams
from ziphius.inference.repeat import MOST_BYTES, MOST_TOKENS
from ziphius.inference.request import Request
from ziphius.inference.sequence import QueueFull
from ziphius.inference.twin import share, twin
from ziphius.inference.vocabulary import Vocabulary
from ziphius.kernels.select import TRITON
from ziphius.model.transformer import Transformer
from ziphius.planning.answering import AnsweringPlan, Work, plan_answering

Prompt = str | Sequence[int] | Mapping[str, Any]


class LLM:
    """Loads a checkpoint and answers prompts, many at once.

    ``path`` is a Hugging Face folder or a run folder. ``dtype`` is what to compute in, by default
    what the config says. ``fast_math`` gives up that answers are the same bits whatever else is
    computed. ``device`` is ``cpu``, ``cuda`` or ``cuda:N``; on a GPU ``fast_math`` must be said.
    ``kernels`` is ``auto``, ``compiled``, ``torch`` or ``triton``. Quantised weights stay codes in
    memory. With ``expert_bytes`` routed experts are read when they are first chosen, and at most so
    many bytes of them are kept; ``auto`` keeps as many as what is free has room for. ``options``
    are those of ``EngineOptions``. Raises BadInput for a checkpoint or an option that can't be
    used.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        dtype: str | torch.dtype | None = None,
        fast_math: bool = False,
        kernels: str = "auto",
        kernel_cache: str | os.PathLike[str] | None = None,
        device: str | torch.device = CPU,
        mtp: bool = True,
        verify: bool = True,
        expert_bytes: int | Literal["auto"] | None = None,
        **options: Any,
    ) -> None:
        checked = _engine_options(options, exact=not fast_math)
        folder = checkpoint_folder(Path(path))
        where = choose_device(device)
        chosen = choose_kernels(kernels, kernel_cache, exact=not fast_math, device=where)
        if expert_bytes is not None and where != CPU:
            raise BadInput(
                f"expert_bytes (--lazy-experts) is for processors: all experts lie on {where}"
            )
        if isinstance(expert_bytes, str):
            _require_auto(expert_bytes)
            expert_bytes = _plan(folder, checked, dtype=dtype, mtp=mtp, expert_bytes=0).expert_room
        loaded = load_in_place(
            folder, chosen, dtype, where, mtp=mtp, verify=verify, expert_bytes=expert_bytes,
            in_fp8=chosen.gemm == TRITON,
        )  # fmt: skip
        tokenizer = None
        if (folder / TOKENIZER_FILE).is_file():
            tokenizer = read_tokenizer(folder / TOKENIZER_FILE)
        self._init(loaded.model, tokenizer, checked, loaded=loaded, folder=folder)

    @staticmethod
    def plan(
        path: str | os.PathLike[str],
        *,
        dtype: str | torch.dtype | None = None,
        fast_math: bool = False,
        kernels: str = "auto",
        kernel_cache: str | os.PathLike[str] | None = None,
        device: str | torch.device = CPU,
        mtp: bool = True,
        verify: bool = True,
        expert_bytes: int | Literal["auto"] | None = None,
        memory_bytes: int | None = None,
        **options: Any,
    ) -> AnsweringPlan:
        """Return what ``LLM`` with the same arguments would hold, and how long loading would take.

        Only headers are read, and a sample of the weights to time it. ``memory_bytes`` is what all
        may take, by default what is free here. ``kernels`` and their folder change nothing.
        Raises BadInput as ``LLM`` does.
        """
        require_known(kernels)
        if choose_device(device) != CPU:
            raise BadInput(f"device = '{device}': a plan counts processors' memory: leave it out")
        checked = _engine_options(options, exact=not fast_math)
        how: dict[str, Any] = {"dtype": dtype, "mtp": mtp, "memory_bytes": memory_bytes}
        if isinstance(expert_bytes, str):
            _require_auto(expert_bytes)
            expert_bytes = _plan(path, checked, expert_bytes=0, **how).expert_room
        return _plan(path, checked, verify=verify, expert_bytes=expert_bytes, **how)

    @classmethod
    def of(
        cls,
        model: Transformer,
        tokenizer: Tokenizer | None = None,
        *,
        fast_math: bool = False,
        kernels: str = "auto",
        kernel_cache: str | os.PathLike[str] | None = None,
        device: str | torch.device = CPU,
        **options: Any,
    ) -> LLM:
        """Answer with a model that is in memory, such as one that is being trained.

        Its weights are not copied where they are on ``device``; the kernels are those that answer,
        whatever the model's own are. After its weights have changed call ``weights_changed``.
        """
        checked = _engine_options(options, exact=not fast_math)
        where = choose_device(device)
        chosen = choose_kernels(kernels, kernel_cache, exact=not fast_math, device=where)
        llm = cls.__new__(cls)
        llm._init(twin(model, chosen, where), tokenizer, checked, original=model)
        return llm

    def _init(
        self,
        model: Transformer,
        tokenizer: Tokenizer | None,
        options: EngineOptions,
        *,
        original: Transformer | None = None,
        loaded: Loaded | None = None,
        folder: Path | None = None,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.loaded, self.folder, self._original = loaded, folder, original
        vocabulary = None if tokenizer is None else Vocabulary(tokenizer)
        self.engine = Engine(model, vocabulary, options)

    def weights_changed(self) -> None:
        """Answer by the weights as they are now, and forget what was computed by earlier ones.

        Raises BadInput while requests are being answered.
        """
        if not self.engine.idle:
            raise BadInput(
                "weights can't change under requests that are being answered: "
                "let them end, or cancel them"
            )
        if self._original is not None:
            share(self._original, self.model, self.model.device)
        self.engine.forward.prepare()
        self.engine.pool.forget()

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
        all). One prompt that can't be answered raises BadInput, and none is.
        """
        many = _as_list(prompts)
        return self._answer(many, _as_params(sampling_params, len(many)), on_progress)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        on_progress: Callable[[int, int], None] | None = None,
        **options: Any,
    ) -> list[RequestOutput]:
        """Answer one conversation or several; ``options`` are the chat template's own.

        A message has ``role`` and ``content``. Raises BadInput for messages that are none.
        """
        several = bool(messages) and all(isinstance(m, list | tuple) for m in messages)
        conversations = cast("Sequence[Any]", messages if several else [messages])
        prompts = [self.encode_chat(one, **options) for one in conversations]
        return self.generate(prompts, sampling_params, on_progress=on_progress)

    @cached_property
    def chat_template(self) -> ChatTemplate:
        """The checkpoint's own, or V3's format; may be set to another."""
        return ChatTemplate() if self.folder is None else read_chat_template(self.folder)

    def encode_chat(self, messages: Sequence[Message], **options: Any) -> dict[str, Any]:
        """Return a conversation as a prompt: its text, and its tokens with one first token."""
        return self.encode_rendered(self.chat_template.render(messages, **options))

    def encode_rendered(self, text: str) -> dict[str, Any]:
        """Return a conversation that a template has rendered as a prompt, with one first token."""
        ids = self._tokens_of(text)
        first = self.model.config.bos_token_id
        return {"prompt": text, "prompt_token_ids": ids if ids[:1] == [first] else [first, *ids]}

    def score(
        self, prompts: Prompt | Sequence[Prompt], prompt_logprobs: int = 0
    ) -> list[RequestOutput]:
        """Return the log-probability of every prompt's tokens, in ``prompt_logprobs``."""
        many = _as_list(prompts)
        params = SamplingParams(prompt_logprobs=prompt_logprobs, max_tokens=1)
        return self._answer(many, [params] * len(many), None, score_only=True)

    def stream(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None
    ) -> Iterator[list[Delta]]:
        """Yield what every step adds to the answers of one prompt, until they have ended.

        Leaving the loop early cancels the request.
        """
        text, ids = self.encode(prompt)
        request = self.engine.add(ids, sampling_params or SamplingParams(), prompt=text)
        try:
            while True:
                # Another stream's steps may have added to this one's answers.
                deltas = [answer.pull() for answer in request.answers]
                if any(d.token_ids or d.text or d.finish_reason for d in deltas):
                    yield deltas
                elif request.finished:
                    return
                else:
                    self.engine.step()
        finally:
            if not request.finished:
                self.engine.cancel(request)

    def encode(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        """Return a prompt's text and token ids; a text begins with the config's first token."""
        if isinstance(prompt, Mapping):
            if {"prompt_token_ids"} <= set(prompt) <= {"prompt", "prompt_token_ids"}:
                return prompt.get("prompt"), _as_ids(prompt["prompt_token_ids"])
            if set(prompt) != {"prompt"}:
                raise BadInput(f"a prompt has 'prompt' or 'prompt_token_ids', not {list(prompt)}")
            prompt = str(prompt["prompt"])
        if not isinstance(prompt, str):
            return None, _as_ids(prompt)
        return prompt, [self.model.config.bos_token_id, *self._tokens_of(prompt)]

    def _tokens_of(self, text: str) -> list[int]:
        if self.tokenizer is None:
            raise BadInput("this checkpoint has no tokenizer.json: give token ids")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise BadInput("the prompt is not valid UTF-8: give text in UTF-8") from None
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def _answer(
        self,
        prompts: Sequence[Prompt],
        params: Sequence[SamplingParams],
        on_progress: Callable[[int, int], None] | None,
        *,
        score_only: bool = False,
    ) -> list[RequestOutput]:
        jobs = [(*self.encode(prompt), p) for prompt, p in zip(prompts, params, strict=True)]
        for _, ids, p in jobs:
            self.engine.check(ids, p)
        requests: list[Request] = []

        def going() -> bool:
            done = sum(request.finished for request in requests)
            if on_progress is not None:
                on_progress(done, len(jobs))
            return done < len(jobs)

        try:
            for text, ids, p in jobs:
                while True:
                    try:
                        added = self.engine.add(ids, p, prompt=text, score_only=score_only)
                        break
                    except QueueFull:
                        going()
                        self.engine.step()
                requests.append(added)
            while going():
                self.engine.step()
        except BaseException:
            for request in requests:
                self.engine.cancel(request)
            raise
        return [request.result() for request in requests]


def _require_auto(expert_bytes: str) -> None:
    if expert_bytes != "auto":
        raise BadInput(f"expert_bytes = '{expert_bytes}': use a number of bytes, or auto")


def _engine_options(options: Mapping[str, Any], *, exact: bool) -> EngineOptions:
    known = [name for name in EngineOptions.__dataclass_fields__ if name != "exact"]
    for name in options:
        if name not in known:
            raise BadInput(f"unknown option '{name}'{nearest(name, known)}")
    return EngineOptions(exact=exact, **options)


def _plan(path: str | os.PathLike[str], options: EngineOptions, **how: Any) -> AnsweringPlan:
    drafts = 0 if options.speculation == "off" else options.draft_depth
    work = Work(
        # Whole pages, as the engine takes them.
        cache_tokens=-(-options.cache_tokens // options.page_size) * options.page_size,
        step_tokens=max(options.max_step_tokens, options.max_running),
        rows=options.max_running * (1 + drafts),
        kept_bytes=MOST_BYTES,
        kept_tokens=MOST_TOKENS,
    )
    return plan_answering(Path(path), work, **how)


def _as_ids(prompt: Any) -> list[int]:
    try:
        return [operator.index(token) for token in prompt]
    except TypeError:
        raise BadInput(f"a prompt is text or a list of token ids, not {prompt!r:.60}") from None


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
