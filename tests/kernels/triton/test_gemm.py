"""The FP8 product in Triton against float64: ragged shapes, both forms of scales, every way."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.triton.conftest import ON_GPU
from tests.kernels.triton.products import close, exact, on
from ziphius import kernels
from ziphius.kernels.gemm import gemm_reference
from ziphius.kernels.quantize import Fp8, quantize_blocks, quantize_tiles
from ziphius.kernels.select import STAYING, triton_kernels
from ziphius.kernels.triton import gemm, grouped_gemm
from ziphius.kernels.triton.gemm import CANDIDATES, PAIRS, best_large, config, gemm_triton
from ziphius.kernels.triton.product import Config

QUANTIZERS = {"blocks": quantize_blocks, "tiles": quantize_tiles}
PLAIN = [c for c in CANDIDATES if c.engine == "plain"]


def operands(M: int, N: int, K: int, form: str, seed: int = 0) -> tuple[Fp8, Fp8]:
    generator = torch.Generator().manual_seed(seed)
    # Scales far apart, so that none can stand for another.
    a = torch.randn(M, K, generator=generator) * 10.0 ** torch.randint(
        -2, 3, (M, 1), generator=generator
    )
    b = torch.randn(N, K, generator=generator) * 10.0 ** torch.randint(
        -2, 3, (1, K), generator=generator
    )
    return quantize_tiles(a), QUANTIZERS[form](b)


@settings(max_examples=20, deadline=None)
@given(
    M=st.integers(1, 150), N=st.integers(1, 150), K=st.integers(1, 300),
    form=st.sampled_from(sorted(QUANTIZERS)), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_shape(M: int, N: int, K: int, form: str, seed: int) -> None:
    device = torch.device("cuda" if ON_GPU else "cpu")
    a, b = (on(device, q) for q in operands(M, N, K, form, seed))
    out = gemm_triton(a, b, torch.float32)
    assert out.shape == (M, N)
    assert close(out, exact(a, b))


@pytest.mark.parametrize("form", sorted(QUANTIZERS))
@pytest.mark.parametrize("chosen", CANDIDATES if ON_GPU else PLAIN[::3], ids=str)
def test_every_candidate(chosen: Config, form: str, device: torch.device) -> None:
    if form == "tiles" and chosen.block_m * chosen.block_n > 128 * 128:
        pytest.skip("larger tiles are for blocks only")
    M, N, K = (1000, 1100, 4112) if ON_GPU else (130, 140, 528)
    a, b = (on(device, q) for q in operands(M, N, K, form))
    out = gemm_triton(a, b, torch.float32, config=chosen)
    assert close(out, exact(a, b))
    assert torch.equal(out, gemm_triton(a, b, torch.float32, config=chosen))


@pytest.mark.skipif(not ON_GPU, reason="no Gluon there")
@pytest.mark.parametrize("form", sorted(QUANTIZERS))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
# Whole tiles; rounds and a nearly empty one, with rows that the copy engine can store and cannot.
@pytest.mark.parametrize("shape", [(1000, 600, 4112), (4096, 2112, 7168), (4100, 2117, 4112)])
def test_pairs_in_any_round(
    shape: tuple[int, int, int], dtype: torch.dtype, form: str, device: torch.device
) -> None:
    a, b = (on(device, q) for q in operands(*shape, form))
    out = gemm_triton(a, b, dtype, config=PAIRS)
    assert close(out, exact(a, b))
    # Pieces of a tile are always added up in the same order.
    assert torch.equal(gemm_triton(a, b, dtype, config=PAIRS), out)


@pytest.mark.skipif(not ON_GPU, reason="the interpreter cuts BF16 off")
@pytest.mark.parametrize("shape", [(4096, 2112, 7168), (200, 7168, 2048), (64, 4096, 7168)])
def test_bf16_at_the_reports_shapes(shape: tuple[int, int, int], device: torch.device) -> None:
    a, b = (on(device, q) for q in operands(*shape, "blocks"))
    assert close(gemm_triton(a, b, torch.bfloat16), exact(a, b))


@pytest.mark.parametrize("form", sorted(QUANTIZERS))
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_where_it_belongs(
    bad: float, form: str, device: torch.device
) -> None:
    generator = torch.Generator().manual_seed(1)
    x, w = (torch.randn(rows, 272, generator=generator) for rows in (5, 140))
    x[3, 200] = bad
    w[130, 7] = bad
    a, b = on(device, quantize_tiles(x)), on(device, QUANTIZERS[form](w))
    out, right = gemm_triton(a, b, torch.float32).cpu(), gemm_reference(a, b, torch.float32).cpu()
    assert torch.equal(out.isfinite(), right.isfinite())
    assert not out[3].isfinite().any()
    assert out[:3, :128].isfinite().all()


def test_nothing_to_do(device: torch.device) -> None:
    a, b = (on(device, q) for q in operands(4, 6, 16, "blocks"))
    none = Fp8(a.codes[:0], a.scales[:0])
    assert gemm_triton(none, b, torch.float32).shape == (0, 6)


def test_operands_need_not_be_contiguous(device: torch.device) -> None:
    a, b = (on(device, q) for q in operands(20, 30, 256, "blocks"))
    apart = Fp8(a.codes.T.contiguous().T, a.scales.T.contiguous().T)
    assert torch.equal(gemm_triton(apart, b, torch.float32), gemm_triton(a, b, torch.float32))


def test_choice_is_by_shape() -> None:
    assert config(4096, 7168, 2048).engine == "pairs"
    small = config(64, 2112, 7168)
    assert small.engine == "plain"
    assert small.splits > 1
    assert config(64, 24576, 1536).splits == 1
    assert config(256, 2112, 7168).engine == "plain"
    assert config(256, 7168, 2048).engine != "plain"
    # 132 programs take three rounds of tiles of 192 rows. Of those of 128 they take four, and the
    # 16 tiles that are left are cut along K.
    assert best_large(4096, 2112, 7168) == PAIRS
    # Where K is too short for that, one round of the larger ones is done before two.
    assert best_large(4096, 640, 1536).block_m == 192
    assert best_large(4096, 640, 1536, matrices=2) == PAIRS


@pytest.mark.parametrize("engine", ["hopper", "pairs"])
def test_programs_that_stay_leave_room_for_communication(
    monkeypatch: pytest.MonkeyPatch, engine: str, device: torch.device
) -> None:
    """``parallel.comm_sms`` of 132 multiprocessors, in each of the four products."""
    told: list[int] = []
    name = {"hopper": "hopper", "pairs": "hopper_pairs"}[engine]
    stub = SimpleNamespace(launch=lambda *_, row_tiles, programs: told.append(programs))
    monkeypatch.setitem(sys.modules, f"ziphius.kernels.triton.{name}", stub)
    monkeypatch.setattr(kernels.triton, name, stub, raising=False)
    if not ON_GPU:
        machine = SimpleNamespace(multi_processor_count=132)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: machine)
    there = torch.cuda.get_device_properties(device).multi_processor_count
    for module in (gemm, grouped_gemm):
        monkeypatch.setattr(module, "available", lambda chosen, a, b: chosen)
    chosen = next(c for c in CANDIDATES if c.engine == engine)
    a, b = (on(device, q) for q in operands(256, 128, 256, "blocks"))
    stack = Fp8(b.codes[None], b.scales[None], b.rows)
    counts = torch.tensor([256], device=device)
    by_rows = Fp8(a.codes[None], a.scales[None], a.rows)
    calls = {
        "gemm": (a, b), "grouped_gemm": (a, stack, counts), "masked_gemm": (by_rows, stack, counts),
        "along_k": (a, a, counts),
    }  # fmt: skip
    assert set(calls) == STAYING
    for spared in (0, 20, 200):
        for op, operands_ in calls.items():
            triton_kernels(spared).function(op)(*operands_, torch.float32, config=chosen)
    assert told == [there] * 4 + [there - 20] * 4 + [1] * 4


@pytest.mark.skipif(not ON_GPU, reason="no Gluon there")
@pytest.mark.parametrize("engine", ["hopper", "pairs"])
def test_fewer_programs_compute_the_same(engine: str, device: torch.device) -> None:
    chosen = next(c for c in CANDIDATES if c.engine == engine)
    for shape in ((1000, 600, 4112), (4096, 2112, 7168)):
        a, b = (on(device, q) for q in operands(*shape, "blocks"))
        for spared in (0, 20, 131):
            assert close(
                gemm_triton(a, b, torch.float32, config=chosen, spared=spared), exact(a, b)
            )
