"""Attacks on the sandbox, each really tried, bounded in itself, and judged from outside.

Each runs in a cage that root builds and in one that an ordinary user builds. Where it could be
that an attack does nothing anywhere, it is run without a cage too, and must succeed there.
"""

from __future__ import annotations

import hashlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.evaluation.cages import (
    Run,
    another_user,
    here,
    name_it,
    named,
    require_confinement,
    unconfined,
    wait_for,
)
from ziphius.evaluation.sandbox import Limits

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="confinement needs Linux")


@pytest.fixture(params=["as this user", "as another user"], scope="module")
def run(request: pytest.FixtureRequest) -> Iterator[Run]:
    require_confinement()
    if request.param == "as this user":
        yield here
        return
    with another_user() as runner:
        yield runner


@pytest.fixture
def marker() -> Iterator[str]:
    name = f"zx{uuid.uuid4().hex[:10]}"
    yield name
    for pid in named(name):
        os.kill(pid, signal.SIGKILL)


@pytest.fixture
def secret() -> Iterator[Path]:
    """A file that every user may read, and no cage."""
    folder = Path(tempfile.mkdtemp(prefix="secret-"))
    folder.chmod(0o777)
    path = folder / "secret.txt"
    path.write_text("the secret words")
    path.chmod(0o666)
    yield path
    for entry in folder.iterdir():
        entry.unlink()
    folder.rmdir()


# Processes

FORKS = """
import os, time
made = 0
for _ in range(150):
    try:
        pid = os.fork()
    except OSError:
        break
    if pid == 0:
        time.sleep(20)
        os._exit(0)
    made += 1
print(made)
"""


def test_forks_end_at_the_limit_and_with_the_program(run: Run, marker: str) -> None:
    outcome = run(name_it(marker) + FORKS, limits=Limits(processes=10))
    assert outcome.status == "ok", outcome
    assert 1 <= int(outcome.stdout) <= 12
    assert named(marker) == []


def test_the_forks_would_be_made_without_a_cage(marker: str) -> None:
    assert int(unconfined(name_it(marker) + FORKS)) == 150
    assert len(named(marker)) == 150


def test_a_fork_bomb_is_ended_with_all_its_processes(run: Run, marker: str) -> None:
    bomb = "import os\nfor _ in range(11):\n    try:\n        os.fork()\n    except OSError:\n"
    bomb += "        pass\nwhile True:\n    pass\n"
    outcome = run(name_it(marker) + bomb, limits=Limits(seconds=0.7, cpu_seconds=30))
    assert outcome.status == "timeout", outcome
    assert outcome.seconds < 5
    assert named(marker) == []


def test_threads_count_as_processes(run: Run) -> None:
    program = (
        "import threading, time\nmade = 0\ntry:\n    for _ in range(100):\n"
        "        threading.Thread(target=time.sleep, args=(1,), daemon=True).start()\n"
        "        made += 1\nexcept RuntimeError:\n    print('no more', made)\n"
    )
    outcome = run(program, limits=Limits(processes=8, memory=1 << 30))
    assert outcome.stdout.startswith("no more"), outcome
    assert int(outcome.stdout.split()[-1]) < 11


DAEMON = """
import os, signal, sys, time
for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
    signal.signal(number, signal.SIG_IGN)
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.close(1), os.close(2)
        time.sleep(20)
    os._exit(0)
os.wait()
"""


def test_no_daemon_stays_behind(run: Run, marker: str) -> None:
    assert run(name_it(marker) + DAEMON).status == "ok"
    assert named(marker) == []


def test_the_daemon_would_stay_without_a_cage(marker: str) -> None:
    unconfined(name_it(marker) + DAEMON)
    assert len(named(marker)) == 1


