"""The kernels in C++ against the plain references, in every dtype, and in a whole model."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.support import F32, F64, random_model, random_tokens
from ziphius.config.errors import BadInput
from ziphius.kernels import adamw, attention, choose, grouped, linear, loss, norm, permute, swiglu
from ziphius.kernels.cpu import library as library_file
from ziphius.kernels.cpu.library import Library, build
from ziphius.kernels.select import (
    ANSWERING,
    COMPILED,
    OPERATIONS,
    Kernels,
    answering_kernels,
    compiled_kernels,
)
from ziphius.model import router
from ziphius.model.precision import Precision
from ziphius.model.transformer import Transformer
from ziphius.parallel.recompute import apply_recompute

BF16 = Precision.for_training(torch.bfloat16)
DTYPES = [torch.float64, torch.float32, torch.bfloat16]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2**-7}
SIZES = settings(max_examples=25, deadline=None)


def results(
    function: Callable[..., Tensor], inputs: Sequence[Tensor | None], dout: Tensor | None = None
) -> list[Tensor]:
    """Return the output and the gradients of every floating input."""
    given = [
        x.clone().requires_grad_(x.is_floating_point()) if x is not None else x for x in inputs
    ]
    out = function(*given)
    wanted = [x for x in given if x is not None and x.requires_grad]
    if dout is None:
        dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, wanted, dout)]


def assert_close(
    found: Sequence[Tensor], expected: Sequence[Tensor], dtype: torch.dtype, roundings: int = 1
) -> None:
    for got, exact in zip(found, expected, strict=True):
        assert got.shape == exact.shape
        if not exact.numel():
            continue
        scale = exact.double().abs().max().clamp(min=1)
        error = (got.double() - exact.double()).abs().max() / scale
        assert error <= TOLERANCE[dtype] * roundings, error


def exact(
    function: Callable[..., Tensor], inputs: Sequence[Tensor | None], out: Tensor
) -> list[Tensor]:
    """Return what the reference gives in float64 for the same numbers and the same gradient."""
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    wide = [x.double() if x is not None and x.is_floating_point() else x for x in inputs]
    return results(function, wide, dout.double())


# --- one operation after the other ----------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@SIZES
@given(
    st.integers(1, 2),
    st.integers(1, 3),
    st.sampled_from([1, 2, 63, 64, 65, 130, 200]),
    st.sampled_from([1, 6, 16, 40, 96]),
    st.sampled_from([1, 5, 16, 72]),
    st.sampled_from(["one", "in turn", "mixed"]),
    st.integers(0, 10**6),
)
def test_attention(
    library: Library,
    dtype: torch.dtype,
    B: int,
    H: int,
    T: int,
    d: int,
    v: int,
    documents: str,
    seed: int,
) -> None:
    """Lengths round the blocks' size, widths that fill no vector, documents in pieces."""
    torch.manual_seed(seed)
    inputs = [torch.randn(B, T, H, width).to(dtype).transpose(1, 2) for width in (d, d, v)]
    # A few: some fill blocks, alone or together, and some blocks have none in common.
    mixed_BT = torch.randint(-1, seed % 4, (B, T)).int()
    ordered_BT = mixed_BT.sort(-1).values
    documents_BT = {"one": None, "in turn": ordered_BT, "mixed": mixed_BT}[documents]

    def compiled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention.causal_attention_compiled(library, q, k, v, d**-0.5, documents_BT)

    def reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention.causal_attention_reference(q, k, v, d**-0.5, documents_BT)

    found = results(compiled, inputs)
    assert all(x.dtype == dtype for x in found)
    # Backward starts from the output as it was rounded: one rounding more than elsewhere.
    assert_close(found, exact(reference, inputs, found[0]), dtype, roundings=2)


@pytest.mark.parametrize("layout", ["BHTd", "expanded gradient", "narrow view"])
def test_attention_takes_any_layout(library: Library, layout: str) -> None:
    q, k, v = torch.randn(3, 2, 3, 70, 8, dtype=torch.float64).unbind(0)
    if layout == "narrow view":
        q, k, v = (torch.randn(2, 70, 3, 20).double()[..., 5:13].transpose(1, 2) for _ in range(3))
    dout = torch.ones(1, dtype=torch.float64).expand(2, 3, 70, 8) if "grad" in layout else None
    for found, expected in zip(
        results(lambda *x: attention.causal_attention_compiled(library, *x, 0.4), (q, k, v), dout),
        results(lambda *x: attention.causal_attention_reference(*x, 0.4), (q, k, v), dout),
        strict=True,
    ):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("size", [1e3, 1e15])
