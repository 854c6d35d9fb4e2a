"""The whole network: stages, places of blocks, MTP, and which dtype is where."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import ziphius
from tests.support import F64, random_model, random_tokens, tiny_config
from ziphius.model.ffn import Dense, MixtureOfExperts
from ziphius.model.precision import Precision
from ziphius.model.transformer import Transformer

BF16 = Precision.for_inference(torch.bfloat16)


# --- blocks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", [0, 1])
def test_five_stages_by_hand_equal_the_forward(index: int) -> None:
    model = random_model(precision=F64)
    block = model.layers[index]
    x_BTD = torch.randn(2, 7, 24, dtype=torch.float64)
    rope = model.rope(x_BTD.shape[1])
    attended = block.attend(x_BTD, rope)
    sent = block.dispatch(attended)
    routed_ND = block.combine(block.experts(sent), sent)
    result_BTD = block.add(attended, routed_ND, block.shared(attended))
    expected_BTD, routing = block(x_BTD, rope)
    assert torch.equal(result_BTD, expected_BTD)
    assert (routing is None) == (attended.routed is None) == (index == 0)


def test_a_block_is_two_pre_norm_residuals() -> None:
    """``x + MLA(norm(x))``, then ``x + FFN(norm(x))``: with both outputs zero, the identity."""
    model = random_model(precision=F64)
    x_BTD = torch.randn(2, 5, 24, dtype=torch.float64)
    rope = model.rope(x_BTD.shape[1])
    for block in model.layers:
        after_BTD = x_BTD + block.self_attn(block.input_layernorm(x_BTD), rope)
        u_ND = block.post_attention_layernorm(after_BTD).flatten(0, 1)
        sent = block.mlp.dispatch(u_ND, block.mlp.route(u_ND, None))
        half_ND = block.mlp.combine(block.mlp.run_experts(sent), sent)
        if isinstance(block.mlp, MixtureOfExperts):
            half_ND = half_ND + block.mlp.shared_experts(u_ND)
        torch.testing.assert_close(block(x_BTD, rope)[0], after_BTD + half_ND.view(2, 5, 24))
        with torch.no_grad():
            block.self_attn.o_proj.weight.zero_()
            for name, weight in block.mlp.named_parameters():
                if "down_proj" in name:
                    weight.zero_()
        assert torch.equal(block(x_BTD, rope)[0], x_BTD)


@pytest.mark.parametrize("dense", [0, 1, 3])
def test_the_first_k_layers_are_dense(dense: int) -> None:
    model = Transformer(tiny_config(first_k_dense_replace=dense), device="meta")
    kinds = [type(block.mlp) for block in model.layers]
    assert kinds == [Dense] * dense + [MixtureOfExperts] * (3 - dense)
    assert isinstance(model.mtp[0].block.mlp, MixtureOfExperts)


def test_blocks_have_global_numbers_and_mtp_depths() -> None:
    model = random_model(num_nextn_predict_layers=2)
    places = [(place.layer, place.mtp_depth) for place in model.blocks()]
    assert places == [(0, 0), (1, 0), (2, 0), (3, 1), (4, 2)]
    blocks = [place.block for place in model.blocks()]
    assert blocks == [*model.layers, model.mtp[0].block, model.mtp[1].block]
    routings = model.features(random_tokens(model.config, 2, 9)).routings
    assert sorted(routings) == [1, 2, 3, 4]
    assert routings[2].chosen_NK.shape == (2 * 8, 3)
    assert routings[3].chosen_NK.shape == (2 * 7, 3)
    assert routings[4].chosen_NK.shape == (2 * 6, 3)


# --- the trunk ------------------------------------------------------------------------------------


def test_logits_are_the_head_on_the_normed_trunk() -> None:
    model = random_model(precision=F64)
    tokens_BT = random_tokens(model.config, 2, 8)
    x_BTD = F.embedding(tokens_BT, model.embed_tokens.weight)
    for block in model.layers:
        x_BTD, _ = block(x_BTD, model.rope(tokens_BT.shape[1]))
    root_BT1 = (x_BTD.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    hidden_BTD = x_BTD / root_BT1 * model.norm.weight
    torch.testing.assert_close(model.trunk(tokens_BT)[0], hidden_BTD)
    torch.testing.assert_close(model(tokens_BT), hidden_BTD @ model.lm_head.weight.T)


def test_embedding_and_head_are_not_tied() -> None:
    model = random_model()
    assert model.embed_tokens.weight.data_ptr() != model.lm_head.weight.data_ptr()
    assert not torch.equal(model.embed_tokens.weight, model.lm_head.weight)


def test_sequences_of_a_batch_do_not_see_each_other() -> None:
    model = random_model(precision=F64)
    tokens_BT = random_tokens(model.config, 3, 9)
    alone = torch.cat([model(row) for row in tokens_BT.split(1)])
    torch.testing.assert_close(model(tokens_BT), alone)


def test_the_main_model_does_not_depend_on_mtp() -> None:
    with_mtp, without = random_model(), Transformer(tiny_config(num_nextn_predict_layers=0))
    without.load_state_dict(with_mtp.state_dict(), strict=False)
    tokens_BS = random_tokens(with_mtp.config, 2, 9)
    assert torch.equal(with_mtp(tokens_BS), without(tokens_BS))
    features = without.features(tokens_BS)
    assert features.mtp_hidden == []
    assert torch.equal(features.hidden_BTD, with_mtp.features(tokens_BS).hidden_BTD)


# --- MTP ------------------------------------------------------------------------------------------


def mtp_model(**changes: Any) -> Transformer:
    return random_model(precision=F64, num_nextn_predict_layers=2, **changes)


def test_features_have_the_trunks_hidden_state_and_shorter_mtp_rows() -> None:
    model = mtp_model()
    tokens_BS = random_tokens(model.config, 2, 10)
    features = model.features(tokens_BS)
    assert torch.equal(features.hidden_BTD, model.trunk(tokens_BS[:, :-1])[0])
    assert features.hidden_BTD.shape == (2, 9, 24)
    assert [h.shape for h in features.mtp_hidden] == [(2, 8, 24), (2, 7, 24)]


def test_mtp_by_hand() -> None:
    """Eq. 21-22 with the embedding first, each half with its own norm (facts 3.1, 3.2)."""
    model = mtp_model()
    tokens_BS = random_tokens(model.config, 2, 10)

    def norm(x: Tensor, gain: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * gain

    h_BTD = model.trunk(tokens_BS[:, :9])[0]
    for k, module in enumerate(model.mtp, start=1):
        embedded_BTD = model.embed_tokens.weight[tokens_BS[:, k:9]]
        joined = torch.cat(
            (
                norm(embedded_BTD, module.enorm.weight),
                norm(h_BTD[:, : 9 - k], module.hnorm.weight),
            ),
            dim=-1,
        )
        rope = model.rope(embedded_BTD.shape[1])
        h_BTD, _ = module.block(joined @ module.eh_proj.weight.T, rope)
        expected_BTD = norm(h_BTD, module.norm.weight)
        torch.testing.assert_close(model.features(tokens_BS).mtp_hidden[k - 1], expected_BTD)


@pytest.mark.parametrize("changed", [3, 7])
def test_mtp_position_i_knows_the_tokens_up_to_i_plus_k(changed: int) -> None:
    """Depth k at position i (from 0) sees tokens 0 to i + k, all of them and none after."""
    model = mtp_model()
    tokens_BS = random_tokens(model.config, 1, 10)
    other_BS = tokens_BS.clone()
    other_BS[0, changed] = (other_BS[0, changed] + 1) % model.config.vocab_size
    before, after = model.features(tokens_BS), model.features(other_BS)
    for k in (1, 2):
        moved = (after.mtp_hidden[k - 1] - before.mtp_hidden[k - 1])[0].abs().amax(-1) > 1e-9
        assert moved.tolist() == [i + k >= changed for i in range(9 - k)]


def test_the_last_token_is_a_target_only() -> None:
    model = mtp_model()
    tokens_BS = random_tokens(model.config, 1, 10)
    other_BS = tokens_BS.clone()
    other_BS[0, -1] = (other_BS[0, -1] + 1) % model.config.vocab_size
    before, after = model.features(tokens_BS), model.features(other_BS)
    assert torch.equal(before.hidden_BTD, after.hidden_BTD)
    assert all(map(torch.equal, before.mtp_hidden, after.mtp_hidden))


@torch.no_grad()
def test_where_mtp_takes_its_hidden_states_from() -> None:
    """Depth 1 from after the final norm; depth 2 from before the norm of the shared head."""
    model = mtp_model()
    tokens_BS = random_tokens(model.config, 1, 10)
    before = model.features(tokens_BS).mtp_hidden
    model.mtp[0].norm.weight.mul_(torch.linspace(0.5, 2, 24))
    after = model.features(tokens_BS).mtp_hidden
    torch.testing.assert_close(after[0], before[0] * torch.linspace(0.5, 2, 24).double())
    assert torch.equal(after[1], before[1])
    model.norm.weight.mul_(torch.linspace(0.5, 2, 24))
    assert not torch.allclose(model.features(tokens_BS).mtp_hidden[0], after[0])


def test_mtp_shares_embedding_and_head_and_has_the_rest_for_itself() -> None:
    model = mtp_model()
    names = {name for name, _ in model.mtp.named_parameters()}
    assert not any("embed" in name or "head" in name for name in names)
    assert {"0.enorm.weight", "0.hnorm.weight", "0.eh_proj.weight", "0.norm.weight"} <= names
    features = model.features(random_tokens(model.config, 1, 10))
    model.lm_head(features.mtp_hidden[1]).square().mean().backward()
    assert model.embed_tokens.weight.grad.abs().max() > 0
    assert model.lm_head.weight.grad.abs().max() > 0
    assert model.mtp[0].block.mlp.gate.weight.grad.abs().max() > 0


# --- gradients ------------------------------------------------------------------------------------


def test_the_gradient_of_everything_by_differences_in_float64() -> None:
    """Along random directions of every weight. Any FP32 step inside would show as noise."""
    model = mtp_model(rms_norm_eps=1e-5)
    tokens_BS = random_tokens(model.config, 2, 9)

    def loss() -> Tensor:
        features = model.features(tokens_BS)
        rows = [features.hidden_BTD, *features.mtp_hidden]
        return sum(
            F.cross_entropy(model.lm_head(h).flatten(0, 1), tokens_BS[:, k:].flatten())
            for k, h in enumerate(rows, start=1)
        )

    loss().backward()
    step = 1e-6
    for seed, (name, weight) in enumerate(model.named_parameters()):
        torch.manual_seed(seed)
        direction = torch.randn_like(weight)
        with torch.no_grad():
            weight.add_(direction, alpha=step)
            up = loss().item()
            weight.sub_(direction, alpha=2 * step)
            down = loss().item()
            weight.add_(direction, alpha=step)
        exact = (weight.grad * direction).sum().item()
        assert (up - down) / (2 * step) == pytest.approx(exact, rel=1e-5, abs=1e-8), name


# --- dtypes ---------------------------------------------------------------------------------------


def outputs_by_module(model: Transformer) -> dict[str, list[torch.dtype]]:
    """Run a model; return the dtypes of the tensors that every module returned."""
    seen: dict[str, list[torch.dtype]] = {}

    def hook(name: str) -> Any:
        def keep(module: Any, inputs: Any, output: Any) -> None:
            tensors = output if isinstance(output, tuple) else (output,)
            seen[name] = [t.dtype for t in tensors if isinstance(t, Tensor)]

        return keep

    handles = [m.register_forward_hook(hook(n)) for n, m in model.named_modules() if n]
    features = model.features(random_tokens(model.config, 1, 9))
    model.lm_head(features.hidden_BTD)
    for handle in handles:
        handle.remove()
    return seen


def test_a_float64_model_is_float64_throughout() -> None:
    model = random_model(precision=F64)
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    for name, dtypes in outputs_by_module(model).items():
        assert set(dtypes) <= {torch.float64, torch.int64}, name


def test_a_bfloat16_model_decides_in_fp32_and_computes_in_bfloat16() -> None:
    model = random_model(precision=BF16)
    for name, dtypes in outputs_by_module(model).items():
        expected = {torch.bfloat16}
        if name.endswith("gate"):
            expected = {torch.int64, torch.float32}
        assert set(dtypes) <= expected | {torch.int64}, name
    routings = model.features(random_tokens(model.config, 1, 9)).routings
    assert all(r.scores_NE.dtype == r.weights_NK.dtype == torch.float32 for r in routings.values())


def test_training_keeps_fp32_master_weights_under_bfloat16_products() -> None:
    model = random_model(precision=Precision.for_training(torch.bfloat16))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    tokens_BS = random_tokens(model.config, 1, 9)
    features = model.features(tokens_BS)
    assert features.hidden_BTD.dtype == torch.bfloat16
    model.lm_head(features.hidden_BTD).float().square().mean().backward()
    assert model.layers[1].mlp.gate.weight.grad.dtype == torch.float32
    assert model(tokens_BS).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", ["bfloat16", torch.float32, torch.float64])
def test_routing_biases_stay_fp32_in_a_loaded_model(tmp_path: Path, dtype: Any) -> None:
    model = random_model()
    for _, _, block in list(model.blocks())[1:]:
        block.mlp.gate.e_score_correction_bias.fill_(2.021)  # no BF16 number
    ziphius.save(model, tmp_path / "model")
    loaded = ziphius.load(tmp_path / "model", dtype=dtype)
    biases = [b for n, b in loaded.named_buffers() if n.endswith("e_score_correction_bias")]
    assert len(biases) == 3
    for bias_E in biases:
        assert bias_E.dtype == torch.float32
        assert torch.equal(bias_E, torch.full((8,), 2.021))


def test_the_policy_of_precision() -> None:
    training = Precision.for_training(torch.bfloat16)
    assert (training.compute, training.storage) == (torch.bfloat16, torch.float32)
    assert Precision.for_training(torch.float64).storage == torch.float64
    assert BF16.storage == BF16.compute == torch.bfloat16
    for kind in ("linear", "embedding", "head"):
        assert BF16.dtype(kind) == torch.bfloat16
    assert BF16.dtype("router") == torch.float32
    assert F64.dtype("router") == torch.float64
