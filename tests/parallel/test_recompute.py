"""Recomputation: the same numbers as without it, whatever happens between forward and backward."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support import F32, F64, Past, random_batch, random_model, random_tokens, step_settings
from ziphius.config.pretrain import PretrainConfig
from ziphius.kernels.select import Kernels
from ziphius.model.precision import Precision
from ziphius.model.transformer import Transformer
from ziphius.model.weights import ROUTING_BIAS, named_weights
from ziphius.parallel.ledger import Ledger
from ziphius.parallel.recompute import apply_recompute
from ziphius.training.balance import ExpertLoads
from ziphius.training.objective import Losses, losses
from ziphius.training.optimizer import AdamW
from ziphius.training.step import train_step

BF16 = Precision.for_training(torch.bfloat16)
HOWS = ["selective", "full"]
SETTINGS = PretrainConfig(
    steps=10,
    batch_size=4,
    micro_batch_size=4,
    sequence_length=10,
    learning_rate=1e-2,
    final_learning_rate=1e-3,
    bias_update_speed=0.05,
    balance_loss_weight=0.2,
)


def build(how: str, precision: Precision = F32, **changes: Any) -> Transformer:
    model = random_model(precision=precision, **changes)
    apply_recompute(model, how)  # type: ignore[arg-type]
    return model


def forward(model: Transformer, seed: int = 0, batch: int = 4) -> tuple[Losses, ExpertLoads]:
    parts, routings = losses(
        model,
        random_batch(model.config, batch, 11, seed=seed),
        SETTINGS,
        mtp_loss_weight=SETTINGS.mtp_loss_weight,
        target_count=batch * 10,
        sequence_count=batch,
    )
    loads = ExpertLoads(model.config.n_routed_experts)
    loads.add(routings)
    return parts, loads


def gradients(model: Transformer) -> dict[str, Tensor]:
    found = {name: p.grad for name, p in model.named_parameters()}
    assert all(g is not None for g in found.values()), "every weight takes part"
    return {name: g.clone() for name, g in found.items() if g is not None}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    different = [name for name in expected if not torch.equal(found[name], expected[name])]
    assert not different, different


def forward_and_backward(model: Transformer) -> tuple[list[float], ExpertLoads, dict[str, Tensor]]:
    parts, loads = forward(model)
    parts.total.backward()
    values = [parts.main, parts.mtp, parts.balance, parts.total]
    return [v.item() for v in values], loads, gradients(model)


# The same numbers

VARIANTS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"precision": BF16},
    "float64": {"precision": F64},
    "two MTP depths": {"num_nextn_predict_layers": 2},
    "two MTP depths in bfloat16": {"num_nextn_predict_layers": 2, "precision": BF16},
    "no MTP": {"num_nextn_predict_layers": 0},
    "no query latent": {"q_lora_rank": None},
    "wide values": {"v_head_dim": 13},
    "values as wide as keys": {"v_head_dim": 11},
    "one group": {"n_group": 1, "topk_group": 1},
    "dense": {"first_k_dense_replace": 3, "num_nextn_predict_layers": 0},
    "reference kernels": {"kernels": Kernels(attention="reference", grouped="reference")},
}


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("how", HOWS)
def test_losses_loads_and_gradients_are_bitwise_those_of_none(
    how: str, variant: dict[str, Any]
) -> None:
    expected_values, expected_loads, expected = forward_and_backward(build("none", **variant))
    values, loads, found = forward_and_backward(build(how, **variant))
    assert values == expected_values
    assert_equal(found, expected)
    assert loads.counts.keys() == expected_loads.counts.keys()
    for layer, counts_E in loads.counts.items():
        assert torch.equal(counts_E, expected_loads.counts[layer])


@pytest.mark.parametrize("precision", [F32, BF16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("how", HOWS)
def test_a_training_is_bitwise_that_of_none(how: str, precision: Precision) -> None:
    """Micro-batches, biases that move, weights that move: three steps, then every weight."""
    config = SETTINGS.model_copy(update={"micro_batch_size": 2})
    ends = []
    for choice in ("none", how):
        model = build(choice, precision, num_nextn_predict_layers=2)
        optimizer, rate = AdamW(model.parameters(), config), step_settings(config, 1e-2)
        results = [
            train_step(model, optimizer, random_batch(model.config, 4, 11, seed=step), config, rate)
            for step in range(3)
        ]
        ends.append((results, {n: t.clone() for n, t in named_weights(model)}))
    (expected_results, expected), (results, found) = ends
    assert results == expected_results
    assert_equal(found, expected)


@pytest.mark.parametrize("how", HOWS)
def test_loads_count_every_choice_once(how: str) -> None:
    parts, loads = forward(build(how, num_nextn_predict_layers=1))
    parts.total.backward()
    K = 3
    totals = {layer: int(counts_E.sum()) for layer, counts_E in loads.counts.items()}
    assert totals == {1: 4 * 10 * K, 2: 4 * 10 * K, 3: 4 * 9 * K}


# Between forward and backward


@pytest.mark.parametrize("how", HOWS)
def test_the_first_choice_of_experts_is_replayed(how: str) -> None:
    """A router that chose again in backward would choose others: the bias has moved."""
    _, _, expected = forward_and_backward(build("none"))
    model = build(how)
    parts, loads = forward(model)
    for name, tensor in named_weights(model):
        if name.endswith(ROUTING_BIAS):
            tensor.copy_(tensor.flip(0) * 5)
    with torch.no_grad():
        _, moved = forward(model)
    assert all(not torch.equal(moved.counts[layer], loads.counts[layer]) for layer in loads.counts)
    parts.total.backward()
    assert_equal(gradients(model), expected)


@pytest.mark.parametrize("how", HOWS)
def test_two_forward_passes_before_their_backward_passes(how: str) -> None:
    found = []
    for choice in ("none", how):
        model = build(choice)
        first, _ = forward(model, seed=1)
        second, _ = forward(model, seed=2)
        with torch.no_grad():
            forward(model, seed=3)
        first.total.backward()
        second.total.backward()
        found.append(gradients(model))
    assert_equal(found[1], found[0])


@pytest.mark.parametrize("how", HOWS)
def test_backward_twice_gives_the_same_twice(how: str) -> None:
    _, _, once = forward_and_backward(build(how))
    model = build(how)
    parts, _ = forward(model)
    parts.total.backward(retain_graph=True)
    assert_equal(gradients(model), once)
    model.zero_grad()
    parts.total.backward()
    assert_equal(gradients(model), once)


@pytest.mark.parametrize("how", HOWS)
def test_backward_of_a_part_leaves_the_rest_right(how: str) -> None:
    """Some saved outputs are used by one backward pass only, some by both."""
    found = []
    for choice in ("none", how):
        model = build(choice)
        parts, _ = forward(model)
        parts.balance.backward(retain_graph=True)
        parts.mtp.backward(retain_graph=True)
        parts.total.backward(retain_graph=True)
        parts.main.backward()
        found.append(gradients(model))
    assert_equal(found[1], found[0])


@pytest.mark.parametrize("how", ["none", *HOWS])
def test_weights_that_change_before_backward_are_noticed(how: str) -> None:
    """torch refuses to compute wrong gradients; recomputation may not take that away."""
    model = build(how)
    parts, _ = forward(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        parts.total.backward()


# The model stays what it was


@pytest.mark.parametrize("how", HOWS)
def test_names_of_weights_stay(how: str) -> None:
    plain, model = build("none"), build(how)
    assert [n for n, _ in named_weights(model)] == [n for n, _ in named_weights(plain)]
    assert list(model.state_dict()) == list(plain.state_dict())
    assert list(dict(model.named_modules())) == list(dict(plain.named_modules()))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("how", HOWS)
def test_inference_is_unaffected(how: str, mode: Callable[[], Any]) -> None:
    plain, model = build("none"), build(how)
    tokens_BT = random_tokens(model.config, 2, 9)
    with mode():
        pasts = [Past(m, batch=2, capacity=9) for m in (plain, model)]
        for part_BT in (tokens_BT[:, :5], tokens_BT[:, 5:6], tokens_BT[:, 6:]):
            expected, found = (past(part_BT) for past in pasts)
            assert torch.equal(found, expected)
        assert torch.equal(model(tokens_BT), plain(tokens_BT))


@pytest.mark.parametrize("how", HOWS)
def test_gradients_of_logits_outside_training(how: str) -> None:
    found = []
    for choice in ("none", how):
        model = build(choice, num_nextn_predict_layers=0)
        model(random_tokens(model.config, 2, 9)).logsumexp(-1).sum().backward()
        found.append(gradients(model))
    assert_equal(found[1], found[0])


@pytest.mark.parametrize("how", HOWS)
def test_two_models_do_not_disturb_each_other(how: str) -> None:
    _, _, expected = forward_and_backward(build("none"))
    one, other = build(how), build(how)
    parts, _ = forward(one)
    others, _ = forward(other, seed=9)
    parts.total.backward()
    others.total.backward()
    assert_equal(gradients(one), expected)


@pytest.mark.parametrize("how", HOWS)
def test_a_copy_of_a_model_computes_with_its_own_weights(how: str) -> None:
    """As an average of weights or a frozen reference policy would be made."""
    model = build(how)
    twin = copy.deepcopy(model)
    tokens_BT = random_tokens(model.config, 2, 9)
    with torch.no_grad():
        expected = model(tokens_BT)
        for parameter in model.parameters():
            parameter.zero_()
        assert torch.equal(twin(tokens_BT), expected)


@pytest.mark.parametrize("how", HOWS)
def test_applying_it_twice_is_harmless(how: str) -> None:
    _, _, expected = forward_and_backward(build("none"))
    model = build(how)
    apply_recompute(model, how)  # type: ignore[arg-type]
    _, _, found = forward_and_backward(model)
    assert_equal(found, expected)


# What the ledger takes for an output that it can compute again


class _At(torch.autograd.Function):
    """``x * factor``, written to given memory, so that addresses repeat."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float, memory: bytearray) -> Tensor:
        ctx.factor = factor
        out = torch.frombuffer(memory, dtype=x.dtype)
        return out.copy_(x * factor)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0] * ctx.factor, None, None


