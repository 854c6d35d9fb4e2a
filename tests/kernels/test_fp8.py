"""Linear layers in FP8: which products run on which codes, and what is kept between them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ziphius.kernels.fp8 import Arithmetic, Tiled, permute_tiled, unread
from ziphius.kernels.gemm import gemm_reference
from ziphius.kernels.permute import permute_tiles, unpermute
from ziphius.kernels.quantize import (
    Fp8,
    dequantize,
    quantize_blocks,
    quantize_tiles,
    regroup,
    transpose_blocks,
    turn,
)
from ziphius.kernels.select import Kernels

# Of E4M3 in the forward and backward products of one layer, against float64.
CLOSE = 0.06
COUNTS = [100, 0, 5, 163]


def arithmetic(power_of_two: bool = False) -> Arithmetic:
    return Kernels().fp8(power_of_two)


def normal(*shape: int, seed: int = 0, requires_grad: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator).bfloat16()
    return x.requires_grad_(requires_grad)


def off(ours: Tensor, exact: Tensor) -> float:
    wide = exact.detach().double()
    return float((ours.detach().double() - wide).norm() / wide.norm())


def linear(x: Tensor, weight: Tensor, how: Arithmetic | None = None) -> Tensor:
    how = how or arithmetic()
    return how.linear(how.operand(x), weight, how.weight(weight))


def grouped(x: Tensor, weight: Tensor, counts_E: Tensor) -> Tensor:
    how = arithmetic()
    rows = how.operand(x, power_of_two=True)
    return how.grouped_linear(rows, weight, how.weight(weight), counts_E)


def weights(*shape: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * 0.1).requires_grad_()


# --- the three products, number by number ---------------------------------------------------------


@pytest.mark.parametrize("power_of_two", [False, True])
def test_a_layer_is_the_three_products_of_its_codes(power_of_two: bool) -> None:
    x, weight, dout = normal(2, 150, 200, requires_grad=True), weights(70, 200), normal(2, 150, 70)
    y = linear(x, weight, arithmetic(power_of_two))
    y.backward(dout)
    how = {"power_of_two": power_of_two}
    x8, w8 = quantize_tiles(x.detach().flatten(0, 1), **how), quantize_blocks(weight, **how)
    dout8 = quantize_tiles(dout.flatten(0, 1), **how)
    assert torch.equal(y.flatten(0, 1), gemm_reference(x8, w8, torch.bfloat16))
    dx = gemm_reference(dout8, transpose_blocks(w8), torch.bfloat16)
    assert x.grad is not None
    assert torch.equal(x.grad.flatten(0, 1), dx)
    turned = turn(dout.flatten(0, 1), **how), regroup(x8, **how)
    assert weight.grad is not None
    assert torch.equal(weight.grad, gemm_reference(*turned, torch.float32))
    assert weight.grad.dtype == torch.float32


def test_a_layer_is_close_to_float64() -> None:
    x, weight, dout = normal(300, 200, requires_grad=True), weights(70, 200), normal(300, 70)
    y = linear(x, weight)
    y.backward(dout)
    exact_x, exact_w = x.detach().double(), weight.detach().double()
    assert off(y, exact_x @ exact_w.T) < CLOSE
    assert x.grad is not None
    assert weight.grad is not None
    assert off(x.grad, dout.double() @ exact_w) < CLOSE
    assert off(weight.grad, dout.double().T @ exact_x) < CLOSE


def test_experts_are_layers_of_their_own() -> None:
    counts_E = torch.tensor(COUNTS)
    x, weight, dout = normal(268, 200, requires_grad=True), weights(4, 70, 200), normal(268, 70)
    y = grouped(x, weight, counts_E)
    y.backward(dout)
    assert x.grad is not None
    assert weight.grad is not None
    start = 0
    for expert, count in enumerate(COUNTS):
        rows = slice(start, start + count)
        start += count
        alone = x.detach()[rows].clone().requires_grad_()
        own = weight.detach()[expert].clone().requires_grad_()
        if not count:
            assert not weight.grad[expert].any()
            continue
        how = arithmetic()
        tiles = how.operand(alone, power_of_two=True)
        y_alone = how.linear(tiles, own, how.weight(own))
        y_alone.backward(dout[rows])
        assert torch.equal(y[rows], y_alone)
        assert alone.grad is not None
        assert torch.equal(x.grad[rows], alone.grad)
        # Dispatched rows are regrouped by powers of two, those of a plain layer are not.
        assert own.grad is not None
        assert off(weight.grad[expert], own.grad) < CLOSE
    assert off(x.grad, torch.cat(_exact_dx(dout, weight))) < CLOSE


def test_experts_that_get_no_row() -> None:
    """Of all tokens in the world none may come to a rank: it still goes there and back."""
    how, counts_E, weight = arithmetic(), torch.zeros(4, dtype=torch.int64), weights(4, 70, 200)
    x = normal(0, 200, requires_grad=True)
    y = grouped(x, weight, counts_E)
    down = weights(4, 200, 35)
    gates_M = torch.ones(0, requires_grad=True)
    out = how.gated_linear(y, None, gates_M, down, how.weight(down), counts_E)
    assert (y.shape, out.shape) == ((0, 70), (0, 200))
    out.backward(torch.zeros_like(out))
    for leaf in (x, gates_M, weight, down):
        assert leaf.grad is not None
        assert leaf.grad.shape == leaf.shape
        assert not leaf.grad.any()


def _exact_dx(dout: Tensor, weight: Tensor) -> list[Tensor]:
    parts = zip(dout.double().split(COUNTS), weight.detach().double(), strict=True)
    return [d @ w for d, w in parts]


@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("routed", [False, True])
def test_swiglu_and_its_projection(joined: bool, routed: bool) -> None:
    width, counts_E = 150, torch.tensor(COUNTS) if routed else None
    gate_up = normal(268, 2 * width, requires_grad=True)
    gates = (normal(268).float().abs() + 0.1).requires_grad_() if routed else None
    weight = weights(4, 70, width) if routed else weights(70, width)
    how, dout = arithmetic(), normal(268, 70, seed=3)
    gate, up = (gate_up, None) if joined else gate_up.chunk(2, dim=-1)
    y = how.gated_linear(gate, up, gates, weight, how.weight(weight), counts_E)
    y.backward(dout)
    # In float64, from the same inputs.
    wide = gate_up.detach().double().requires_grad_()
    wide_gates = None if gates is None else gates.detach().double().requires_grad_()
    wide_weight = weight.detach().double().requires_grad_()
    hidden = F.silu(wide[:, :width]) * wide[:, width:]
    if wide_gates is not None:
        hidden = hidden * wide_gates.unsqueeze(-1)
        parts = zip(hidden.split(COUNTS), wide_weight, strict=True)
        exact = torch.cat([part @ matrix.T for part, matrix in parts])
    else:
        exact = hidden @ wide_weight.T
    exact.backward(dout.double())
    assert off(y, exact.detach()) < CLOSE
    for ours, theirs in ((gate_up, wide), (weight, wide_weight), (gates, wide_gates)):
        if ours is not None:
            assert ours.grad is not None
            assert theirs is not None
            assert theirs.grad is not None
            assert off(ours.grad, theirs.grad) < 1.5 * CLOSE


def test_rows_that_are_moved_keep_their_codes_and_sum_their_gradients() -> None:
    u = normal(9, 200, requires_grad=True)
    order_M = torch.randperm(18)
    inverse_M = order_M.argsort()
    tiled = arithmetic().operand(u, power_of_two=True)
    moved = permute_tiled(tiled, order_M, inverse_M, 2, permute_tiles, unpermute)
    assert torch.equal(moved.codes.float(), tiled.codes.float()[order_M // 2])
    assert torch.equal(moved.scales, tiled.scales[order_M // 2])
    drows = normal(18, 200, seed=4)
    moved.value.backward(drows)
    assert u.grad is not None
    assert torch.equal(u.grad, unpermute(drows, order_M, inverse_M, 2))


def test_a_value_that_nobody_reads_has_no_memory_and_shows_when_it_is_read() -> None:
    value = unread(normal(3, 4), 1000, 1000)
    assert value.shape == (1000, 1000)
    assert value.untyped_storage().nbytes() == 2
    assert value.isnan().all()


# --- which operands the products see --------------------------------------------------------------


class Products(TorchDispatchMode):
    """Notes of every matrix product whether both operands are FP8 codes, as they are.

    A tensor is *coded* if it is of float8, or a cast, view or slice of one that is: nothing has
    been computed with it.
    """

    MOVES = ("_to_copy", "slice", "t", "transpose", "permute", "view", "select", "detach", "alias")

    def __init__(self) -> None:
        super().__init__()
        self.coded: dict[int, Tensor] = {}
        self.seen: list[tuple[bool, ...]] = []

    def _is_coded(self, x: Tensor) -> bool:
        return x.dtype == torch.float8_e4m3fn or id(x) in self.coded

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm", "bmm"):
            self.seen.append(tuple(self._is_coded(x) for x in args[-2:]))
        elif name in self.MOVES and isinstance(args[0], Tensor) and self._is_coded(args[0]):
            self.coded[id(out)] = out  # held, so that no other tensor gets its number
        return out


def three(run: Callable[[], Tensor]) -> tuple[list[tuple[bool, ...]], list[tuple[bool, ...]]]:
    with Products() as forward:
        out = run()
    with Products() as backward:
        out.backward(torch.ones_like(out))
    return forward.seen, backward.seen


def test_all_three_products_multiply_codes() -> None:
    x, weight = normal(128, 128, requires_grad=True), weights(128, 128)
    forward, backward = three(lambda: linear(x, weight))
    assert forward == [(True, True)]
    assert backward == [(True, True), (True, True)]


def test_all_products_of_experts_multiply_codes() -> None:
    x, weight = normal(268, 128, requires_grad=True), weights(4, 128, 128)
    forward, backward = three(lambda: grouped(x, weight, torch.tensor(COUNTS)))
    assert forward
    assert backward
    assert all(pair == (True, True) for pair in forward + backward)


def test_the_watch_would_see_a_product_of_numbers() -> None:
    x, weight = normal(128, 128, requires_grad=True), weights(128, 128)
    forward, backward = three(lambda: x @ weight.bfloat16().T)
    assert forward == [(False, False)]
    assert not any(all(pair) for pair in backward)


# --- what is kept ---------------------------------------------------------------------------------


def kept_by(run: Callable[[], Any]) -> list[Tensor]:
    """Return what autograd saves, each storage once."""
    saved: dict[int, Tensor] = {}

    def pack(x: Tensor) -> Tensor:
        saved[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = run()
    assert out is not None
    return list(saved.values())


def test_a_layer_keeps_codes_and_scales_and_nothing_else() -> None:
    x, weight = normal(256, 512, requires_grad=True), weights(128, 512)
    tensors = kept_by(lambda: linear(x, weight))
    assert {t.dtype for t in tensors} == {torch.float8_e4m3fn, torch.float32}
    assert sum(t.nbytes for t in tensors) == 256 * (512 + 4 * 4)


def test_two_layers_of_one_input_keep_it_once() -> None:
    x, how = normal(256, 512, requires_grad=True), arithmetic()
    first, second = weights(128, 512), weights(256, 512, seed=2)

    def run() -> tuple[Tensor, Tensor]:
        tiled = how.operand(x)
        return tuple(how.linear(tiled, w, how.weight(w)) for w in (first, second))  # type: ignore[return-value]

    assert sum(t.nbytes for t in kept_by(run)) == 256 * (512 + 4 * 4)


def test_swiglu_keeps_its_inputs_in_fp8_and_not_its_output() -> None:
    gate_up, weight = normal(256, 512, requires_grad=True), weights(128, 256)
    how = arithmetic()
    tensors = kept_by(lambda: how.gated_linear(gate_up, None, None, weight, how.weight(weight)))
    assert sum(t.nbytes for t in tensors) == 256 * (512 + 4 * 4)


def test_the_output_projection_keeps_twelve_bits() -> None:
    x, weight, how = normal(2, 128, 512, requires_grad=True), weights(128, 512), arithmetic()
    kept = how.keep_output(128)
    heads = x.detach().unflatten(-1, (4, 128)).transpose(1, 2)

    def run() -> Tensor:
        kept.keep(heads)
        return how.linear(how.operand(x), weight, how.weight(weight), kept)

    tensors = kept_by(run)
    assert {t.dtype for t in tensors} == {torch.uint8}
    assert sum(t.nbytes for t in tensors) == 256 * (512 * 12 // 8 + 4)
    dout = normal(2, 128, 128, seed=7)
    how.linear(how.operand(x), weight, how.weight(weight), kept).backward(dout)
    exact = dout.flatten(0, 1).double().T @ x.detach().flatten(0, 1).double()
    assert weight.grad is not None
    assert off(weight.grad, exact) < CLOSE


def test_what_is_kept_of_attention_comes_back_in_its_shape() -> None:
    out_BHTv = normal(2, 3, 10, 40)
    kept = arithmetic().keep_output(33)  # the rest of a head is padding
    back = kept.restore(kept.keep(out_BHTv), out_BHTv)
    assert back.shape == out_BHTv.shape
    assert not back[..., 33:].any()
    torch.testing.assert_close(back[..., :33], out_BHTv[..., :33], rtol=2**-7, atol=1e-6)


# --- what is not finite ---------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_seen_behind_a_layer(bad: float) -> None:
    """It is not saturated: a whole tile becomes NaN, and a step that meets it is not applied."""
    x = normal(4, 256)
    x[1, 7] = bad
    y = linear(x, weights(64, 256))
    assert y[1].isnan().all()
    assert y[[0, 2, 3]].isfinite().all()


def test_the_largest_numbers_do_not_overflow() -> None:
    x = torch.full((1, 128), 3e38)
    codes = quantize_tiles(x)
    assert torch.equal(codes.codes.float(), torch.full((1, 128), 448.0))
    assert dequantize(codes).isfinite().all()


def test_a_tiled_activation_is_one_matrix() -> None:
    tiled = arithmetic().operand(normal(2, 3, 200))
    assert isinstance(tiled, Tiled)
    assert isinstance(tiled.rows, Fp8)
    assert tiled.rows.codes.shape == (6, 200)
    assert tiled.rows.scales.shape == (6, 2)
