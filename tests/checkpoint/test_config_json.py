"""config.json against transformers, in both directions and both spellings."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, DeepseekV3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3ForCausalLM,
    yarn_apply_mscale,
)

from ziphius.checkpoint.config_json import (
    config_json,
    raw_config,
    read_config,
    stored_dtype,
    stored_form,
)
from ziphius.config.errors import BadInput
from ziphius.config.model import ModelConfig, Yarn
from ziphius.config.recipe import load_recipe

# Facts 1.8, as published.
PUBLISHED = """{
  "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "vocab_size": 129280,
  "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048,
  "num_hidden_layers": 61, "num_nextn_predict_layers": 1, "num_attention_heads": 128,
  "num_key_value_heads": 128, "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128,
  "qk_rope_head_dim": 64, "v_head_dim": 128, "n_routed_experts": 256, "n_shared_experts": 1,
  "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4, "topk_method": "noaux_tc",
  "scoring_func": "sigmoid", "norm_topk_prob": true, "routed_scaling_factor": 2.5,
  "first_k_dense_replace": 3, "moe_layer_freq": 1, "hidden_act": "silu", "rms_norm_eps": 1e-06,
  "rope_theta": 10000, "rope_scaling": {"type": "yarn", "factor": 40,
    "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0,
    "mscale_all_dim": 1.0}, "max_position_embeddings": 163840, "attention_bias": false,
  "attention_dropout": 0.0, "tie_word_embeddings": false, "torch_dtype": "bfloat16",
  "bos_token_id": 0, "eos_token_id": 1, "aux_loss_alpha": 0.001, "seq_aux": true,
  "initializer_range": 0.02, "quantization_config": {"quant_method": "fp8", "fmt": "e4m3",
    "weight_block_size": [128, 128], "activation_scheme": "dynamic"}, "use_cache": true,
  "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"}, "ep_size": 1
}"""
V3 = ModelConfig(
    vocab_size=129280, hidden_size=7168, intermediate_size=18432, moe_intermediate_size=2048,
    num_hidden_layers=61, num_nextn_predict_layers=1, num_attention_heads=128, q_lora_rank=1536,
    kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128,
    n_routed_experts=256, n_shared_experts=1, num_experts_per_tok=8, n_group=8, topk_group=4,
    norm_topk_prob=True, routed_scaling_factor=2.5, first_k_dense_replace=3, rms_norm_eps=1e-6,
    rope_theta=10000, rope_scaling=Yarn(), max_position_embeddings=163840, initializer_range=0.02,
)  # fmt: skip
TINY: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 48, "intermediate_size": 80, "moe_intermediate_size": 24,
    "num_hidden_layers": 3, "num_attention_heads": 4, "q_lora_rank": 20, "kv_lora_rank": 16,
    "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 10, "n_routed_experts": 8,
    "n_shared_experts": 2, "num_experts_per_tok": 3, "n_group": 4, "topk_group": 2,
    "norm_topk_prob": False, "routed_scaling_factor": 1.7, "first_k_dense_replace": 1,
    "rms_norm_eps": 3e-6, "max_position_embeddings": 640,
}  # fmt: skip
YARN: dict[str, Any] = {
    "rope_type": "yarn", "factor": 10.0, "original_max_position_embeddings": 64,
    "beta_fast": 16.0, "beta_slow": 2.0, "mscale": 0.7, "mscale_all_dim": 0.9,
    "rope_theta": 5000.0,
}  # fmt: skip


def write(folder: Path, raw: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(raw if isinstance(raw, str) else json.dumps(raw))
    return folder


def published(**changes: Any) -> dict[str, Any]:
    return {**json.loads(PUBLISHED), **changes}


@st.composite
def configs(draw: st.DrawFn) -> ModelConfig:
    def size(low: int = 1, high: int = 64) -> int:
        return draw(st.integers(low, high))

    groups, members, layers = size(1, 4), size(2, 4), size(1, 5)
    topk_group = size(1, groups)
    positive = st.floats(0.01, 100)
    # Zero means absent, which no engine distinguishes.
    yarn = st.builds(
        Yarn,
        factor=st.floats(1, 64),
        original_max_position_embeddings=st.integers(1, 4096),
        beta_fast=st.floats(1, 64),
        beta_slow=st.floats(0.1, 1),
        mscale=st.one_of(st.just(0.0), positive),
        mscale_all_dim=st.one_of(st.just(0.0), positive),
    )
    return ModelConfig(
        vocab_size=size(),
        hidden_size=size(),
        intermediate_size=size(),
        moe_intermediate_size=size(),
        num_hidden_layers=layers,
        first_k_dense_replace=size(0, layers),
        num_nextn_predict_layers=size(0, 2),
        max_position_embeddings=size(1, 10**6),
        rms_norm_eps=draw(st.floats(1e-8, 1e-3)),
        initializer_range=draw(st.one_of(st.none(), st.floats(1e-4, 1))),
        num_attention_heads=size(),
        q_lora_rank=draw(st.one_of(st.none(), st.integers(1, 64))),
        kv_lora_rank=size(),
        qk_nope_head_dim=size(),
        qk_rope_head_dim=2 * size(),
        v_head_dim=size(),
        rope_theta=draw(st.floats(2, 1e7)),
        rope_scaling=draw(st.one_of(st.none(), yarn)),
        n_routed_experts=groups * members,
        n_shared_experts=size(1, 3),
        n_group=groups,
        topk_group=topk_group,
        num_experts_per_tok=size(1, topk_group * members),
        norm_topk_prob=draw(st.booleans()),
        routed_scaling_factor=draw(positive),
    )


# Reading


def test_the_published_config_is_read(tmp_path: Path) -> None:
    folder = write(tmp_path, PUBLISHED)
    assert read_config(folder) == V3
    assert stored_dtype(raw_config(folder)) == torch.bfloat16
    assert stored_form(raw_config(folder)) == (128, 128)


def test_the_presets_equal_the_published_config(tmp_path: Path) -> None:
    preset = load_recipe("671b").model
    compared = V3.model_dump(exclude={"initializer_range", "rope_scaling"}).keys()
    read = read_config(write(tmp_path, PUBLISHED))
    architecture = [name for name in compared if name != "max_position_embeddings"]
    assert {name: getattr(read, name) for name in architecture} == {
        name: getattr(preset, name) for name in architecture
    }


def test_kimi_k2_is_read(tmp_path: Path) -> None:
    raw = published(
        model_type="kimi_k2", num_attention_heads=64, num_key_value_heads=64, n_group=1,
        topk_group=1, n_routed_experts=384, first_k_dense_replace=1, num_nextn_predict_layers=0,
        rope_theta=50000.0, routed_scaling_factor=2.827, vocab_size=163840,
        max_position_embeddings=131072,
        rope_scaling={"type": "yarn", "factor": 32.0, "beta_fast": 1.0, "beta_slow": 1.0,
                      "mscale": 1.0, "mscale_all_dim": 1.0,
                      "original_max_position_embeddings": 4096},
    )  # fmt: skip
    config = read_config(write(tmp_path, raw))
    assert config.n_routed_experts == 384
    assert config.num_nextn_predict_layers == 0
    assert config.rope_theta == 50000
    assert config.rope_scaling == Yarn(factor=32, beta_fast=1)


VARIANTS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    ({"num_mtp_layers": 0}, {"num_nextn_predict_layers": 0}),
    ({"num_nextn_predict_layers": 2}, {"num_nextn_predict_layers": 2}),
    ({"q_lora_rank": None}, {"q_lora_rank": None}),
    ({"rope_parameters": {"rope_theta": 777.0, "rope_type": "default"}}, {"rope_theta": 777.0}),
    ({"rope_theta": 777.0}, {"rope_theta": 777.0}),
    ({"dtype": "bfloat16", "topk_method": "noaux_tc", "scoring_func": "sigmoid"}, {}),
    ({"initializer_range": 0.3}, {"initializer_range": 0.3}),
    (
        {"rope_parameters": YARN},
        {
            "rope_theta": 5000.0,
            "rope_scaling": Yarn(
                factor=10,
                original_max_position_embeddings=64,
                beta_fast=16,
                beta_slow=2,
                mscale=0.7,
                mscale_all_dim=0.9,
            ),
        },
    ),
    (
        {"rope_scaling": {"type": "yarn", "factor": 4}, "rope_theta": 300.0},
        {
            "rope_theta": 300.0,
            "rope_scaling": Yarn(
                factor=4, original_max_position_embeddings=640, mscale=0, mscale_all_dim=0
            ),
        },
    ),
]


@pytest.mark.parametrize(("given", "expected"), VARIANTS)
def test_what_transformers_writes_is_read_equal(
    tmp_path: Path, given: dict[str, Any], expected: dict[str, Any]
) -> None:
    given = copy.deepcopy(given)  # transformers changes the tables it is given
    theirs = DeepseekV3Config(**{**TINY, "num_key_value_heads": 4, **given})
    theirs.save_pretrained(tmp_path)
    wanted = {"num_nextn_predict_layers": 1, "initializer_range": 0.02, **TINY, **expected}
    assert read_config(tmp_path) == ModelConfig(**wanted)


def test_a_config_without_mtp_keys_has_no_mtp_module(tmp_path: Path) -> None:
    raw = published()
    del raw["num_nextn_predict_layers"]
    assert read_config(write(tmp_path, raw)).num_nextn_predict_layers == 0


YARN_TABLES = [
    {},
    {"mscale": 1.0, "mscale_all_dim": 1.0},
    {"mscale": 0.707, "mscale_all_dim": 0.5},
    {"mscale": 0.707},
    {"mscale_all_dim": 0.5},
    {"mscale": 0, "mscale_all_dim": 0},
    {"beta_fast": 8, "beta_slow": 4},
    {"beta_fast": None, "truncate": True, "attention_factor": None},
    {"original_max_position_embeddings": 100},
]


@pytest.mark.parametrize("extra", YARN_TABLES)
def test_reading_and_writing_keeps_every_yarn_factor(tmp_path: Path, extra: dict[str, Any]) -> None:
    """transformers computes the same frequencies and scales from our copy as from the original."""

    def computed(folder: Path) -> tuple[torch.Tensor, float, float]:
        config = DeepseekV3Config.from_pretrained(folder)
        frequencies, on_cosine = ROPE_INIT_FUNCTIONS["yarn"](config)
        return frequencies, on_cosine, yarn_apply_mscale(config.rope_parameters, 1.0)

    rope = {"type": "yarn", "factor": 40, **extra}
    raw = published(rope_scaling=rope, rope_theta=12345.0, max_position_embeddings=3000)
    original = write(tmp_path / "original", raw)
    config = read_config(original)
    ours = write(tmp_path / "ours", config_json(config, dtype=torch.bfloat16))
    assert torch.equal(computed(ours)[0], computed(original)[0])
    assert computed(ours)[1:] == computed(original)[1:]


# Refusing


REFUSED: list[tuple[str, Any]] = [
    ("model_type", "deepseek_v2"),
    ("model_type", "deepseek_v32"),
    ("model_type", None),
    ("architectures", ["DeepseekV3ForSequenceClassification"]),
    ("scoring_func", "softmax"),
    ("topk_method", "group_limited_greedy"),
    ("moe_layer_freq", 2),
    ("tie_word_embeddings", True),
    ("attention_bias", True),
    ("hidden_act", "gelu"),
    ("rope_interleave", False),
    ("rope_interleave", None),
    ("num_key_value_heads", 8),
    ("partial_rotary_factor", 0.5),
    ("dtype", "float8_e4m3fn"),
    ("torch_dtype", "int8"),
    ("rope_scaling", "yarn"),
    ("quantization_config", "fp8"),
]


@pytest.mark.parametrize(("key", "value"), REFUSED)
def test_another_network_is_refused_with_file_key_and_value(
    tmp_path: Path, key: str, value: Any
) -> None:
    folder = write(tmp_path, published(**{key: value}))
    with pytest.raises(BadInput) as caught:
        read_config(folder)
    message = str(caught.value)
    assert message.startswith(f"{folder / 'config.json'}: {key} = {json.dumps(value)} is not")
    assert "must be" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"type": "linear"}, 'rope_scaling.rope_type = "linear"'),
        ({"rope_type": "llama3"}, 'rope_scaling.rope_type = "llama3"'),
        ({"rope_type": None}, "rope_scaling.rope_type = null"),
        ({"attention_factor": 1.2}, "rope_scaling.attention_factor = 1.2"),
        ({"truncate": False}, "rope_scaling.truncate = false"),
        ({"llama_4_scaling_beta": 0.1}, "rope_scaling.llama_4_scaling_beta = 0.1"),
    ],
)
def test_other_rotary_tables_are_refused(
    tmp_path: Path, change: dict[str, Any], named: str
) -> None:
    rope = {**published()["rope_scaling"], **change}
    with pytest.raises(BadInput) as caught:
        read_config(write(tmp_path, published(rope_scaling=rope)))
    assert named in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("quant_method", "awq"),
        ("quant_method", None),
        ("fmt", "e5m2"),
        ("weight_block_size", [64, 128]),
        ("weight_block_size", None),
        ("activation_scheme", "static"),
        ("scale_fmt", "other"),
    ],
)
def test_other_quantisation_is_refused(tmp_path: Path, key: str, value: Any) -> None:
    scheme = {**published()["quantization_config"], key: value}
    with pytest.raises(BadInput) as caught:
        read_config(write(tmp_path, published(quantization_config=scheme)))
    assert f"quantization_config.{key} = {json.dumps(value)}" in str(caught.value)


def test_accepted_quantisation_and_dtypes() -> None:
    assert stored_form({}) is None
    assert stored_form({"quantization_config": None}) is None
    scheme = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    assert stored_form({"quantization_config": scheme}) == (128, 128)
    v31 = {**scheme, "fmt": "e4m3", "activation_scheme": "dynamic", "scale_fmt": "ue8m0"}
    assert stored_form({"quantization_config": v31}) == (128, 128)
    assert stored_dtype({}) == torch.float32
    assert stored_dtype({"torch_dtype": "torch.float16"}) == torch.float16
    assert stored_dtype({"dtype": "float32", "torch_dtype": "bfloat16"}) == torch.float32


REQUIRED = [
    "vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "num_hidden_layers",
    "num_attention_heads", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim",
    "v_head_dim", "n_routed_experts", "n_shared_experts", "num_experts_per_tok", "n_group",
    "topk_group", "norm_topk_prob", "routed_scaling_factor", "first_k_dense_replace",
    "rms_norm_eps", "max_position_embeddings", "model_type",
]  # fmt: skip


@pytest.mark.parametrize("key", REQUIRED)
def test_a_missing_key_is_named(tmp_path: Path, key: str) -> None:
    raw = published()
    del raw[key]
    with pytest.raises(BadInput, match=rf"config\.json: required keys are missing: {key}$"):
        read_config(write(tmp_path, raw))


def test_a_missing_yarn_factor_is_named(tmp_path: Path) -> None:
    raw = published(rope_scaling={"type": "yarn"})
    with pytest.raises(BadInput, match=r"required keys are missing: rope_scaling\.factor"):
        read_config(write(tmp_path, raw))


@pytest.mark.parametrize(
    ("key", "value"), [("hidden_size", -1), ("n_group", None), ("rms_norm_eps", "small")]
)
def test_an_impossible_value_is_named(tmp_path: Path, key: str, value: Any) -> None:
    with pytest.raises(BadInput, match=rf"config\.json: {key} = {value!r}"):
        read_config(write(tmp_path, published(**{key: value})))


@pytest.mark.parametrize("text", ["", "{", "[1]", '"text"', "null", PUBLISHED[:-5]])
def test_a_file_that_is_no_json_object_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(BadInput, match=r"config\.json: .*restore the file"):
        read_config(write(tmp_path, text))


def test_a_file_of_other_bytes_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(BadInput, match=r"config\.json: cannot be read as JSON"):
        read_config(tmp_path)


def test_no_file_and_no_folder_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path, tmp_path / "none", tmp_path / "file"):
        with pytest.raises(BadInput, match=rf"^{folder}: no config\.json"):
            read_config(folder)


# Writing


@settings(max_examples=60, deadline=None)
@given(config=configs())
def test_both_spellings_return_the_config(
    tmp_path_factory: pytest.TempPathFactory, config: ModelConfig
) -> None:
    """Ours is read back equal; so is what transformers makes of ours when it saves it."""
    folder = tmp_path_factory.mktemp("config")
    expected = config.model_copy(update={"initializer_range": config.init_std})
    write(folder / "ours", config_json(config, dtype=torch.float16))
    assert read_config(folder / "ours") == expected
    DeepseekV3Config.from_pretrained(folder / "ours").save_pretrained(folder / "theirs")
    theirs = raw_config(folder / "theirs")
    assert "rope_theta" not in theirs  # the other spelling
    assert read_config(folder / "theirs") == expected
    assert stored_dtype(theirs) == torch.float16


def test_transformers_opens_what_we_write_with_equal_fields(tmp_path: Path) -> None:
    config = ModelConfig(
        **TINY, num_nextn_predict_layers=1, rope_theta=5000.0, initializer_range=0.05,
        bos_token_id=5, eos_token_id=7,
        rope_scaling=Yarn(factor=10, original_max_position_embeddings=64, beta_fast=16,
                          beta_slow=2, mscale=0.7, mscale_all_dim=0.9),
    )  # fmt: skip
    raw = config_json(config, dtype=torch.bfloat16)
    opened = AutoConfig.from_pretrained(write(tmp_path, raw), trust_remote_code=False)
    direct = DeepseekV3Config(
        **TINY, num_key_value_heads=4, num_nextn_predict_layers=1, initializer_range=0.05,
        rope_parameters={**YARN, "type": "yarn"}, dtype="bfloat16", bos_token_id=5, eos_token_id=7,
        architectures=["DeepseekV3ForCausalLM"], torch_dtype="bfloat16",
    )  # fmt: skip
    assert isinstance(opened, DeepseekV3Config)
    theirs = direct.to_dict()
    theirs["_name_or_path"] = str(tmp_path)
    assert {key: opened.to_dict().get(key, "absent") for key in theirs} == theirs
    with torch.device("meta"):
        model = DeepseekV3ForCausalLM(opened)
    assert model.model.layers[1].self_attn.q_a_proj.weight.shape == (20, 48)


def test_what_other_engines_read_is_written() -> None:
    raw = config_json(V3, dtype=torch.bfloat16)
    original = json.loads(PUBLISHED)
    left_out = {"aux_loss_alpha", "seq_aux", "quantization_config", "auto_map"}
    for key in original.keys() - left_out - {"rope_scaling"}:
        assert raw[key] == original[key], key
    assert raw["rope_scaling"] == {**original["rope_scaling"], "rope_type": "yarn"}
    assert raw["dtype"] == "bfloat16"
    assert raw["rope_interleave"] is True
    plain = config_json(V3.model_copy(update={"rope_scaling": None}), dtype=torch.float32)
    assert plain["rope_scaling"] is None
    assert plain["torch_dtype"] == "float32"


def test_the_real_initial_spread_is_written() -> None:
    config = V3.model_copy(update={"initializer_range": None})
    raw = config_json(config, dtype=torch.float32)
    assert raw["initializer_range"] == pytest.approx(0.006)


def test_absent_mscale_is_not_written_as_a_number() -> None:
    yarn = Yarn(mscale=0, mscale_all_dim=0)
    raw = config_json(V3.model_copy(update={"rope_scaling": yarn}), dtype=torch.float32)
    assert {"mscale", "mscale_all_dim"}.isdisjoint(raw["rope_scaling"])


def test_weights_cannot_be_declared_fp8() -> None:
    with pytest.raises(BadInput, match="cannot be stored as"):
        config_json(V3, dtype=torch.float8_e4m3fn)
