"""What a process may use: the smaller of torch's own limit and a container's quota."""

from __future__ import annotations

from pathlib import Path

import pytest

from ziphius.training import machine


@pytest.mark.parametrize(
    ("quota", "expected"),
    [("200000 100000", 2), ("50000 100000", 1), ("max 100000", 7), ("900000 100000", 7), ("?", 7)],
)
def test_a_quota_bounds_the_threads(
    quota: str, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "cpu.max"
    file.write_text(quota + "\n", "ascii")
    monkeypatch.setattr(machine, "_QUOTA", file)
    monkeypatch.setattr("torch.get_num_threads", lambda: 7)
    assert machine.usable_threads() == expected


def test_without_a_quota_torch_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_QUOTA", tmp_path / "absent")
    monkeypatch.setattr("torch.get_num_threads", lambda: 3)
    assert machine.usable_threads() == 3


def test_peak_memory_is_that_of_a_python_with_torch() -> None:
    assert 0.05 < machine.peak_memory_gib() < 24
