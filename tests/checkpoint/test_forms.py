"""Quantised forms of a conversion: what is written, recorded, kept, refused, and held in memory."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoint import published
from tests.checkpoint.published import assert_same, is_fp8, layout, read_all, weights
from tests.support import random_model, tiny_config
from ziphius.checkpoint.convert import convert
from ziphius.checkpoint.forms import ragged_weights
from ziphius.checkpoint.fp8 import dequantize_blocks
from ziphius.checkpoint.huggingface import load, save
from ziphius.config.errors import BadInput

NAME = "model.layers.1.mlp.experts.3.down_proj.weight"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    save(random_model(), tmp_path / "source", dtype="bfloat16")
    return tmp_path / "source"


def raw(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return content


# FP8


def test_fp8_has_the_published_layout(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "fp8", to="fp8")
    found = read_all(tmp_path / "fp8")
    expected = set(layout(tiny_config()))
    expected |= {f"{name}_scale_inv" for name in expected if is_fp8(name)}
    assert set(found) == expected
    for name in layout(tiny_config()):
        assert (found[name].dtype == torch.float8_e4m3fn) == is_fp8(name), name
    assert raw(tmp_path / "fp8")["quantization_config"] == published.QUANTIZATION
    originals, loaded = read_all(source), dict(weights(load(tmp_path / "fp8")))
    scale_inv = found[f"{NAME}_scale_inv"]
    assert torch.equal(loaded[NAME], dequantize_blocks(found[NAME], scale_inv, torch.bfloat16))
    torch.testing.assert_close(loaded[NAME], originals[NAME], rtol=2**-3, atol=1e-3)


def test_fp8_of_fp8_is_copied(tmp_path: Path) -> None:
    published.write_published(tmp_path / "official", published.ragged_config())
    convert(tmp_path / "official", tmp_path / "again", to="fp8")
    before, after = read_all(tmp_path / "official"), read_all(tmp_path / "again")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[n].float(), after[n].float()) for n in before)


# Integers


@pytest.mark.parametrize(("to", "size"), [("int8", 8), ("int4", 8), ("int8", -1), ("int4", 128)])
def test_the_error_is_that_of_the_bits(source: Path, tmp_path: Path, to: str, size: int) -> None:
    convert(source, tmp_path / "ints", to=to, group_size=size)
    expected = weights(load(source, dtype="float32"))
    for name, weight in weights(load(tmp_path / "ints", dtype="float32")).items():
        error = float((weight - expected[name]).norm() / expected[name].norm())
        if not is_fp8(name):
            assert error == 0
        else:
            assert 0 < error < (0.012 if to == "int8" else 0.2), name


@pytest.mark.parametrize("to", ["int8", "int4", "fp8"])
def test_back_to_bf16_and_once_more(source: Path, tmp_path: Path, to: str) -> None:
    """A quantised checkpoint is a source like any other, and integers are fixed points."""
    convert(source, tmp_path / "one", to=to, group_size=8)
    convert(tmp_path / "one", tmp_path / "plain", to="fp32")
    assert_same(load(tmp_path / "plain"), weights(load(tmp_path / "one", dtype="float32")))
    assert "quantization_config" not in raw(tmp_path / "plain")
    assert "ziphius_quantization" not in raw(tmp_path / "plain")
    convert(tmp_path / "plain", tmp_path / "two", to=to, group_size=8)
    assert_same(load(tmp_path / "two"), weights(load(tmp_path / "one")))


def test_the_published_fp8_becomes_integers(tmp_path: Path) -> None:
    published.write_published(tmp_path / "official", published.ragged_config())
    convert(tmp_path / "official", tmp_path / "ints", to="int8", group_size=32)
    expected = weights(load(tmp_path / "official", dtype="float32"))
    for name, weight in weights(load(tmp_path / "ints", dtype="float32")).items():
        assert (weight - expected[name]).norm() <= 0.012 * expected[name].norm(), name


def test_how_integers_were_found_is_recorded(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "ints", to="int4", group_size=8)
    record = raw(tmp_path / "ints")["ziphius_quantization"]
    assert record == {"method": "rounding", "bits": 4, "group_size": 8}
    convert(source, tmp_path / "fp8", to="fp8")
    record = raw(tmp_path / "fp8")["ziphius_quantization"]
    assert record == {"method": "rounding", "block": [128, 128]}


def test_ragged_matrices_are_named() -> None:
    config = tiny_config()
    assert ragged_weights(config, -1) == []
    assert ragged_weights(config, 1) == []
    ragged = ragged_weights(config, 8)
    assert "model.layers.0.self_attn.q_b_proj.weight" in ragged  # 14 inputs
    assert "model.layers.0.mlp.gate_proj.weight" not in ragged  # 24 inputs


# What is refused


@pytest.mark.parametrize("size", [0, -2])
def test_impossible_group_sizes(source: Path, tmp_path: Path, size: int) -> None:
    with pytest.raises(BadInput, match="--group-size: group size"):
        convert(source, tmp_path / "ints", to="int4", group_size=size)


@pytest.mark.parametrize("to", ["int4", "fp8"])
def test_weights_that_are_not_finite(source: Path, tmp_path: Path, to: str) -> None:
    broken = read_all(source)[NAME].clone()
    broken[3, 2] = float("nan")
    published.change(source, {NAME: broken})
    with pytest.raises(BadInput, match="NaN or infinity") as caught:
        convert(source, tmp_path / "target", to=to)
    assert NAME in str(caught.value)
    assert not (tmp_path / "target").exists()


# Memory

_CONVERT = """
import resource, sys, torch
torch.set_num_threads(1)
from ziphius.checkpoint.convert import convert
source, target, to = sys.argv[1:4]
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
convert(source, target, to, group_size=32, max_shard_bytes=4 * 2**20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize("to", ["int4", "int8", "fp8"])
def test_memory_is_a_fraction_of_the_checkpoint(tmp_path: Path, to: str) -> None:
    """A process's peak beyond its imports, on a checkpoint of about 100 MB in BF16."""
    config = tiny_config(
        hidden_size=256, moe_intermediate_size=256, n_routed_experts=64, n_group=4,
        num_hidden_layers=4, first_k_dense_replace=0, num_nextn_predict_layers=0,
    )  # fmt: skip
    save(random_model(config), tmp_path / "source", dtype="bfloat16", max_shard_bytes=2**23)
    size = sum(path.stat().st_size for path in (tmp_path / "source").iterdir())
    assert size > 90e6
    result = subprocess.run(
        [sys.executable, "-c", _CONVERT, tmp_path / "source", tmp_path / "target", to],
        capture_output=True, text=True, check=True,
        env=os.environ | {"MALLOC_ARENA_MAX": "1"},
    )  # fmt: skip
    grown = int(result.stdout) * 1024
    assert grown < size / 2, f"{grown / 1e6:.0f} MB beyond the imports"
