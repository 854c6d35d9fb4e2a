"""Text and recipes that cannot be used: one line that says what, where and what to do; exit code 2;
nothing written.
"""

from __future__ import annotations

import gzip
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.training.support import overrides
from ziphius.cli.app import run


def refusal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str
) -> str:
    """Run what must be refused: exit code 2 and one line of error, which is returned."""
    monkeypatch.setattr(sys, "argv", ["ziphius", *arguments])
    threads = torch.get_num_threads()
    with pytest.raises(SystemExit) as stopped:
        run()
    torch.set_num_threads(threads)
    err = capsys.readouterr().err

    assert stopped.value.code == 2, err
    assert err.startswith("error: "), err
    assert err.count("\n") == 1, err
    assert "Error" not in err, "the name of an exception helps nobody"
    return err


def settings(words: Path, *more: str) -> list[str]:
    values = [*overrides(words), "pretrain.steps=2", *more]
    return [part for value in values for part in ("--set", value)]


# Text


def lines(*records: object) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


GOOD = {"text": "a line of text that is long enough to be read " * 20}


def nothing(place: Path) -> Path:
    place.mkdir()
    return place


def only_pictures(place: Path) -> Path:
    place.mkdir()
    (place / "cat.png").write_bytes(b"\x89PNG")
    return place


def empty_files(place: Path) -> Path:
    place.mkdir()
    for name in ("a.txt", "b.txt"):
        (place / name).write_text(" \n", "utf-8")
    return place


def one_short_file(place: Path) -> Path:
    place.mkdir()
    (place / "a.txt").write_text("hello", "utf-8")
    return place


def less_than_a_row(place: Path) -> Path:
    place.mkdir()
    for name in "abcd":
        (place / f"{name}.txt").write_text(f"some words of {name} and more of them", "utf-8")
    return place


def unreadable_file(place: Path) -> Path:
    place.mkdir()
    (place / "a.txt").write_text("words", "utf-8")
    (place / "b.txt").symlink_to("/proc/self/mem")  # a real file that cannot be read
    return place


def pipe(place: Path) -> Path:
    os.mkfifo(place)
    return place


def loop_of_links(place: Path) -> Path:
    place.symlink_to(place)
    return place


def binary(place: Path) -> Path:
    place = place.with_suffix(".txt")
    place.write_bytes(b"GIF89a\x00\xff\xfe")
    return place


def broken_line(place: Path) -> Path:
    place = place.with_suffix(".jsonl")
    place.write_bytes(lines(GOOD, GOOD) + b'{"text": "no end\n' + lines(GOOD))
    return place


def line_that_is_no_object(place: Path) -> Path:
    place = place.with_suffix(".jsonl")
    place.write_bytes(lines(GOOD, ["text"]))
    return place


def line_that_is_no_utf8(place: Path) -> Path:
    place = place.with_suffix(".jsonl")
    place.write_bytes(lines(GOOD) + b'{"text": "\xff"}\n')
    return place


def another_field(place: Path) -> Path:
    place = place.with_suffix(".jsonl")
    place.write_bytes(lines({"id": 1, "content": "words"}))
    return place


def number_in_place_of_text(place: Path) -> Path:
    place = place.with_suffix(".jsonl")
    place.write_bytes(lines(GOOD, {"text": 7}))
    return place