def test_attention_of_large_scores_is_finite(library: Library, size: float) -> None:
    q, k, v = torch.randn(3, 1, 1, 70, 4).unbind(0)
    inputs = (q * size, k * size, v)
    found = results(lambda *x: attention.causal_attention_compiled(library, *x, 1.0), inputs)
    assert found[0].isfinite().all()


def test_not_a_number_stays_one(library: Library) -> None:
    """Attention and loss of a run that diverged must say so."""
    q = torch.full((1, 1, 3, 4), float("nan"))
    out = attention.causal_attention_compiled(library, q, torch.randn(1, 1, 3, 4), q, 1.0)
    assert out.isnan().all()
    logits_nV = torch.tensor([[0.0, float("nan"), 1.0], [0.0, float("inf"), 1.0]])
    targets_n = torch.tensor([0, 0])
    assert not loss.cross_entropy_rows_compiled(library, logits_nV, targets_n).isfinite()


@pytest.mark.parametrize("dtype", DTYPES)
@SIZES
@given(st.integers(1, 200), st.sampled_from([1, 5, 64, 100]), st.integers(0, 10**6))
def test_norm(library: Library, dtype: torch.dtype, N: int, D: int, seed: int) -> None:
    torch.manual_seed(seed)
    rows_NC = (torch.randn(N, D + 3) * 3).to(dtype)
    gain_D = torch.randn(D).to(torch.promote_types(dtype, torch.float32))
    inputs = (rows_NC[:, :D], gain_D)
    found = results(lambda x, g: norm.rms_norm_compiled(library, x, g, 1e-3), inputs)
    assert (found[1].dtype, found[2].dtype) == (dtype, gain_D.dtype)
    assert_close(
        found, exact(lambda x, g: norm.rms_norm_reference(x, g, 1e-3), inputs, found[0]), dtype
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_swiglu(library: Library, dtype: torch.dtype, joined: bool, weighted: bool) -> None:
    for M, F in ((1, 1), (7, 5), (64, 33), (0, 4)):
        both = (torch.randn(M, 2 * F) * 4).to(dtype)
        gates_M = torch.rand(M).to(torch.promote_types(dtype, torch.float32))
        inputs = [both, None] if joined else [both[:, :F], both[:, F:]]
        inputs.append(gates_M if weighted else None)
        found = results(lambda *x: swiglu.swiglu_compiled(library, *x), inputs)
        if M:
            assert_close(found, exact(swiglu.swiglu_reference, inputs, found[0]), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@SIZES
@given(st.integers(1, 40), st.integers(1, 5), st.integers(1, 130), st.integers(0, 10**6))
def test_permuting_bit_for_bit(
    library: Library, dtype: torch.dtype, N: int, K: int, D: int, seed: int
) -> None:
    torch.manual_seed(seed)
    order_M = torch.randperm(N * K)
    inverse_M = order_M.argsort()
    u_ND, rows_MD = torch.randn(N, D).to(dtype), torch.randn(N * K, D).to(dtype)
    for ours, plain, x in (
        (permute.permute_compiled, permute.permute, u_ND),
        (permute.unpermute_compiled, permute.unpermute, rows_MD),
    ):
        found = results(lambda x, f=ours: f(library, x, order_M, inverse_M, K), [x])
        expected = results(lambda x, f=plain: f(x, order_M, inverse_M, K), [x])
        assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@SIZES
@given(st.integers(1, 9), st.integers(2, 70), st.integers(0, 10**6))
def test_cross_entropy(library: Library, dtype: torch.dtype, N: int, V: int, seed: int) -> None:
    torch.manual_seed(seed)
    logits_nV = (torch.randn(N, V) * 9).to(dtype)
    targets_n = torch.randint(0, V, (N,)).where(torch.rand(N) < 0.7, loss.IGNORED)
    ours, plain = logits_nV.clone(), logits_nV.double()
    found = loss.cross_entropy_rows_compiled(library, ours, targets_n)
    expected = loss.cross_entropy_rows(plain, targets_n)
    assert found.dtype == dtype
    assert_close([found, ours], [expected, plain], dtype)


@SIZES
@given(
    st.integers(1, 20),
    st.sampled_from([(8, 1, 1), (8, 4, 2), (32, 4, 4), (6, 3, 1)]),
    st.integers(1, 2),
    st.integers(0, 10**6),
)
def test_choosing(
    library: Library, N: int, groups: tuple[int, int, int], K: int, seed: int
) -> None:
    """Scores without equals; biases may be large and of either sign."""
    torch.manual_seed(seed)
    E, n_group, topk_group = groups
    scores_NE, bias_E = torch.rand(N, E), torch.randn(E) * 3
    for wide_NE in (scores_NE, scores_NE.double()):
        found_NK = choose.choose_compiled(library, wide_NE, bias_E, K, n_group, topk_group)
        expected_NK = router.choose(wide_NE, bias_E, K, n_group, topk_group)
        assert torch.equal(found_NK, expected_NK)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("bf16_moments", [False, True])
def test_adamw(library: Library, dtype: torch.dtype, bf16_moments: bool) -> None:
    moments = torch.bfloat16 if bf16_moments else dtype
    ours = [
        torch.randn(37).to(dtype),
        torch.zeros(37, dtype=moments),
        torch.zeros(37, dtype=moments),
    ]
    plain = [x.clone() for x in ours]
    for step in range(1, 6):
        rates = adamw.Rates(0.9, 0.95, 0.99, 1e-2 / (1 - 0.9**step), 1 - 0.95**step, 1e-8)
        grad = torch.randn(37).to(dtype)
        version = ours[0]._version
        adamw.adamw_step_compiled(library, ours[0], grad, *ours[1:], rates)
        adamw.adamw_step(plain[0], grad, *plain[1:], rates)
        assert ours[0]._version > version, "autograd must notice the change"
    tolerance = 2**-7 if bf16_moments else TOLERANCE[dtype]
    for got, expected in zip(ours, plain, strict=True):
        assert got.dtype == expected.dtype
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance * 0.1)


@pytest.mark.parametrize("rows", [1, 5, 1024, 2050])
def test_widened_products_are_at_least_as_exact_as_native_ones(rows: int) -> None:
    x, weight_OI = torch.randn(rows, 40).bfloat16(), torch.randn(24, 40)
    inputs = (x, weight_OI)
    found, native = (
        results(lambda x, w, f=f: f(x, w, torch.bfloat16), inputs)
        for f in (linear.linear_widened, linear.linear_native)
    )
    expected = exact(lambda x, w: x @ w.T, inputs, found[0])
    for ours, theirs, right in zip(found, native, expected, strict=True):
        assert ours.dtype == theirs.dtype
        assert (ours - right).norm() <= (theirs - right).norm() * 1.01
    assert_close(found, expected, torch.bfloat16)


# --- a whole model --------------------------------------------------------------------------------


def chosen(library: Library, **changes: str) -> Kernels:
    compiled = (op for op, (_, function) in OPERATIONS.items() if function is not None)
    names = {op: COMPILED for op in compiled if op not in ANSWERING}
    return Kernels(**{**names, **changes}, library=library)


def gradients(model: Transformer, documents: bool = False) -> dict[str, Tensor]:
    tokens_BS = random_tokens(model.config, 3, 71)
    numbers = torch.arange(71).div(9, rounding_mode="floor").expand(3, -1)
    features = model.features(tokens_BS, numbers if documents else None)
    total = sum(r.scores_NE.sum() for r in features.routings.values()) * 1e-3
    for k, hidden_BTD in enumerate([features.hidden_BTD, *features.mtp_hidden]):
        total = total + model.cross_entropy(
            hidden_BTD.flatten(0, 1), tokens_BS[:, k + 1 :].flatten()
        )
    total.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {**found, "total": total.detach()}


@pytest.mark.parametrize("changes", [{}, {"q_lora_rank": None}, {"v_head_dim": 13}])
@pytest.mark.parametrize("documents", [False, True])
def test_a_float64_model_is_the_plain_one(
    library: Library, documents: bool, changes: dict[str, Any]
) -> None:
    plain = gradients(random_model(precision=F64, **changes), documents)
    model = random_model(precision=F64, kernels=chosen(library), **changes)
    found = gradients(model, documents)
    assert found.keys() == plain.keys()
    for name, expected in plain.items():
        torch.testing.assert_close(found[name], expected, rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize("version", ["native", "widened"])
def test_a_bfloat16_model_is_near_the_exact_one(library: Library, version: str) -> None:
    exact_total = gradients(random_model(precision=F64))["total"]
    model = random_model(precision=BF16, kernels=chosen(library, linear=version))
    assert gradients(model)["total"].item() == pytest.approx(exact_total.item(), rel=2e-2)


@pytest.mark.parametrize("precision", [F32, BF16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("how", ["selective", "full"])
def test_recomputation_is_bitwise_none(library: Library, how: Any, precision: Precision) -> None:
    found = []
    for choice in ("none", how):
        model = random_model(precision=precision, kernels=chosen(library, linear="widened"))
        apply_recompute(model, choice)
        found.append(gradients(model))
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_the_same_twice_and_with_two_threads_too(library: Library) -> None:
    threads = torch.get_num_threads()
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            model = random_model(kernels=chosen(library))
            once, again = (gradients(random_model(kernels=model.kernels)) for _ in range(2))
            assert all(torch.equal(once[name], again[name]) for name in once)
    finally:
        torch.set_num_threads(threads)


# --- grouped products -----------------------------------------------------------------------------

COUNTS = st.lists(st.sampled_from([0, 1, 2, 5, 6, 7, 95, 96, 97, 200]), min_size=1, max_size=5)
WIDTHS = st.sampled_from([1, 2, 3, 15, 16, 31, 64, 65, 96, 130])
PAIRS = [(d, d) for d in DTYPES] + [
    (torch.bfloat16, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float64, torch.float32),
]


@pytest.mark.parametrize(("rows", "weights"), PAIRS)
@SIZES
@given(counts=COUNTS, inner=WIDTHS, outer=WIDTHS)
def test_grouped(
    library: Library,
    rows: torch.dtype,
    weights: torch.dtype,
    counts: list[int],
    inner: int,
    outer: int,
) -> None:
    x_MI = torch.randn(sum(counts), inner).to(rows)
    weight_EOI = torch.randn(len(counts), outer, inner).to(weights)
    dout_MO = torch.randn(sum(counts), outer).to(rows)
    found = results(
        lambda x, w: grouped.grouped_linear_compiled(library, x, w, counts),
        (x_MI, weight_EOI),
        dout_MO,
    )
    expected = results(
        lambda x, w: grouped.grouped_linear_reference(x, w, counts),
        (x_MI.double(), weight_EOI.to(rows).double()),
        dout_MO.double(),
    )
    assert [x.dtype for x in found] == [rows, rows, weights]
    for got, exact in zip(found, expected, strict=True):
        assert_close([got], [exact], max(got.dtype, rows, key=TOLERANCE.__getitem__))


def test_a_row_does_not_depend_on_how_many_there_are(library: Library) -> None:
    x_MI, weight_EOI = torch.randn(200, 64).bfloat16(), torch.randn(1, 48, 64)
    whole = grouped.grouped_linear_compiled(library, x_MI, weight_EOI, [200])
    for rows in (1, 3, 6, 10, 97):
        some = grouped.grouped_linear_compiled(library, x_MI[:rows], weight_EOI, [rows])
        assert torch.equal(some, whole[:rows])


# --- the library ----------------------------------------------------------------------------------


def test_it_is_built_once_and_shared_by_copies(kernel_folder: Path, library: Library) -> None:
    written = library.path.stat().st_mtime_ns
    assert build(kernel_folder).path.stat().st_mtime_ns == written
    assert copy.deepcopy(library) is library
    assert pickle.loads(pickle.dumps(library)).path == library.path


def test_no_compiler_is_said_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library_file, "COMPILER", "no-such-compiler")
    with pytest.raises(BadInput, match="compiled kernels: no-such-compiler: No such file"):
        build(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_compiled_version_without_a_library_is_an_error() -> None:
    with pytest.raises(BadInput, match="kernel norm: 'cpp' needs the compiled library"):
        Kernels(norm="cpp")
    with pytest.raises(BadInput, match="kernel linear: no version 'fortran'"):
        Kernels(linear="fortran")


def test_kernels_without_a_backward_refuse_to_train(kernel_folder: Path) -> None:
    model = random_model(kernels=answering_kernels(kernel_folder))
    with pytest.raises(RuntimeError, match="no backward"):
        model(random_tokens(model.config, 1, 4))
    with torch.no_grad():
        assert model(random_tokens(model.config, 1, 4)).isfinite().all()


def test_everything_is_compiled_that_can_be(kernel_folder: Path) -> None:
    kernels = compiled_kernels(kernel_folder)
    assert kernels.linear == "native"
    assert compiled_kernels(kernel_folder, "widened").linear == "widened"
    assert all(
        (getattr(kernels, op) == COMPILED) == (compiled is not None and op not in ANSWERING)
        for op, (_, compiled) in OPERATIONS.items()
    )
