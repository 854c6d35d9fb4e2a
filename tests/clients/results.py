"""What came of the checks: a table to read, and a dated file to keep."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

from ziphius.serving.bench.result import hardware

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"


@dataclass(frozen=True)
class Outcome:
    """One check."""

    check: str
    passed: bool
    detail: str = ""
    seconds: float = 0.0


@dataclass
class Result:
    """One client. ``commands`` are what was run, with what differs from run to run by name."""

    client: str
    version: str = ""
    commands: list[str] = field(default_factory=list)
    checks: list[Outcome] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def passed(self) -> int:
        return sum(check.passed for check in self.checks)

    @property
    def failed(self) -> list[Outcome]:
        return [check for check in self.checks if not check.passed]

    def add(self, check: str, wrong: str = "") -> None:
        """Add a check; ``wrong`` says what is, and is empty where nothing is."""
        self.checks.append(Outcome(check, not wrong, wrong))


def table(results: Sequence[Result]) -> str:
    """Return the results as lines of text."""
    rows = [("client", "version", "passed", "failed", "seconds")]
    rows += [
        (r.client, r.version, str(r.passed), str(len(r.failed)), f"{r.seconds:.0f}")
        for r in results
    ]
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    lines = []
    for row in rows:
        left = [cell.ljust(width) for cell, width in zip(row[:2], widths[:2], strict=True)]
        right = [cell.rjust(width) for cell, width in zip(row[2:], widths[2:], strict=True)]
        lines.append("  ".join([*left, *right]))
    for result in results:
        lines += [f"{result.client}: {one.check}: {one.detail}" for one in result.failed]
    return "\n".join(lines)


def record(results: Sequence[Result], checkpoint: str, *, only: str | None) -> Path:
    """Keep the results in today's file; some of the clients have one of their own."""
    found: dict[str, Any] = {
        "benchmark": "clients",
        "date": date.today().isoformat(),
        "command": " ".join(["python -m tests.clients", *sys.argv[1:]]),
        "commit": _git("rev-parse", "--short", "HEAD") + ("+" if _git("status", "-s") else ""),
        "hardware": hardware(),
        "checkpoint": checkpoint,
        "clients": {
            r.client: {
                "version": r.version,
                "passed": r.passed,
                "failed": len(r.failed),
                "seconds": round(r.seconds, 1),
                "commands": r.commands,
                "checks": [asdict(one) for one in r.checks],
            }
            for r in results
        },
    }
    name = f"{found['date']}-clients{'-' + only if only else ''}.json"
    RESULTS.mkdir(parents=True, exist_ok=True)
    write(RESULTS / name, json.dumps(found, indent=2) + "\n")
    return RESULTS / name


def write(path: Path, text: str) -> None:
    """Write a file: all of it, or none."""
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(partial, 0o644)
        os.replace(partial, path)
    except BaseException:
        os.unlink(partial)
        raise


def _git(*arguments: str) -> str:
    run = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False, cwd=ROOT)
    return run.stdout.strip()
