"""What a result file says: the figures, and everything needed to measure them again."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ziphius import __version__
from ziphius.serving.bench.measure import Spread, Summary
from ziphius.serving.bench.texts import Texts

SPREADS = ("ttft", "itl", "per_token", "end_to_end", "late")
UNITS = "times are in seconds; per_token is a request's mean time between tokens, itl every one"


def make_result(
    summaries: Sequence[Summary],
    texts: Texts | None,
    *,
    server: Mapping[str, Any],
    command: str,
    settings: Mapping[str, Any],
    complete: bool = True,
) -> dict[str, Any]:
    """Return a sweep as JSON can hold it. ``texts`` is None where answers may differ."""
    return {
        "ziphius": __version__,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command,
        "server": dict(server),
        "generator": hardware(),
        "settings": dict(settings),
        "complete": complete,
        "units": UNITS,
        "levels": [_level(summary) for summary in summaries],
        "texts": None if texts is None else texts.report(),
    }


def _level(summary: Summary) -> dict[str, Any]:
    level = asdict(summary)
    for name in SPREADS:
        value: Spread | None = getattr(summary, name)
        level[name] = None if value is None else value._asdict()
    return level


def hardware() -> dict[str, Any]:
    """Return the machine that sends; on loopback it is the server's too."""
    return {
        "machine": platform.machine(),
        "processor": _line("/proc/cpuinfo", "model name") or platform.processor(),
        "cores": os.cpu_count(),
        "memory": _line("/proc/meminfo", "MemTotal"),
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
    }


def _line(path: str, name: str) -> str | None:
    """Return what a file of ``name : value`` lines says, where there is one."""
    try:
        lines = Path(path).read_text("utf-8", "replace").splitlines()
    except OSError:
        return None
    found = (line.partition(":")[2].strip() for line in lines if line.startswith(name))
    return next(found, None)