def test_memory_of_a_dead_output_may_belong_to_another_tensor() -> None:
    ledger, memory = Ledger(), bytearray(16)
    x = torch.tensor([1.0, 2.0, 3.0, 4.0], requires_grad=True)
    double = partial(ledger.run, lambda x: _At.apply(x, 2.0, memory))
    with ledger.watching():
        y = double(x)
        address = y.untyped_storage().data_ptr()
        del y
        z = _At.apply(x, 3.0, memory)
        assert z.untyped_storage().data_ptr() == address
        (z * z).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [18.0, 36.0, 54.0, 72.0]  # d/dx (3x)^2


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "itself": lambda y: y,
    "flat": lambda y: y.flatten(),
    "transposed": lambda y: y.transpose(0, 2),
    "slice": lambda y: y[1:, :, 1:3],
    "strided": lambda y: y[..., ::2],
    "expanded": lambda y: y[:, :1].expand(-1, 5, -1),
    "split": lambda y: y.split(2, dim=-1)[1],
    "detached": lambda y: y.detach() + 0 * y,
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_views_of_an_output_are_restored(view: Callable[[Tensor], Tensor]) -> None:
    base = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))

    def outputs(x: Tensor) -> tuple[Tensor, Tensor]:
        """The second one is a view with an offset into memory of its own, as MLA's values are."""
        return x.sin(), (x * 2).split((4, 4), dim=-1)[1]

    found = []
    for wrapped in (False, True):
        ledger = Ledger()
        function = partial(ledger.run, outputs) if wrapped else outputs
        x = base.clone().requires_grad_()
        with ledger.watching():
            first, second = function(x)
            loss = (view(first).exp() * view(first)).sum() + view(second).pow(3).sum()
            del first, second
        loss.backward()
        assert x.grad is not None
        found.append(x.grad)
    assert torch.equal(found[1], found[0])


