"""The script for Slurm: its options are sbatch's, bash and shellcheck accept it, and it runs.

There is no Slurm here. ``srun`` and ``scontrol`` are stand-ins that do, for one node, what the
script asks of them; torchrun, its two processes, their signals and the run are real.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.examples.support import EXAMPLES
from tests.training.support import overrides

SCRIPT = EXAMPLES / "slurm" / "pretrain.sbatch"
# sbatch(1) of Slurm 20.11 and later, https://slurm.schedmd.com/sbatch.html: options of jobs on
# several nodes, and what their values look like. None takes no value.
COUNT, NAME = r"[1-9]\d*", r"[^\s=]+"
TIME = r"\d+|\d+:\d\d|(\d+-)?\d+:\d\d:\d\d|\d+-\d+(:\d\d)?"
KNOWN: dict[str, str | None] = {
    "account": NAME, "chdir": NAME, "comment": ".+", "constraint": NAME, "contiguous": None,
    "cpus-per-gpu": COUNT, "cpus-per-task": COUNT, "dependency": NAME, "error": NAME,
    "exclude": NAME, "exclusive": r"(user|mcs)?", "export": NAME, "gpus": rf"(\w+:)?{COUNT}",
    "gpus-per-node": rf"(\w+:)?{COUNT}", "gpus-per-task": rf"(\w+:)?{COUNT}", "gres": NAME,
    "hint": NAME, "job-name": NAME, "mail-type": NAME, "mail-user": NAME, "mem": r"\d+[KMGT]?",
    "mem-per-cpu": r"\d+[KMGT]?", "mem-per-gpu": r"\d+[KMGT]?", "no-requeue": None,
    "nodelist": NAME, "nodes": rf"{COUNT}(-{COUNT})?", "ntasks": COUNT, "ntasks-per-node": COUNT,
    "open-mode": "append|truncate", "output": NAME, "partition": NAME, "qos": NAME,
    "requeue": None, "reservation": NAME, "signal": r"([RB]+:)?([A-Z]+\d?|\d+)(@\d{1,5})?",
    "switches": NAME, "threads-per-core": COUNT, "time": TIME, "time-min": TIME, "wait": None,
    "wait-all-nodes": "[01]",
}  # fmt: skip


def wrong(text: str) -> list[str]:
    """Return the directives of a script that sbatch would not take, or not read."""
    lines = text.splitlines()
    found = [(number, line[len("#SBATCH ") :]) for number, line in enumerate(lines)
             if line.startswith("#SBATCH")]  # fmt: skip
    commands = [n for n, line in enumerate(lines) if line.strip() and not line.startswith("#")]
    bad = [option for number, option in found if number > commands[0]]
    for _, option in found:
        matched = re.fullmatch(r"--([a-z-]+)(?:=(.*))?", option)
        name, value = matched.groups() if matched else ("", None)
        if name not in KNOWN:
            bad.append(option)
            continue
        form = KNOWN[name]
        fits = value is None if form is None else re.fullmatch(form, value or "")
        if not fits:
            bad.append(option)
    return bad


def options(text: str) -> dict[str, str]:
    """Return a script's directives."""
    return dict(re.findall(r"^#SBATCH --([a-z-]+)=?(.*)$", text, re.M))


def test_sbatch_knows_every_option() -> None:
    text = SCRIPT.read_text("utf-8")
    assert wrong(text) == []
    assert len(options(text)) > 8
    for old, new in (
        ("--ntasks-per-node=1", "--task-per-node=1"), ("--time=24:00:00", "--time=24h"),
        ("--signal=B:TERM@600", "--signal=B:TERM 600"), ("--requeue", "--requeue=yes"),
        ("--nodes=2", "--nodes"), ("\nset -euo", "\n: no\n#SBATCH --nodes=3\nset -euo"),
    ):  # fmt: skip
        assert old in text
        assert len(wrong(text.replace(old, new, 1))) == 1, new


def test_one_torchrun_a_node_and_time_to_save() -> None:
    text = SCRIPT.read_text("utf-8")
    given = options(text)
    assert given["ntasks-per-node"] == "1"
    seconds = int(given["signal"].partition("@")[2])
    timeout = re.search(r"TORCH_ELASTIC_SHUTDOWN_TIMEOUT=(\d+)", text)
    assert timeout is not None
    assert int(timeout[1]) < seconds, "torchrun gives up before Slurm does"


