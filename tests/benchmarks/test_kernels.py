"""``benchmarks/kernels.py`` around its entries: processes, budgets, tables, the result."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from support.gpu import measure as measuring
from support.gpu import show
from support.gpu.clock import HostClock, count_bytes
from support.gpu.entry import COPY, OURS, Entry, Place, Version
from support.gpu.peaks import Peaks
from support.gpu.process import Gone
from support.gpu.worker import Setting, Worker

SCRIPT = Path(__file__).parent.parent.parent / "benchmarks" / "kernels.py"
CPU = Place(torch.device("cpu"), torch.float32)
PEAKS = Peaks(bf16=1e9, fp8=0.0, copy=1e6)


def entry(**changes: Any) -> Entry:
    """Return a kernel that doubles."""
    parts: dict[str, Any] = {
        "section": "toys",
        "name": "double",
        "make": lambda generator: torch.randn(8, generator=generator),
        "reference": lambda x: x.double() * 2,
        "ours": Version(OURS, lambda x: x * 2),
        "plain": Version("reference", lambda x: x + x),
        "nbytes": 64.0,
    }
    return Entry(**{**parts, **changes})


def measured(one: Entry, *versions: Version) -> dict[str, Any]:
    return measuring.measure(one, versions, CPU, HostClock(), PEAKS, 0)


def test_a_row_has_what_was_reached() -> None:
    one = entry(flops=16.0, goal=("peer", 2.0))
    row = measured(one, one.ours, Version("peer", lambda x: (time.sleep(0.02), x * 2)[1]))
    ours, peer = row["versions"][OURS], row["versions"]["peer"]
    assert row["floor_is"] == "bytes"
    assert row["floor_us"] == pytest.approx(64)
    assert peer["us"] > 20_000
    assert peer["of_copy"] == pytest.approx(64 / (peer["us"] / 1e6) / 1e6, rel=0.05)
    assert ours["relative_error"] == 0
    assert row["goal"]["met"] is (row["goal"]["reached"] >= 2)
    assert "us," in show.line(row, 3)


def test_the_larger_of_both_floors_counts() -> None:
    assert PEAKS.floor(entry(flops=1e9)) == (1.0, "arithmetic")
    assert PEAKS.floor(entry(nbytes=2e6, flops=1e9)) == (2.0, "bytes")


def test_a_version_that_fails_says_why_and_the_others_go_on() -> None:
    def broken(x: torch.Tensor) -> torch.Tensor:
        raise ValueError("no such\nkernel")

    one = entry(goal=(COPY, 0.8))
    wrong = Version("wrong", lambda x: x * 2.1)
    row = measured(one, Version(OURS, broken), wrong, one.plain)
    assert row["versions"][OURS] == {"error": "ValueError: no such kernel"}
    assert "Wrong" in row["versions"]["wrong"]["error"]
    assert row["versions"]["reference"]["us"] > 0
    assert row["goal"] is None
    show.table([row, {"section": "toys", "name": "other", "error": "not reached"}])


def test_a_lost_device_ends_the_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "alive", lambda device: False)
    with pytest.raises(measuring.Lost) as caught:
        measured(entry(), Version("wrong", lambda x: x), entry().plain)
    assert list(caught.value.row["versions"]) == ["wrong"]


def test_bytes_of_inputs_are_counted_through_tuples() -> None:
    x = torch.zeros(4)
    assert count_bytes((x, [x, (x, 1)], "a", None)) == 48


def test_the_whole_run_on_a_processor(tmp_path: Path) -> None:
    """The last line is JSON, and says that no GPU was measured."""
    record = tmp_path / "kernels.json"
    only = ["--only", "router,norm", "--commit", "abc"]
    command = [sys.executable, str(SCRIPT), *only, "--record", str(record)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result == json.loads(record.read_text("utf-8"))
    if not torch.cuda.is_available():
        assert (result["device"], result["measured_on_gpu"]) == ("cpu", False)
    assert result["failed"] == result["not_reached"] == []
    assert {row["section"] for row in result["rows"]} == {"router", "norm"}
    assert result["commit"] == "abc"


def test_no_time_is_no_measurement_but_names_everything() -> None:
    command = [sys.executable, str(SCRIPT), "--only", "router,norm", "--seconds", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    result = json.loads(done.stdout.splitlines()[-1])
    assert len(result["not_reached"]) == len(result["rows"]) >= 3


def worker(tmp_path: Path, body: str) -> Worker:
    """Return a worker whose process answers peaks and then does as ``body`` says for a line."""
    script = tmp_path / "script.py"
    peaks = json.dumps({"bf16": 1.0, "fp8": 0.0, "copy": 1.0, "fp8_product": ""})
    lines = (
        f"import os, sys, time\nprint({peaks!r}, flush=True)\nfor line in sys.stdin:\n    {body}\n"
    )
    script.write_text(lines, "utf-8")
    return Worker(str(script), Setting("cpu", "toy"))


def test_a_process_that_ends_or_hangs_is_replaced(tmp_path: Path) -> None:
    for body, why in (("os._exit(7)", "ended with 7"), ("time.sleep(60)", "not answered")):
        asked = worker(tmp_path, body)
        asked.start(20)
        assert asked.setting.peaks is not None, "the next process does not measure again"
        for _ in range(2):
            with pytest.raises(Gone, match=why):
                asked.ask("gemm", 0, 2)
        asked.close()


def test_a_process_that_lost_the_device_gives_its_row_and_ends(tmp_path: Path) -> None:
    asked = worker(tmp_path, 'print(\'{"lost": {"versions": {}}}\', flush=True)')
    asked.start(20)
    assert asked.ask("gemm", 0, 10) == {"versions": {}}
    assert asked.ask("gemm", 1, 10) == {"versions": {}}, "from a new process"
    asked.close()
