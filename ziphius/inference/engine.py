"""The engine: requests in, tokens out, a step at a time."""

from __future__ import annotations

import time
from collections.abc import Callable
from collections.abc import Sequence as List
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from ziphius.config.errors import BadInput
from ziphius.inference.answer import Answer
from ziphius.inference.drawing import draw_plain
from ziphius.inference.errors import RequestError
from ziphius.inference.forward import Forward
from ziphius.inference.grammar import Grammars, Matcher
from ziphius.inference.logits import Row
from ziphius.inference.noise import fresh_seed
from ziphius.inference.paged import Feed, PagedCache
from ziphius.inference.pages import PagePool
from ziphius.inference.params import SamplingParams
from ziphius.inference.request import Request
from ziphius.inference.sampler import Sampled
from ziphius.inference.scheduler import FOREVER, Scheduler
from ziphius.inference.sequence import Chunk, Sequence, Stats, Step
from ziphius.inference.speculation import Acceptance, Drafter, Mode, Pace
from ziphius.inference.verification import Verification, verifier
from ziphius.inference.vocabulary import Vocabulary
from ziphius.kernels.draw import Draw
from ziphius.model.transformer import Transformer


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """Limits and modes of an engine. ``cache_tokens`` is the room for all requests together.

    ``speculation`` is ``auto``, ``on`` or ``off``, ``verification`` of its drafts ``coupled`` or
    ``rejection``. ``keep_experts`` lets answers tell which experts their tokens chose.
    """

    cache_tokens: int = 16_384
    page_size: int = 32
    max_running: int = 16
    max_step_tokens: int = 2048
    prefill_chunk: int = 512
    max_waiting: int = 1024
    max_waiting_tokens: int = 1_000_000
    prefix_cache: bool = True
    exact: bool = True
    speculation: Mode = "auto"
    draft_depth: int = 1
    verification: Verification = "coupled"
    keep_experts: bool = False

    def __post_init__(self) -> None:
        Pace(self.speculation, self.draft_depth)
        verifier(self.verification)


