"""A checkpoint in the published FP8 form, written without the package's own writer.

Facts 1.8, 1.9, 3.2, 4.2: E4M3 weights with FP32 scales a 128 x 128 block, everything else BF16, the
routing bias FP32, and beside each MTP module a copy of embedding and head.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.support import tiny_config
from ziphius.checkpoint.huggingface import load
from ziphius.config.errors import BadInput
from ziphius.config.model import ModelConfig
from ziphius.model.transformer import Transformer
from ziphius.model.weights import named_weights

ROUTING_BIAS = "e_score_correction_bias"
QUANTIZATION = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [128, 128],
}


def ragged_config(**changes: Any) -> ModelConfig:
    """Widths around 128, so that edges of blocks fall inside weights and some blocks are ragged."""
    return tiny_config(
        **{
            "hidden_size": 136,
            "intermediate_size": 260,
            "q_lora_rank": 128,
            "kv_lora_rank": 20,
            "num_attention_heads": 4,
            "qk_nope_head_dim": 30,
            "qk_rope_head_dim": 6,
            "moe_intermediate_size": 130,
            "n_shared_experts": 1,
            "n_routed_experts": 4,
            "n_group": 2,
            "topk_group": 1,
            "num_experts_per_tok": 2,
            "num_hidden_layers": 2,
            **changes,
        }
    )


def layout(c: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes by facts 1.3, 1.9 and 3.2, the MTP copies included."""
    V, D, H, C = c.vocab_size, c.hidden_size, c.num_attention_heads, c.kv_lora_rank
    Q, R, F = c.q_lora_rank or 0, c.qk_rope_head_dim, c.moe_intermediate_size
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (V, D)}
    for layer in range(c.num_hidden_layers + c.num_nextn_predict_layers):
        widths = {"mlp": c.intermediate_size}
        parts: dict[str, tuple[int, ...]] = {
            "input_layernorm.weight": (D,),
            "post_attention_layernorm.weight": (D,),
            "self_attn.q_a_proj.weight": (Q, D),
            "self_attn.q_a_layernorm.weight": (Q,),
            "self_attn.q_b_proj.weight": (H * (c.qk_nope_head_dim + R), Q),
            "self_attn.kv_a_proj_with_mqa.weight": (C + R, D),
            "self_attn.kv_a_layernorm.weight": (C,),
            "self_attn.kv_b_proj.weight": (H * (c.qk_nope_head_dim + c.v_head_dim), C),
            "self_attn.o_proj.weight": (D, H * c.v_head_dim),
        }
        if layer >= c.first_k_dense_replace:
            parts["mlp.gate.weight"] = (c.n_routed_experts, D)
            parts[f"mlp.gate.{ROUTING_BIAS}"] = (c.n_routed_experts,)
            widths = {f"mlp.experts.{e}": F for e in range(c.n_routed_experts)}
            widths["mlp.shared_experts"] = c.n_shared_experts * F
        for name, width in widths.items():
            parts |= {f"{name}.{p}_proj.weight": (width, D) for p in ("gate", "up")}
            parts[f"{name}.down_proj.weight"] = (D, width)
        if layer >= c.num_hidden_layers:
            parts |= {"enorm.weight": (D,), "hnorm.weight": (D,), "eh_proj.weight": (D, 2 * D)}
            parts |= {"shared_head.norm.weight": (D,), "shared_head.head.weight": (V, D)}
            parts["embed_tokens.weight"] = (V, D)
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in parts.items()}
    return shapes | {"model.norm.weight": (D,), "lm_head.weight": (V, D)}


def is_fp8(name: str) -> bool:
    """Facts 1.9: all projections of attention and of feed-forward layers, and nothing else."""
    if name.endswith("eh_proj.weight"):
        return False
    return name.endswith(("_proj.weight", "kv_a_proj_with_mqa.weight"))


def published_config(c: ModelConfig, **changes: Any) -> dict[str, Any]:
    """config.json by facts 1.8, spelled out here and not by ``config_json``."""
    same = {
        k: v for k, v in c.model_dump().items() if k not in ("rope_scaling", "initializer_range")
    }
    return {
        **same,
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "num_key_value_heads": c.num_attention_heads,
        "rope_scaling": None,
        "initializer_range": 0.02,
        "moe_layer_freq": 1,
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "torch_dtype": "bfloat16",
        "quantization_config": QUANTIZATION,
        **changes,
    }


