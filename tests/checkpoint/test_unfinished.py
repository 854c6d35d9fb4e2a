"""Conversions that are stopped: what is kept, what is done again, and what is refused."""

import fcntl
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoint import published
from tests.checkpoint.published import read_all
from tests.checkpoint.saves import MIB
from ziphius.checkpoint import convert as module
from ziphius.checkpoint import unfinished
from ziphius.checkpoint.convert import convert
from ziphius.checkpoint.files import check_manifest
from ziphius.checkpoint.forms import Rounding
from ziphius.checkpoint.unfinished import finished_shards, unfinished_folder
from ziphius.config.errors import BadInput, ZiphiusError

# About 30 shards.
SMALL: dict[str, Any] = {"to": "fp8", "max_shard_bytes": 50_000}
DIE = """
import os, signal, sys
from pathlib import Path
import ziphius.checkpoint.convert as module
import ziphius.checkpoint.unfinished as unfinished
source, target, where, count = sys.argv[1:]
left = int(count)
def die(*args, **named):
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
def before(owner, name):
    plain = getattr(owner, name)
    def dying(*args, **named):
        die()
        return plain(*args, **named)
    setattr(owner, name, dying)
tell = lambda *args: None
if " " in where or where == "converting":
    tell = lambda phase, done, total: die() if phase == where else None
elif where == "put":
    before(module.PieceWriter, "put")
elif where == "keep":
    before(module.Unfinished, "keep")
else:
    before(os if hasattr(os, where) else unfinished.shutil, where)
module.convert(source, target, "fp8", max_shard_bytes=50_000, on_progress=tell)
"""


@pytest.fixture
def source(place: Path) -> Path:
    published.write_published(place / "official", published.ragged_config(), shards=2)
    convert(place / "official", place / "source")
    return place / "source"


@pytest.fixture
def whole(source: Path) -> dict[str, torch.Tensor]:
    """What a conversion gives that nothing interrupts."""
    convert(source, source.parent / "whole", **SMALL)
    return read_all(source.parent / "whole")