def test_a_program_that_ignores_signals_is_ended(run: Run, marker: str) -> None:
    program = (
        "import signal, time\nfor n in range(1, 65):\n    try:\n"
        "        signal.signal(n, signal.SIG_IGN)\n    except (OSError, ValueError):\n"
        "        pass\nprint('here', flush=True)\nwhile True:\n    time.sleep(1)\n"
    )
    outcome = run(name_it(marker) + program, limits=Limits(seconds=0.7))
    assert (outcome.status, outcome.stdout) == ("timeout", "here\n")
    assert named(marker) == []


# Time and memory


def test_an_endless_loop_is_ended_by_the_clock(run: Run) -> None:
    outcome = run("while True: pass", limits=Limits(seconds=0.5))
    assert outcome.status == "timeout"
    assert 0.4 < outcome.seconds < 5


def test_processor_time_is_that_of_all_processes(run: Run, marker: str) -> None:
    program = "import os\nfor _ in range(2):\n    os.fork()\nwhile True: pass\n"
    outcome = run(name_it(marker) + program, limits=Limits(seconds=20, cpu_seconds=0.6))
    assert outcome.status == "timeout", outcome
    assert outcome.seconds < 10
    assert named(marker) == []


@pytest.mark.parametrize(
    "hog",
    [
        "kept = bytearray(1 << 40)",
        "kept = []\nfor _ in range(600): kept.append(bytes(range(256)) * 4096)\n",
        # Sixteen processes, each within what one may have.
        "import os, time\nfor _ in range(4): os.fork()\nkept = os.urandom(40 << 20)\ntime.sleep(5)",
    ],
    ids=["at once", "step by step", "by many"],
)
def test_a_memory_hog_is_ended(run: Run, hog: str, marker: str) -> None:
    limits = Limits(memory=128 << 20, processes=20, seconds=10, cpu_seconds=30)
    outcome = run(name_it(marker) + hog, limits=limits)
    assert outcome.status == "memory", outcome
    assert named(marker) == []


def test_pages_that_processes_share_count_once(run: Run) -> None:
    program = (
        "import os, time\nkept = os.urandom(60 << 20)\nfor _ in range(3):\n"
        "    if os.fork() == 0:\n        time.sleep(0.5)\n        os._exit(0)\n"
        "for _ in range(3): os.wait()\n"
    )
    assert run(program, limits=Limits(memory=128 << 20)).status == "ok"


@pytest.mark.parametrize(
    "way",
    [
        "import mmap; mmap.mmap(-1, 1 << 20)",
        "import os; os.memfd_create('x')",
        "import mmap; mmap.mmap(os.open('/dev/zero', os.O_RDWR), 1 << 20)",
        "import ctypes; l = ctypes.CDLL(None, use_errno=True)\n"
        "if l.shmget(0, 1 << 20, 0o1600) < 0: raise OSError(ctypes.get_errno(), 'shmget')",
    ],
    ids=["shared", "memfd", "device", "system V"],
)
def test_memory_that_no_process_shows_is_refused(run: Run, way: str) -> None:
    program = f"import os\ntry:\n    exec({way!r})\nexcept OSError as e:\n    print('refused', e)\n"
    assert run(program).stdout.startswith("refused")
    if "/dev/zero" not in way:
        assert unconfined(program) == ""


def test_files_in_memory_count_as_memory(run: Run) -> None:
    program = (
        "import time\nwith open('x', 'wb') as f:\n"
        "    for _ in range(90): f.write(b'x' * (1 << 20))\ntime.sleep(3)\n"
    )
    outcome = run(program, limits=Limits(memory=64 << 20, disk=128 << 20))
    assert outcome.status == "memory", outcome


def test_deep_recursion_is_a_failure(run: Run) -> None:
    program = (
        "import sys\nsys.setrecursionlimit(1 << 30)\n"
        "def f(n):\n    return sorted([n], key=lambda _: f(n + 1))\nf(0)\n"
    )
    outcome = run(program)
    assert outcome.status in ("failed", "memory"), outcome
    assert outcome.code != 0


# Files

READ = "try:\n    print(open({path!r}).read())\nexcept OSError as e:\n    print(type(e).__name__)\n"


