"""A virtual environment a client, made once below a folder and used again."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

TORCH = "torch>=2.11,<2.14"
# Where PyTorch keeps the builds without CUDA; pip goes on without it where it can't be reached.
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
_STAMP = ".made"
_VERSION = "import importlib.metadata as m, sys; print(*map(m.version, sys.argv[1:]))"


class CannotMake(Exception):
    """An environment can't be made here; the message says why."""


@dataclass(frozen=True)
class Environment:
    """What to install. ``torch`` comes first and without CUDA, where others would bring it."""

    name: str
    package: str
    requirements: tuple[str, ...]
    megabytes: int
    torch: bool = False
    beside: tuple[str, ...] = ()  # other packages whose versions count

    def python(self, folder: Path) -> Path:
        """Return the environment's Python; it is made unless it is there. Raises CannotMake."""
        place = folder / self.name
        python, stamp = place / "bin" / "python", place / _STAMP
        wanted = json.dumps([*self.requirements, self.torch])
        if python.exists() and stamp.is_file() and stamp.read_text("utf-8") == wanted:
            return python
        print(f"installing {self.package}: about {self.megabytes:,} MB", flush=True)
        shutil.rmtree(place, ignore_errors=True)
        _run([sys.executable, "-m", "venv", str(place)])
        pip = [str(python), "-m", "pip", "install", "--quiet"]
        if self.torch:
            index = ["--retries", "1", "--timeout", "20", "--extra-index-url", TORCH_CPU_INDEX]
            try:
                _run([*pip, *index, TORCH])
            except CannotMake:
                _run([*pip, TORCH])
        _run([*pip, *self.requirements])
        stamp.write_text(wanted, "utf-8")
        return python

    def version(self, python: Path) -> str:
        """Return the version of the client that is installed, and of those beside it."""
        run = subprocess.run(
            [str(python), "-c", _VERSION, self.package, *self.beside],
            capture_output=True,
            text=True,
            check=True,
        )
        own, *others = run.stdout.split()
        return ", ".join([own, *map(" ".join, zip(self.beside, others, strict=True))])


def _run(command: Sequence[str]) -> None:
    run = subprocess.run(command, capture_output=True, text=True, check=False, env=clean())
    if run.returncode:
        last = run.stderr.strip().splitlines()[-3:]
        raise CannotMake(f"{' '.join(command[:5])} ...: {' / '.join(last)}")


def clean(**more: str) -> dict[str, str]:
    """Return the environment variables for a client: nothing of ours is importable there."""
    return {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")} | more
