"""Runs programs for tests of the sandbox: confined by this user, by another, or not at all."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import pytest

import ziphius
from ziphius.evaluation.sandbox import Limits, Outcome, confinement, run_program

Run = Callable[..., Outcome]
NOBODY = 65534

_AS_USER = """
import json, sys
sys.path.insert(0, sys.argv[1])
from dataclasses import asdict
from ziphius.evaluation.sandbox import Limits, run_program
order = json.load(sys.stdin)
outcome = run_program(order["program"], stdin=order["stdin"], limits=Limits(**order["limits"]))
json.dump(asdict(outcome), sys.stdout)
"""


def here(program: str, *, stdin: str = "", limits: Limits | None = None) -> Outcome:
    """Run a program confined, by this process."""
    return run_program(program, stdin=stdin, limits=limits)


def unconfined(program: str, seconds: float = 20) -> str:
    """Run a program as any other; return what it printed: what an attack does without a cage."""
    with tempfile.TemporaryFile("w+") as out:  # a pipe would be held open by what it leaves
        subprocess.run(
            [sys.executable, "-c", program], stdout=out, stderr=subprocess.DEVNULL, timeout=seconds
        )
        out.seek(0)
        return out.read()


def require_confinement() -> None:
    """Skip where programs cannot be confined, with the reason that a caller would be told."""
    found = confinement()
    if not found.possible:
        pytest.skip(found.missing)


@contextmanager
def another_user() -> Iterator[Run]:
    """Yield a runner whose cages are built without root's rights.

    Without root this is the runner of this process; with it, an interpreter that everybody may
    read runs them as nobody. Skips where there is none.
    """
    if os.geteuid() != 0:
        yield here
        return
    python = _everybodys_python()
    folder = Path(tempfile.mkdtemp(prefix="everybodys-"))
    try:
        package = Path(ziphius.__file__).parent
        for part in ("__init__.py", "config", "evaluation"):
            copy = shutil.copytree if (package / part).is_dir() else shutil.copy
            (folder / "ziphius").mkdir(exist_ok=True)
            copy(package / part, folder / "ziphius" / part)
        subprocess.run(["chmod", "-R", "a+rX", folder], check=True)

        def run(program: str, *, stdin: str = "", limits: Limits | None = None) -> Outcome:
            order = {
                "program": program,
                "stdin": stdin,
                "limits": asdict(limits or Limits()),
            }
            done = subprocess.run(
                [python, "-B", "-c", _AS_USER, str(folder)],
                input=json.dumps(order), capture_output=True, text=True, timeout=60,
                user=NOBODY, group=NOBODY, extra_groups=[], cwd="/",
            )  # fmt: skip
            if "cannot be confined" in done.stderr:
                pytest.skip(done.stderr.strip().splitlines()[-1])
            return Outcome(**json.loads(done.stdout))

        yield run
    finally:
        shutil.rmtree(folder)


def _everybodys_python() -> str:
    for python in ("/usr/bin/python3", "/usr/local/bin/python3"):
        try:
            done = subprocess.run(
                [python, "-c", "import sys; sys.exit(sys.version_info < (3, 11))"],
                user=NOBODY, group=NOBODY, extra_groups=[], cwd="/",
            )  # fmt: skip
        except OSError:
            continue
        if done.returncode == 0:
            return python
    pytest.skip("no Python from 3.11 on that any user may run")


def name_it(marker: str) -> str:
    """Return a program's first line, which gives its processes a name to find them by."""
    return f"open('/proc/self/comm', 'w').write({marker!r})\n"


def named(marker: str) -> list[int]:
    """Return the processes of the whole machine that have a name."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                if (folder / "comm").read_text().strip() == marker:
                    found.append(int(folder.name))
            except OSError:
                continue
    return found


def wait_for(condition: Callable[[], bool], seconds: float = 10) -> bool:
    """Wait until something is so; return whether it ever was."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True
