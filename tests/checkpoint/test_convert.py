"""Conversion: the same weights in another form, a shard at a time, with everything beside them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.checkpoint import published
from tests.checkpoint.published import (
    ROUTING_BIAS,
    assert_same,
    change,
    change_config,
    read_all,
    weights,
)
from tests.support import random_model
from ziphius.checkpoint import convert as module
from ziphius.checkpoint.convert import convert
from ziphius.checkpoint.files import check_manifest
from ziphius.checkpoint.huggingface import load, save
from ziphius.checkpoint.pieces import PieceWriter
from ziphius.config.errors import BadInput

PHASES = ["checking the source", "converting"]
FORMS = {"bf16": torch.bfloat16, "fp32": torch.float32}


@pytest.fixture
def official(tmp_path: Path) -> Path:
    """The published FP8 form in three shards, with files beside it."""
    folder = tmp_path / "official"
    published.write_published(folder, published.ragged_config(), shards=3)
    (folder / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "LICENSE-MODEL").write_text("terms")
    (folder / "generation_config.json").write_text('{"temperature": 0.6}')
    return folder


def refused(source: Path, target: Path, **options: Any) -> str:
    before = set(target.parent.iterdir())
    with pytest.raises(BadInput) as caught:
        convert(source, target, **options)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2
    assert set(target.parent.iterdir()) == before, "nothing half written is left"
    return str(caught.value)


# What is written


@pytest.mark.parametrize("to", FORMS)
def test_fp8_becomes_what_it_means(official: Path, tmp_path: Path, to: str) -> None:
    target = tmp_path / "target"
    comparison = convert(official, target, to=to)
    config = published.ragged_config()
    found = read_all(target)
    assert {name: tuple(t.shape) for name, t in found.items()} == published.layout(config)
    for name, tensor in found.items():
        assert tensor.dtype == (torch.float32 if name.endswith(ROUTING_BIAS) else FORMS[to]), name
    assert_same(load(target), weights(load(official, dtype=FORMS[to])))
    assert comparison.used == set(read_all(official))
    assert not comparison.missing
    assert not comparison.unused
    check_manifest(target)


@pytest.mark.parametrize("to", FORMS)
def test_bf16_in_fp32_and_back_is_the_same(tmp_path: Path, to: str) -> None:
    save(random_model(num_nextn_predict_layers=2), tmp_path / "one", dtype="bfloat16")
    convert(tmp_path / "one", tmp_path / "two", to="fp32")
    convert(tmp_path / "two", tmp_path / "three")
    one, three = read_all(tmp_path / "one"), read_all(tmp_path / "three")
    assert one.keys() == three.keys()
    assert all(torch.equal(one[name], three[name]) for name in one)
    expected = {n: t.to(FORMS[to]) for n, t in one.items() if not n.endswith(ROUTING_BIAS)}
    convert(tmp_path / "three", tmp_path / "four", to=to)
    found = read_all(tmp_path / "four")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_the_config_keeps_what_it_says_beyond_the_network(official: Path, tmp_path: Path) -> None:
    change_config(
        official,
        eos_token_id=[7, 8],
        aux_loss_alpha=0.001,
        some_engine={"tuned": True},
        transformers_version="4.33.1",
    )
    before = json.loads((official / "config.json").read_text())
    convert(official, tmp_path / "target", to="fp32")
    after = json.loads((tmp_path / "target" / "config.json").read_text())
    assert "quantization_config" in before
    assert "quantization_config" not in after
    assert after["torch_dtype"] == "float32"
    changed = ("quantization_config", "torch_dtype", "dtype")
    assert {k: v for k, v in after.items() if k not in changed} == {
        k: v for k, v in before.items() if k not in changed
    }


def test_other_files_come_along_and_run_state_does_not(official: Path, tmp_path: Path) -> None:
    (official / "state").mkdir()
    (official / "state" / "optimizer.safetensors").write_text("large")
    (official / "pytorch_model.bin").write_text("pickled")
    target = tmp_path / "target"
    convert(official, target)
    beside = {
        "tokenizer_config.json",
        "chat_template.jinja",
        "LICENSE-MODEL",
        "generation_config.json",
    }
    assert {p.name for p in target.iterdir()} == {
        *beside,
        "config.json",
        "manifest.json",
        "model.safetensors",
    }
    for name in beside:
        assert (target / name).read_bytes() == (official / name).read_bytes()


def test_leaving_mtp_out(official: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    convert(official, target, mtp=False)
    expected = published.layout(published.ragged_config(num_nextn_predict_layers=0))
    assert set(read_all(target)) == set(expected)
    assert json.loads((target / "config.json").read_text())["num_nextn_predict_layers"] == 0
    assert_same(load(target), weights(load(official, mtp=False)))


def test_a_run_folder_is_a_source(tmp_path: Path) -> None:
    model = random_model()
    save(model, tmp_path / "run" / "checkpoint")
    convert(tmp_path / "run", tmp_path / "target", to="fp32")
    assert_same(load(tmp_path / "target"), weights(model))


def test_the_source_is_not_touched(official: Path, tmp_path: Path) -> None:
    before = {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in official.iterdir()}
    convert(official, tmp_path / "target")
    assert {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in official.iterdir()} == before


# Memory


@pytest.mark.parametrize("to", ["bf16", "fp32", "fp8", "int8", "int4"])
@pytest.mark.parametrize("form", ["bf16", "fp8", "int4"])
def test_pieces_change_no_bit(
    official: Path, tmp_path: Path, form: str, to: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The smallest pieces, rows of 128, against whole matrices; every form into every form."""
    convert(official, tmp_path / "source", form, group_size=24)
    convert(tmp_path / "source", tmp_path / "whole", to, group_size=16)
    pieces, put = [0], PieceWriter.put

    def counted(self: PieceWriter, name: str, start: int, rows: Tensor) -> None:
        pieces[0] += start > 0
        assert len(rows) <= 128
        put(self, name, start, rows)

    monkeypatch.setattr(PieceWriter, "put", counted)
    monkeypatch.setattr(module, "numbers_at_a_time", lambda shapes, memory: 1)
    convert(tmp_path / "source", tmp_path / "pieces", to, group_size=16)
    assert pieces[0] > 20
    one, other = read_all(tmp_path / "whole"), read_all(tmp_path / "pieces")
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor.view(torch.uint8), other[name].view(torch.uint8)), name


