"""What every client is run with."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.clients.checks.case import Case, as_argument
from tests.clients.environments import clean
from tests.clients.results import ROOT, Outcome, Result


@dataclass(frozen=True)
class Session:
    """The servers, the checkpoint they serve, and a client's Python. ``scratch`` may be filled."""

    case: Case
    checkpoint: Path
    python: Path
    scratch: Path
    result: Result
    seconds: float = 900.0

    def tool(self, name: str) -> str:
        """Return the path of a program of the client."""
        return str(self.python.parent / name)

    def run(
        self, command: Sequence[str], *, log: str, folder: Path = ROOT, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a client's program in ``folder``, and note the command without what is only this
        machine's.
        """
        self.result.commands.append(self._told(command))
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=self.seconds,
            cwd=folder, env=clean(**environment),
        )  # fmt: skip
        (self.scratch / log).write_text(done.stdout + done.stderr, "utf-8")
        return done

    def run_checks(self, module: str) -> None:
        """Run a module of checks in the client's environment, and take over what it says."""
        command = [str(self.python), "-m", module, as_argument(self.case)]
        done = self.run(command, log="checks.log", PYTHONPATH=str(ROOT))
        lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        self.result.checks += [Outcome(**line) for line in lines if "check" in line]
        if not self.result.checks or done.returncode > 1 or done.returncode < 0:
            last = " / ".join(done.stderr.strip().splitlines()[-2:])
            self.result.add("the checks run to their end", last or f"exit {done.returncode}")

    def _told(self, command: Sequence[str]) -> str:
        told = " ".join([Path(command[0]).name, *command[1:]])
        if as_argument(self.case) in told:
            return told.replace(as_argument(self.case), "SERVERS")
        for place, name in {
            self.case.url: "URL", str(self.scratch): "SCRATCH", str(self.checkpoint): "CHECKPOINT",
            f"{ROOT}/": "",
        }.items():  # fmt: skip
            told = told.replace(place, name)
        return told
