"""Apply known mistakes to a copy of the package, one at a time: the suite must notice each.

    python tests/mutations.py              all of them
    python tests/mutations.py --only 7     one, by its number in the table
    python tests/mutations.py --part 2/8   every eighth of them, from the second on
    python tests/mutations.py --list       the table

The table is ``mutations.toml``. Exit code 0: every mistake was noticed; 1: some were not.

A mutant runs in a fork of a process that has the heavy libraries loaded, and not the package: the
fork finds its own copy first. POSIX only, as the package's own use of processes is.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TABLE = Path(__file__).with_suffix(".toml")
COPIED = ("ziphius", "tests", "pyproject.toml")
AT_A_TIME = 2
NOTICED = 1  # pytest's exit code for tests that ran and failed; others mean that they did not run
NOT_THE_COPY = 99


@dataclass(frozen=True)
class Mutation:
    """One mistake: ``old`` becomes ``new`` in ``file``, and ``tests`` must fail, every one.

    Before the version ``since_torch`` nothing runs what it changes.
    """

    number: int
    what: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    errata: str = ""
    bug: str = ""
    since_torch: str = ""

    @property
    def runs(self) -> bool:
        """Say whether the torch that is installed runs what it changes."""
        wanted, found = (
            [int(n) for n in v.split(".")[:2]]
            for v in (self.since_torch or "0.0", version("torch"))
        )
        return found >= wanted

    @property
    def name(self) -> str:
        """Say where the mistake is known from."""
        return f"13.{self.errata}" if self.errata else self.bug

    def apply(self, root: Path) -> None:
        """Change the file below ``root``. Raises ValueError unless ``old`` is there just once."""
        path = root / "ziphius" / self.file
        text = path.read_text("utf-8")
        if (found := text.count(self.old)) != 1:
            raise ValueError(f"mutation {self.number}: {found} times in {self.file}: {self.old!r}")
        path.write_text(text.replace(self.old, self.new), "utf-8")


def read_table(path: Path = TABLE) -> list[Mutation]:
    """Read the mutations, numbered from 1."""
    rows = tomllib.loads(path.read_text("utf-8"))["mutation"]
    return [
        Mutation(number=number, **{**row, "tests": tuple(row["tests"])})
        for number, row in enumerate(rows, start=1)
    ]


@dataclass(frozen=True)
class Job:
    """A test of one mutant, or without a mutation the tests of the untouched package."""

    mutation: Mutation | None
    tests: tuple[str, ...]


@dataclass
class Running:
    job: Job
    folder: Path
    started: float


@dataclass(frozen=True)
class Outcome:
    job: Job
    code: int
    seconds: float
    output: str


def run(jobs: Sequence[Job]) -> list[Outcome]:
    """Run the jobs, AT_A_TIME processes at once; return their outcomes as they end."""
    _load_libraries()
    waiting, running, outcomes = list(jobs), dict[int, Running](), list[Outcome]()
    with tempfile.TemporaryDirectory(prefix="mutants-") as base:
        while waiting or running:
            while waiting and len(running) < AT_A_TIME:
                job = waiting.pop(0)
                folder = _copy(Path(base))
                if job.mutation is not None:
                    job.mutation.apply(folder)
                running[_fork(job, folder)] = Running(job, folder, time.monotonic())
            pid, status = os.wait()
            done = running.pop(pid)
            outcomes.append(
                Outcome(
                    done.job,
                    os.waitstatus_to_exitcode(status),
                    time.monotonic() - done.started,
                    (done.folder / "output.txt").read_text("utf-8", "replace"),
                )
            )
            _show(outcomes[-1])
            shutil.rmtree(done.folder)
    return outcomes


def _load_libraries() -> None:
    """Import what every test needs, once. The package itself must stay unknown to this process."""
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    import hypothesis  # noqa: F401
    import pydantic  # noqa: F401
    import pytest  # noqa: F401
    import tokenizers  # noqa: F401
    import torch

    torch.set_num_threads(1)
    assert not [name for name in sys.modules if name.partition(".")[0] in ("ziphius", "tests")]


def _copy(base: Path) -> Path:
    folder = Path(tempfile.mkdtemp(dir=base))
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(source, folder / name)
    return folder


def _fork(job: Job, folder: Path) -> int:
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    code = NOT_THE_COPY
    try:
        code = _in_the_copy(job, folder)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _in_the_copy(job: Job, folder: Path) -> int:
    """Run pytest inside ``folder``, on the package there and not on the installed one."""
    import pytest

    with open(folder / "output.txt", "wb") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    os.chdir(folder)
    sys.dont_write_bytecode = True
    here = str(Path(__file__).resolve().parent)
    sys.path[:] = [str(folder), *(path for path in sys.path if path not in (here, str(ROOT)))]
    off = [f"-pno:{plugin}" for plugin in ("xdist", "warnings")]
    # Compiled kernels are kept between mutants, and between runs.
    kept = ["-o", f"cache_dir={ROOT / '.pytest_cache' / 'mutants'}"]
    code = pytest.main(["-x", "-q", "--timeout=300", *off, *kept, *job.tests])
    package = sys.modules.get("ziphius")
    if package is None or not Path(str(package.__file__)).is_relative_to(folder):
        print(f"the package under test was {package}")
        return NOT_THE_COPY
    return int(code)


def _expected(job: Job) -> int:
    return 0 if job.mutation is None else NOTICED


def _show(outcome: Outcome) -> None:
    mutation = outcome.job.mutation
    verdict = "ok" if outcome.code == _expected(outcome.job) else f"WRONG (exit {outcome.code})"
    label, test = "  - the untouched package", f"{len(outcome.job.tests)} tests"
    if mutation:
        label = f"{mutation.number:3} {mutation.name}: {mutation.what}"
        test = outcome.job.tests[0]
    print(f"{verdict:5} {outcome.seconds:5.1f} s {label}\n{'':14} {test}", flush=True)


def _part(text: str) -> tuple[int, int]:
    part, parts = map(int, text.split("/"))
    if not 1 <= part <= parts:
        raise ValueError(text)
    return part, parts


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the table, or a part of it; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", type=int, action="append", metavar="N", help="run number N")
    whole = (1, 1)
    parser.add_argument("--part", type=_part, metavar="I/N", default=whole, help="part I of N")
    parser.add_argument("--list", action="store_true", help="print the table and stop")
    options = parser.parse_args(arguments)
    part, parts = options.part
    table = [m for m in read_table() if options.only is None or m.number in options.only]
    table = table[part - 1 :: parts]
    if options.list or not table:
        for m in table:
            print(f"{m.number:3} {m.name}: {m.what} ({m.file})")
        return 0 if table else 1
    table = [m for m in table if m.runs]
    # A test that fails anyway would notice nothing: first, all of them without a mistake.
    jobs = [Job(None, tuple(sorted({test for m in table for test in m.tests})))] if table else []
    jobs += [Job(mutation, (test,)) for mutation in table for test in mutation.tests]
    started = time.monotonic()
    outcomes = run(jobs)
    wrong = [outcome for outcome in outcomes if outcome.code != _expected(outcome.job)]
    for outcome in wrong:
        _show(outcome)
        print("\n".join(outcome.output.splitlines()[-15:]))
    print(
        f"{len(table)} mutations, {len(jobs)} runs, {len(wrong)} wrong, "
        f"{time.monotonic() - started:.0f} s"
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
