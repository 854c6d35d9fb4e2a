"""Recipes: presets, files, overrides, and messages that name what to mend."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from tests.support import tiny_config
from ziphius.config.data import SourceConfig
from ziphius.config.errors import BadInput, ZiphiusError
from ziphius.config.model import ModelConfig, Yarn
from ziphius.config.precision import PrecisionConfig
from ziphius.config.pretrain import PretrainConfig
from ziphius.config.recipe import Recipe, dump_recipe, load_recipe, preset_names
from ziphius.config.table import build, nearest

MODEL = """
[model]
vocab_size = 512
hidden_size = 32
intermediate_size = 64
num_hidden_layers = 2
first_k_dense_replace = 1
num_attention_heads = 2
kv_lora_rank = 8
qk_nope_head_dim = 8
qk_rope_head_dim = 4
v_head_dim = 8
n_routed_experts = 4
num_experts_per_tok = 2
moe_intermediate_size = 16
"""
REST = """
[tokenizer]
vocab_size = 512

[pretrain]
steps = 10
batch_size = 4
micro_batch_size = 2
sequence_length = 16
learning_rate = 1e-3
final_learning_rate = 1e-4
"""


def written(folder: Path, text: str = MODEL + REST) -> str:
    path = folder / "recipe.toml"
    path.write_text(text, "utf-8")
    return str(path)


def refusal(source: str, *overrides: str) -> str:
    """Load, expect one line of bad input, and return it."""
    with pytest.raises(BadInput) as caught:
        load_recipe(source, overrides)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2
    return str(caught.value)


# --- reading and writing --------------------------------------------------------------------------


def test_presets() -> None:
    assert preset_names() == ["16b", "671b", "mini", "tiny"]
    for name in preset_names():
        assert isinstance(load_recipe(name), Recipe)


@pytest.mark.parametrize("name", ["16b", "671b", "mini", "tiny"])
def test_dump_and_load_round_trip(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    assert load_recipe(written(tmp_path, dump_recipe(recipe))) == recipe


def test_an_extension_survives_the_round_trip(tmp_path: Path) -> None:
    yarn = "model.rope_scaling={factor=8.0, beta_slow=2.0}"
    recipe = load_recipe(written(tmp_path), [yarn, "model.q_lora_rank=12"])
    assert recipe.model.rope_scaling == Yarn(factor=8.0, beta_slow=2.0)
    assert load_recipe(written(tmp_path, dump_recipe(recipe))) == recipe


def test_the_published_recipe_is_that_of_the_report() -> None:
    """Facts 1.1 and 6.3: what the preset must not lose."""
    recipe = load_recipe("671b")
    m, p = recipe.model, recipe.pretrain
    assert (m.hidden_size, m.num_hidden_layers, m.first_k_dense_replace) == (7168, 61, 3)
    assert (m.n_routed_experts, m.num_experts_per_tok, m.n_group, m.topk_group) == (256, 8, 8, 4)
    assert (m.routed_scaling_factor, m.norm_topk_prob, m.init_std) == (2.5, True, 0.006)
    assert m.rope_scaling is None, "pre-training at 4K has no extension"
    assert (p.learning_rate, p.final_learning_rate, p.warmup_steps) == (2.2e-4, 2.2e-5, 2000)
    assert (p.beta1, p.beta2, p.weight_decay, p.clip_norm) == (0.9, 0.95, 0.1, 1.0)
    assert (p.bias_update_speed, p.balance_loss_weight, p.mtp_loss_weight) == (1e-3, 1e-4, 0.3)
    assert (p.batch_size, p.sequence_length) == (15360, 4096)


def test_mini_is_v3_in_small() -> None:
    """Every published part, the published heads, and no FP8 tile that V3 would not cut."""
    small, large = load_recipe("mini").model, load_recipe("671b").model
    same = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    same += ("num_experts_per_tok", "n_shared_experts", "n_group", "topk_group")
    same += ("num_nextn_predict_layers", "routed_scaling_factor", "rope_theta")
    for name in same:
        assert getattr(small, name) == getattr(large, name), name
    for name, width in large:
        if width != large.num_attention_heads and isinstance(width, int) and width % 128 == 0:
            assert getattr(small, name) % 128 == 0, name
    for c in (small, large):
        assert c.intermediate_size == 9 * c.moe_intermediate_size
        assert (c.num_attention_heads * c.v_head_dim) % 128 == 0
    assert load_recipe("mini").precision.compute == "bfloat16"
    assert load_recipe("mini", ["precision.compute=fp8"]).precision.compute == "fp8"


def test_the_default_balance_loss_is_the_published_one_and_on() -> None:
    """1e-4, neither config.json's 0.001 nor zero (facts 13.16)."""
    assert PretrainConfig.model_fields["balance_loss_weight"].default == 1e-4
    assert all(load_recipe(name).pretrain.balance_loss_weight == 1e-4 for name in preset_names())


