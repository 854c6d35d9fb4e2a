"""The dense feed-forward layer, and the shared experts of a mixture."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tests.support import F64, tiny_config
from ziphius.kernels.select import Kernels
from ziphius.model.ffn import Dense, MixtureOfExperts, SwiGLU


def filled(module: SwiGLU) -> SwiGLU:
    with torch.no_grad():
        for weight in module.parameters():
            weight.copy_(torch.randn_like(weight) * 0.5)
    return module


def test_swiglu_gates_with_gate_proj() -> None:
    """silu on the first projection, not on the second (facts 1.2)."""
    mlp, u_ND = filled(SwiGLU(5, 7, F64, Kernels(), None)), torch.randn(9, 5, dtype=torch.float64)
    gate_NF, up_NF = u_ND @ mlp.gate_proj.weight.T, u_ND @ mlp.up_proj.weight.T
    expected_ND = (gate_NF / (1 + (-gate_NF).exp()) * up_NF) @ mlp.down_proj.weight.T
    torch.testing.assert_close(mlp(u_ND), expected_ND)


def test_gradients() -> None:
    mlp = filled(SwiGLU(3, 4, F64, Kernels(), None))
    names = [name for name, _ in mlp.named_parameters()]
    weights = [p.detach().clone().requires_grad_() for p in mlp.parameters()]
    u_ND = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)

    def run(u_ND: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(mlp, dict(zip(names, weights, strict=True)), (u_ND,))

    assert torch.autograd.gradcheck(run, (u_ND, *weights))


def test_a_dense_layer_routes_nothing() -> None:
    config = tiny_config()
    dense = filled(Dense(config, F64, Kernels(), None))
    u_ND = torch.randn(6, config.hidden_size, dtype=torch.float64)
    assert dense.route(u_ND, None) is None
    assert dense.dispatch(u_ND, None) is u_ND
    assert dense.shared(u_ND) is None
    rows = dense.run_experts(u_ND)
    assert dense.combine(rows, u_ND) is rows
    gate_NF, up_NF = u_ND @ dense.gate_proj.weight.T, u_ND @ dense.up_proj.weight.T
    torch.testing.assert_close(rows, (F.silu(gate_NF) * up_NF) @ dense.down_proj.weight.T)
    assert dense.gate_proj.weight.shape == (config.intermediate_size, config.hidden_size)


def test_shared_experts_are_one_layer_of_their_joint_width_and_equal_their_sum() -> None:
    config = tiny_config(n_shared_experts=3)
    moe, F_ = MixtureOfExperts(config, F64, Kernels(), None), config.moe_intermediate_size
    s = filled(moe.shared_experts)
    assert s.gate_proj.weight.shape == (3 * F_, config.hidden_size)
    u_ND = torch.randn(6, config.hidden_size, dtype=torch.float64)
    total_ND = torch.zeros_like(u_ND)
    for i in range(3):
        rows = slice(i * F_, (i + 1) * F_)
        hidden_NF = F.silu(u_ND @ s.gate_proj.weight[rows].T) * (u_ND @ s.up_proj.weight[rows].T)
        total_ND += hidden_NF @ s.down_proj.weight[:, rows].T
    torch.testing.assert_close(moe.shared(u_ND), total_ND)