def write_published(
    folder: Path, config: ModelConfig, *, shards: int = 1, seed: int = 0
) -> dict[str, Tensor]:
    """Write a checkpoint with random weights; return what they mean, in float64."""
    generator = torch.Generator().manual_seed(seed)
    stored, meant = {}, {}
    for name, shape in layout(config).items():
        drawn = torch.randn(shape, generator=generator)
        if is_fp8(name):
            rows, columns = shape
            scale = torch.rand(-(-rows // 128), -(-columns // 128), generator=generator) + 0.01
            scale *= 0.01
            q = (drawn * 20).clamp(-448, 448).to(torch.float8_e4m3fn)
            stored[name], stored[f"{name}_scale_inv"] = q, scale
            spread = scale.double().repeat_interleave(128, 0).repeat_interleave(128, 1)
            meant[name] = q.double() * spread[:rows, :columns]
            continue
        drawn = 1 + 0.1 * drawn if name.endswith("norm.weight") else 0.2 * drawn
        dtype = torch.float32 if name.endswith(ROUTING_BIAS) else torch.bfloat16
        stored[name] = drawn.to(dtype)
        meant[name] = stored[name].double()
    for name in list(stored):
        if name.endswith(("embed_tokens.weight", "head.weight")) and ".layers." in name:
            original = "lm_head.weight" if "head" in name else "model.embed_tokens.weight"
            stored[name], meant[name] = stored[original].clone(), meant[original]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(published_config(config), indent=2))
    write_shards(folder, stored, shards)
    return meant


def write_shards(folder: Path, tensors: dict[str, Tensor], shards: int = 1) -> None:
    """Write tensors as one file, or round robin over numbered files with an index."""
    for old in folder.glob("model*.safetensors*"):
        old.unlink()
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    placed = {
        name: f"model-{i % shards + 1:05d}-of-{shards:06d}.safetensors"
        for i, name in enumerate(tensors)
    }
    for file in sorted(set(placed.values())):
        part = {name: tensors[name] for name in tensors if placed[name] == file}
        save_file(part, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": placed}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def read_all(folder: Path) -> dict[str, Tensor]:
    """Read every tensor of a folder with safetensors' own reader."""
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def change(folder: Path, changed: dict[str, Tensor | None]) -> None:
    """Rewrite a checkpoint with other tensors (``None`` takes one away); drop its manifest."""
    tensors = read_all(folder)
    for name, tensor in changed.items():
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor
    for old in (*folder.glob("*.safetensors"), folder / "model.safetensors.index.json"):
        old.unlink(missing_ok=True)
    write_shards(folder, tensors)
    (folder / "manifest.json").unlink(missing_ok=True)


def change_config(folder: Path, **changes: Any) -> None:
    """Change keys of ``config.json`` (``None`` takes one away); drop the manifest."""
    path = folder / "config.json"
    raw = json.loads(path.read_text())
    for key, value in changes.items():
        raw[key] = value
        if value is None:
            del raw[key]
    path.write_text(json.dumps(raw))
    (folder / "manifest.json").unlink(missing_ok=True)


def weights(model: Transformer) -> dict[str, Tensor]:
    """Copy every weight of a model, by name."""
    return {name: tensor.clone() for name, tensor in named_weights(model)}


def assert_same(found: Transformer, expected: dict[str, Tensor]) -> None:
    """Compare a model's weights bit for bit, dtypes included."""
    tensors = dict(named_weights(found))
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert tensors[name].dtype == tensor.dtype, name
        assert torch.equal(tensors[name], tensor), name


def refused(path: Path, **options: Any) -> str:
    """The one line with which a checkpoint is refused."""
    with pytest.raises(BadInput) as caught:
        load(path, **options)
    text = str(caught.value)
    assert "\n" not in text
    assert caught.value.exit_code == 2
    assert str(path) in text or "model.layers" in text
    return text