def test_no_file_of_others_can_be_read(run: Run, secret: Path) -> None:
    for path in (str(secret), "/etc/passwd", f"/proc/1/root{secret}", f"/work/../..{secret}"):
        outcome = run(READ.format(path=path))
        assert outcome.stdout in ("FileNotFoundError\n", "PermissionError\n"), (path, outcome)
    assert unconfined(READ.format(path=str(secret))) == "the secret words\n"


def test_the_view_is_the_interpreter_and_one_folder(run: Run) -> None:
    program = (
        "import os, sys\nprint(*os.listdir('/'))\nprint(*os.listdir('/dev'))\n"
        "for path in ('/', '/dev/null', '/usr/lib', os.__file__, sys.executable):\n"
        "    print(bool(os.statvfs(path).f_flag & os.ST_RDONLY), end=' ')\n"
        "print()\nprint(sys.executable.split('/')[1])\n"
    )
    top, devices, read_only, own = (line.split() for line in run(program).stdout.splitlines())
    assert set(top) <= {"dev", "etc", "lib", "lib64", "proc", "tmp", "usr", "work", *own}
    assert set(devices) == {"fd", "null", "random", "shm", "stderr", "stdin", "stdout", "urandom"}
    # Read-only by the mount, not only because the files belong to somebody else.
    assert read_only == ["True"] * 5


def test_nothing_of_home_is_shown(run: Run) -> None:
    program = (
        "import os\nfor top in ('/root', '/home'):\n    for at, _, files in os.walk(top):\n"
        "        for f in files: print(os.path.join(at, f))\n"
    )
    shown = run(program, limits=Limits(output=8 << 20)).stdout.split("\n")
    # An interpreter may lie in somebody's home; it is shown, and what it brings.
    base = os.path.realpath(sys.base_prefix)
    assert [path for path in shown if path and not path.startswith(base)] == []


def test_links_lead_nowhere(run: Run, secret: Path) -> None:
    program = (
        f"import os\nos.symlink({str(secret)!r}, 'link')\nos.symlink('/', 'root')\n"
        "os.makedirs('a/b')\nos.symlink('../../../../../..', 'a/b/up')\n"
        f"for path in ('link', 'root' + {str(secret)!r}, 'a/b/up' + {str(secret)!r}):\n"
        "    try:\n        print(open(path).read())\n"
        "    except OSError as e:\n        print(type(e).__name__)\n"
        f"try:\n    os.link({str(secret)!r}, 'hard')\n    print(open('hard').read())\n"
        "except OSError as e:\n    print(type(e).__name__)\n"
    )
    assert run(program).stdout.split() == ["FileNotFoundError"] * 4


def test_nothing_is_written_outside_its_folder(run: Run, secret: Path) -> None:
    left = [secret.parent / "left", Path("/tmp/left-behind"), Path("/var/tmp/left-behind")]
    paths = [str(path) for path in (*left, Path("/left"), Path("/etc/left"), secret)]
    program = (
        f"for path in {paths!r}:\n    try:\n        open(path, 'w').write('x')\n"
        "        print('wrote', path)\n    except OSError:\n        pass\nopen('own', 'w')\n"
    )
    outcome = run(program)
    # /tmp is its own folder by another name.
    assert outcome.stdout == "wrote /tmp/left-behind\n"
    assert outcome.status == "ok"
    assert not any(path.exists() for path in left)
    assert secret.read_text() == "the secret words"


def test_the_interpreter_cannot_be_changed(run: Run) -> None:
    library = Path(os.__file__)
    before = hashlib.sha256(library.read_bytes()).digest(), library.stat().st_mode
    program = (
        "import os, sys\nfor act in (\n"
        "    lambda: open(os.__file__, 'a').write('# changed'),\n"
        "    lambda: os.chmod(os.__file__, 0o777),\n"
        "    lambda: os.rename(os.__file__, os.__file__ + '.old'),\n"
        "    lambda: os.unlink(sys.executable),\n"
        "    lambda: open(sys.executable, 'r+b'),\n"
        "    lambda: open(os.path.dirname(os.__file__) + '/new.py', 'w'),\n"
        "):\n    try:\n        act()\n        print('changed')\n    except OSError:\n"
        "        print('kept')\n"
    )
    assert run(program).stdout.split() == ["kept"] * 6
    assert (hashlib.sha256(library.read_bytes()).digest(), library.stat().st_mode) == before


