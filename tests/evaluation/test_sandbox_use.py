"""What a caller of the sandbox gets: outcomes, threads, its own death, refusal."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.evaluation.cages import name_it, named, require_confinement, wait_for
from ziphius.config.errors import BadInput, ZiphiusError
from ziphius.evaluation import sandbox
from ziphius.evaluation.cage import filter
from ziphius.evaluation.sandbox import Limits, confinement, run_program

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="confinement needs Linux")


@pytest.fixture
def caged() -> None:
    require_confinement()


@pytest.mark.usefixtures("caged")
@pytest.mark.parametrize(
    ("program", "status", "code"),
    [
        ("print('a')", "ok", 0),
        ("exit(3)", "failed", 3),
        ("quit()", "ok", 0),
        ("1 / 0", "failed", 1),
        ("import os\nos.abort()", "failed", -signal.SIGABRT),
        ("import os\nos.kill(os.getpid(), 9)", "killed", -9),
        ("syntax error", "failed", 1),
        ("print('\ud800')", "ok", 0),
        ("a = '\0'", "failed", 1),
    ],
)
def test_outcomes(program: str, status: str, code: int) -> None:
    outcome = run_program(program)
    assert (outcome.status, outcome.code) == (status, code), outcome
    assert 0 < outcome.seconds < 5


@pytest.mark.usefixtures("caged")
def test_streams_are_told_apart_and_bad_bytes_are_shown() -> None:
    program = "import os\nos.write(1, b'one\\xff')\nos.write(2, b'two')"
    outcome = run_program(program)
    assert (outcome.stdout, outcome.stderr) == ("one\ufffd", "two")


@pytest.mark.usefixtures("caged")
def test_input_larger_than_a_pipe_arrives_and_need_not_be_read() -> None:
    text = "0123456789" * 100_000
    assert run_program("print(len(input()))", stdin=text).stdout == "1000000\n"
    assert run_program("print('done')", stdin=text).stdout == "done\n"
    assert run_program("print(len(open('main.py').read()))" + " " * 500_000).stdout == "500034\n"


@pytest.mark.usefixtures("caged")
def test_the_library_works_as_programs_expect() -> None:
    program = (
        "import json, re, collections, heapq, itertools, math, sqlite3, ssl, ctypes, tempfile\n"
        "import dataclasses, typing, decimal, asyncio, subprocess, sys, pickle\n"
        "@dataclasses.dataclass\nclass A:\n    x: int\n"
        "assert pickle.loads(pickle.dumps(A(1))) == A(1)\n"
        "asyncio.run(asyncio.sleep(0))\n"
        "tempfile.TemporaryFile().write(b'x')\n"
        "print(subprocess.run([sys.executable, '-c', 'print(5)'], capture_output=True).stdout)\n"
        "open('helper.py', 'w').write('value = 7')\nimport helper\nprint(helper.value)\n"
        "if __name__ == '__main__': print({'b', 'a', 'c'})\n"
    )
    outcomes = [run_program(program) for _ in range(2)]
    assert outcomes[0].status == "ok", outcomes[0]
    assert outcomes[0].stdout.startswith("b'5\\n'\n7\n")
    # The order of a set is the same at every run.
    assert outcomes[0].stdout == outcomes[1].stdout


@pytest.mark.usefixtures("caged")
def test_threads_run_many_at_once() -> None:
    with ThreadPoolExecutor(8) as pool:
        outcomes = list(pool.map(lambda n: run_program(f"print({n} * {n})"), range(24)))
    assert [int(outcome.stdout) for outcome in outcomes] == [n * n for n in range(24)]


@pytest.mark.usefixtures("caged")
def test_no_descriptor_thread_or_child_is_left() -> None:
    run_program("")
    before = len(os.listdir("/proc/self/fd")), threading.active_count(), _children()
    for program in ("", "while True: pass", "print('x' * 10**6)"):
        run_program(program, limits=Limits(seconds=0.3))
    after = len(os.listdir("/proc/self/fd")), threading.active_count(), _children()
    assert after == before


@pytest.mark.usefixtures("caged")
def test_a_cage_ends_when_its_caller_is_killed() -> None:
    marker = f"zx{uuid.uuid4().hex[:10]}"
    program = name_it(marker) + "import os, time\nos.fork()\ntime.sleep(30)"
    caller = (
        "from ziphius.evaluation.sandbox import Limits, run_program\n"
        f"run_program({program!r}, limits=Limits(seconds=30))\n"
    )
    with subprocess.Popen([sys.executable, "-c", caller]) as process:
        assert wait_for(lambda: len(named(marker)) == 2, 20)
        process.kill()
    assert wait_for(lambda: named(marker) == [], 5)


@pytest.mark.usefixtures("caged")
def test_a_helper_that_is_killed_takes_its_cage_along() -> None:
    marker = f"zx{uuid.uuid4().hex[:10]}"
    found = []

    def run() -> None:
        found.append(run_program(name_it(marker) + "import time\ntime.sleep(20)"))

    thread = threading.Thread(target=run)
    thread.start()
    assert wait_for(lambda: bool(named(marker)), 10)
    keeper = int(_status(named(marker)[0], "PPid"))
    os.kill(int(_status(keeper, "PPid")), signal.SIGKILL)
    thread.join(10)
    assert found[0].status == "killed"
    assert wait_for(lambda: named(marker) == [], 5)


def _children() -> set[str]:
    """Return this process's children, dead ones that nobody has waited for included.

    Other tests of the same process may have some that stay.
    """
    found: set[str] = set()
    for task in os.listdir("/proc/self/task"):
        with open(f"/proc/self/task/{task}/children") as file:
            found |= set(file.read().split())
    return found


def _status(pid: int, field: str) -> str:
    with open(f"/proc/{pid}/status") as file:
        return next(line.split()[1] for line in file if line.startswith(f"{field}:"))


# Refusal


def test_it_confines_wherever_the_system_allows_it() -> None:
    """Other tests are skipped where nothing can be confined: not because a step of ours fails."""
    if shutil.which("unshare") is None:
        pytest.skip("no unshare program")
    options = "--user --map-root-user --mount --pid --net --ipc --uts --cgroup --fork --mount-proc"
    allowed = subprocess.run(["unshare", *options.split(), "true"], capture_output=True)
    if allowed.returncode:
        pytest.skip(f"the system allows no namespaces: {allowed.stderr.decode().strip()}")
    assert confinement().missing == ""


def test_it_says_that_it_can_confine_or_what_is_missing() -> None:
    found = confinement()
    assert found.possible == (found.missing == "")


def test_it_refuses_an_architecture_whose_calls_it_does_not_know(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(filter, "known", lambda machine: False)
    with pytest.raises(ZiphiusError, match=r"no filter of system calls for .* run programs on"):
        run_program("print(1)")


def test_it_refuses_where_there_is_no_linux(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox.sys, "platform", "darwin")
    assert "darwin is not Linux" in confinement().missing


def test_it_refuses_where_no_namespace_can_be_made() -> None:
    """In a user namespace that allows no more of them, which is how hardened systems refuse."""
    if shutil.which("unshare") is None:
        pytest.skip("no unshare program")
    caller = (
        "open('/proc/sys/user/max_user_namespaces', 'w').write('0')\n"
        "from ziphius.evaluation.sandbox import confinement\nprint(confinement())\n"
    )
    done = subprocess.run(
        ["unshare", "--user", "--map-root-user", sys.executable, "-c", caller],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    if "unshare:" in done.stderr:
        pytest.skip(done.stderr.strip())
    assert "possible=False" in done.stdout, done
    assert "new namespaces (user, mount, pid, net, ipc, uts, cgroup): " in done.stdout
    assert "max_user_namespaces above 0" in done.stdout


@pytest.mark.parametrize("name", ["seconds", "memory", "processes", "output"])
@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf")])
def test_limits_are_positive_numbers(name: str, value: float) -> None:
    with pytest.raises(BadInput, match=f"sandbox limit {name} = "):
        Limits(**{name: value})  # type: ignore[arg-type]
