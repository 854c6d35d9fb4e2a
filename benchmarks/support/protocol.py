"""How a process that runs one engine is spoken to. Only the standard library: peers bring no torch.

A request is a JSON line on standard input, ``{"do": METHOD, ...arguments}``; the answer is one on
standard output, ``{"value": ...}`` or ``{"error": "..."}``. An engine has these methods:

    about() -> dict                          versions and settings, for the record
    variants(measure) -> [str]               ways to compute that are worth trying, one or more
    prefill(prompt, variant) -> dict         {"seconds"}: the prompt and one token
    decode(prompts, new, variant) -> dict    {"seconds", "tokens", "batch"}: what follows the first
                                             token of every prompt, and the mean running batch
    tokens(prompt, new) -> [int]             greedy continuation

Prompts are token ids. Decoding is greedy and passes over the end token. Nothing may be found in a
cache of prefixes.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any

READY = "ready"
END_WITH_PARENT = 1  # PR_SET_PDEATHSIG of Linux


def serve(load: Callable[[], Any]) -> None:
    """Load an engine, say that it is ready, and answer until standard input ends."""
    ctypes.CDLL(None).prctl(END_WITH_PARENT, signal.SIGKILL)
    # Engines print what they like: it goes to the log.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def answer(**line: Any) -> None:
        answers.write(json.dumps(line) + "\n")
        answers.flush()

    try:
        engine = load()
    except BaseException as error:
        traceback.print_exc()
        answer(error=one_line(error))
        return
    answer(value=READY)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            value = getattr(engine, request.pop("do"))(**request)
        except Exception as error:
            traceback.print_exc()
            answer(error=one_line(error))
        else:
            answer(value=value)


def one_line(error: BaseException) -> str:
    """Return an error as a line of bounded length."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:500]


def resident_bytes() -> int:
    """Return the memory of this process that is its own or mapped from files, now."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * resource.getpagesize()