def test_files_are_bounded_in_size_and_number(run: Run) -> None:
    program = (
        "import os\ntry:\n    with open('big', 'wb') as f:\n"
        "        for _ in range(64): f.write(bytes(1 << 20))\n"
        "except OSError as e: print('big', e)\n"
        "print(os.path.getsize('big') >> 20)\nos.unlink('big')\n"
        "try:\n    os.truncate(os.open('sparse', os.O_CREAT | os.O_RDWR), 1 << 30)\n"
        "except OSError as e: print('sparse', e)\n"
        "n = 0\ntry:\n    for n in range(2000): open(f'f{n}', 'w').close()\n"
        "except OSError as e: print('many', e)\nprint(n)\n"
        "kept = []\ntry:\n    while len(kept) < 500: kept.append(open('main.py'))\n"
        "except OSError as e: print('open', e)\n"
    )
    outcome = run(program, limits=Limits(disk=4 << 20, files=50, open_files=30))
    words = outcome.stdout.splitlines()
    assert [line.split()[0] for line in words] == ["big", "4", "sparse", "many", "49", "open"]


def test_two_files_together_are_bounded(run: Run) -> None:
    program = (
        "n = 0\ntry:\n    for n in range(20):\n        open(f'f{n}', 'wb').write(bytes(1 << 20))\n"
        "except OSError as e: print(n, e)\n"
    )
    assert int(run(program, limits=Limits(disk=4 << 20)).stdout.split()[0]) <= 4


# The network

CONNECT = """
import socket
for kind, address in {targets!r}:
    try:
        s = socket.socket(kind, socket.SOCK_STREAM)
        s.settimeout(2)
        s.connect(address)
        print("connected")
    except OSError as e:
        print(type(e).__name__)
"""


def test_no_socket_of_the_machine_is_reached(run: Run, marker: str, secret: Path) -> None:
    with socket.socket() as inet, socket.socket(socket.AF_UNIX) as hidden:
        inet.bind(("127.0.0.1", 0))
        inet.listen()
        hidden.bind(f"\0{marker}")
        hidden.listen()
        targets = [
            (socket.AF_INET.value, inet.getsockname()),
            (socket.AF_UNIX.value, f"\0{marker}"),
        ]
        program = CONNECT.format(targets=targets)
        assert "connected" not in run(program).stdout
        for server in (inet, hidden):
            server.setblocking(False)
            with pytest.raises(BlockingIOError):
                server.accept()
        assert unconfined(program).split() == ["connected"] * 2


def test_there_is_no_network_at_all(run: Run) -> None:
    program = (
        "import os, socket\nprint(os.readlink('/proc/self/ns/net'))\n"
        "print(open('/proc/self/net/dev').read().count(':'))\n"
        "try:\n    print(socket.getaddrinfo('localhost.example.com', 80))\n"
        "except OSError as e: print(type(e).__name__)\n"
        "for name in ('INET', 'INET6', 'NETLINK', 'PACKET', 'VSOCK'):\n"
        "    try:\n        socket.socket(getattr(socket, 'AF_' + name), 2)\n        print('made')\n"
        "    except OSError as e: print(type(e).__name__)\n"
    )
    words = run(program).stdout.split()
    assert words[0] != os.readlink("/proc/self/ns/net")
    assert words[1:] == ["1", "gaierror"] + ["PermissionError"] * 5


# Other processes, and rights

KILL = """
import os, signal
for pid in {pids!r}:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGKILL):
        try:
            os.kill(pid, number)
            print("sent", pid)
        except OSError:
            pass
"""


