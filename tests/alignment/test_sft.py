"""Supervised fine-tuning of a small checkpoint: what it learns, leaves alone, and goes on from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.alignment.support import run_later, write_chats
from tests.training.support import assert_same_run, breaking_off, metrics
from ziphius.alignment.holdout import divided
from ziphius.alignment.records import Record
from ziphius.alignment.sft import asked_of
from ziphius.checkpoint.files import check_manifest, manifest_sizes
from ziphius.config.errors import BadInput
from ziphius.config.sft import SftConfig
from ziphius.inference.chat import read_chat_template
from ziphius.inference.template import chat_template_of
from ziphius.training.run import Trained

TUNED = (
    *("sft.sequence_length=48", "sft.batch_size=4", "sft.micro_batch_size=2", "sft.epochs=3"),
    *("sft.learning_rate=1e-2", "sft.final_learning_rate=1e-3", "sft.holdout_every=6"),
    *("run.checkpoint_every=3", "run.kernels=torch"),
)


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Conversations that all have the same answer but one word."""
    file = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    said = [{"content": f"return x + {n}", "reasoning_content": "def"} for n in range(40)]
    return write_chats(file, said)


def tune(words: Path, start: Path, chats: Path, out: Path, *more: str, **how: Any) -> Trained:
    return run_later("sft", words, start, out, *TUNED, f"sft.source={chats}", *more, **how)


@pytest.fixture(scope="module")
def whole(words: Path, start: Path, chats: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "whole"
    tune(words, start, chats, out)
    return out


def weights(run: Path) -> dict[str, torch.Tensor]:
    (file,) = (run / "checkpoint").glob("*.safetensors")
    return load_file(file)


def test_held_out_answers_are_learned(whole: Path) -> None:
    summary = json.loads((whole / "summary.json").read_text("utf-8"))
    assert summary["heldout_bpb_after"] < summary["heldout_bpb_before"] / 2
    assert summary["records"] == 40
    assert summary["dropped"] == {"empty": 0, "too_long": 0}
    assert len(summary["start_sha256"]) == 64
    assert 0 <= summary["padding"] < 0.5


def test_its_length_is_so_many_epochs(whole: Path) -> None:
    summary = json.loads((whole / "summary.json").read_text("utf-8"))
    assert len(metrics(whole)) == summary["steps"] == -(-3 * summary["rows"] // 4)


def test_biases_stay_and_mtp_learns(start: Path, whole: Path) -> None:
    before, after = weights(start), weights(whole)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert not any("e_score_correction_bias" in name for name in moved)
    assert "model.layers.2.eh_proj.weight" in moved
    assert "model.layers.1.mlp.experts.0.gate_proj.weight" in moved


def test_biases_move_where_that_is_asked_for(
    words: Path, start: Path, chats: Path, tmp_path: Path
) -> None:
    tune(words, start, chats, tmp_path / "run", "sft.bias_update_speed=0.01", "sft.epochs=1")
    before, after = weights(start), weights(tmp_path / "run")
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    assert not torch.equal(before[name], after[name])


@pytest.mark.parametrize("at", [2, 3, 7])
def test_broken_off_and_resumed(
    at: int, words: Path, start: Path, chats: Path, whole: Path, tmp_path: Path
) -> None:
    with breaking_off(at) as watch:
        tune(words, start, chats, tmp_path / "run", watch=watch)
    tune(words, start, chats, tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", whole)


def test_other_records_are_no_way_to_go_on(
    words: Path, start: Path, chats: Path, tmp_path: Path
) -> None:
    own = tmp_path / "chats.jsonl"
    own.write_bytes(chats.read_bytes())

    with breaking_off(4) as watch:
        tune(words, start, own, tmp_path / "run", watch=watch)
    own.write_text(own.read_text("utf-8").replace("return x", "return y"), "utf-8")
    with pytest.raises(BadInput, match="samples differ"):
        tune(words, start, own, tmp_path / "run", resume=True)


def test_no_records_are_refused_before_anything_is_written(
    words: Path, start: Path, tmp_path: Path
) -> None:
    with pytest.raises(BadInput, match=r"sft\.source"):
        tune(words, start, Path(), tmp_path / "run", "sft.source=")
    assert not (tmp_path / "run").exists()


def test_the_published_recipe_is_the_default() -> None:
    config = SftConfig()
    assert (config.learning_rate, config.final_learning_rate) == (5e-6, 1e-6)
    assert config.passes == 2
    assert config.bias_update_speed == 0
    assert SftConfig(steps=7).passes is None


def test_answers_to_one_question_are_all_learned_or_none_is(
    words: Path, start: Path, tmp_path: Path
) -> None:
    """Also where others ask it for another system: an expert has both samples of a problem."""
    asked = [f"say {n}" for n in range(40)]
    lines = [
        [{"role": "user", "content": one}, {"role": "assistant", "content": f"{n}"}]
        for n in range(2)
        for one in asked
    ]
    lines += [[{"role": "system", "content": "think"}, *line] for line in lines[:40]]
    kept, held = divided([Record(line, "") for line in lines], asked_of, seed=0, holdout_every=4)
    assert held
    sides = [{r.messages[-2]["content"] for r in side} for side in (kept, held)]
    assert not sides[0] & sides[1]


def test_the_final_checkpoint_says_how_it_is_asked(whole: Path) -> None:
    template = read_chat_template(whole / "checkpoint")
    assert template.source == chat_template_of("v3.1")
    asked = [{"role": "user", "content": "say 7"}]
    assert template.render(asked, thinking=True).endswith("<think>")
    check_manifest(whole / "checkpoint")
    assert "chat_template.jinja" in manifest_sizes(whole / "checkpoint")
