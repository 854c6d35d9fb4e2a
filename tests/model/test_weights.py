"""The one way weights leave a model: published names, every weight once, views of the storage."""

from __future__ import annotations

import torch

from tests.support import random_model, tiny_config
from ziphius.config.recipe import load_recipe
from ziphius.model.transformer import Transformer
from ziphius.model.weights import named_weights


def test_the_published_names_of_v3() -> None:
    """Layer 0, layer 60 and the MTP layer of facts 1.3, 1.9 and 3.2, with their shapes."""
    model = Transformer(load_recipe("671b").model, device="meta")
    shapes = {name: tuple(tensor.shape) for name, tensor in named_weights(model)}
    attention = {
        "self_attn.q_a_proj.weight": (1536, 7168),
        "self_attn.q_a_layernorm.weight": (1536,),
        "self_attn.q_b_proj.weight": (24576, 1536),
        "self_attn.kv_a_proj_with_mqa.weight": (576, 7168),
        "self_attn.kv_a_layernorm.weight": (512,),
        "self_attn.kv_b_proj.weight": (32768, 512),
        "self_attn.o_proj.weight": (7168, 16384),
        "input_layernorm.weight": (7168,),
        "post_attention_layernorm.weight": (7168,),
    }
    dense = {
        "mlp.gate_proj.weight": (18432, 7168),
        "mlp.up_proj.weight": (18432, 7168),
        "mlp.down_proj.weight": (7168, 18432),
    }
    mixture = {"mlp.gate.weight": (256, 7168), "mlp.gate.e_score_correction_bias": (256,)}
    for owner in [f"experts.{e}" for e in range(256)] + ["shared_experts"]:
        mixture |= {
            f"mlp.{owner}.gate_proj.weight": (2048, 7168),
            f"mlp.{owner}.up_proj.weight": (2048, 7168),
            f"mlp.{owner}.down_proj.weight": (7168, 2048),
        }
    module = {
        "enorm.weight": (7168,),
        "hnorm.weight": (7168,),
        "eh_proj.weight": (7168, 14336),
        "shared_head.norm.weight": (7168,),
    }
    layers = {0: attention | dense, 60: attention | mixture, 61: attention | mixture | module}
    for layer, expected in layers.items():
        prefix = f"model.layers.{layer}."
        found = {n.removeprefix(prefix): s for n, s in shapes.items() if n.startswith(prefix)}
        assert found == expected
    outside = {name: shape for name, shape in shapes.items() if ".layers." not in name}
    assert outside == {
        "model.embed_tokens.weight": (129280, 7168),
        "model.norm.weight": (7168,),
        "lm_head.weight": (129280, 7168),
    }


def test_queries_without_compression_have_the_name_of_v2_lite() -> None:
    names = {name for name, _ in named_weights(random_model(q_lora_rank=None))}
    assert "model.layers.0.self_attn.q_proj.weight" in names
    assert not any("q_a_" in name or "q_b_" in name for name in names)


def test_every_number_of_the_model_is_yielded_exactly_once() -> None:
    model = Transformer(tiny_config(num_nextn_predict_layers=2))
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.zero_()
        for _, view in named_weights(model):
            view.add_(1)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        assert (tensor == 1).all(), name


def test_names_are_unique_and_nothing_requires_a_gradient() -> None:
    listed = list(named_weights(random_model()))
    assert len({name for name, _ in listed}) == len(listed)
    assert not any(tensor.requires_grad for _, tensor in listed)