def test_tables_are_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        load_recipe("tiny").pretrain.steps = 5


def test_a_source_that_is_nothing(tmp_path: Path) -> None:
    assert "did you mean 'tiny'" in refusal("tinny")
    assert "neither a file nor a preset" in refusal(str(tmp_path))
    assert "known: 16b, 671b, mini, tiny" in refusal("zzzzzz")


def test_bad_toml_names_the_place(tmp_path: Path) -> None:
    message = refusal(written(tmp_path, "[model\nx = 1"))
    assert "not valid TOML" in message
    assert "line 1" in message


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_bytes(b"\xff\xfe\x00")
    assert "cannot be read" in refusal(str(path))


def test_missing_keys_are_listed_together(tmp_path: Path) -> None:
    text = MODEL.replace("hidden_size = 32\n", "", 1).replace("v_head_dim = 8\n", "")
    message = refusal(written(tmp_path, text + REST))
    assert "model.hidden_size" in message
    assert "model.v_head_dim" in message


# --- unknown keys ---------------------------------------------------------------------------------


def test_an_unknown_key_names_the_nearest(tmp_path: Path) -> None:
    source = written(tmp_path)
    top = refusal(source, "pretrian.steps=5")
    assert "unknown key 'pretrian'; did you mean 'pretrain'?" in top
    inside = refusal(source, "pretrain.learning_rat=1e-3")
    assert "unknown key 'pretrain.learning_rat'; did you mean 'learning_rate'?" in inside
    nested = refusal(source, "model.rope_scaling.faktor=4")
    assert "unknown key 'model.rope_scaling.faktor'; did you mean 'factor'?" in nested
    assert "known: cache, checkpoint_every, device" in refusal(source, "run.zzzzzz=1")


def test_nearest_lists_the_choices_when_none_is_near() -> None:
    assert nearest("tiney", ["tiny", "huge"]) == "; did you mean 'tiny'?"
    assert nearest("zzz", ["b", "a"]) == "; known: a, b"


# --- overrides ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "table", "key", "value"),
    [
        ("pretrain.steps=7", "pretrain", "steps", 7),
        ("pretrain.learning_rate=3e-4", "pretrain", "learning_rate", 3e-4),
        ("pretrain.moments=float32", "pretrain", "moments", "float32"),
        ('pretrain.moments="float32"', "pretrain", "moments", "float32"),
        (" pretrain.steps = 8 ", "pretrain", "steps", 8),
        ("model.norm_topk_prob=false", "model", "norm_topk_prob", False),
        ("model.q_lora_rank=6", "model", "q_lora_rank", 6),
        ("data.source=/some/where=else", "data", "source", "/some/where=else"),
        ("run.device=cuda:0", "run", "device", "cuda:0"),
        ("precision.compute=bfloat16", "precision", "compute", "bfloat16"),
    ],
)
def test_overrides(tmp_path: Path, override: str, table: str, key: str, value: Any) -> None:
    recipe = load_recipe(written(tmp_path), [override])
    assert getattr(getattr(recipe, table), key) == value


def test_null_unsets(tmp_path: Path) -> None:
    source = written(tmp_path)
    assert load_recipe("tiny").model.q_lora_rank is not None
    assert load_recipe("tiny", ["model.q_lora_rank=null"]).model.q_lora_rank is None
    assert load_recipe(source, ["run.seed=null"]).run.seed == 0
    assert "model.hidden_size" in refusal(source, "model.hidden_size=null")


def test_the_last_override_wins(tmp_path: Path) -> None:
    overrides = ["pretrain.steps=7", "pretrain.steps=9"]
    assert load_recipe(written(tmp_path), overrides).pretrain.steps == 9


@pytest.mark.parametrize(
    "override", ["steps", "steps=5", "=5", "pretrain.=5", ".steps=5", "a..b=1"]
)
def test_bad_syntax_shows_how_to_write_it(tmp_path: Path, override: str) -> None:
    message = refusal(written(tmp_path), override)
    assert "write table.key=value" in message
    assert override in message