def test_no_process_outside_gets_a_signal(run: Run) -> None:
    with subprocess.Popen(["sleep", "20"]) as victim:
        try:
            program = KILL.format(pids=[victim.pid, os.getpid(), os.getppid(), 1])
            outcome = run(
                program + "if os.fork() == 0: signal.pause()\nos.kill(-1, 15)\nprint('end')"
            )
            # Process 1 of the cage lets itself be sent signals, and does not care.
            assert set(outcome.stdout.splitlines()) <= {"sent 1", "end"}, outcome
            assert outcome.status == "ok"
            outcome = run("import os, signal\nos.kill(0, 9)")
            assert outcome.status == "killed"
            assert victim.poll() is None
            unconfined(KILL.format(pids=[victim.pid]))
            assert victim.wait(5) < 0
        finally:
            victim.kill()


def test_other_processes_are_not_shown(run: Run) -> None:
    program = (
        "import os\nprint([n for n in os.listdir('/proc') if n.isdigit()])\n"
        "for path in ('/proc/1/environ', '/proc/1/mem', '/proc/1/fd', '/proc/1/cwd/x', "
        "'/proc/meminfo', '/proc/sys/kernel/hostname', '/sys/kernel'):\n"
        "    try:\n        open(path)\n        print('opened', path)\n    except OSError: pass\n"
    )
    assert run(program).stdout == "['2']\n"


def test_rights_cannot_be_gained(run: Run) -> None:
    program = (
        "import ctypes, os\nl = ctypes.CDLL(None, use_errno=True)\n"
        "calls = dict(\n"
        "    unshare=lambda: l.unshare(0x10000000),\n"
        "    mount=lambda: l.mount(b'x', b'/work', b'tmpfs', 0, None),\n"
        "    remount=lambda: l.mount(b'x', b'/', None, 32 | 4096, None),\n"
        "    chroot=lambda: l.chroot(b'/work'),\n"
        "    ptrace=lambda: l.ptrace(16, 1, 0, 0),\n"
        "    setuid=lambda: l.setuid(0) if os.getuid() else -1,\n"
        "    clone=lambda: l.syscall(56, 0x10000011, 0, 0, 0, 0),\n"
        "    keys=lambda: l.syscall(250, 0, -3, 1),\n"
        "    io_uring=lambda: l.syscall(425, 1, 0),\n"
        "    bpf=lambda: l.syscall(321, 0, 0, 0),\n"
        ")\n"
        "for name, call in calls.items():\n    print(name, call() >= 0, ctypes.get_errno())\n"
    )
    if os.uname().machine != "x86_64":
        pytest.skip("numbers of x86_64")
    lines = run(program).stdout.splitlines()
    assert len(lines) == 10
    assert [line for line in lines if " False " not in line] == []
    assert [line for line in lines if not line.endswith(" 1") and "setuid" not in line] == []
    status = run("print(open('/proc/self/status').read())").stdout
    assert [line.split()[1] for line in status.splitlines() if line.startswith("Cap")] == [
        "0" * 16
    ] * 5
    assert "NoNewPrivs:\t1" in status
    assert "Seccomp:\t2" in status


def test_the_environment_is_empty(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("API_KEY", "hunter2")
    outcome = run("import os\nprint(sorted(os.environ), os.listdir('.'), os.getcwd())")
    names = "'HOME', 'LANG', 'PATH', 'PYTHONDONTWRITEBYTECODE', 'PYTHONHASHSEED', 'PYTHONUTF8'"
    assert outcome.stdout == f"[{names}, 'TMPDIR'] ['main.py'] /work\n"


# Output


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_flood_is_cut_and_ended(run: Run, stream: str, marker: str) -> None:
    program = f"import sys\nfor _ in range(10**6): sys.{stream}.write('flood ' * 1000)\n"
    outcome = run(name_it(marker) + program, limits=Limits(output=10_000))
    assert outcome.status == "output"
    assert getattr(outcome, stream) == ("flood " * 2000)[:10_000]
    assert wait_for(lambda: named(marker) == [], 1)