def test_bash_and_shellcheck_accept_it() -> None:
    for tool in (["bash", "-n"], [str(Path(sys.executable).with_name("shellcheck"))]):
        done = subprocess.run([*tool, str(SCRIPT)], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


# A run of it

SRUN = """#!/bin/bash
# The task of the one node gets the signals that srun gets.
while [[ $1 == --* ]]; do shift; done
exec "$@"
"""
SCONTROL = """#!/bin/bash
case $1 in
    show) echo localhost ;;
    requeue) echo "$2" >> "$REQUEUED" ;;
esac
"""
TORCHRUN = """#!/bin/bash
exec {python} -m torch.distributed.run "$@"
"""


@pytest.fixture
def cluster(tmp_path: Path) -> dict[str, str]:
    """Return the environment that Slurm gives to a job of one node with two devices."""
    programs = {
        "srun": SRUN, "scontrol": SCONTROL, "torchrun": TORCHRUN.format(python=sys.executable)
    }  # fmt: skip
    (tmp_path / "bin").mkdir()
    for name, text in programs.items():
        path = tmp_path / "bin" / name
        path.write_text(text)
        path.chmod(0o755)
    return {
        **os.environ,
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "PYTHONPATH": str(EXAMPLES.parent),
        "OMP_NUM_THREADS": "1",
        "REQUEUED": str(tmp_path / "requeued"),
        "SLURM_JOB_ID": str(free_job()),
        "SLURM_JOB_NODELIST": "localhost",
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_GPUS_ON_NODE": "2",
    }


def free_job() -> int:
    """Return the number of a job whose port nobody has."""
    for job in range(os.getpid(), os.getpid() + 1000):
        with socket.socket() as probe:
            if probe.connect_ex(("localhost", 20000 + job % 40000)):
                return job
    raise AssertionError("no port is free")


@contextmanager
def started(
    cluster: dict[str, str], text: Path, out: Path, *more: str
) -> Iterator[subprocess.Popen[str]]:
    """Run the script on the tiny recipe; what a test leaves running ends with it."""
    settings = overrides(text, "run.device=cpu", "parallel.pp=1", "parallel.ep=2", *more)
    flags = [part for setting in settings for part in ("--set", setting)]
    with subprocess.Popen(
        ["bash", str(SCRIPT), "tiny", str(out), *flags],
        env=cluster,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as job:
        try:
            yield job
        finally:
            if job.poll() is None:
                os.killpg(job.pid, signal.SIGKILL)


def steps(out: Path) -> list[int]:
    try:
        lines = (out / "metrics.jsonl").read_text("utf-8").splitlines()
    except FileNotFoundError:
        return []
    return [json.loads(line)["step"] for line in lines]


def test_a_run_saves_before_its_time_is_over_and_goes_on_when_it_is_queued_again(
    cluster: dict[str, str], words: Path, tmp_path: Path
) -> None:
    out, requeued, some = tmp_path / "run", tmp_path / "requeued", "pretrain.steps=400"
    with started(cluster, words, out, some) as job:
        ends = time.monotonic() + 120
        while len(steps(out)) < 2:
            assert job.poll() is None, job.communicate()[0]
            assert time.monotonic() < ends, "it does not train"
            time.sleep(0.05)
        job.send_signal(signal.SIGTERM)  # what --signal=B:TERM@600 sends
        said, _ = job.communicate(timeout=120)
    assert job.returncode != 0, said
    assert requeued.read_text() == f"{cluster['SLURM_JOB_ID']}\n", said
    last = steps(out)[-1]
    assert last < 400
    assert (out / "stages" / "pretrain" / f"step-{last}").is_dir(), said
    # As Slurm begins a job again.
    again = {**cluster, "SLURM_RESTART_COUNT": "1"}
    with started(again, words, out, some) as job:
        while len(steps(out)) < last + 2:
            assert job.poll() is None, job.communicate()[0]
            time.sleep(0.05)
        job.send_signal(signal.SIGTERM)
        said, _ = job.communicate(timeout=120)
    assert f"going on after step {last}" in said
    assert steps(out) == list(range(1, steps(out)[-1] + 1))


def test_a_run_that_ends_is_not_queued_again(
    cluster: dict[str, str], words: Path, tmp_path: Path
) -> None:
    with started(cluster, words, tmp_path / "run", "pretrain.steps=2") as job:
        said, _ = job.communicate(timeout=120)
    assert job.returncode == 0, said
    assert not (tmp_path / "requeued").exists()
    summary = json.loads((tmp_path / "run" / "summary.json").read_text("utf-8"))
    assert (summary["steps"], summary["processes"]) == (2, 2)