def test_a_function_inside_a_function() -> None:
    base = torch.randn(5, generator=torch.Generator().manual_seed(0))
    found = []
    for wrapped in (False, True):
        ledger = Ledger()
        wrap = (lambda f, run=ledger.run: partial(run, f)) if wrapped else lambda f: f
        inner = wrap(lambda x: x.exp())
        outer = wrap(lambda x, inner=inner: inner(x) * inner(x.sin()))
        x = base.clone().requires_grad_()
        with ledger.watching():
            y = outer(inner(x))
            loss = (y * y).sum()
        loss.backward(retain_graph=True)
        loss.backward()
        assert x.grad is not None
        found.append(x.grad)
    assert torch.equal(found[1], found[0])


def test_an_output_changed_in_place_before_it_is_saved_is_not_computed_again() -> None:
    ledger = Ledger()
    double = partial(ledger.run, lambda x: x * 2)
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    with ledger.watching():
        y = double(x)
        y += 1
        loss = (y * y).sum()
    loss.backward()
    assert x.grad is not None
    assert x.grad.tolist() == [12.0, 20.0]  # d/dx (2x + 1)^2


def test_an_input_changed_in_place_after_the_function_is_noticed() -> None:
    ledger = Ledger()
    double = partial(ledger.run, lambda x: x * 2)
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    with ledger.watching():
        inside = x * 1
        y = double(inside)
        loss = (y * y).sum()
        inside += 1
    with pytest.raises(RuntimeError):
        loss.backward()