def test_an_override_below_a_value(tmp_path: Path) -> None:
    assert "'steps' is a value, not a table" in refusal(written(tmp_path), "pretrain.steps.x=1")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("pretrain.steps=many", "pretrain.steps = 'many'"),
        ("pretrain.steps=0", "pretrain.steps = 0"),
        ("pretrain.learning_rate=nan", "pretrain.learning_rate"),
        ("pretrain.learning_rate=inf", "pretrain.learning_rate"),
        ("pretrain.beta1=1", "pretrain.beta1 = 1"),
        ("pretrain.moments=float16", "'float32' or 'bfloat16'"),
        ("pretrain.micro_batch_size=3", "batch_size = 4 is no multiple of micro_batch_size = 3"),
        ("model.scoring_func=softmax", "model.scoring_func = 'softmax'"),
        ("model.topk_method=greedy", "model.topk_method = 'greedy'"),
        ("parallel.recompute=all", "parallel.recompute: 'all' is no policy"),
        (
            "parallel.recompute=full|al",
            "parallel.recompute: 'al' is no policy: use none, selective",
        ),
    ],
)
def test_impossible_values_are_named(tmp_path: Path, override: str, expected: str) -> None:
    assert expected in refusal(written(tmp_path), override)


@settings(max_examples=60)
@given(
    st.sampled_from(["", "pretrain.", "pretrain.steps=", "data.source=", "model.rope_scaling="]),
    st.text(
        st.characters(exclude_categories=["C", "Z"]) | st.sampled_from(" .={}['\""), max_size=20
    ),
)
def test_any_override_is_applied_or_refused(start: str, text: str) -> None:
    """Whatever is typed, there is a recipe or one line of bad input, and nothing else."""
    with contextlib.suppress(BadInput):
        assert isinstance(load_recipe("tiny", [start + text]), Recipe)


# --- dimensions -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"qk_rope_head_dim": 5}, "qk_rope_head_dim = 5 is odd"),
        ({"first_k_dense_replace": 4}, "first_k_dense_replace = 4 exceeds"),
        ({"n_routed_experts": 10}, "does not divide into n_group = 4"),
        ({"n_group": 8, "topk_group": 4}, "n_group = 8 leaves 1 expert a group"),
        ({"topk_group": 5}, "topk_group = 5 exceeds n_group = 4"),
        ({"num_experts_per_tok": 5}, "exceeds the 4 experts of the 2 allowed groups"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps"),
        ({"rope_theta": float("inf")}, "rope_theta"),
        ({"rope_scaling": {"factor": 0.5}}, "factor"),
    ],
)
def test_impossible_dimensions(changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValidationError, match=expected):
        tiny_config(**changes)
    values = {**tiny_config().model_dump(), **changes}
    with pytest.raises(BadInput, match=f"^here: .*{expected}"):
        build(ModelConfig, values, where="here")


def test_possible_extremes() -> None:
    tiny_config(n_routed_experts=1, n_group=1, topk_group=1, num_experts_per_tok=1)
    tiny_config(first_k_dense_replace=0)
    tiny_config(first_k_dense_replace=3)
    tiny_config(num_experts_per_tok=4)


def test_vocabularies_must_agree(tmp_path: Path) -> None:
    message = refusal(written(tmp_path), "model.vocab_size=600")
    assert "tokenizer.vocab_size = 512 and model.vocab_size = 600 differ" in message
    both = ["model.vocab_size=600", "tokenizer.vocab_size=600"]
    assert load_recipe(written(tmp_path), both).model.vocab_size == 600
    with_path = ["model.vocab_size=600", "tokenizer.path=elsewhere/tokenizer.json"]
    assert load_recipe(written(tmp_path), with_path).model.vocab_size == 600


def test_sequences_must_fit(tmp_path: Path) -> None:
    source = written(tmp_path)
    assert "exceeds model.max_position_embeddings = 8" in refusal(
        source, "model.max_position_embeddings=8"
    )
    assert "leaves no target" in refusal(source, "model.num_nextn_predict_layers=16")


# --- precision ------------------------------------------------------------------------------------


def test_the_words_of_the_precision_table() -> None:
    precision = load_recipe("tiny", ["precision.compute=fp8"]).precision
    assert precision == PrecisionConfig(compute="fp8", scales="report")
    assert load_recipe("tiny", ["precision.scales=ue8m0"]).precision.scales == "ue8m0"
    assert "'float64', 'float32', 'bfloat16' or 'fp8'" in refusal("tiny", "precision.compute=fp9")


def test_errors_have_their_exit_codes() -> None:
    assert (BadInput.exit_code, ZiphiusError.exit_code) == (2, 1)
    assert issubclass(BadInput, ZiphiusError)


@pytest.mark.parametrize(
    ("begin", "end"), [("50%", "20%"), ("50%", "50%"), (7, 7), (8, 7), ("12.51%", "12.5%")]
)
def test_a_source_that_is_never_read_is_refused(begin: int | str, end: int | str) -> None:
    with pytest.raises(ValueError, match=r"code: is never read from begin = .* to end = "):
        SourceConfig(path="code", begin=begin, end=end)


def test_tokens_and_shares_may_bound_one_source() -> None:
    assert SourceConfig(path="code", begin=1000, end="20%").end == "20%"
    assert SourceConfig(path="code", begin="12.5%", end="12.51%").begin == "12.5%"
