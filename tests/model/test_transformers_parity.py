"""The network is V3: logits equal those of transformers' own class, in both directions.

The configurations are random, the weights large enough that a wrong expert or a wrong weight shows:
matrices are N(0, 0.2^2), norm gains are spread around 1, routing biases are N(0, 0.3^2).

Routing is a step function. Where two experts (or groups) are closer than rounding, two correct
programs may choose differently, and the logits then differ by much more than rounding. Such
examples are no evidence either way and are thrown away, by ``_undecided``; about one in twenty is.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import DeepseekV3ForCausalLM
from transformers.modeling_layers import MtpModel

import ziphius
from tests.support import (
    hf_config,
    open_in_transformers,
    random_model,
    random_tokens,
    tiny_config,
    transformers_twin,
)
from ziphius.config.model import ModelConfig, Yarn
from ziphius.kernels.select import Kernels
from ziphius.model.router import Routing
from ziphius.model.transformer import Transformer

TOLERANCE = 1e-4
CLOSE = 1e-5
RANDOM = settings(
    max_examples=40,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)


@st.composite
def yarns(draw: st.DrawFn) -> Yarn:
    """Draw extensions whose blend falls into the few positions of an example."""
    return Yarn(
        factor=draw(st.sampled_from([1.0, 4.0, 40.0])),
        original_max_position_embeddings=draw(st.sampled_from([6, 16, 64, 4096])),
        beta_fast=draw(st.sampled_from([2.0, 32.0])),
        beta_slow=draw(st.sampled_from([0.25, 1.0])),
        mscale=draw(st.sampled_from([0.0, 0.707, 1.0])),
        mscale_all_dim=draw(st.sampled_from([0.0, 0.707, 1.0])),
    )


@st.composite
def configs(draw: st.DrawFn) -> ModelConfig:
    """Draw small networks over everything that a V3 config may say."""
    groups = draw(st.sampled_from([1, 2, 4, 8]))
    members = draw(st.sampled_from([2, 3, 4]))
    topk_group = draw(st.integers(1, groups))
    layers = draw(st.integers(2, 3))
    return tiny_config(
        vocab_size=draw(st.integers(40, 70)),
        hidden_size=draw(st.sampled_from([16, 24, 33, 48])),
        intermediate_size=draw(st.integers(8, 40)),
        num_hidden_layers=layers,
        first_k_dense_replace=draw(st.integers(0, layers)),
        num_nextn_predict_layers=draw(st.integers(0, 2)),
        rms_norm_eps=draw(st.sampled_from([1e-6, 1e-5, 1e-2])),
        num_attention_heads=draw(st.integers(1, 4)),
        q_lora_rank=draw(st.sampled_from([None, 8, 14])),
        kv_lora_rank=draw(st.integers(4, 20)),
        qk_nope_head_dim=draw(st.integers(2, 12)),
        qk_rope_head_dim=2 * draw(st.integers(1, 8)),
        v_head_dim=draw(st.integers(2, 16)),
        rope_theta=draw(st.sampled_from([100.0, 10000.0])),
        rope_scaling=draw(st.none() | yarns()),
        n_routed_experts=groups * members,
        n_shared_experts=draw(st.integers(1, 3)),
        num_experts_per_tok=draw(st.integers(1, min(4, topk_group * members))),
        moe_intermediate_size=draw(st.integers(4, 20)),
        n_group=groups,
        topk_group=topk_group,
        norm_topk_prob=draw(st.booleans()),
        routed_scaling_factor=draw(st.sampled_from([0.5, 1.0, 2.5])),
    )


def _undecided(model: Transformer, routings: dict[int, Routing]) -> bool:
    """Say whether any choice of experts or groups hangs on less than CLOSE."""
    c = model.config
    for layer, _, block in model.blocks():
        if layer not in routings:
            continue
        biased_NE = routings[layer].scores_NE + block.mlp.gate.e_score_correction_bias
        if c.topk_group < c.n_group:
            best_NG2 = biased_NE.unflatten(-1, (c.n_group, -1)).topk(2, -1).values
            if _closest(best_NG2.sum(-1), c.topk_group) < CLOSE:
                return True
        chosen_N = biased_NE.gather(1, routings[layer].chosen_NK).min(-1).values
        # An expert of an excluded group may lie there too: cautious, and rare.
        if (biased_NE - chosen_N[:, None]).abs().topk(2, -1, largest=False).values[:, 1].min() < (
            CLOSE
        ):
            return True
    return False


def _closest(values_NG: Tensor, kept: int) -> float:
    """Return the smallest distance between the last kept and the first dropped value."""
    ordered_NG = values_NG.sort(-1, descending=True).values
    return float((ordered_NG[:, kept - 1] - ordered_NG[:, kept]).min())


@torch.no_grad()
def _assert_equal_logits(
    model: Transformer, twin: DeepseekV3ForCausalLM, tokens_BT: Tensor
) -> None:
    ours, theirs = model(tokens_BT), twin(tokens_BT).logits
    assert ours.dtype == theirs.dtype == torch.float32
    assert (ours - theirs).abs().max() < TOLERANCE * theirs.abs().max()


@torch.no_grad()
def _assume_decided(model: Transformer, tokens_BT: Tensor) -> None:
    assume(not _undecided(model, model.trunk(tokens_BT)[1]))


dtypes = st.sampled_from([torch.float32, torch.bfloat16])
V3_LIKE = tiny_config(
    n_routed_experts=16,
    n_group=8,
    topk_group=4,
    num_experts_per_tok=8,
    rope_scaling=Yarn(original_max_position_embeddings=16),
)
LITE_LIKE = tiny_config(
    q_lora_rank=None,
    n_group=1,
    topk_group=1,
    norm_topk_prob=False,
    routed_scaling_factor=1.0,
    num_nextn_predict_layers=0,
    rope_scaling=Yarn(original_max_position_embeddings=16, mscale=0.707, mscale_all_dim=0.707),
)


@RANDOM
@example(V3_LIKE, torch.bfloat16, "sdpa", 18, 1)
@example(LITE_LIKE, torch.float32, "reference", 18, 2)
@given(
    configs(), dtypes, st.sampled_from(["sdpa", "reference"]), st.integers(12, 24), st.integers()
)
def test_transformers_opens_what_we_save(
    config: ModelConfig, stored: torch.dtype, attention: str, length: int, seed: int
) -> None:
    tokens_BT = random_tokens(config, 2, length)
    saved = random_model(config, seed=abs(seed) % 2**31)
    with tempfile.TemporaryDirectory() as folder:
        ziphius.save(saved, Path(folder) / "model", dtype=stored)
        twin = open_in_transformers(Path(folder) / "model")
        loaded = ziphius.load(Path(folder) / "model", dtype=torch.float32)
    model = Transformer(config, loaded.precision, kernels=Kernels(attention=attention))
    model.load_state_dict(loaded.state_dict())
    _assume_decided(model, tokens_BT)
    _assert_equal_logits(model, twin, tokens_BT)
    if stored == torch.float32:
        _assert_equal_logits(saved, twin, tokens_BT)


@RANDOM
@example(V3_LIKE, torch.bfloat16, 18, 1)
@example(LITE_LIKE, torch.float32, 18, 2)
@given(configs(), dtypes, st.integers(12, 24), st.integers())
def test_we_open_what_transformers_saves(
    config: ModelConfig, stored: torch.dtype, length: int, seed: int
) -> None:
    tokens_BT = random_tokens(config, 2, length)
    with tempfile.TemporaryDirectory() as folder:
        written = _random_twin(config, seed=abs(seed) % 2**31).to(stored)
        written.save_pretrained(folder)
        twin = open_in_transformers(Path(folder))
        model = ziphius.load(folder, dtype=torch.float32, mtp=False)
    assert model.config == config.model_copy(
        update={
            "num_nextn_predict_layers": 0,
            "initializer_range": twin.config.initializer_range,
        }
    )
    _assume_decided(model, tokens_BT)
    _assert_equal_logits(model, twin, tokens_BT)


@torch.no_grad()
def _random_twin(config: ModelConfig, seed: int) -> DeepseekV3ForCausalLM:
    """Build transformers' class with weights of its own, as random as ours."""
    twin = DeepseekV3ForCausalLM(hf_config(config))
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in [*twin.named_parameters(), *twin.named_buffers()]:
        drawn = torch.randn(tensor.shape, generator=generator)
        if name.endswith("e_score_correction_bias"):
            tensor.copy_(drawn * 0.3)
        elif "inv_freq" not in name:
            tensor.copy_(drawn * 0.2 + ("norm" in name))
    return twin