def half_a_gz(place: Path) -> Path:
    place = place.with_suffix(".jsonl.gz")
    packed = gzip.compress(lines(*([GOOD] * 50)))
    place.write_bytes(packed[: len(packed) // 2])
    return place


def no_gz(place: Path) -> Path:
    place = place.with_suffix(".jsonl.gz")
    place.write_bytes(lines(GOOD))
    return place


def no_parquet(place: Path) -> Path:
    place = place.with_suffix(".parquet")
    place.write_bytes(b"PAR0" * 20)
    return place


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (nothing, "no file to read in this folder"),
        (only_pictures, "no file to read in this folder"),
        (empty_files, "give"),
        (one_short_file, "give"),
        (less_than_a_row, "tokens are fewer than one row of pretrain.sequence_length = 32"),
        (unreadable_file, "b.txt: cannot be read"),
        (pipe, "no such file or folder"),
        (loop_of_links, "no such file or folder"),
        (binary, "is not UTF-8 text (byte 7)"),
        (broken_line, "line 3: is not valid JSON"),
        (line_that_is_no_object, "line 2: is no JSON object"),
        (line_that_is_no_utf8, "line 2: is not UTF-8"),
        (
            another_field,
            "line 1: has no field 'text': set text_field to the text's; its fields: "
            "'content', 'id'",
        ),
        (number_in_place_of_text, "line 2: field 'text' is a number"),
        (half_a_gz, "is damaged"),
        (no_gz, "is damaged"),
        (no_parquet, "is damaged"),
    ],
)
def test_text_that_cannot_be_used_is_told_in_one_line(
    make: Callable[[Path], Path],
    said: str,
    words: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = make(tmp_path / "text")
    before = sorted(os.listdir(tmp_path))
    more = settings(words, f"data.source={source}")
    for verb in (["pretrain", "tiny"], ["quickstart"]):
        out = tmp_path / "runs" / "run"
        error = refusal(capsys, monkeypatch, *verb, "--out", str(out), *more)
        assert said in error
        assert "data.source" in error or str(source) in error
    assert sorted(os.listdir(tmp_path)) == before


def test_a_file_that_may_not_be_read_is_named(
    words: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Even to root, who may read everything."""
    read = Path.read_bytes

    def refuse(path: Path) -> bytes:
        if path.name == "m2.py":
            raise PermissionError(13, "Permission denied", str(path))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", refuse)
    more = settings(words)
    error = refusal(capsys, monkeypatch, "pretrain", "tiny", "--out", str(tmp_path / "run"), *more)
    assert "m2.py: cannot be read: Permission denied" in error
    assert os.listdir(tmp_path) == []


# Recipes


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("pretrain.tokens=1000", "steps = 2 and tokens = 1000: give one of them"),
        ("pretrain.steps=null", "give one of them"),
        ("pretrain.decay_start=half", "decay_start"),
        ("pretrain.decay_start=150%", "decay_start"),
        ("pretrain.batch_size=3", "no multiple of micro_batch_size"),
        ("pretrain.batch_size=40000", "a batch of pretrain.batch_size = 40000 needs more"),
        ("pretrain.batch_size_start=4", "set tokens in place of steps"),
        ("pretrain.steps=many", "pretrain.steps"),
        ("pretrain.learning_rate=nan", "learning_rate"),
        ("pretrain.sequence_length=100000", "max_position_embeddings"),
        ("run.keep_checkpoints=1", "keep_checkpoints"),
        ("run.checkpoint_every=0", "checkpoint_every"),
        ("run.checkpoint_evry=5", "did you mean 'checkpoint_every'"),
        ("guard.patience=0", "patience"),
        ("data.sources=[{path='a', weight=-1}]", "weight"),
        ("tokenizer.path=/no/such/tokenizer", "/no/such/tokenizer"),
        ("pretrain=5", "table.key=value"),
        ("pretrain.steps.more=5", "'steps' is a value"),
    ],
)
def test_a_setting_that_cannot_be_is_told_in_one_line(
    setting: str,
    said: str,
    words: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    more = settings(words, setting)
    out = str(tmp_path / "run")
    assert said in refusal(capsys, monkeypatch, "pretrain", "tiny", "--out", out, *more)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["pretrain", "tyni"], "tiny"),
        (["pretrain", "broken.toml"], "not valid TOML"),
        (["pretrain", "bytes.toml"], "cannot be read"),
        (["pretrain", "."], "neither a file nor a preset"),
        (["pretrain", "tiny", "--steps", "0"], "see --help"),
        (["pretrain", "tiny", "--stesp", "3"], "see --help"),
        (["pretrain"], "see --help"),
    ],
)
def test_a_recipe_that_cannot_be_read_is_told_in_one_line(
    arguments: list[str],
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "broken.toml").write_text("[pretrain\nsteps = 3", "utf-8")
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe")
    monkeypatch.chdir(tmp_path)
    before = sorted(os.listdir(tmp_path))
    assert said in refusal(capsys, monkeypatch, *arguments, "--out", str(tmp_path / "run"))
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize(
    ("out", "said"),
    [
        ("file", "is a file: choose a folder"),
        ("file/below", "file/below: Not a directory"),
        ("x" * 300, "File name too long"),
        ("letters", "holds files that are no run"),
    ],
)
def test_a_folder_that_cannot_be_used_is_told_in_one_line(
    out: str,
    said: str,
    words: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "file").write_text("mine", "utf-8")
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "letter.txt").write_text("mine", "utf-8")
    before = sorted(tmp_path.rglob("*"))
    for more in ([], ["--resume"]):
        arguments = ["pretrain", "tiny", "--out", str(tmp_path / out), *more, *settings(words)]
        assert said in refusal(capsys, monkeypatch, *arguments)
    assert sorted(tmp_path.rglob("*")) == before
