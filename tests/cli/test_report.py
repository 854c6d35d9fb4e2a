"""``ziphius report`` as a user meets it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.report.synthetic import Plan, write_run


def ziphius(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ziphius", "report", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_it_writes_the_report_and_says_where(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", Plan(steps=30))
    done = ziphius(str(folder))
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{folder}/report.html\n", "")
    assert (folder / "report.html").read_text().startswith("<!DOCTYPE html>")


def test_it_writes_where_it_is_told(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", Plan(steps=30, finished=False))
    done = ziphius(str(folder), "--out", str(tmp_path / "page.html"))
    assert done.stdout == f"{tmp_path}/page.html\n"
    assert not (folder / "report.html").exists()
    assert (tmp_path / "page.html").exists()


def test_a_folder_that_is_no_run_is_refused_in_one_line(tmp_path: Path) -> None:
    done = ziphius(str(tmp_path))
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert f"{tmp_path}: holds no metrics.jsonl, so it is no run" in done.stderr
