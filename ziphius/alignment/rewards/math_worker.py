"""The process that compares two answers by ``math-verify``: it may hang, or need much memory."""

from __future__ import annotations

import json
import os
import resource
import sys
from typing import Any

READY = "ready"
_MEMORY = 2 << 30


def main() -> None:
    """Judge one pair after the other: a JSON line ``[gold, answer]`` in, ``true`` or ``false`` out.

    The first line out says that it is ready. What cannot be read as mathematics is not equal.
    """
    # What the libraries print goes elsewhere.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    import math_verify

    print(READY, file=out, flush=True)
    for line in sys.stdin:
        gold, answer = json.loads(line)
        print(json.dumps(_equal(math_verify, gold, answer)), file=out, flush=True)


def _equal(math_verify: Any, gold: str, answer: str) -> bool:
    # In a box both are read as formulas; the time-outs are signals, the asking side has its own.
    try:
        read = [
            math_verify.parse(f"\\boxed{{{text}}}", parsing_timeout=0) for text in (gold, answer)
        ]
        return bool(math_verify.verify(*read, timeout_seconds=0))
    except Exception:
        return False
