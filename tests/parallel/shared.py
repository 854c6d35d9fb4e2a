"""Rows shared over cp and tp: what one process computes, and what several do together."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.parallel.sharded import settings
from tests.support import F64, random_model, random_tokens, tiny_config
from ziphius.data.rows import Batch
from ziphius.kernels.select import Kernels
from ziphius.model.ffn import MixtureOfExperts
from ziphius.model.precision import Precision
from ziphius.model.router import expert_counts
from ziphius.model.transformer import Transformer
from ziphius.parallel.collectives import Axis
from ziphius.parallel.experts import cut_experts
from ziphius.parallel.layout import Layout
from ziphius.parallel.mesh import Mesh, make_mesh
from ziphius.parallel.recompute import apply_recompute
from ziphius.parallel.sequence import apply_sequence
from ziphius.parallel.tensor import gradient_axis, split_of
from ziphius.training.objective import Losses, count_targets, losses

CLOSE = {"rtol": 1e-9, "atol": 1e-9}
# Heads and experts divide by two; widths of dense layers and the vocabulary do not.
CONFIG: dict[str, Any] = {
    "num_attention_heads": 4,
    "intermediate_size": 41,
    "num_nextn_predict_layers": 2,
}


def skewed_model(
    kernels: Kernels | None = None, precision: Precision = F64, **changes: Any
) -> Transformer:
    """Expert 5 is the first choice of every token, expert 2 of none."""
    config = tiny_config(**{**CONFIG, **changes})
    model = random_model(config, precision=precision, kernels=kernels)
    for _, _, block in model.blocks():
        if isinstance(block.mlp, MixtureOfExperts):
            block.mlp.gate.e_score_correction_bias[5] += 3
            block.mlp.gate.e_score_correction_bias[2] -= 30
    return model


def rows_of(model: Transformer, rows: int, length: int) -> Batch:
    """Rows of ``length`` inputs: several documents in each, and padding at the end of the first."""
    tokens_BS = random_tokens(model.config, rows, length + 1)
    place_S = torch.arange(length + 1)
    documents_BS = torch.stack(
        [(place_S >= 3 + b).int() + (place_S >= length - 2) for b in range(rows)]
    )
    documents_BS[0, -2:] = -1
    return Batch(tokens_BS, documents_BS.to(torch.int32))


def run(
    model: Transformer,
    batch: Batch,
    rows: slice,
    choices: str,
    *,
    document_mask: bool,
    scale: float = 1.0,
) -> tuple[Losses, dict[int, Tensor]]:
    """Return the losses of some rows of a global batch and the loads, after backward."""
    found, routings = losses(
        model,
        Batch(batch.tokens_BS[rows], batch.documents_BS[rows]),
        settings(balance_loss_weight=0.7, balance_loss_choices=choices),
        mtp_loss_weight=0.3,
        target_count=count_targets(batch, document_mask=document_mask),
        sequence_count=len(batch),
        document_mask=document_mask,
    )
    found.total.backward(torch.full_like(found.total, scale))
    E = model.config.n_routed_experts
    return found, {layer: expert_counts(r.chosen_NK, E) for layer, r in routings.items()}


def own_rows(axis: Axis, rows: int) -> slice:
    return slice(axis.place * rows // axis.size, (axis.place + 1) * rows // axis.size)


def expected_gradient(
    name: str, parameter: Tensor, whole: Transformer, mesh: Mesh, slots: tuple[int, int]
) -> Tensor:
    """Return what one process has, cut as this rank's weight is."""
    gradient = whole.get_parameter(name).grad
    assert gradient is not None
    if ".experts." in name:
        return gradient[slice(*slots)]
    split = split_of(name, whole.config, mesh["tp"].size, mesh["tp"].place)
    return gradient if split is None else split.cut(gradient)


def equals_one_process(
    layout: dict[str, int],
    length: int,
    changes: dict[str, Any],
    choices: str = "unbiased",
    document_mask: bool = False,
    n_rows: int = 3,
    recompute: Any = "none",
) -> None:
    """Compare losses, loads and gradients with those of one process, on every rank."""
    mesh = make_mesh(Layout.fill(torch.distributed.get_world_size(), **layout))
    whole = skewed_model(**changes)
    batch = rows_of(whole, n_rows, length)
    expected, loads = run(whole, batch, slice(None), choices, document_mask=document_mask)
    model = apply_sequence(skewed_model(**changes), mesh)
    if mesh["ep"].size > 1:
        cut_experts(model, mesh)
    apply_recompute(model, recompute)
    mine = own_rows(mesh["batch"], n_rows)
    found, own_loads = run(model, batch, mine, choices, document_mask=document_mask)
    for name, value in vars(expected).items():
        total = mesh["stage"].all_reduce(getattr(found, name).detach().clone())
        torch.testing.assert_close(total, value, **CLOSE, msg=lambda m, n=name: f"{n}: {m}")
    for layer, counts_E in loads.items():
        assert torch.equal(mesh["stage"].all_reduce(own_loads[layer]), counts_E)
    share = whole.config.n_routed_experts // mesh["ep"].size
    slots = (mesh["ep"].place * share, (mesh["ep"].place + 1) * share)
    for name, parameter in model.named_parameters():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        mesh[gradient_axis(name, model.config, mesh.layout)].all_reduce(gradient)
        wanted = expected_gradient(name, parameter, whole, mesh, slots)
        torch.testing.assert_close(gradient, wanted, **CLOSE, msg=lambda m, n=name: f"{n}: {m}")
