"""Whole checkpoints: saved and loaded, in the published form, damaged, and half written."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoint import published
from tests.checkpoint.published import (
    ROUTING_BIAS,
    assert_same,
    change,
    change_config,
    read_all,
    refused,
    weights,
)
from tests.support import hf_config, random_model, random_tokens, tiny_config
from ziphius.checkpoint.huggingface import as_dtype, exported, load, save
from ziphius.checkpoint.keys import shared_copies
from ziphius.config.errors import BadInput
from ziphius.model.precision import Precision
from ziphius.model.weights import named_weights

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


# Round trips


@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_a_saved_model_comes_back_bit_for_bit(
    tmp_path: Path, dtype: torch.dtype, depth: int
) -> None:
    model = random_model(
        precision=Precision.for_inference(dtype), num_nextn_predict_layers=depth
    ).eval()
    save(model, tmp_path)
    found = load(tmp_path)
    assert not found.training
    assert found.precision == model.precision
    assert found.config.num_nextn_predict_layers == depth
    assert_same(found, weights(model))
    tokens_BT = random_tokens(model.config, 2, 9)
    with torch.no_grad():
        assert torch.equal(found(tokens_BT), model(tokens_BT))


@pytest.mark.parametrize("depth", [0, 2])
def test_shards_come_back_bit_for_bit(tmp_path: Path, depth: int) -> None:
    model = random_model(num_nextn_predict_layers=depth)
    save(model, tmp_path, max_shard_bytes=10_000)
    files = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(files) > 5
    assert all(path.stat().st_size < 15_000 for path in files)
    assert_same(load(tmp_path), weights(model))


def test_files_have_the_published_names_dtypes_and_copies(tmp_path: Path) -> None:
    config = published.ragged_config(num_nextn_predict_layers=2)
    model = random_model(config, precision=Precision.for_inference(torch.bfloat16))
    save(model, tmp_path)
    found, expected = read_all(tmp_path), published.layout(config)
    assert {name: tuple(t.shape) for name, t in found.items()} == expected
    for name, tensor in found.items():
        wanted = torch.float32 if name.endswith(ROUTING_BIAS) else torch.bfloat16
        assert tensor.dtype == wanted, name
    for copy, original in shared_copies(config).items():
        assert torch.equal(found[copy], found[original])
    raw = json.loads((tmp_path / "config.json").read_text())
    assert raw["torch_dtype"] == "bfloat16"
    assert raw["num_nextn_predict_layers"] == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "config.json",
        "generation_config.json",
        "manifest.json",
        "model.safetensors",
    ]


@pytest.mark.parametrize("name", ["bfloat16", "float64"])
def test_loading_in_another_dtype_rounds_once(saved: Path, name: str) -> None:
    expected = {
        n: t if n.endswith(ROUTING_BIAS) else t.to(DTYPES[name])
        for n, t in weights(load(saved)).items()
    }
    for dtype in (name, DTYPES[name]):
        model = load(saved, dtype=dtype)
        assert_same(model, expected)
        assert model.precision.compute == DTYPES[name]


def test_master_weights_are_saved_as_they_are_or_as_asked(tmp_path: Path) -> None:
    model = random_model(precision=Precision.for_training(torch.bfloat16))
    save(model, tmp_path / "master")
    save(model, tmp_path / "short", dtype="bfloat16")
    assert read_all(tmp_path / "master")["lm_head.weight"].dtype == torch.float32
    assert_same(load(tmp_path / "master"), weights(model))
    expected = {
        n: t if n.endswith(ROUTING_BIAS) else t.bfloat16() for n, t in weights(model).items()
    }
    assert_same(load(tmp_path / "short"), expected)
    assert all(p.dtype == torch.float32 for p in model.parameters()), "saving changes no weight"


def test_export_yields_every_tensor_once() -> None:
    model = random_model(num_nextn_predict_layers=2)
    names = [name for name, _ in exported(model, torch.float32)]
    assert len(names) == len(set(names))
    assert set(names) == set(published.layout(model.config))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_routing_bias_is_float32_however_it_was_stored(saved: Path, dtype: torch.dtype) -> None:
    biases = {n: t for n, t in read_all(saved).items() if n.endswith(ROUTING_BIAS)}
    assert len(biases) == 3
    stored = {name: (bias + 2).to(dtype) for name, bias in biases.items()}
    change(saved, dict(stored))
    model = load(saved, dtype="bfloat16")
    for name, tensor in named_weights(model):
        if name.endswith(ROUTING_BIAS):
            assert tensor.dtype == torch.float32
            assert torch.equal(tensor, stored[name].float())
    save(model, saved)
    for name, tensor in read_all(saved).items():
        if name.endswith(ROUTING_BIAS):
            assert tensor.dtype == torch.float32
            assert torch.equal(tensor, stored[name].float())


def test_leaving_mtp_out(saved: Path) -> None:
    whole, without = load(saved), load(saved, mtp=False)
    assert without.config.num_nextn_predict_layers == 0
    assert len(without.mtp) == 0
    expected = {n: t for n, t in weights(whole).items() if not n.startswith("model.layers.3.")}
    assert_same(without, expected)
    save(without, saved)
    assert load(saved).config.num_nextn_predict_layers == 0
    assert set(read_all(saved)) == set(expected)


def test_rotary_tables_of_old_exports_are_no_obstacle(saved: Path) -> None:
    expected = weights(load(saved))
    change(
        saved, {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(2) for i in (0, 1)}
    )
    assert_same(load(saved), expected)


# The published FP8 form


@pytest.mark.parametrize("shards_", [1, 3])
def test_fp8_is_dequantised(tmp_path: Path, shards_: int) -> None:
    config = published.ragged_config()
    meant = published.write_published(tmp_path, config, shards=shards_)
    scaled = [name for name in read_all(tmp_path) if name.endswith("weight_scale_inv")]
    assert len(scaled) > 40
    default, high, double = load(tmp_path), load(tmp_path, "float32"), load(tmp_path, "float64")
    assert default.precision.storage == torch.bfloat16
    for model in (default, high, double):
        for name, tensor in named_weights(model):
            # E4M3 has 4 significant bits and the scale 24: their product is exact in float64, and
            # is rounded to float32, then to what is stored.
            exact = meant[name] if tensor.dtype == torch.float64 else meant[name].float()
            assert torch.equal(tensor, exact.to(tensor.dtype)), name


def test_fp8_without_mtp(tmp_path: Path) -> None:
    config = published.ragged_config()
    meant = published.write_published(tmp_path, config)
    model = load(tmp_path, "float32", mtp=False)
    for name, tensor in named_weights(model):
        assert torch.equal(tensor, meant[name].float()), name


def test_fp8_errors_name_the_tensor(tmp_path: Path) -> None:
    config = published.ragged_config(num_nextn_predict_layers=0)
    weight = "model.layers.1.mlp.experts.2.down_proj.weight"
    scale = f"{weight}_scale_inv"

    def broken(name: str, **changed: Any) -> Path:
        folder = tmp_path / name
        published.write_published(folder, config)
        change(folder, changed.get("tensors", {}))
        change_config(folder, **changed.get("config", {}))
        return folder

    assert scale in refused(broken("no scale", tensors={scale: None}))
    assert "has FP8 scales but config.json has no quantization_config" in refused(
        broken("no config", config={"quantization_config": None})
    )
    assert scale in refused(broken("a row too many", tensors={scale: torch.ones(3, 2)}))
    assert scale in refused(broken("half", tensors={scale: torch.ones(2, 2).half()}))
    assert weight in refused(broken("no fp8", tensors={weight: torch.zeros(136, 130)}))
    blocks = {**published.QUANTIZATION, "weight_block_size": [64, 64]}
    assert "weight_block_size" in refused(
        broken("other blocks", config={"quantization_config": blocks})
    )


@pytest.mark.parametrize(
    "dtype", [torch.float8_e5m2, torch.int8, torch.uint8, torch.int64, torch.bool]
)
def test_weights_in_a_form_that_means_something_else_are_refused(
    saved: Path, dtype: torch.dtype
) -> None:
    """Packed or scaled numbers: read as they stand they would be nonsense, without a word."""
    name = "model.layers.1.mlp.experts.2.down_proj.weight"
    change(saved, {name: read_all(saved)[name].to(dtype)})
    text = refused(saved)
    assert name in text
    assert str(dtype).removeprefix("torch.") in text


# What is refused


def test_missing_extra_and_misshapen_tensors_are_named(saved: Path) -> None:
    tensors = read_all(saved)
    norm = tensors["model.norm.weight"]
    change(saved, {"model.norm.weight": None})
    assert "model.norm.weight" in refused(saved)
    change(saved, {"model.norm.weight": norm, "model.layers.0.self_attn.k_proj.weight": norm + 1})
    assert "model.layers.0.self_attn.k_proj.weight" in refused(saved)
    change(saved, {"model.layers.0.self_attn.k_proj.weight": None, "model.norm.weight": norm[:-1]})
    with pytest.raises(BadInput, match=r"model\.norm\.weight: shape \[23\].*\[24\]"):
        load(saved)
    change(saved, {"model.norm.weight": norm})
    load(saved)


def test_a_misshapen_copy_is_refused_too(saved: Path) -> None:
    copy = "model.layers.3.embed_tokens.weight"
    change(saved, {copy: read_all(saved)[copy][:-1]})
    with pytest.raises(BadInput, match=copy):
        load(saved)


@pytest.mark.parametrize("many", [False, True], ids=["one file", "shards"])
@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("manifest", [True, False])
def test_a_truncated_file_is_named(
    tmp_path: Path, many: bool, verify: bool, manifest: bool
) -> None:
    save(random_model(), tmp_path, max_shard_bytes=30_000 if many else 10**9)
    path = sorted(tmp_path.glob("*.safetensors"))[-1]
    os.truncate(path, path.stat().st_size - 1)
    if not manifest:
        (tmp_path / "manifest.json").unlink()
    assert path.name in refused(tmp_path, verify=verify)


def test_a_flipped_byte_is_found_where_there_is_a_manifest(saved: Path) -> None:
    path = saved / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)
    assert "model.safetensors has sha256" in refused(saved)
    load(saved, verify=False)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    save(random_model(), tmp_path, max_shard_bytes=30_000)
    path = sorted(tmp_path.glob("*.safetensors"))[1]
    path.unlink()
    assert path.name in refused(tmp_path)
    (tmp_path / "manifest.json").unlink()
    assert path.name in refused(tmp_path)


def test_another_architecture_is_refused(saved: Path) -> None:
    change_config(saved, model_type="llama", architectures=["LlamaForCausalLM"])
    assert "llama" in refused(saved)


def test_copies_that_differ_name_the_option(saved: Path) -> None:
    for copy in ("model.layers.3.embed_tokens.weight", "model.layers.3.shared_head.head.weight"):
        tensor = read_all(saved)[copy]
        different = tensor.clone()
        different[3, 4] += 1e-3
        change(saved, {copy: different})
        text = refused(saved)
        assert copy in text
        assert "mtp=False" in text
        load(saved, mtp=False)
        change(saved, {copy: tensor})
    load(saved)


def test_copies_of_equal_value_in_another_dtype_are_copies(saved: Path) -> None:
    copy = "model.layers.3.shared_head.head.weight"
    tensors = read_all(saved)
    short = tensors["lm_head.weight"].bfloat16()
    change(saved, {"lm_head.weight": short.float(), copy: short})
    load(saved)
    change(saved, {"lm_head.weight": tensors["lm_head.weight"]})
    assert copy in refused(saved)


@pytest.mark.parametrize("dtype", ["float8", "fp16", "int8", torch.int8, torch.float8_e4m3fn])
def test_dtypes_that_nothing_computes_in_are_refused(saved: Path, dtype: torch.dtype | str) -> None:
    with pytest.raises(BadInput, match="dtype"):
        load(saved, dtype=dtype)
    with pytest.raises(BadInput, match="dtype"):
        save(random_model(), saved / "new", dtype=dtype)
    assert not (saved / "new").exists()


def test_a_nearby_name_of_a_dtype_is_offered() -> None:
    with pytest.raises(BadInput, match="did you mean 'bfloat16'"):
        as_dtype("bfloat")


# Checkpoints that transformers wrote


@pytest.fixture(scope="module")
def by_transformers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import DeepseekV3ForCausalLM

    folder = tmp_path_factory.mktemp("transformers")
    torch.manual_seed(0)
    DeepseekV3ForCausalLM(hf_config(tiny_config())).save_pretrained(folder)
    return folder


def test_declared_and_absent_mtp_of_transformers_names_the_option(by_transformers: Path) -> None:
    raw = json.loads((by_transformers / "config.json").read_text())
    assert raw["num_nextn_predict_layers"] == 1, "the case is no case any more"
    text = refused(by_transformers)
    assert "mtp=False" in text
    assert "--without-mtp" in text


def test_without_mtp_a_checkpoint_of_transformers_loads(by_transformers: Path) -> None:
    model = load(by_transformers, mtp=False)
    tensors = read_all(by_transformers)
    assert len(tensors) == len(dict(named_weights(model)))
    for name, tensor in named_weights(model):
        assert torch.equal(tensor, tensors[name]), name


@pytest.mark.parametrize("eos", [7, (7, 9)])
def test_begin_and_end_tokens_survive_load_and_save(
    tmp_path: Path, eos: int | tuple[int, ...]
) -> None:
    save(random_model(bos_token_id=3, eos_token_id=eos), tmp_path / "one")
    save(load(tmp_path / "one"), tmp_path / "two")
    for name in ("config.json", "generation_config.json"):
        written = json.loads((tmp_path / "two" / name).read_text("utf-8"))
        assert written["bos_token_id"] == 3
        assert written["eos_token_id"] == (list(eos) if isinstance(eos, tuple) else eos)
    assert load(tmp_path / "two").config.eos_token_id == eos