def _mtp_twin(model: Transformer, folder: Path, **changes: Any) -> tuple[Any, MtpModel]:
    twin = transformers_twin(model, folder)
    first = model.config.num_hidden_layers
    numbers = "|".join(str(first + k) for k in range(model.config.num_nextn_predict_layers))
    # transformers knows the published number of the MTP layer only.
    twin._keys_to_ignore_on_load_unexpected = [rf"model\.layers\.({numbers})\..*"]
    mtp = MtpModel.from_pretrained(twin)
    mtp.config._experts_implementation = "eager"
    return twin, mtp.eval()


@torch.no_grad()
def test_mtp_equals_that_of_transformers(tmp_path: Path) -> None:
    """Depth 1 against another program: order in eh_proj, norms, shift, shared head, names."""
    model = random_model(seed=3, rope_scaling=Yarn(original_max_position_embeddings=16))
    tokens_BS = random_tokens(model.config, 2, 19)
    twin, mtp = _mtp_twin(model, tmp_path / "model")
    features = model.features(tokens_BS)
    assert not _undecided(model, features.routings)
    hidden_BTD = twin.model(tokens_BS[:, :-1]).last_hidden_state
    positions = torch.arange(17)[None] + 1  # only differences of positions count
    expected = mtp.forward_layer(0, hidden_BTD[:, :-1], positions, None, tokens_BS[:, 1:-1])
    torch.testing.assert_close(features.mtp_hidden[0], expected, rtol=1e-4, atol=1e-4)
    logits = model.lm_head(features.mtp_hidden[0])
    theirs = mtp._project_to_logits(expected)
    assert (logits - theirs).abs().max() < TOLERANCE * theirs.abs().max()


@torch.no_grad()
def test_mtp_depth_two_continues_the_causal_chain(tmp_path: Path) -> None:
    """Depth 2 against transformers.

    transformers hands the next depth h^1 after the norm of the shared head, the report before it
    (eq. 21). With gains of 1 the two agree, because the next depth norms its input anyway.
    """
    model = random_model(seed=4, num_nextn_predict_layers=2)
    model.mtp[0].norm.weight.fill_(1)
    tokens_BS = random_tokens(model.config, 2, 19)
    twin, mtp = _mtp_twin(model, tmp_path / "model")
    features = model.features(tokens_BS)
    assert not _undecided(model, features.routings)
    hidden = twin.model(tokens_BS[:, :-1]).last_hidden_state
    for k in (1, 2):
        positions = torch.arange(18 - k)[None]
        hidden = mtp.forward_layer(k - 1, hidden[:, :-1], positions, None, tokens_BS[:, k:-1])
        torch.testing.assert_close(features.mtp_hidden[k - 1], hidden, rtol=1e-4, atol=1e-4)