def _current(device: torch.device) -> AbstractContextManager[object]:
    """Make a GPU the thread's own: Triton's kernels run there, whichever has their tensors."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _chooses(chunk: Chunk) -> bool:
    """Whether a token is to follow the prompt: some requests only want it scored."""
    return chunk.sequence.max_length > chunk.sequence.prompt_length


class Engine:
    """Answers many requests at once with one model, on the thread that calls it.

    In exact mode a request's tokens and log-probabilities are the same bits alone or in a batch,
    with a prompt computed whole or in chunks, from a cold or a warm prefix, with or without
    speculation, preempted or not (design seam 11). With drafts that are verified by rejection the
    tokens, unless greedy, also depend on where there were drafts; their distribution does not.
    """

    def __init__(
        self,
        model: Transformer,
        vocabulary: Vocabulary | None = None,
        options: EngineOptions | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        options = options or EngineOptions()
        c = model.config
        self.model, self.vocabulary, self.options, self.clock = model, vocabulary, options, clock
        self.end_ids = frozenset(
            c.eos_token_id if isinstance(c.eos_token_id, tuple) else (c.eos_token_id,)
        )
        n_pages = -(-options.cache_tokens // options.page_size)
        self.cache = PagedCache(model, n_pages, options.page_size, experts=options.keep_experts)
        self.pool = PagePool(n_pages, options.page_size, reuse=options.prefix_cache)
        self.forward = Forward(model, self.cache, exact=options.exact)
        make_draw = model.kernels.function("draw")
        self.draw: Draw | None = make_draw() if make_draw is not None else None
        drafting = options.speculation != "off" and len(model.mtp) > 0
        if options.speculation == "on" and not model.mtp:
            raise BadInput("speculation = on: this checkpoint has no MTP module to draft with")
        pace = Pace(options.speculation, options.draft_depth)
        self.pace = pace if drafting else Pace("off", options.draft_depth)
        self.drafter = Drafter(self.forward) if drafting else None
        self.verifier = verifier(options.verification)
        self.scheduler = Scheduler(
            self.pool,
            max_running=options.max_running,
            max_step_tokens=max(options.max_step_tokens, options.max_running),
            prefill_chunk=options.prefill_chunk,
            max_waiting=options.max_waiting,
            max_waiting_tokens=options.max_waiting_tokens,
            recompute=int(drafting),
        )
        self.acceptance = Acceptance()
        self.steps = self.tokens = 0
        self.batched = 0  # running sequences, summed over decoding steps
        self._grammars: Grammars | None = None
        self._requests: dict[Sequence, tuple[Request, Answer]] = {}
        self._numbered = 0

    # --- requests ---------------------------------------------------------------------------------

    def add(
        self,
        prompt_ids: List[int],
        params: SamplingParams,
        *,
        request_id: str | None = None,
        prompt: str | None = None,
        priority: int = 0,
        salt: bytes = b"",
        deadline: float = FOREVER,
        score_only: bool = False,
    ) -> Request:
        """Put a request into the queue.

        Raises BadInput for what can never be answered and QueueFull for what can't be now.
        ``deadline`` is a time of the engine's clock. ``score_only`` chooses no token.
        """
        self.check(prompt_ids, params)
        room = self.model.config.max_position_embeddings - len(prompt_ids)
        if params.max_tokens is None:  # as far as there is room, which a small cache may bound
            room = max(1, min(room, self.pool.n_pages * self.pool.page_size - len(prompt_ids)))
        most = 0 if score_only else min(params.max_tokens or room, room)
        seed = fresh_seed() if params.seed is None else params.seed
        # Made before the queue is asked: what can't be made must not wait there.
        answers = [
            Answer(
                params, prompt_ids, index, seed, self.end_ids, self.vocabulary,
                self._matcher(params), self.verifier, self.draw,
            )
            for index in range(params.n)
        ]  # fmt: skip
        sequences = self.scheduler.add(
            list(prompt_ids),
            most,
            n=params.n,
            priority=priority,
            salt=salt,
            deadline=deadline,
            prompt_logprobs=params.prompt_logprobs is not None,
        )
        self._numbered += 1
        name = request_id if request_id is not None else f"request-{self._numbered}"
        request = Request(name, prompt, prompt_ids, params, answers)
        request.sequences = sequences
        for sequence, answer in zip(sequences, answers, strict=True):
            self._requests[sequence] = (request, answer)
        return request

    def cancel(self, request: Request) -> None:
        """End a request now, at any moment between two steps; what it has written stays."""
        for sequence, answer in zip(request.sequences, request.answers, strict=True):
            self.scheduler.cancel(sequence)
            answer.abort()
            self._requests.pop(sequence, None)

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return self.scheduler.idle

    def stats(self) -> Stats:
        """Return the scheduler's numbers of this moment."""
        return self.scheduler.stats()

    def check(self, prompt_ids: List[int], params: SamplingParams) -> None:
        """Raise BadInput for a prompt or parameters that don't fit the model."""
        c = self.model.config
        if not prompt_ids:
            raise BadInput("the prompt is empty: give at least one token to go on from")
        outside = [token for token in prompt_ids if not 0 <= token < c.vocab_size]
        if outside:
            raise BadInput(
                f"token id {outside[0]} is outside the model's vocabulary of {c.vocab_size}: "
                "the tokenizer belongs to another model"
            )
        if len(prompt_ids) >= c.max_position_embeddings:
            raise BadInput(
                f"the prompt has {len(prompt_ids)} tokens and the model's context "
                f"{c.max_position_embeddings}: shorten the prompt"
            )
        params.check_vocabulary(c.vocab_size)

    def _matcher(self, params: SamplingParams) -> Matcher | None:
        if params.constraint is None:
            return None
        if self.vocabulary is None:
            raise BadInput("a grammar needs a tokenizer: this model has none")
        if self._grammars is None:
            size = self.model.config.vocab_size
            self._grammars = Grammars(self.vocabulary, self.end_ids, size)
        return self._grammars.matcher(params.constraint)

    # --- a step -----------------------------------------------------------------------------------

    def step(self) -> list[Request]:
        """Compute the next step; return the requests that have something new.

        What breaks a step off ends its requests, because they are half done, and is raised.
        """
        began = self.clock()
        step = self.scheduler.schedule(began)
        try:
            with _current(self.model.device):
                return self._compute(step, began)
        except BaseException:
            for chunk in step.chunks:
                if (held := self._requests.pop(chunk.sequence, None)) is not None:
                    held[1].fail("the engine broke off while it computed this request")
            self.scheduler.drop(step)
            raise

    def _compute(self, step: Step, began: float) -> list[Request]:
        touched: dict[Request, None] = {}
        for sequence in step.expired:
            request, answer = self._requests.pop(sequence)
            answer.fail("the request's time was up: ask for fewer tokens or give it more time")
            touched[request] = None
        if not step.chunks:
            return list(touched)
        self.cache.copy(step.copies)
        hidden_ND = self.forward.hidden([Feed.of(chunk) for chunk in step.chunks])
        logits_NV, places = self._logits(step.chunks, hidden_ND)
        ready = self._ready(step.chunks, logits_NV, places)
        confirmed: dict[Sequence, list[int]] = {}
        finished = []
        for chunk, place, made in zip(step.chunks, places, ready, strict=True):
            request, answer = self._requests[chunk.sequence]
            rows = list(logits_NV.numpy()[place.start : place.stop])
            try:
                request.score_prompt(chunk, rows, self.draw)
            except RequestError as error:
                answer.fail(str(error))
            if not (chunk.ends or answer.finished):
                continue
            touched[request] = None
            new = [] if answer.finished else self._choose(chunk, rows, made, request, answer)
            if new:
                confirmed[chunk.sequence] = new
            if answer.finished:
                finished.append(chunk.sequence)
        for sequence in finished:
            self._keep_experts(sequence)
        self.scheduler.update(step, confirmed, finished)
        drafting = self._draft(step.chunks, hidden_ND)
        for sequence in finished:
            del self._requests[sequence]
        self._count(step.chunks, confirmed, drafting, began)
        return list(touched)

    def _logits(self, chunks: List[Chunk], hidden_ND: Tensor) -> tuple[Tensor, list[range]]:
        """Return the logits that all chunks want, a row a position, and each chunk's rows."""
        wanted: list[int] = []
        places: list[range] = []
        end = 0
        for chunk in chunks:
            end += len(chunk.tokens)
            places.append(range(len(wanted), len(wanted) + chunk.logits))
            wanted += range(end - chunk.logits, end)
        if not wanted:
            return torch.empty(0, self.model.config.vocab_size), places
        rows = torch.tensor(wanted, device=hidden_ND.device)
        return self.forward.logits(hidden_ND[rows]), places

    def _ready(
        self, chunks: List[Chunk], logits_NV: Tensor, places: List[range]
    ) -> list[list[Sampled | None]]:
        """Make the choices that a kernel can make for many answers at once."""
        answers = [
            self._requests[chunk.sequence][1] if chunk.ends and _chooses(chunk) else None
            for chunk in chunks
        ]
        last = [
            place[len(place) - 1 - chunk.drafts :]
            for place, chunk in zip(places, chunks, strict=True)
        ]
        return draw_plain(self.draw, logits_NV, last, answers)

    def _choose(
        self,
        chunk: Chunk,
        rows: List[Row],
        ready: List[Sampled | None],
        request: Request,
        answer: Answer,
    ) -> list[int]:
        """Choose a chunk's tokens and end its answer where it ends."""
        sequence = chunk.sequence
        if not _chooses(chunk):
            answer.stop_at_length()
            return []
        first = len(chunk.tokens) - chunk.drafts
        drafts = chunk.tokens[first:]
        new = answer.take(rows[len(rows) - 1 - chunk.drafts :], drafts, ready)
        if drafts:
            judged = min(len(drafts), len(new))  # fewer where the answer ended with a draft
            accepted = judged - (new[:judged] != drafts[:judged])
            self.acceptance.note(judged, accepted)
            request.drafted += len(drafts)
            request.accepted += accepted
        if len(sequence.tokens) + len(new) >= sequence.max_length:
            answer.stop_at_length()
        return new

    def _keep_experts(self, sequence: Sequence) -> None:
        """Take the experts of a sequence that has ended from its pages, before they are freed."""
        if self.cache.experts is None:
            return
        answer = self._requests[sequence][1]
        new = len(answer.output)
        fed = sequence.prompt_length + new - (new > 0)  # its last token has not been fed
        answer.experts = self.cache.chosen(sequence.table.pages, fed)

    def _draft(self, chunks: List[Chunk], hidden_ND: Tensor) -> bool:
        """Keep the MTP rows and set drafts, where that pays; say whether it was done."""
        if self.drafter is None:
            return False
        running = sum(chunk.sequence.state == "running" for chunk in chunks)
        depth = self.pace.drafts(running)
        if not depth:
            self.drafter.skip(chunks)
            return False
        answers = [
            self._requests[chunk.sequence][1] if chunk.sequence.state == "running" else None
            for chunk in chunks
        ]
        self.drafter.propose(chunks, hidden_ND, answers, depth)
        return True

    def _count(
        self,
        chunks: List[Chunk],
        confirmed: dict[Sequence, list[int]],
        drafting: bool,
        began: float,
    ) -> None:
        new = sum(map(len, confirmed.values()))
        self.steps += 1
        self.tokens += new
        self.batched += len(chunks)
        if all(len(chunk.tokens) == 1 + chunk.drafts for chunk in chunks):
            self.pace.note(len(chunks), drafting, new, self.clock() - began)
