"""Quantised checkpoints in transformers: numbers mean there what they mean here."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.checkpoint import published
from tests.checkpoint.published import assert_same, weights
from tests.support import open_in_transformers, random_model, random_tokens, tiny_config
from ziphius.checkpoint.convert import convert
from ziphius.checkpoint.forms import ragged_blocks
from ziphius.checkpoint.huggingface import load, save
from ziphius.model.weights import named_weights

# Widths that divide into groups of 32 and, of FP8 weights, into blocks: transformers 5.24 takes the
# size of a block from the number of scales, and so refuses a ragged one or gets it wrong.
CONFIG = tiny_config(
    hidden_size=128, intermediate_size=256, num_attention_heads=2, q_lora_rank=128,
    kv_lora_rank=128, qk_nope_head_dim=64, qk_rope_head_dim=128, v_head_dim=64,
    moe_intermediate_size=128, n_shared_experts=1,
)  # fmt: skip


@pytest.mark.parametrize(
    ("to", "group_size", "library"),
    [
        ("int8", 32, "compressed_tensors"),
        ("int4", 32, "compressed_tensors"),
        ("int8", -1, "compressed_tensors"),
        ("int4", -1, "compressed_tensors"),
        ("int4+head", 32, "compressed_tensors"),
        ("fp8", 128, "accelerate"),
    ],
)
def test_transformers_computes_what_the_dequantised_weights_mean(
    tmp_path: Path, to: str, group_size: int, library: str
) -> None:
    pytest.importorskip(library)
    save(random_model(CONFIG), tmp_path / "source", dtype="bfloat16")
    to, _, head = to.partition("+")
    settings = {"to": to, "group_size": group_size, "head": bool(head)}
    convert(tmp_path / "source", tmp_path / "quantised", **settings)
    convert(tmp_path / "quantised", tmp_path / "plain", to="bf16")
    assert_same(load(tmp_path / "quantised"), weights(load(tmp_path / "plain")))
    tokens = random_tokens(CONFIG, 2, 16)
    with torch.no_grad():
        found, expected = (
            open_in_transformers(tmp_path / name, torch.bfloat16)(tokens).logits
            for name in ("quantised", "plain")
        )
    assert torch.equal(found, expected)


# FP8


def dequantised(folder: Path) -> dict[str, torch.Tensor]:
    """What an FP8 folder means, by facts 4.2 and safetensors alone."""
    stored = {n: t for f in folder.glob("*.safetensors") for n, t in load_file(f).items()}
    meant = {}
    for name in (name for name in stored if not name.endswith("_scale_inv")):
        meant[name] = stored[name].float()
        if f"{name}_scale_inv" in stored:
            scale = stored[f"{name}_scale_inv"].repeat_interleave(128, 0).repeat_interleave(128, 1)
            rows, columns = meant[name].shape
            meant[name] *= scale[:rows, :columns]
    return meant


@pytest.mark.parametrize("scales", ["float32", "ue8m0"])
def test_an_independent_dequantisation_gives_our_logits(tmp_path: Path, scales: str) -> None:
    """Of ragged matrices and with MTP; in FP32, bit for bit."""
    config = published.ragged_config()
    save(random_model(config), tmp_path / "source", dtype="bfloat16")
    convert(tmp_path / "source", tmp_path / "fp8", "fp8", scales=scales)
    (tmp_path / "plain").mkdir()
    save_file(dequantised(tmp_path / "fp8"), tmp_path / "plain" / "model.safetensors")
    settings = published.published_config(config, torch_dtype="float32", quantization_config=None)
    (tmp_path / "plain" / "config.json").write_text(json.dumps(settings))
    plain, ours = load(tmp_path / "plain"), load(tmp_path / "fp8", dtype="float32")
    assert_same(ours, weights(plain))
    tokens = random_tokens(config, 2, 17)
    with torch.no_grad():
        found, expected, source = (
            [model(tokens), *map(model.lm_head, model.features(tokens).mtp_hidden)]
            for model in (ours, plain, load(tmp_path / "source", dtype="float32"))
        )
    assert len(found) == 2
    for logits, same, before in zip(found, expected, source, strict=True):
        assert torch.equal(logits, same)
        # And they are logits of the source, but for FP8 and the experts that tokens choose instead
        # (a random router is undecided); those of another network would be off by 1.4.
        assert 0.001 < (logits - before).norm() / before.norm() < 0.5


@pytest.mark.parametrize("scales", ["float32", "ue8m0"])
def test_transformers_dequantises_fp8_to_what_it_means(tmp_path: Path, scales: str) -> None:
    """Asked for it by ``dequantize=True``, on a processor; main layers, which it has."""
    pytest.importorskip("accelerate")
    save(random_model(CONFIG), tmp_path / "source", dtype="bfloat16")
    convert(tmp_path / "source", tmp_path / "fp8", "fp8", scales=scales)
    assert ragged_blocks(CONFIG) == {}
    theirs = in_transformers(tmp_path / "fp8")
    meant = {n: w.bfloat16() for n, w in dequantised(tmp_path / "fp8").items()}
    for name, weight in theirs.items():
        if name in meant and "experts" not in name:
            assert torch.equal(weight.bfloat16(), meant[name]), name
    experts = theirs["model.layers.1.mlp.experts.down_proj"]
    for number, expert in enumerate(experts):
        assert torch.equal(expert, meant[f"model.layers.1.mlp.experts.{number}.down_proj.weight"])


def in_transformers(folder: Path) -> dict[str, torch.Tensor]:
    from transformers import DeepseekV3ForCausalLM, FineGrainedFP8Config

    scheme = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert scheme.pop("quant_method") == "fp8"
    asked = FineGrainedFP8Config(
        weight_block_size=(128, 128), dequantize=True, scale_fmt=scheme.get("scale_fmt", "float")
    )
    model = DeepseekV3ForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, quantization_config=asked
    )
    return dict(model.state_dict())


@pytest.mark.parametrize(
    ("changes", "name", "raises"),
    [
        # kv_lora_rank + qk_rope_head_dim = 576, as V3 has; five scales.
        ({"kv_lora_rank": 512, "qk_rope_head_dim": 64}, "kv_a_proj_with_mqa", True),
        # 192 rows and two scales: taken for blocks of 96.
        ({"kv_lora_rank": 128, "qk_rope_head_dim": 64}, "kv_a_proj_with_mqa", False),
    ],
)
def test_the_limit_of_transformers_that_the_pages_name(
    tmp_path: Path, changes: dict[str, int], name: str, raises: bool
) -> None:
    """It takes the size of blocks from the number of scales. When this fails, the limit is gone."""
    pytest.importorskip("accelerate")
    config = CONFIG.model_copy(update=changes)
    name = f"model.layers.0.self_attn.{name}.weight"
    assert name in ragged_blocks(config)
    save(random_model(config), tmp_path / "source", dtype="bfloat16")
    convert(tmp_path / "source", tmp_path / "fp8", "fp8")
    if raises:
        with pytest.raises(RuntimeError, match="issues during automatic conversion"):
            in_transformers(tmp_path / "fp8")
        return
    meant = dequantised(tmp_path / "fp8")[name].bfloat16()
    assert not torch.equal(in_transformers(tmp_path / "fp8")[name], meant)
    assert torch.equal(dict(named_weights(load(tmp_path / "fp8")))[name], meant)
