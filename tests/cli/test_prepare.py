"""``ziphius prepare``: what it prints, what it leaves, and how it says no."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from tests.cli.verbs import refusal, ziphius_exits
from tests.data.preparing import contents, make_mixture
from tests.data.texts import prose, write
from ziphius.cli.follower import Follower
from ziphius.cli.prepare import _engine
from ziphius.data.engine import LocalEngine
from ziphius.data.prepared import open_prepared
from ziphius.data.ray_engine import RayEngine

SMALL = ["--set", "model.vocab_size=400", "--set", "tokenizer.vocab_size=400"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("texts")


@pytest.fixture(scope="module")
def setting(folder: Path) -> str:
    return make_mixture(folder)


def arguments(out: Path, setting: str, *more: str) -> list[str]:
    return ["prepare", "tiny", "--out", str(out), *SMALL, "--set", setting, *more]


def test_prepare_tells_what_it_left_out_and_what_there_is(
    setting: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert ziphius_exits(*arguments(out, setting)) == 0
    shown = capsys.readouterr().out
    for phase in ("reading", "training the tokenizer", "encoding"):
        assert f"{phase} ..." in shown
    prepared = open_prepared(out)
    for count in prepared.removed_counts:
        row = next(line for line in shown.splitlines() if f" {count.reason} " in line)
        assert f" {count.documents} " in row
        assert f" {count.bytes:,} " in row
        assert count.examples[0].split(" ")[0] in shown
    assert f"{prepared.documents} documents, {prepared.train_bytes:,} bytes" in shown
    assert f"{prepared.tokens:,} tokens" in shown
    text_tokens = prepared.tokens - 2 * prepared.documents
    assert f"{prepared.train_bytes / text_tokens:.2f} bytes per token" in shown
    assert f"held out: {len(prepared.heldout)} documents, {prepared.heldout_bytes:,} by" in shown
    assert prepared.sha256[:16] in shown
    assert f"pretrain tiny --out runs/first --set data.source={out}" in shown


def test_workers_change_no_byte(setting: str, tmp_path: Path) -> None:
    assert ziphius_exits(*arguments(tmp_path / "one", setting, "--workers", "1")) == 0
    assert ziphius_exits(*arguments(tmp_path / "two", setting, "--workers", "2")) == 0
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_the_engine_is_chosen_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """What Ray writes is compared in tests/data: starting it takes seconds."""
    pytest.importorskip("ray")
    local = _engine("local", 3)
    assert isinstance(local, LocalEngine)
    assert local.workers == 3
    monkeypatch.setenv("RAY_ADDRESS", "ray.example:6379")
    ray = _engine("ray", 2)
    assert isinstance(ray, RayEngine)
    assert (ray.workers, ray.address) == (2, "ray.example:6379")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--set", "data.holdout_every=1"], "data.holdout_every"),
        (["--set", "data.near_treshold=1"], "did you mean 'near_threshold'"),
        (["--set", "data.min_characters=99999"], "no text left to train on"),
        (["--engine", "spark"], "spark"),
        (["--workers", "0"], "workers"),
    ],
)
def test_bad_input_is_refused_and_leaves_nothing(
    more: list[str], said: str, setting: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in refusal(capsys, *arguments(tmp_path / "out", setting, *more))
    assert list(tmp_path.iterdir()) == []


def test_sources_that_are_wrong_are_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(source: Path | str) -> str:
        return refusal(capsys, *arguments(tmp_path / "out", f"data.source={source}"))

    assert "write 'hf:owner/name'" in said("owner/name")
    assert "hf:owner/name: train: cannot be read" in said("hf:owner/name")
    assert "its fields: 'body'" in said(folder / "rows.jsonl.gz")
    (tmp_path / "binary").write_bytes(bytes(range(256)))
    assert "binary: is not UTF-8 text" in said(tmp_path / "binary")
    (tmp_path / "binary").unlink()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_there_is_refused(
    setting: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, {"letter.txt": "mine"})
    assert "holds files" in refusal(capsys, *arguments(tmp_path, setting))
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


def test_ctrl_c_leaves_nothing(tmp_path: Path) -> None:
    """Also with worker processes, which the terminal's signal reaches too."""
    lines = (json.dumps({"text": prose(n, 400)}) for n in range(4000))
    write(tmp_path, {"rows.jsonl": "\n".join(lines)})
    command = [sys.executable, "-m", "ziphius"]
    command += arguments(tmp_path / "new" / "out", f"data.source={tmp_path / 'rows.jsonl'}")
    process = subprocess.Popen(
        [*command, "--workers", "2"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A test run in the background of a shell is born deaf to Ctrl-C, and so would this be.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("new/.out.writing-*/.texts")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err == "stopped\n"
    assert list((tmp_path / "new").iterdir()) == []


def test_without_a_terminal_progress_is_a_line_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter([0.0, 5.0, 16.0, 20.0, 40.0, 41.0, 42.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    with Follower(Console(force_terminal=False)) as follower:
        for done in (0, 10, 40, 50, 100):
            follower.tell("reading", done, 100)
        follower.tell("encoding", 0, None)
        follower.tell("encoding", 5, None)
    assert capsys.readouterr().out.splitlines() == [
        "reading ...",
        "reading: 40%, about 24 s left",
        "encoding ...",
    ]


def test_on_a_terminal_progress_is_a_bar(capsys: pytest.CaptureFixture[str]) -> None:
    with Follower(Console(force_terminal=True, width=100)) as follower:
        follower.tell("reading", 0, 100)
        follower.tell("reading", 100, 100)
        follower.tell("comparing", 7, None)
    shown = capsys.readouterr().out
    assert "reading" in shown
    assert "100 %" in shown
    assert "comparing" in shown
    assert "left" in shown
