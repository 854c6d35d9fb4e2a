"""Names and shapes of a checkpoint against the published layout (facts 1.3, 1.9, 1.10, 3.2)."""

import math
from typing import Any

import pytest

from tests.support import tiny_config
from ziphius.checkpoint.keys import (
    Comparison,
    compare,
    expected_shapes,
    is_mtp,
    require_complete,
    require_shape,
    shared_copies,
)
from ziphius.config.errors import BadInput
from ziphius.config.model import ModelConfig
from ziphius.config.recipe import load_recipe

# Facts 1.3: attention of one layer of the published model.
ATTENTION = {
    "self_attn.q_a_proj.weight": (1536, 7168),
    "self_attn.q_a_layernorm.weight": (1536,),
    "self_attn.q_b_proj.weight": (24576, 1536),
    "self_attn.kv_a_proj_with_mqa.weight": (576, 7168),
    "self_attn.kv_a_layernorm.weight": (512,),
    "self_attn.kv_b_proj.weight": (32768, 512),
    "self_attn.o_proj.weight": (7168, 16384),
}
NORMS = {"input_layernorm.weight": (7168,), "post_attention_layernorm.weight": (7168,)}
DENSE = {
    "mlp.gate_proj.weight": (18432, 7168),
    "mlp.up_proj.weight": (18432, 7168),
    "mlp.down_proj.weight": (7168, 18432),
}
MIXTURE = {
    "mlp.gate.weight": (256, 7168),
    "mlp.gate.e_score_correction_bias": (256,),
    **{
        f"mlp.{expert}.{name}_proj.weight": (7168, 2048) if name == "down" else (2048, 7168)
        for expert in ["shared_experts", *(f"experts.{e}" for e in range(256))]
        for name in ("gate", "up", "down")
    },
}
# Facts 3.2, without what every layer has.
MTP = {
    "enorm.weight": (7168,),
    "hnorm.weight": (7168,),
    "eh_proj.weight": (7168, 14336),
    "shared_head.norm.weight": (7168,),
}
MTP_COPIES = {
    "embed_tokens.weight": "model.embed_tokens.weight",
    "shared_head.head.weight": "lm_head.weight",
}


def published_shapes() -> dict[str, tuple[int, ...]]:
    """The main model and layer 61, without the copies of embedding and head."""
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (129280, 7168),
        "model.norm.weight": (7168,),
        "lm_head.weight": (129280, 7168),
    }
    for layer in range(62):
        parts = {**ATTENTION, **NORMS, **(DENSE if layer < 3 else MIXTURE)}
        parts |= MTP if layer == 61 else {}
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in parts.items()}
    return shapes


@pytest.fixture(scope="module")
def v3() -> ModelConfig:
    return load_recipe("671b").model


# The published layout


def test_every_tensor_of_the_published_model(v3: ModelConfig) -> None:
    expected, found = published_shapes(), expected_shapes(v3)
    assert found.keys() == expected.keys()
    assert {name: found[name] for name in expected if found[name] != expected[name]} == {}


def test_numbers_of_the_published_model(v3: ModelConfig) -> None:
    found = expected_shapes(v3)
    sizes = {name: math.prod(shape) for name, shape in found.items()}
    # A layer has 7 tensors of attention and 2 norms; a mixture 3 * 257 + 2 more, a dense one 3.
    assert len(found) == 3 + 3 * 12 + 58 * (9 + 773) + (9 + 773 + 4)
    # Facts 1.10.
    mtp = {name for name in found if name.startswith("model.layers.61.")}
    assert sum(sizes[name] for name in mtp) == 11_610_068_224
    assert sum(sizes[name] for name in sizes.keys() - mtp) == 671_026_419_200
    copies = shared_copies(v3)
    whole = sum(sizes.values()) + sum(sizes[original] for original in copies.values())
    assert whole == 684_489_845_504


def test_the_mtp_copies_of_the_published_model(v3: ModelConfig) -> None:
    assert shared_copies(v3) == {
        f"model.layers.61.{name}": original for name, original in MTP_COPIES.items()
    }


@pytest.mark.parametrize("layers", [1, 5])
@pytest.mark.parametrize("depth", [0, 1, 2])
def test_mtp_modules_follow_the_last_layer_whatever_its_number(layers: int, depth: int) -> None:
    config = tiny_config(num_hidden_layers=layers, num_nextn_predict_layers=depth)
    names = expected_shapes(config)
    places = {int(n.split(".")[2]) for n in names if n.startswith("model.layers.")}
    assert places == set(range(layers + depth))
    modules = {int(n.split(".")[2]) for n in names if n.endswith("eh_proj.weight")}
    assert modules == set(range(layers, layers + depth))
    assert set(shared_copies(config)) == {
        f"model.layers.{layers + d}.{name}" for d in range(depth) for name in MTP_COPIES
    }
    of_mtp = {n for n in names if n.startswith("model.layers.") and int(n.split(".")[2]) >= layers}
    assert {n for n in names if is_mtp(n, config)} == of_mtp


def test_queries_without_a_latent() -> None:
    """V2-Lite's form (facts 1.3): one q_proj of n_h * (nope + rope) rows."""
    found = expected_shapes(tiny_config(q_lora_rank=None, num_nextn_predict_layers=0))
    of_queries = {n: s for n, s in found.items() if ".q_" in n and ".0." in n}
    assert of_queries == {"model.layers.0.self_attn.q_proj.weight": (3 * 11, 24)}


