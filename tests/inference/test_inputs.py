"""The recorded inputs of a layer's matrices against the layer worked out by hand."""

import pytest
import torch
from torch import Tensor

from tests.support import random_model, random_tokens
from ziphius.inference.inputs import LayerInputs
from ziphius.model.block import Block
from ziphius.model.ffn import MixtureOfExperts
from ziphius.model.transformer import Transformer

PREFIX = "model.layers.1."


@pytest.fixture(scope="module")
def recorded() -> tuple[Transformer, LayerInputs, Tensor]:
    """A mixture layer that has run twice, and all its inputs ``[B, T, D]``."""
    model = random_model()
    hidden = [torch.randn(2, 9, model.config.hidden_size) for _ in range(2)]
    inputs = LayerInputs(model.layers[1], PREFIX)
    with torch.no_grad(), inputs.recording():
        for x_BTD in hidden:
            model.layers[1](x_BTD, model.rope(9))
    return model, inputs, torch.cat(hidden)


def attended(model: Transformer, x_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Normed input of the mixture, chosen experts, and their weights."""
    with torch.no_grad():
        result = model.layers[1].attend(x_BTD, model.rope(x_BTD.shape[1]))
    assert result.routed is not None
    routing = result.routed.routing
    return result.u_ND, routing.chosen_NK, routing.weights_NK


def close(found: Tensor, x_NI: Tensor) -> None:
    torch.testing.assert_close(found, x_NI.T @ x_NI, rtol=1e-4, atol=1e-4)


def test_linear_layers(recorded: tuple[Transformer, LayerInputs, Tensor]) -> None:
    model, inputs, x_BTD = recorded
    block = model.layers[1]
    normed = block.input_layernorm(x_BTD).flatten(0, 1).detach()
    for name in ("q_a_proj", "kv_a_proj_with_mqa"):
        close(inputs.hessian(f"{PREFIX}self_attn.{name}.weight"), normed)
    attention = block.self_attn
    latent = attention.q_a_layernorm(attention.q_a_proj(normed)).detach()
    close(inputs.hessian(f"{PREFIX}self_attn.q_b_proj.weight"), latent)
    compressed = attention.kv_a_proj_with_mqa(normed).detach()[:, : model.config.kv_lora_rank]
    close(
        inputs.hessian(f"{PREFIX}self_attn.kv_b_proj.weight"),
        attention.kv_a_layernorm(compressed).detach(),
    )
    u_ND, _, _ = attended(model, x_BTD)
    close(inputs.hessian(f"{PREFIX}mlp.shared_experts.up_proj.weight"), u_ND)


def test_experts(recorded: tuple[Transformer, LayerInputs, Tensor]) -> None:
    model, inputs, x_BTD = recorded
    u_ND, chosen_NK, weights_NK = attended(model, x_BTD)
    mixture = model.layers[1].mlp
    assert isinstance(mixture, MixtureOfExperts)
    for expert in range(model.config.n_routed_experts):
        hit_NK = chosen_NK == expert
        assert inputs.rows_of(expert) == int(hit_NK.sum())
        rows = u_ND[hit_NK.any(1)]
        gates = weights_NK[hit_NK]
        name = f"{PREFIX}mlp.experts.{expert}"
        assert inputs.expert_of(f"{name}.up_proj.weight") == expert
        close(inputs.hessian(f"{name}.gate_proj.weight"), rows)
        close(inputs.hessian(f"{name}.up_proj.weight"), rows)
        gate, up = mixture.experts.store.gate_up()[expert].detach().chunk(2)
        hidden = torch.nn.functional.silu(rows @ gate.T) * (rows @ up.T) * gates.unsqueeze(1)
        close(inputs.hessian(f"{name}.down_proj.weight"), hidden)
    assert sum(map(inputs.rows_of, range(8))) == chosen_NK.numel()


def test_only_what_is_quantised_is_recorded() -> None:
    model = random_model()
    inputs = LayerInputs(model.mtp[0].block, "model.layers.3.")
    tokens = random_tokens(model.config, 1, 8)
    with torch.no_grad(), inputs.recording():
        model.features(tokens)
    assert inputs.expert_of("model.layers.3.mlp.shared_experts.up_proj.weight") is None
    with pytest.raises(KeyError):
        inputs.hessian("model.layers.3.eh_proj.weight")


def test_nothing_is_recorded_afterwards() -> None:
    model = random_model()
    block: Block = model.layers[0]
    inputs = LayerInputs(block, "model.layers.0.")
    x_BTD = torch.randn(1, 4, model.config.hidden_size)
    with torch.no_grad(), inputs.recording():
        block(x_BTD, model.rope(4))
    before = inputs.hessian("model.layers.0.mlp.up_proj.weight").clone()
    with torch.no_grad():
        block(x_BTD, model.rope(4))
    assert torch.equal(inputs.hessian("model.layers.0.mlp.up_proj.weight"), before)
