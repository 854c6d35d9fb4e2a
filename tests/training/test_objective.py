"""The losses against the report's sums, written out position by position in float64."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.support import F32, F64, as_batch, random_model, random_tokens
from ziphius.config.pretrain import PretrainConfig
from ziphius.model.precision import Precision
from ziphius.model.router import Routing
from ziphius.model.transformer import Transformer
from ziphius.training.objective import Losses, losses

B, T = 3, 9


def settings(**changes: Any) -> PretrainConfig:
    given: dict[str, Any] = {
        "steps": 10,
        "batch_size": B,
        "micro_batch_size": B,
        "sequence_length": T,
        "learning_rate": 1e-3,
        "final_learning_rate": 1e-4,
        # Large, so that a wrong term shows.
        "balance_loss_weight": 0.37,
        "mtp_loss_weight": 0.61,
    }
    return PretrainConfig(**{**given, **changes})


def compute(
    model: Transformer,
    tokens_BS: Tensor,
    config: PretrainConfig,
    sequences: int = B,
) -> tuple[Losses, Any]:
    return losses(
        model,
        as_batch(tokens_BS),
        config,
        mtp_loss_weight=config.mtp_loss_weight,
        target_count=sequences * (tokens_BS.shape[1] - 1),
        sequence_count=sequences,
    )


# The slow formulas. Positions are counted from 1 as in the report, so token t_i is row[i - 1].


def slow_main(model: Transformer, tokens_BS: Tensor) -> float:
    """-(1/T) sum_{i=2}^{T+1} log P_i[t_i], averaged over sequences."""
    logits_BTV = model(tokens_BS[:, :-1])
    terms = [
        F.cross_entropy(logits_BTV[b, i - 1], tokens_BS[b, i])
        for b in range(tokens_BS.shape[0])
        for i in range(1, tokens_BS.shape[1])
    ]
    assert len(terms) == tokens_BS.shape[0] * (tokens_BS.shape[1] - 1)
    return sum(t.item() for t in terms) / len(terms)


def slow_rms_norm(x_D: Tensor, gain_D: Tensor, eps: float) -> Tensor:
    return gain_D * x_D / (x_D.pow(2).mean() + eps).sqrt()


def slow_mtp(model: Transformer, tokens_BS: Tensor) -> tuple[float, dict[int, Routing]]:
    """Facts 3.1 with h^0 after the final norm: (1/D) sum_k L^k, and the modules' routings.

    The pieces that are tested elsewhere are taken from the model: its trunk and its blocks. What
    is spelled out here is which token meets which position, what is normed, and the divisor.
    """
    eps, L = model.config.rms_norm_eps, model.config.num_hidden_layers
    rows, width = tokens_BS.shape[0], tokens_BS.shape[1] - 1
    hidden_BTD, _ = model.trunk(tokens_BS[:, :-1])
    previous = [[hidden_BTD[b, i] for i in range(width)] for b in range(rows)]
    total, routings = 0.0, {}
    for k, module in enumerate(model.mtp, start=1):
        inputs = []
        for b in range(rows):
            for i in range(1, width - k + 1):  # positions 1 .. T - k
                token = tokens_BS[b, i + k - 1]  # t_{i+k}
                embedded_D = model.embed_tokens.weight[token]
                joined = torch.cat(
                    (
                        slow_rms_norm(embedded_D, module.enorm.weight, eps),
                        slow_rms_norm(previous[b][i - 1], module.hnorm.weight, eps),
                    )
                )
                inputs.append(module.eh_proj.weight @ joined)
        x_BTD = torch.stack(inputs).unflatten(0, (rows, width - k))
        h_BTD, routing = module.block(x_BTD, model.rope(x_BTD.shape[1]))
        assert routing is not None
        routings[L + k - 1] = routing
        nll = 0.0
        for b in range(rows):
            for i in range(1, width - k + 1):
                out_D = slow_rms_norm(h_BTD[b, i - 1], module.norm.weight, eps)
                target = tokens_BS[b, i + k]  # t_{i+k+1}
                nll += F.cross_entropy(model.lm_head.weight @ out_D, target).item()
        total += nll / (rows * width)  # divisor T, though the sum has T - k terms
        previous = [[h_BTD[b, i] for i in range(width - k)] for b in range(rows)]
    return (total / len(model.mtp) if len(model.mtp) else 0.0), routings


def slow_balance(routing: Routing, rows: int, *, real: bool) -> float:
    """Facts 2.2 for one layer, averaged over sequences, without alpha."""
    scores_NE, chosen_NK = routing.scores_NE, routing.chosen_NK
    E, K, width = scores_NE.shape[1], chosen_NK.shape[1], scores_NE.shape[0] // rows
    total = 0.0
    for b in range(rows):
        mine = range(b * width, (b + 1) * width)
        for i in range(E):
            hits, share = 0, 0.0
            for n in mine:
                s = scores_NE[n].tolist()
                top = sorted(range(E), key=lambda e: -s[e])[:K]
                hits += i in (chosen_NK[n].tolist() if real else top)
                share += s[i] / sum(s)
            total += (E / (K * width) * hits) * (share / width)
    return total / rows


@pytest.mark.parametrize("choices", ["unbiased", "real"])
@pytest.mark.parametrize("depth", [0, 1, 2])
@torch.no_grad()
def test_losses_equal_the_sums_of_the_report(depth: int, choices: str) -> None:
    model = random_model(precision=F64, num_nextn_predict_layers=depth)
    tokens_BS = random_tokens(model.config, B, T + 1)
    config = settings(balance_loss_choices=choices)
    found, routings = compute(model, tokens_BS, config)
    _, main_routings = model.trunk(tokens_BS[:, :-1])
    main, (mtp, mtp_routings) = slow_main(model, tokens_BS), slow_mtp(model, tokens_BS)
    slow_routings = {**main_routings, **mtp_routings}
    assert set(routings) == set(slow_routings) == {1, 2, *range(3, 3 + depth)}
    balance = 0.37 * sum(slow_balance(r, B, real=choices == "real") for r in slow_routings.values())
    assert found.main.item() == pytest.approx(main, rel=1e-12)
    assert found.mtp.item() == pytest.approx(mtp, rel=1e-12)
    assert found.balance.item() == pytest.approx(balance, rel=1e-12)
    assert found.total.item() == pytest.approx(main + 0.61 * mtp + balance, rel=1e-12)
    assert (found.mtp.item() == 0) == (depth == 0)


@torch.no_grad()
def test_real_and_unbiased_choices_differ() -> None:
    model = random_model(precision=F64)
    tokens_BS = random_tokens(model.config, B, T + 1)
    unbiased, _ = compute(model, tokens_BS, settings(balance_loss_choices="unbiased"))
    real, _ = compute(model, tokens_BS, settings(balance_loss_choices="real"))
    assert abs(unbiased.balance.item() - real.balance.item()) > 1e-3


@torch.no_grad()
def test_micro_batches_add_up_to_the_global_batch() -> None:
    model = random_model(precision=F64, num_nextn_predict_layers=2)
    config = settings()
    tokens_BS = random_tokens(model.config, 6, T + 1)
    whole, _ = compute(model, tokens_BS, config, sequences=6)
    parts = [
        compute(model, part_BS, config, sequences=6)[0] for part_BS in tokens_BS.split([1, 2, 3])
    ]
    for name in ("main", "mtp", "balance", "total"):
        total = sum(getattr(part, name).item() for part in parts)
        assert total == pytest.approx(getattr(whole, name).item(), rel=1e-12), name


@torch.no_grad()
def test_regression_balance_coefficient_is_silently_zero() -> None:
    model = random_model(precision=F64)
    tokens_BS = random_tokens(model.config, B, T + 1)
    off, _ = compute(model, tokens_BS, settings(balance_loss_weight=0.0))
    on, _ = compute(model, tokens_BS, settings(balance_loss_weight=0.5))
    default, _ = compute(model, tokens_BS, settings(balance_loss_weight=1e-4))
    assert off.balance.item() == 0
    # Perfect balance gives 1 a layer, and there are three MoE layers, the MTP one included.
    assert 0.5 * 3 * 0.8 < on.total.item() - off.total.item() < 0.5 * 3 * 3
    assert default.total.item() > off.total.item()


@torch.no_grad()
def test_mtp_weight_scales_the_mtp_loss_and_nothing_else() -> None:
    model = random_model(precision=F64, num_nextn_predict_layers=2)
    tokens_BS = random_tokens(model.config, B, T + 1)
    off, _ = compute(model, tokens_BS, settings(mtp_loss_weight=0.0))
    on, _ = compute(model, tokens_BS, settings(mtp_loss_weight=0.3))
    assert off.mtp.item() == on.mtp.item() > 1
    assert (on.total - off.total).item() == pytest.approx(0.3 * on.mtp.item(), rel=1e-10)


def test_losses_of_a_bfloat16_model_are_float32() -> None:
    model = random_model(precision=Precision.for_training(torch.bfloat16))
    reference = random_model(precision=F32)
    tokens_BS = random_tokens(model.config, B, T + 1)
    found, _ = compute(model, tokens_BS, settings())
    expected, _ = compute(reference, tokens_BS, settings())
    for name in ("main", "mtp", "balance", "total"):
        assert getattr(found, name).dtype == torch.float32, name
        assert getattr(found, name).item() == pytest.approx(
            getattr(expected, name).item(), rel=0.05
        )
    found.total.backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())


# Gradients


@pytest.mark.parametrize("depth", [0, 2])
def test_gradient_of_the_total_equals_finite_differences(depth: int) -> None:
    model = random_model(precision=F64, num_nextn_predict_layers=depth)
    tokens_BS = random_tokens(model.config, B, T + 1)
    config = settings()
    compute(model, tokens_BS, config)[0].total.backward()
    generator = torch.Generator().manual_seed(1)
    step = 1e-6
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, f"{name} has no gradient"
        # The largest gradient, where a mistake shows most, and one at random.
        picked = [
            int(parameter.grad.abs().argmax()),
            int(torch.randint(parameter.numel(), (1,), generator=generator)),
        ]
        flat, before = parameter.data.view(-1), parameter.grad.view(-1)
        for index in picked:
            value = flat[index].item()
            sides = []
            for moved in (value + step, value - step):
                flat[index] = moved
                with torch.no_grad():
                    found, _ = compute(model, tokens_BS, config)
                sides.append(found.total.item())
            flat[index] = value
            slope = (sides[0] - sides[1]) / (2 * step)
            assert before[index].item() == pytest.approx(slope, rel=1e-4, abs=1e-7), name


def test_balance_counts_have_no_gradient_and_shares_have() -> None:
    model = random_model(precision=F64, num_nextn_predict_layers=0)
    tokens_BS = random_tokens(model.config, B, T + 1)
    # The last layer: scores of an earlier one act on later ones through the residual stream.
    found, routings = compute(model, tokens_BS, settings())
    (gradient_NE,) = torch.autograd.grad(found.balance, [routings[2].scores_NE], retain_graph=True)
    # With f held fixed: d/ds of alpha/B * sum_i f_i * mean_t (s_i / sum_j s_j).
    scores_BTE = routings[2].scores_NE.detach().unflatten(0, (B, T))
    K, E = routings[2].chosen_NK.shape[1], scores_BTE.shape[-1]
    hits_BE = F.one_hot(scores_BTE.topk(K).indices, E).sum((1, 2)).double()
    f_B1E = (hits_BE * E / (K * T)).unsqueeze(1)
    sums_BT1 = scores_BTE.sum(-1, keepdim=True)
    inner_BT1 = (f_B1E * scores_BTE).sum(-1, keepdim=True)
    slow_BTE = (f_B1E / sums_BT1 - inner_BT1 / sums_BT1**2) * 0.37 / (B * T)
    torch.testing.assert_close(gradient_NE.unflatten(0, (B, T)), slow_BTE, rtol=1e-10, atol=1e-14)