def test_shared_experts_are_one_of_their_joint_width() -> None:
    found = expected_shapes(tiny_config(n_shared_experts=3, moe_intermediate_size=11))
    assert found["model.layers.1.mlp.shared_experts.gate_proj.weight"] == (33, 24)
    assert found["model.layers.1.mlp.shared_experts.down_proj.weight"] == (24, 33)
    assert found["model.layers.1.mlp.experts.7.down_proj.weight"] == (24, 11)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.5.eh_proj.weight", True),
        ("model.layers.17.anything", True),
        ("model.layers.4.mlp.gate.weight", False),
        ("model.layers.x.mlp", False),
        ("model.layers", False),
        ("model.norm.weight", False),
        ("lm_head.weight", False),
    ],
)
def test_what_belongs_to_an_mtp_module(name: str, expected: bool) -> None:
    assert is_mtp(name, tiny_config(num_hidden_layers=5)) is expected


# Comparison


def full_names(config: ModelConfig) -> set[str]:
    return set(expected_shapes(config)) | set(shared_copies(config))


def message(found: set[str], config: ModelConfig) -> str:
    with pytest.raises(BadInput) as caught:
        require_complete(compare(found, config), config, "some/folder")
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith("some/folder: ")
    return text


def test_a_complete_file_has_nothing_to_report() -> None:
    config = tiny_config()
    names = full_names(config)
    comparison = compare(names, config)
    assert comparison == Comparison(frozenset(names), frozenset(), frozenset(), frozenset())
    require_complete(comparison, config, "some/folder")


def test_every_name_is_in_exactly_one_of_the_four() -> None:
    config = tiny_config()
    names = full_names(config)
    gone = {"model.norm.weight", "model.layers.1.mlp.gate.weight"}
    extra = {"model.layers.0.self_attn.k_proj.weight", "model.norm.weight_scale_inv"}
    old = {"model.layers.0.self_attn.rotary_emb.inv_freq"}
    scales = {"model.layers.0.self_attn.o_proj.weight_scale_inv"}
    found = (names - gone) | extra | old | scales
    comparison = compare(found, config)
    assert comparison.missing == gone
    assert comparison.unused == extra, "a scale without its weight is of no use"
    assert comparison.ignored == old
    assert comparison.used == (names - gone) | scales


def test_missing_tensors_are_counted_and_named() -> None:
    config = tiny_config()
    experts = {n for n in full_names(config) if ".1.mlp.experts." in n}
    assert len(experts) == 24
    text = message(full_names(config) - experts, config)
    assert "24 tensor(s) missing: model.layers.1.mlp.experts.0.down_proj.weight" in text
    assert text.endswith("and 20 more")
    assert "no place" not in text


def test_unused_tensors_are_counted_and_named() -> None:
    config = tiny_config()
    text = message(full_names(config) | {"model.layers.0.self_attn.k_proj.weight"}, config)
    assert "1 tensor(s) that the config has no place for" in text
    assert "model.layers.0.self_attn.k_proj.weight" in text
    assert "missing" not in text


def test_missing_and_unused_are_told_together() -> None:
    config = tiny_config()
    names = full_names(config) - {"lm_head.weight"} | {"output.weight"}
    text = message(names, config)
    assert "1 tensor(s) missing: lm_head.weight" in text
    assert "output.weight" in text


def test_rotary_tables_of_old_exports_are_ignored() -> None:
    config = tiny_config()
    found = full_names(config) | {
        f"model.layers.{layer}.self_attn.rotary_emb.inv_freq" for layer in range(3)
    }
    require_complete(compare(found, config), config, "some/folder")


@pytest.mark.parametrize("depth", [1, 2])
def test_declared_and_absent_mtp_names_the_option(depth: int) -> None:
    config = tiny_config(num_nextn_predict_layers=depth)
    names = {name for name in full_names(config) if not is_mtp(name, config)}
    text = message(names, config)
    assert f"declares {depth} MTP module(s)" in text
    assert "--without-mtp" in text
    assert "mtp=False" in text


@pytest.mark.parametrize("case", ["a part of the module", "one module of two", "a main tensor too"])
def test_other_losses_are_not_blamed_on_mtp(case: str) -> None:
    config = tiny_config(num_nextn_predict_layers=2)
    names = full_names(config)
    lost = {
        "a part of the module": {n for n in names if is_mtp(n, config) and "norm" in n},
        "one module of two": {n for n in names if n.startswith("model.layers.4.")},
        "a main tensor too": {n for n in names if is_mtp(n, config)} | {"model.norm.weight"},
    }[case]
    text = message(names - lost, config)
    assert f"{len(lost)} tensor(s) missing" in text
    assert "mtp=False" not in text


def test_undeclared_mtp_is_told_as_unused() -> None:
    """transformers drops ``num_nextn_predict_layers`` from the configs that it writes."""
    with_mtp = tiny_config(num_nextn_predict_layers=1)
    without = tiny_config(num_nextn_predict_layers=0)
    comparison = compare(full_names(with_mtp), without)
    assert comparison.missing == frozenset()
    assert comparison.unused == {n for n in full_names(with_mtp) if is_mtp(n, without)}


@pytest.mark.parametrize(
    ("name", "shape", "wrong"),
    [
        ("model.norm.weight", (24,), False),
        ("model.norm.weight", (25,), True),
        ("model.norm.weight", (1, 24), True),
        ("lm_head.weight", (24, 61), True),
        ("no.such.weight", (3,), False),
    ],
)
def test_shapes(name: str, shape: tuple[int, ...], wrong: bool) -> None:
    expected: Any = expected_shapes(tiny_config())
    if not wrong:
        require_shape(name, shape, expected)
        return
    with pytest.raises(BadInput) as caught:
        require_shape(name, shape, expected)
    text = str(caught.value)
    assert text.startswith(name)
    assert str(list(shape)) in text
    assert str(list(expected[name])) in text