def killed(source: Path, target: Path, where: str, count: int) -> None:
    command = [sys.executable, "-c", DIE, str(source), str(target), where, str(count)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == -signal.SIGKILL, (where, count, done.stderr)


def stop_after(source: Path, target: Path, shards: int, how: type[BaseException], **options: Any) \
        -> None:  # fmt: skip
    """Stop a conversion in this process when so many shards are finished."""
    left = [shards]

    def told(phase: str, done: int, total: int) -> None:
        if phase == "converting" and finished_shards(target) >= left[0]:
            raise how

    with pytest.raises(how):
        convert(source, target, **{**SMALL, **options}, on_progress=told)


def inodes(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_ino for path in folder.glob("*.safetensors")}


def assert_whole(target: Path, whole: dict[str, torch.Tensor]) -> None:
    found = read_all(target)
    assert found.keys() == whole.keys()
    for name, tensor in whole.items():
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name
    check_manifest(target)
    assert not unfinished_folder(target).exists()
    assert not list(target.parent.glob(f".{target.name}.*"))


# Killed


@pytest.mark.parametrize(
    ("where", "count", "kept"),
    [
        ("checking the source", 0, 0),
        ("converting", 0, 0),
        ("put", 3, 0),
        ("put", 40, 6),
        ("put", 110, 20),
        ("keep", 2, 2),
    ],
)
def test_what_was_finished_before_a_kill_is_kept(
    source: Path, whole: dict[str, torch.Tensor], where: str, count: int, kept: int
) -> None:
    target = source.parent / "target"
    killed(source, target, where, count)
    assert not target.exists()
    finished = json.loads((unfinished_folder(target) / "conversion.json").read_text())["shards"]
    assert len(finished) == finished_shards(target) >= kept
    before = inodes(unfinished_folder(target))
    told: list[tuple[str, int, int]] = []
    convert(source, target, **SMALL, on_progress=lambda *step: told.append(step))
    after = inodes(target)
    # The same files, not files with the same content; what was half written was written again.
    assert {name for name in after if after[name] == before.get(name)} >= set(finished)
    written = max(total for phase, _, total in told if phase == "converting")
    sizes = {path.name: path.stat().st_size for path in target.glob("*.safetensors")}
    missing = sum(size for name, size in sizes.items() if name not in finished)
    assert missing * 0.9 < written <= missing
    assert ("checking the source" in {step[0] for step in told}) == ("source" in where)
    assert_whole(target, whole)


@pytest.mark.parametrize(
    ("where", "count"),
    [("link", 0), ("link", 10), ("rename", 0), ("rmtree", 0)],
)
def test_a_kill_after_the_last_shard_loses_none(
    source: Path, whole: dict[str, torch.Tensor], where: str, count: int
) -> None:
    """While shards are handed over, before the swap, and after it."""
    target = source.parent / "target"
    shards = len(list((source.parent / "whole").glob("*.safetensors")))
    killed(source, target, where, count)
    assert target.exists() == (where == "rmtree")
    assert finished_shards(target) == shards
    told: list[str] = []
    convert(source, target, **SMALL, on_progress=lambda phase, *_: told.append(phase))
    assert told.count("converting") <= 1, "nothing was written again"
    assert_whole(target, whole)


@pytest.mark.parametrize("seconds", [0.0, 0.05, 0.15])
def test_kills_at_any_moment(source: Path, whole: dict[str, torch.Tensor], seconds: float) -> None:
    """From outside, several times over, until one ends."""
    target = source.parent / "target"
    command = [sys.executable, "-c", DIE, str(source), str(target), "put", str(10**9)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while not unfinished_folder(target).exists() and process.poll() is None:
        time.sleep(0.001)
    time.sleep(seconds)
    process.kill()
    process.wait()
    if not target.exists():
        convert(source, target, **SMALL)
    assert_whole(target, whole)


# What is done again


def test_a_shard_that_was_damaged_is_done_again_and_no_other(
    source: Path, whole: dict[str, torch.Tensor]
) -> None:
    target = source.parent / "target"
    stop_after(source, target, 6, KeyboardInterrupt)
    before = inodes(unfinished_folder(target))
    assert len(before) == 6, "what was half written is gone"
    flipped, cut, gone = sorted(before)[:3]
    path = unfinished_folder(target) / flipped
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    path.write_bytes(data)
    with open(unfinished_folder(target) / cut, "r+b") as file:
        file.truncate(1000)
    (unfinished_folder(target) / gone).unlink()
    written: list[str] = []
    plain = module.PieceWriter.__init__

    def counted(self: Any, path: Path, *rest: Any) -> None:
        written.append(path.name)
        plain(self, path, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module.PieceWriter, "__init__", counted)
        convert(source, target, **SMALL)
    assert_whole(target, whole)
    assert {flipped, cut, gone} <= set(written)
    assert not set(before) - {flipped, cut, gone} & set(written)


@pytest.mark.parametrize("change", ["time", "weights", "config"])
def test_a_source_that_changed_is_converted_from_the_start(
    source: Path, whole: dict[str, torch.Tensor], change: str
) -> None:
    target = source.parent / "target"
    stop_after(source, target, 6, KeyboardInterrupt)
    before = inodes(unfinished_folder(target))
    if change == "time":
        os.utime(source / "model.safetensors", (1, 1))
    elif change == "weights":
        published.change(source, {"model.norm.weight": torch.full((136,), 3.0).bfloat16()})
    else:
        published.change_config(source, eos_token_id=7)
    opened: list[str] = []
    told = lambda phase, *_: opened.append(phase)  # noqa: E731
    convert(source, target, **SMALL, on_progress=told)
    assert "checking the source" in opened
    assert "checking finished shards" not in opened
    assert set(inodes(target).values()).isdisjoint(before.values())
    if change == "weights":
        whole = {**whole, "model.norm.weight": torch.full((136,), 3.0).bfloat16()}
    assert_whole(target, whole)


def test_a_damaged_journal_is_one_that_says_nothing(
    source: Path, whole: dict[str, torch.Tensor]
) -> None:
    target = source.parent / "target"
    for text in ("", "{", "[]", '{"format": 1}', '{"format": 99, "shards": {}}'):
        stop_after(source, target, 3, KeyboardInterrupt)
        (unfinished_folder(target) / "conversion.json").write_text(text)
        assert finished_shards(target) == 0
    convert(source, target, **SMALL)
    assert_whole(target, whole)


def test_a_quantizer_begins_anew(source: Path) -> None:
    """It learns from one layer for the next, and cannot begin in the middle."""
    target = source.parent / "target"
    options = {"to": "int8", "group_size": 8, "quantizer": Rounding(8, 8)}
    stop_after(source, target, 3, KeyboardInterrupt, **options)
    assert not unfinished_folder(target).exists()
    with pytest.raises(BadInput, match="--memory does not bound"):
        convert(source, target, "int8", quantizer=Rounding(8, 8), memory=2**40)


# What is refused


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"to": "bf16"}, "to fp8"),
        ({"to": "fp8", "scales": "ue8m0"}, "scales None"),
        ({"to": "fp8", "mtp": False}, "mtp True"),
        ({"to": "fp8", "max_shard_bytes": 60_000}, "shard bytes 50000"),
    ],
)
def test_what_another_conversion_left_is_refused(
    source: Path, whole: dict[str, torch.Tensor], options: dict[str, Any], said: str
) -> None:
    target = source.parent / "target"
    stop_after(source, target, 4, KeyboardInterrupt)
    before = inodes(unfinished_folder(target))
    for other in ({**SMALL, **options}, {**SMALL, "source": source.parent / "official"}):
        with pytest.raises(BadInput, match="another conversion to it was interrupted") as caught:
            convert(other.pop("source", source), target, **other)
        text = str(caught.value)
        assert "\n" not in text
        assert str(source) in text
        assert "4 finished shards" in text
        assert f"remove {unfinished_folder(target)}" in text
        assert said in text or other == SMALL
    assert inodes(unfinished_folder(target)) == before
    convert(source, target, **SMALL)
    assert_whole(target, whole)


