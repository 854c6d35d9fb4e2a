"""What the server and the engine's process say to each other, as msgpack (design: no pickle)."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import msgspec

from ziphius.inference.logprobs import Scored
from ziphius.inference.params import SamplingParams

# --- to the engine --------------------------------------------------------------------------------


class Add(msgspec.Struct, tag="add", array_like=True):
    """A request. ``params`` are the options that differ from their defaults."""

    id: int
    prompt_ids: list[int]
    params: dict[str, Any]
    priority: int = 0
    salt: bytes = b""
    seconds: float | None = None  # from now on
    score_only: bool = False


class Cancel(msgspec.Struct, tag="cancel", array_like=True):
    """Nobody waits for this request any more."""

    id: int


class Forget(msgspec.Struct, tag="forget", array_like=True):
    """Drop the prefixes that nobody uses."""


class Stop(msgspec.Struct, tag="stop", array_like=True):
    """End the process, with everything in it."""


Command = Add | Cancel | Forget | Stop

# --- from the engine ------------------------------------------------------------------------------


class ModelInfo(msgspec.Struct, array_like=True):
    """What the server has to know of the model and its engine."""

    vocab_size: int
    context: int  # tokens of a prompt and its answer
    bos: int
    eos: list[int]
    dtype: str
    device: str
    kernels: str
    speculation: str  # off, auto or on
    draft_depth: int
    max_running: int
    cache_tokens: int
    page_size: int
    parameters: int


class Numbers(msgspec.Struct, array_like=True):
    """The engine at a moment. The last nine are counted from its start."""

    running: int = 0
    waiting: int = 0
    waiting_tokens: int = 0
    pages: int = 0
    used: int = 0
    cached: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    preemptions: int = 0
    expired: int = 0
    steps: int = 0
    tokens: int = 0
    batched: int = 0
    judged: list[int] = []
    accepted: list[int] = []


class Ready(msgspec.Struct, tag="ready", array_like=True):
    """The checkpoint is loaded."""

    model: ModelInfo
    seconds: float


class Failed(msgspec.Struct, tag="failed", array_like=True):
    """The engine ends: it could not start, or a step broke it. In one line."""

    message: str
    exit_code: int


class Refused(msgspec.Struct, tag="refused", array_like=True):
    """A request that was not taken. ``kind`` is bad_input, full or failure."""

    id: int
    kind: str
    message: str


class Taken(msgspec.Struct, tag="taken", array_like=True):
    """A request that is in the engine's queue."""

    id: int


class Part(msgspec.Struct, array_like=True):
    """What a step has added to one answer of a request: the fields of ``Delta``."""

    id: int
    index: int
    text: str
    token_ids: list[int]
    offsets: list[int]
    logprobs: list[Scored]
    finish_reason: str | None
    stop_reason: str | int | None
    error: str | None


class End(msgspec.Struct, array_like=True):
    """A request of which every answer has ended."""

    id: int
    cached_tokens: int
    drafted: int
    accepted: int
    prompt_logprobs: list[Scored | None] | None


class Beat(msgspec.Struct, tag="beat", array_like=True):
    """A sign of life: after every step, every second without one, and within a long step too."""

    numbers: Numbers
    parts: list[Part] = []
    ends: list[End] = []
    # Requests that left the queue in this step, and how many seconds ago it began.
    begun: list[int] = []
    ago: float = 0.0


Report = Ready | Failed | Refused | Taken | Beat

_DEFAULTS = {known.name: getattr(SamplingParams(), known.name) for known in fields(SamplingParams)}


def pack_params(params: SamplingParams) -> dict[str, Any]:
    """Return the options that differ from their defaults."""
    return {
        name: getattr(params, name)
        for name, default in _DEFAULTS.items()
        if getattr(params, name) != default
    }
