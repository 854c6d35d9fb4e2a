"""What benchmarks share: alternating measurement, and results that say where they come from."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from datetime import date
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent.parent / "results"


def alternate(
    candidates: Mapping[str, Callable[[], object]], rounds: int
) -> dict[str, list[float]]:
    """Time every candidate once a round, in turn, after one round that does not count: seconds.

    Machines share their cores with others, so only candidates measured side by side compare.
    """
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(rounds + 1):
        for name, run in candidates.items():
            began = time.perf_counter()
            run()
            if turn:
                times[name].append(time.perf_counter() - began)
    return times


def report(
    name: str,
    figures: Mapping[str, Any],
    *,
    record: bool,
    file: Path | None = None,
    commit: str | None = None,
) -> None:
    """Print the figures with their circumstances as one JSON line; ``record`` keeps them too.

    So does ``file``, at that place. ``commit`` is that of a copy without its history.
    """
    result = {
        "benchmark": name,
        **figures,
        "date": date.today().isoformat(),
        "command": " ".join(["python", *map(_without_folder, sys.argv)]),
        "commit": commit or _git("rev-parse", "--short", "HEAD") + _changed(),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    paths = [RESULTS / f"{result['date']}-{name}.json"] if record else []
    for path in [*paths, *([file] if file else [])]:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(_without_home(json.dumps(result, indent=2)) + "\n", "utf-8")
    print(json.dumps(result))


def _without_folder(argument: str) -> str:
    """Name a file by itself: where a machine has it is nobody's business."""
    return Path(argument).name if argument.startswith("/") else argument


def _without_home(text: str) -> str:
    """Write the user's own folder as shells do."""
    return text.replace(str(Path.home()), "~")


def _changed() -> str:
    return "+" if _git("status", "-s") else ""


def _git(*arguments: str) -> str:
    try:
        run = subprocess.run(["git", *arguments], capture_output=True, text=True, timeout=20)
    except OSError:
        return ""
    return run.stdout.strip()


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else platform.processor()
