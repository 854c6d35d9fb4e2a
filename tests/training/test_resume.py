"""A run that was stopped, killed or damaged goes on as if nothing had happened, bit for bit."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.support import Silent, assert_same_run, breaking_off, metrics
from tests.training.support import recipe as small_recipe
from ziphius.config.errors import BadInput, ZiphiusError
from ziphius.config.recipe import Recipe, load_recipe
from ziphius.training import loop
from ziphius.training.folder import RunFolder
from ziphius.training.loop import Stopped
from ziphius.training.run import pretrain

_SETTINGS = (
    *("pretrain.steps=9", "pretrain.micro_batch_size=2", "data.workers=1"),
    *("run.checkpoint_every=2", "run.validate_every=3"),
)


def recipe(words: Path, *more: str) -> Recipe:
    return small_recipe(words, *_SETTINGS, *more)


@pytest.fixture(scope="module")
def whole(words: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing interrupts."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    pretrain(recipe(words), RunFolder(out), Silent())
    return out


def broken_off(words: Path, out: Path, at: int, *more: str) -> None:
    """Run until after step ``at`` and drop everything, as a killed process does."""

    with breaking_off(at) as watch:
        pretrain(recipe(words, *more), RunFolder(out), watch)


def resumed(words: Path, out: Path, *more: str) -> Silent:
    watch = Silent()
    pretrain(recipe(words, *more), RunFolder(out, resume=True), watch)
    return watch


@pytest.mark.parametrize("at", range(1, 10))
def test_broken_off_after_any_step_and_resumed(
    at: int, words: Path, whole: Path, tmp_path: Path
) -> None:
    broken_off(words, tmp_path / "run", at)
    watch = resumed(words, tmp_path / "run")
    assert any("going on after step" in line for line in watch.said) == (at > 2)
    assert_same_run(tmp_path / "run", whole)


@contextmanager
def asked_at(step: int, seen: list[int]) -> Iterator[Callable[[], int]]:
    """Ask to stop when the loop has asked ``step`` times."""

    def asked() -> int:
        seen.append(1)
        return signal.SIGTERM if len(seen) == step else 0

    yield asked


def test_a_signal_saves_the_step_and_says_so(words: Path, whole: Path, tmp_path: Path) -> None:
    out, seen = tmp_path / "run", list[int]()
    with pytest.raises(Stopped, match="stopped after step 3, which is saved") as stopped:
        pretrain(recipe(words), RunFolder(out), Silent(), stopping=lambda: asked_at(3, seen))
    assert stopped.value.exit_code == 128 + signal.SIGTERM
    assert metrics(out)[-1]["step"] == 3
    assert any("after step 3" in line for line in resumed(words, out).said)
    assert_same_run(out, whole)


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_it_used(
    words: Path, whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    broken_off(words, out, 7)
    shard = out / "stages" / "pretrain" / "step-6" / "model.safetensors"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    said = "\n".join(resumed(words, out).said)
    assert "step-6: files differ from manifest.json: model.safetensors has sha256" in said
    assert "going on after step 4" in said
    assert (out / "stages" / "pretrain" / "damaged-step-6").is_dir(), "kept for who wants to look"
    assert_same_run(out, whole, same_steps=False)  # the damaged one lies there too


def test_a_checkpoint_without_its_state_or_manifest_is_damaged(
    words: Path, whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    broken_off(words, out, 7)
    shutil.rmtree(out / "stages" / "pretrain" / "step-6" / "state")
    said = "\n".join(resumed(words, out).said)
    assert "state/state.json is missing" in said
    shutil.rmtree(out / "stages" / "pretrain" / "step-8" / "state")
    (out / "stages" / "pretrain" / "step-9" / "manifest.json").unlink()
    with pytest.raises(BadInput, match=r"no checkpoint can be used.*step-9.*step-8"):
        resumed(words, out)
    assert (out / "stages" / "pretrain" / "step-9").is_dir(), "nothing was touched"


def test_without_a_checkpoint_it_starts_from_the_beginning(
    words: Path, whole: Path, tmp_path: Path
) -> None:
    watch = resumed(words, tmp_path / "new")
    assert not any("going on" in line for line in watch.said)
    assert_same_run(tmp_path / "new", whole)


def test_a_run_that_has_ended_is_resumed_in_no_steps(
    words: Path, whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    (out / "summary.json").unlink()
    resumed(words, out)
    assert_same_run(out, whole)
    summary, expected = (json.loads((p / "summary.json").read_text()) for p in (out, whole))
    assert summary["heldout_bpb_after"] == expected["heldout_bpb_after"]
    assert summary["heldout_bpb_before"] == expected["heldout_bpb_before"]


def test_an_existing_run_is_refused_without_resume(words: Path, whole: Path) -> None:
    before = (whole / "metrics.jsonl").read_bytes()
    with pytest.raises(BadInput, match="holds a run already: go on with it by --resume"):
        pretrain(recipe(words), RunFolder(whole), Silent())
    assert (whole / "metrics.jsonl").read_bytes() == before


def test_a_changed_recipe_is_refused_by_its_keys(words: Path, whole: Path) -> None:
    before = (whole / "recipe.toml").read_bytes()
    with pytest.raises(BadInput, match=r"differs .* in pretrain\.learning_rate, run\.seed:"):
        resumed(words, whole, "pretrain.learning_rate=1e-5", "run.seed=4", "run.checkpoint_every=5")
    assert (whole / "recipe.toml").read_bytes() == before


def test_a_run_may_move_to_another_machine_and_says_what_that_costs(
    words: Path, tmp_path: Path
) -> None:
    """Without this a machine that lacks a compiler could never go on with a run."""
    out = tmp_path / "run"
    broken_off(words, out, 5, "run.kernels=torch")
    before = metrics(out)[:4]
    said = resumed(words, out, "run.kernels=torch", "run.products=widened").said
    assert any("run.products changed: from here on losses are not bit for bit" in s for s in said)
    assert metrics(out)[:4] == before
    assert [record["step"] for record in metrics(out)] == list(range(1, 10))
    assert load_recipe(str(out / "recipe.toml")).run.products == "widened"
    quiet = resumed(words, out, "run.products=auto").said
    assert not any("changed" in line for line in quiet), "what was left open is as the run has it"


def test_other_text_is_refused(words: Path, tmp_path: Path) -> None:
    mine = tmp_path / "text"
    shutil.copytree(words, mine)
    out = tmp_path / "run"
    broken_off(mine, out, 5)
    (mine / "alpha" / "m0.py").write_text("something else\n" * 50, "utf-8")
    checkpoints = sorted(p.name for p in (out / "stages" / "pretrain").iterdir())
    with pytest.raises(BadInput, match=r"loader state: .*text.* differs from this run's"):
        resumed(mine, out)
    assert sorted(p.name for p in (out / "stages" / "pretrain").iterdir()) == checkpoints


def test_two_processes_cannot_train_into_one_folder(words: Path, tmp_path: Path) -> None:
    busy = RunFolder(tmp_path / "run").claimed(recipe(words))
    with busy, pytest.raises(BadInput, match="another process trains into this folder"):
        resumed(words, tmp_path / "run")


def test_half_a_line_of_metrics_is_repaired(words: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    broken_off(words, out, 5)
    with (out / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 6, "lo')
    resumed(words, out)
    assert_same_run(out, whole)


def test_old_checkpoints_are_dropped_and_two_are_kept(whole: Path) -> None:
    assert {p.name for p in (whole / "stages" / "pretrain").iterdir()} == {"step-8", "step-9"}


# The guard


def poison(monkeypatch: pytest.MonkeyPatch, steps: set[int]) -> list[int]:
    """Make the loss of the n-th steps taken NaN, until they are taken again after a resume."""
    taken: list[int] = []
    plain = loop.train_step

    def train_step(passes: Any, optimizer: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
        taken.append(1)
        if len(taken) not in steps:
            return plain(passes, optimizer, batch, *args, **kwargs)
        (model,) = passes.models
        saved = model.norm.weight.detach().clone()
        with torch.no_grad():
            model.norm.weight.fill_(float("nan"))
        result = plain(passes, optimizer, batch, *args, **kwargs)
        with torch.no_grad():
            model.norm.weight.copy_(saved)
        return result

    monkeypatch.setattr(loop, "train_step", train_step)
    return taken


def test_a_bad_step_is_skipped_and_counted(
    words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, {4})
    trained = pretrain(recipe(words), RunFolder(tmp_path / "run"), Silent())
    records = metrics(tmp_path / "run")
    assert [r["step"] for r in records if r["skipped"]] == [4]
    assert records[3]["loss"] is None, "JSON has no NaN"
    assert trained.summary["skipped_steps"] == 1
    assert trained.summary["rollbacks"] == 0


def test_bad_steps_in_a_row_lead_back_to_a_checkpoint_and_on_with_newer_text(
    words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = poison(monkeypatch, {5, 6})
    watch = Silent()
    folder = RunFolder(tmp_path / "run")
    trained = pretrain(recipe(words, "guard.patience=2"), folder, watch)
    assert any("going back to step-4, on with newer text" in line for line in watch.said)
    assert [r["step"] for r in metrics(folder.path)] == [1, 2, 3, 4, 5, 6, 5, 6, 7, 8, 9]
    assert len(taken) == 11
    assert trained.summary["rollbacks"] == 1
    assert trained.summary["heldout_bpb_after"] > 0


def test_a_guard_without_a_checkpoint_gives_up_and_says_what_to_change(
    words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, set(range(1, 20)))
    with pytest.raises(ZiphiusError, match=r"no checkpoint.*lower pretrain\.learning_rate") as why:
        pretrain(
            recipe(words, "guard.patience=3", "run.checkpoint_every=100"),
            RunFolder(tmp_path / "run"),
            Silent(),
        )
    assert not isinstance(why.value, BadInput)


def test_a_guard_gives_up_after_so_many_returns(
    words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, set(range(5, 100)))
    with pytest.raises(ZiphiusError, match="after 2 returns to a checkpoint"):
        pretrain(
            recipe(words, "guard.patience=2", "guard.max_rollbacks=2"),
            RunFolder(tmp_path / "run"),
            Silent(),
        )


@pytest.mark.parametrize("at", [2, 4, 6])
def test_a_mixture_that_changes_goes_on_in_its_turn(at: int, words: Path, tmp_path: Path) -> None:
    spans = ((0, "40%"), ("40%", "100%"), (0, "100%"))
    sources = ", ".join(
        f'{{path = "{words / name}", begin = {json.dumps(begin)}, end = {json.dumps(end)}}}'
        for name, (begin, end) in zip(("alpha", "beta", "gamma"), spans, strict=True)
    )
    # One network for all: overrides come last.
    changing = recipe(words, "data.source=stdlib", f"data.sources=[{sources}]")
    pretrain(changing, RunFolder(tmp_path / "whole"), Silent())
    with breaking_off(at) as watch:
        pretrain(changing, RunFolder(tmp_path / "parts"), watch)
    pretrain(changing, RunFolder(tmp_path / "parts", resume=True), Silent())
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_a_mixture_that_changes_is_no_spike(words: Path, tmp_path: Path) -> None:
    """The loss of text that is new lies above that of text which was learned."""
    easy = tmp_path / "easy.txt"
    easy.write_text("aa " * 3000, "utf-8")
    sources = f'{{path = "{easy}", end = "50%"}}, {{path = "{words / "beta"}", begin = "50%"}}'
    changing = recipe(
        words,
        "data.source=stdlib",
        f"data.sources=[{sources}]",
        "data.clean=false",
        "pretrain.steps=60",
        "pretrain.learning_rate=2e-2",
        "run.checkpoint_every=100",
    )
    trained = pretrain(changing, RunFolder(tmp_path / "run"), Silent())
    losses = [record["loss"] for record in metrics(tmp_path / "run")]
    assert losses[30] > losses[29] + 1, "else there is nothing to take for a spike"
    assert trained.summary["skipped_steps"] == 0
