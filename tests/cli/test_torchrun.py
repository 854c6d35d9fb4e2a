"""Runs under torchrun itself: what it adds to faults is restarts, and signals to all ranks."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cli.launch import flags, quick
from tests.cli.ranks import Torchrun, rank
from tests.cli.test_ranks import AT_ONCE, FEWER, STEPS, after, assert_same_losses
from tests.training.support import assert_same_run, metrics, overrides

LONG = ("pretrain.steps=30", "parallel.pp=2", "parallel.ep=2")


def begun(words: Path, out: Path, *more: str) -> list[str]:
    return ["pretrain", "tiny", "--out", str(out), *flags(overrides(words, *STEPS, *LONG, *more))]


@pytest.fixture(scope="module")
def whole(words: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The run that nothing interrupts, and all that it says."""
    folder = tmp_path_factory.mktemp("runs")
    out = folder / "whole"
    with Torchrun(*begun(words, out), ranks=4, log=folder / "log") as job:
        assert job.code() == 0, job.shown()
        return out, job.shown()


def test_a_run_says_what_one_process_says_and_nothing_else(whole: tuple[Path, str]) -> None:
    phase = r" *\d+\.\d s  \S.*"
    step = r" {10}step \d+/30  loss .*"
    for line in whole[1].splitlines():
        end = line.startswith(("held-out text:", "next:", "report:"))
        assert not line or end or re.fullmatch(f"{phase}|{step}", line), line
        assert "arning" not in line


def test_a_rank_that_is_killed_ends_the_job_and_three_go_on(
    words: Path, whole: tuple[Path, str], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    with Torchrun(*begun(words, out), ranks=4, log=tmp_path / "log") as job:
        job.until_step(out, 9)
        job.until((out / "stages" / "pretrain" / "step-8" / "manifest.json").is_file)
        os.kill(job.workers()[2], signal.SIGKILL)
        began = time.monotonic()
        assert job.code() == 1
        assert time.monotonic() - began < 2 * AT_ONCE  # our processes, and torchrun's own end
    [said] = re.findall(r"^error: .*", job.shown(), re.MULTILINE)
    step = len(metrics(out)) + 1
    assert re.search(
        rf"rank [013]: .* over \w+ \(ranks [\d ]+\) failed at step ({step}|{step - 1}): ", said
    )
    assert "no word from rank 2; go on with: " in said
    again = [*begun(words, out, *FEWER[3]), "--resume"]
    with Torchrun(*again, ranks=3, log=tmp_path / "again") as job:
        assert job.code() == 0, job.shown()
    assert re.search("going on after step (8|12|16|20|24)", job.shown())
    assert_same_losses(out, whole[0])


def die_once() -> None:
    first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    if first:
        after(6, lambda: rank() == 1 and os.kill(os.getpid(), signal.SIGKILL))
    quick()


def test_a_job_that_torchrun_begins_again_goes_on_by_itself(
    words: Path, whole: tuple[Path, str], tmp_path: Path
) -> None:
    out, options = tmp_path / "run", ["--max-restarts=1"]
    job = Torchrun(
        *begun(words, out), ranks=4, log=tmp_path / "log", patch=die_once, options=options
    )
    with job:
        assert job.code() == 0, job.shown()
    assert "failed at step 7" in job.shown()
    assert "going on after step 4" in job.shown()
    assert_same_run(out, whole[0])


def test_a_job_that_torchrun_begins_again_takes_no_run_of_another(
    words: Path, whole: tuple[Path, str], tmp_path: Path
) -> None:
    before = {path: path.read_bytes() for path in whole[0].rglob("*") if path.is_file()}
    again, options = begun(words, whole[0], "parallel.ep=1"), ["--max-restarts=1"]
    with Torchrun(*again, ranks=2, log=tmp_path / "log", options=options) as job:
        assert job.code() == 1
    told = re.findall(r"^error: .*", job.shown(), re.MULTILINE)
    assert len(told) == 2
    assert all("holds a run already: go on with it by --resume" in line for line in told)
    assert {path: path.read_bytes() for path in whole[0].rglob("*") if path.is_file()} == before


def test_a_signal_to_torchrun_saves_and_its_advice_goes_on_bit_for_bit(
    words: Path, whole: tuple[Path, str], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    with Torchrun(*begun(words, out), ranks=4, log=tmp_path / "log") as job:
        job.until_step(out, 3)
        job.process.send_signal(signal.SIGTERM)
        job.code()
    [said] = re.findall(
        r"^stopped after step (\d+), which is saved; go on with: (.+)", job.shown(), re.M
    )
    assert metrics(out)[-1]["step"] == int(said[0])
    assert "error: " not in job.shown()
    program, *arguments = shlex.split(said[1])
    assert Path(program).name == "torchrun" or shutil.which("torchrun") is None
    again = [sys.executable, "-m", "torch.distributed.run", "--standalone", *arguments]
    subprocess.run(again, check=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert_same_run(out, whole[0], same_steps=False)
