"""What is free, by whoever limits it; rates of what is really read."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest

from ziphius.planning import machine
from ziphius.planning.machine import PIECE_BYTES, PIECES, free_memory, measure_rates


def groups(folder: Path, limit: str) -> Path:
    """A control group that uses 700 bytes, 200 of which are cached files."""
    files = {
        "memory.max": limit,
        "memory.current": "700",
        "memory.stat": "anon 5\ninactive_file 200",
    }
    for name, text in files.items():
        (folder / name).write_text(text + "\n", "ascii")
    return folder


def test_the_least_of_all_limits_counts(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 9 kB\nMemAvailable:       2 kB\nHugepagesize: 2048 kB\n", "ascii")
    assert free_memory(meminfo, groups(tmp_path, "max")) == (2048, "free on this machine")
    assert free_memory(meminfo, groups(tmp_path, "1000")) == (500, "left in this control group")
    assert free_memory(meminfo, groups(tmp_path, "400")) == (0, "left in this control group")
    assert free_memory(tmp_path / "absent", tmp_path / "absent") is None


def test_a_limit_of_the_process_counts() -> None:
    script = (
        "import resource; from ziphius.planning.machine import free_memory;"
        "resource.setrlimit(resource.RLIMIT_AS, (2**33, 2**33)); print(*free_memory())"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    free = done.stdout.split()[0]
    assert 0 < int(free) < 2**33
    assert resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY


def test_a_sample_is_spread_over_all_files(tmp_path: Path) -> None:
    files = [tmp_path / name for name in "abc"]
    for file, size in zip(files, (100, 5 * PIECE_BYTES, 40 * PIECE_BYTES), strict=True):
        file.write_bytes(bytes(size))
    rates = measure_rates(files)
    assert rates is not None
    assert rates.sample_bytes <= (PIECES + 1) * PIECE_BYTES
    assert rates.sample_bytes >= (PIECES - 2) * PIECE_BYTES
    assert min(rates) > 0
    assert measure_rates(files[:1]).sample_bytes == 100  # type: ignore[union-attr]
    assert measure_rates([]) is None


def test_a_slow_disk_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_bytes(bytes(10 * PIECE_BYTES))
    monkeypatch.setattr(machine, "MOST_SECONDS", -1.0)
    rates = measure_rates([tmp_path / "a"])
    assert rates is not None
    assert rates.sample_bytes == PIECE_BYTES
