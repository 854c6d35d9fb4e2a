"""The folder around the weights: where it is, what else lies in it, and saves that fail."""

import errno
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoint.published import assert_same, refused, weights
from tests.support import random_model
from ziphius.checkpoint import shards
from ziphius.checkpoint.files import replace_directory
from ziphius.checkpoint.folder import checkpoint_folder
from ziphius.checkpoint.huggingface import load, save, write_model
from ziphius.checkpoint.state import write_state
from ziphius.config.errors import BadInput

# Where the checkpoint is


def test_a_run_folder_means_its_checkpoint(tmp_path: Path) -> None:
    model = random_model()
    save(model, tmp_path / "run" / "checkpoint")
    (tmp_path / "run" / "metrics.jsonl").write_text("{}\n")
    assert checkpoint_folder(tmp_path / "run") == tmp_path / "run" / "checkpoint"
    assert_same(load(str(tmp_path / "run")), weights(model))
    assert checkpoint_folder(tmp_path / "run" / "checkpoint") == tmp_path / "run" / "checkpoint"


def test_a_folder_that_is_a_checkpoint_itself_comes_first(tmp_path: Path) -> None:
    outer, inner = random_model(seed=1), random_model(seed=2)
    save(outer, tmp_path)
    save(inner, tmp_path / "checkpoint")
    assert_same(load(tmp_path), weights(outer))


@pytest.mark.parametrize("name", ["absent", "empty", "file"])
def test_what_is_no_checkpoint_is_told(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("text")
    refused(tmp_path / name)


# Saving over an older checkpoint


@pytest.fixture
def older(tmp_path: Path) -> Path:
    """A sharded checkpoint with a tokenizer and other files beside it."""
    folder = tmp_path / "older"
    save(random_model(seed=1), folder, max_shard_bytes=30_000)
    write_tokenizer(folder, 61)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "LICENSE").write_text("MIT")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_saving_over_a_checkpoint_keeps_what_is_no_weight(older: Path) -> None:
    before = contents(older)
    model = random_model(seed=2)
    save(model, older)
    after = contents(older)
    for name in ("tokenizer.json", "chat_template.jinja", "LICENSE"):
        assert after[name] == before[name]
    assert not [name for name in after if name.startswith("model-") or "index" in name]
    assert_same(load(older), weights(model))


@contextmanager
def small_files(limit: int) -> Iterator[None]:
    """Let the kernel stop every file at ``limit`` bytes, as a full disk would."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_write_that_the_kernel_stops_leaves_the_old_checkpoint(older: Path) -> None:
    before = contents(older)
    with small_files(20_000), pytest.raises(BadInput, match="not saved") as caught:
        save(random_model(seed=2), older)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    assert contents(older) == before
    assert [p.name for p in older.parent.iterdir()] == ["older"], "nothing half written is left"
    assert_same(load(older), weights(random_model(seed=1)))


def test_run_state_that_the_kernel_stops_is_told_in_one_line(older: Path) -> None:
    """The optimizer's moments are the largest part of a run's checkpoint."""
    before = contents(older)

    def write() -> None:
        with replace_directory(older) as folder:
            (folder / "config.json").write_text("{}")
            write_state(folder, {"moments": torch.zeros(10_000)}, {"step": 1})

    with small_files(20_000), pytest.raises(BadInput, match="not saved"):
        write()
    assert contents(older) == before


def test_run_state_is_as_readable_as_the_weights(tmp_path: Path) -> None:
    with replace_directory(tmp_path / "target") as folder:
        write_model(random_model(), folder, torch.float32)
        write_state(folder, {"moments": torch.zeros(3)}, {"step": 1})
    weights_file = tmp_path / "target" / "model.safetensors"
    state_file = tmp_path / "target" / "state" / "optimizer.safetensors"
    assert state_file.stat().st_mode == weights_file.stat().st_mode


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), BadInput),
        (OSError(errno.EROFS, "Read-only file system"), BadInput),
        (KeyboardInterrupt(), KeyboardInterrupt),
        (RuntimeError("a defect"), RuntimeError),
    ],
    ids=["full", "read-only", "Ctrl-C", "defect"],
)
@pytest.mark.parametrize("at", [1, 3])
def test_a_save_that_fails_in_the_middle_leaves_the_old_checkpoint(
    older: Path,
    monkeypatch: pytest.MonkeyPatch,
    at: int,
    error: BaseException,
    shown: type[BaseException],
) -> None:
    before, written = contents(older), []
    plain = shards.save_file

    def failing(tensors: Any, path: Any, **options: Any) -> None:
        written.append(path)
        if len(written) == at:
            raise error
        plain(tensors, path, **options)

    monkeypatch.setattr(shards, "save_file", failing)
    with pytest.raises(shown):
        save(random_model(seed=2), older, max_shard_bytes=30_000)
    assert len(written) == at
    assert contents(older) == before
    assert [p.name for p in older.parent.iterdir()] == ["older"]
    assert_same(load(older), weights(random_model(seed=1)))


def _with_a_file(folder: Path) -> None:
    folder.mkdir()
    (folder / "thesis.txt").write_text("years of work")


def _as_a_file(folder: Path) -> None:
    folder.write_text("years of work")


@pytest.mark.parametrize("make", [_with_a_file, _as_a_file])
def test_saving_refuses_to_replace_what_is_no_checkpoint(
    tmp_path: Path, make: Callable[[Path], None]
) -> None:
    target = tmp_path / "target"
    make(target)
    with pytest.raises(BadInput, match="checkpoint"):
        save(random_model(), target)
    file = target if target.is_file() else target / "thesis.txt"
    assert file.read_text() == "years of work"


def test_saving_into_an_empty_or_absent_folder(tmp_path: Path) -> None:
    model = random_model()
    (tmp_path / "empty").mkdir()
    for target in (tmp_path / "empty", tmp_path / "deep" / "er"):
        save(model, target)
        assert_same(load(target), weights(model))


# Tokenizer files


def write_tokenizer(folder: Path, tokens: int, added: int = 0) -> None:
    from tokenizers import AddedToken, Tokenizer
    from tokenizers.models import BPE

    tokenizer = Tokenizer(BPE({chr(0x100 + i): i for i in range(tokens)}, []))
    tokenizer.add_special_tokens([AddedToken(f"<{i}>") for i in range(added)])
    tokenizer.save(str(folder / "tokenizer.json"))


def test_a_checkpoint_needs_no_tokenizer(saved: Path) -> None:
    assert not list(saved.glob("tokenizer*"))
    load(saved)


@pytest.mark.parametrize(
    ("tokens", "added", "fits"), [(61, 0, True), (40, 21, True), (62, 0, False), (60, 2, False)]
)
def test_a_tokenizer_may_not_know_more_than_the_model(
    saved: Path, tokens: int, added: int, fits: bool
) -> None:
    write_tokenizer(saved, tokens, added)
    if fits:
        load(saved)
        return
    text = refused(saved)
    assert "61" in text
    assert "tokenizer" in text


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"model": {"vocab": 3}, "added_tokens": []}'])
def test_a_tokenizer_that_is_none_is_refused(saved: Path, content: str) -> None:
    (saved / "tokenizer.json").write_text(content)
    assert "tokenizer.json" in refused(saved)