def test_progress_counts_every_byte_up_to_the_last(official: Path, tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    convert(official, tmp_path / "target", on_progress=lambda *step: told.append(step))
    assert [step[0] for step in told] == sorted((s[0] for s in told), key=PHASES.index)
    found = read_all(tmp_path / "target")
    total = sum(tensor.nbytes for tensor in found.values())
    counted = [done for phase, done, of in told if phase == PHASES[-1] and of == total]
    assert counted == sorted(counted)
    assert len(counted) == len(found) + 1
    assert (counted[0], counted[-1]) == (0, total)


def test_shards_of_a_conversion_load_equal(official: Path, tmp_path: Path) -> None:
    convert(official, tmp_path / "one")
    convert(official, tmp_path / "many", max_shard_bytes=50_000)
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 10
    assert_same(load(tmp_path / "many"), weights(load(tmp_path / "one")))


# What is refused


def test_a_target_that_holds_something_is_refused(official: Path, tmp_path: Path) -> None:
    assert "not empty" in refused(official, official)
    link = tmp_path / "link"
    link.symlink_to(official)
    assert "not empty" in refused(official, link)
    save(random_model(), tmp_path / "run" / "checkpoint")
    assert "not empty" in refused(tmp_path / "run", tmp_path / "run" / "checkpoint")
    older = tmp_path / "older"
    model = random_model(seed=5)
    save(model, older)
    assert "not empty" in refused(official, older)
    assert_same(load(older), weights(model))


@pytest.mark.parametrize(("form", "hint"), [("fp16", "fp"), ("bfloat16", "bf16"), ("", "bf16")])
def test_unknown_forms_are_refused(official: Path, tmp_path: Path, form: str, hint: str) -> None:
    text = refused(official, tmp_path / "target", to=form)
    assert f"--to {form}" in text
    assert hint in text


def test_incomplete_and_damaged_sources_are_refused(official: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    name = "model.layers.1.self_attn.o_proj.weight"
    scale = read_all(official)[f"{name}_scale_inv"]
    change(official, {f"{name}_scale_inv": None})
    assert f"{name}_scale_inv" in refused(official, target)
    change(official, {f"{name}_scale_inv": scale, "model.norm.weight": None})
    assert "model.norm.weight" in refused(official, target)
    assert "no such folder" in refused(tmp_path / "absent", target)


def test_a_flipped_byte_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "source"
    save(random_model(), source)
    data = bytearray((source / "model.safetensors").read_bytes())
    data[-50] ^= 4
    (source / "model.safetensors").write_bytes(data)
    assert "model.safetensors" in refused(source, tmp_path / "target")


def test_copies_that_differ_are_refused_as_load_does(official: Path, tmp_path: Path) -> None:
    copy = "model.layers.2.shared_head.head.weight"
    change(official, {copy: read_all(official)[copy] + 1})
    assert "mtp=False" in refused(official, tmp_path / "target")
    convert(official, tmp_path / "target", mtp=False)


def test_a_failed_conversion_leaves_nothing(official: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    # The scale of the last tensor by name: everything before it has been written by then.
    name = "model.layers.2.self_attn.q_b_proj.weight"
    change(official, {f"{name}_scale_inv": torch.ones(7, 7)})
    before = sorted(tmp_path.iterdir())
    assert name in refused(official, target, max_shard_bytes=50_000)
    assert sorted(tmp_path.iterdir()) == before