def test_two_at_a_time_are_refused(source: Path) -> None:
    target = source.parent / "target"
    stop_after(source, target, 4, KeyboardInterrupt)
    with open(unfinished_folder(target) / "lock", "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with pytest.raises(BadInput, match="is being written by another conversion now"):
            convert(source, target, **SMALL)
    convert(source, target, **SMALL)


def test_a_finished_target_is_refused_as_ever(source: Path, whole: dict[str, torch.Tensor]) -> None:
    target = source.parent / "whole"
    with pytest.raises(BadInput, match="is not empty"):
        convert(source, target, **SMALL)
    # What another conversion left beside it does not make it this one's.
    stop_after(source, source.parent / "target", 4, KeyboardInterrupt)
    unfinished_folder(source.parent / "target").rename(unfinished_folder(target))
    shutil.rmtree(target)
    shutil.copytree(source, target)
    with pytest.raises(BadInput, match="is not empty"):
        convert(source, target, **SMALL)


def test_a_source_that_cannot_be_converted_leaves_nothing(source: Path) -> None:
    name = "model.layers.2.self_attn.q_b_proj.weight"
    broken = read_all(source)[name].clone()
    broken[3, 2] = float("inf")
    published.change(source, {name: broken})
    with pytest.raises(BadInput, match="NaN or infinity") as caught:
        convert(source, source.parent / "target", **SMALL)
    assert name in str(caught.value)
    assert "kept" not in str(caught.value)
    assert not list(source.parent.glob(".target*"))


# Disks


def refused_by_the_disk(action: Callable[[], object], kind: type[ZiphiusError] = BadInput) -> str:
    with pytest.raises(kind) as caught:
        action()
    text = str(caught.value)
    assert type(caught.value) is kind
    assert "\n" not in text
    return text


def test_a_disk_that_fills_keeps_what_is_finished(
    source: Path, whole: dict[str, torch.Tensor], small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = small_disk / "target"
    text = refused_by_the_disk(lambda: convert(source, target, **SMALL))
    assert "bytes more are needed and" in text, "before anything is written"
    assert list(small_disk.iterdir()) == []
    with monkeypatch.context() as patch:
        patch.setattr(unfinished.Unfinished, "require_room", lambda *_: None)
        text = refused_by_the_disk(lambda: convert(source, target, **SMALL))
    assert "No space left on device" in text
    assert "free more space" in text
    kept = finished_shards(target)
    assert kept > 1
    assert f"{kept} finished shards are kept in {unfinished_folder(target)}" in text
    before = inodes(unfinished_folder(target))
    assert len(before) == kept, "what was half written gives its room back"
    subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk)], check=True)
    convert(source, target, **SMALL)
    assert before.items() <= inodes(target).items()
    assert_whole(target, whole)


def test_a_file_system_that_takes_no_large_file(source: Path) -> None:
    """The kernel itself refuses: the limit is on this process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        options = {**SMALL, "max_shard_bytes": 4 * MIB}
        text = refused_by_the_disk(lambda: convert(source, source.parent / "target", **options))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "File too large" in text
    assert "nothing is kept" in text
    assert not list(source.parent.glob(".target*"))


def test_a_disk_that_fails_at_the_end_keeps_all(
    source: Path, whole: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    target = source.parent / "target"

    def refuse(*_: object) -> None:
        raise OSError(28, os.strerror(28), "index")

    with monkeypatch.context() as patch:
        patch.setattr(module, "write_index", refuse)
        text = refused_by_the_disk(lambda: convert(source, target, **SMALL))
    assert "No space left on device" in text
    assert "start again the same way" in text
    with monkeypatch.context() as patch:
        patch.setattr(module.PieceWriter, "put", refuse)  # nothing is written again
        convert(source, target, **SMALL)
    assert_whole(target, whole)


def test_without_hard_links_shards_are_moved(
    source: Path, whole: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, os.strerror(1))

    monkeypatch.setattr(os, "link", refuse)
    convert(source, source.parent / "target", **SMALL)
    assert_whole(source.parent / "target", whole)
