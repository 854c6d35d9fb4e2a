"""What ``fp8_numerics`` measures: errors of sums, formats and groups against float64.

An error is the difference to the exact product divided by the root mean square of the exact
outputs: a single output can be arbitrarily near to zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu

from ziphius.kernels import e5m6, logfmt
from ziphius.kernels.accumulate import accumulate, gemm_hopper
from ziphius.kernels.gemm import gemm_dequantized, gemm_reference
from ziphius.kernels.quantize import (
    E4M3,
    TILE,
    Fp8,
    dequantize,
    quantize_blocks,
    quantize_tiles,
    regroup,
)

Figures = dict[str, Any]
K_OF_THE_LAYER = 4096
OUTLIERS = 1 / 64  # share of the tokens
EDGES = [float(f"{10 ** (exponent / 10):.3g}") for exponent in range(-17, 2)]


def errors(found: Tensor, exact: Tensor) -> tuple[float, float]:
    """Root mean square and maximum of the error, as shares of the exact outputs' size."""
    off, size = found.double() - exact, exact.square().mean().sqrt()
    return short(off.square().mean().sqrt() / size), short(off.abs().max() / size)


def short(x: float | Tensor) -> float:
    """Three digits."""
    return float(f"{float(x):.3g}")


def draw(kind: str, shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Draw normal numbers; ``positive``: their magnitudes; or a few channels 30 times larger."""
    x = torch.randn(shape, generator=generator)
    if kind == "positive":
        return x.abs()
    if kind == "outlier channels":
        return x * torch.where(torch.rand(shape[1], generator=generator) < 0.01, 30.0, 1.0)
    return x


def whole(x: Tensor) -> Fp8:
    """Quantise with one scale for everything, written as tiles."""
    scale = x.abs().max() / 448
    return Fp8((x / scale).to(E4M3), scale.expand(len(x), -(-x.shape[1] // TILE)))


def accumulation(ks: list[int], outputs: int) -> Figures:
    """Error of the sum alone, by K: codes with one scale, as only they can go unpromoted."""
    found: Figures = {}
    for kind in ("normal", "positive"):
        rows = {"K": ks, "unpromoted": [], "promoted": []}
        for K in ks:
            a, b = _codes(kind, outputs, K)
            exact = a.double() @ b.double().T
            rows["unpromoted"].append(errors(accumulate(a, b), exact)[1])
            rows["promoted"].append(errors(accumulate(a, b, TILE), exact)[1])
        found[kind] = rows
    return found


def claim(outputs: int) -> Figures:
    """The report's example, normal numbers at K = 4096: the largest of more outputs is larger."""
    a, b = _codes("normal", outputs, K_OF_THE_LAYER)
    exact = a.double() @ b.double().T
    rows = {"unpromoted": accumulate(a, b), "promoted": accumulate(a, b, TILE)}
    found: Figures = {"outputs": outputs}
    for name, product in rows.items():
        found[f"{name}_rms"], found[f"{name}_max"] = errors(product, exact)
    return found


def intervals(every: list[int], outputs: int) -> Figures:
    """Error of the sum alone at K = 4096, by the interval of promotion."""
    found: Figures = {"interval": every}
    for kind in ("normal", "positive"):
        a, b = _codes(kind, outputs, K_OF_THE_LAYER)
        exact = a.double() @ b.double().T
        found[kind] = [errors(accumulate(a, b, interval), exact)[1] for interval in every]
    return found


def _codes(kind: str, outputs: int, K: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    a, b = (whole(draw(kind, (outputs, K), generator)).codes for _ in range(2))
    return a, b


def layer(outputs: int) -> Figures:
    """Forward product of a layer with K = 4096: whole error, and what the sum adds to it."""
    found: Figures = {}
    for kind in ("normal", "outlier channels", "positive"):
        generator = torch.Generator().manual_seed(0)
        x = draw(kind, (outputs, K_OF_THE_LAYER), generator)
        sign = "positive" if kind == "positive" else "normal"
        w = 0.006 * draw(sign, (outputs, K_OF_THE_LAYER), generator)
        exact = x.double() @ w.double().T
        fine, coarse = (quantize_tiles(x), quantize_blocks(w)), (whole(x), whole(w))
        scale = coarse[0].scales[0, 0] * coarse[1].scales[0, 0]
        codes = coarse[0].codes, coarse[1].codes
        tiles, tensor = "tiles and blocks", "a scale a tensor"
        found[kind] = {
            f"{tiles}, exact sum": _row(_exactly(*fine), fine, exact),
            f"{tiles}, FP32": _row(gemm_reference(*fine, torch.float32), fine, exact),
            f"{tiles}, 14 bits promoted": _row(gemm_hopper(*fine, torch.float32), fine, exact),
            f"{tensor}, exact sum": _row(_exactly(*coarse), coarse, exact),
            f"{tensor}, 14 bits promoted": _row(accumulate(*codes, TILE) * scale, coarse, exact),
            f"{tensor}, 14 bits": _row(accumulate(*codes) * scale, coarse, exact),
        }
    return found


def _exactly(a: Fp8, b: Fp8) -> Tensor:
    return dequantize(a, torch.float64) @ dequantize(b, torch.float64).T


def _row(product: Tensor, operands: tuple[Fp8, Fp8], exact: Tensor) -> Figures:
    whole_error = errors(product, exact)
    by_sum = errors(product, _exactly(*operands))
    return {
        "rms": whole_error[0],
        "max": whole_error[1],
        "sum_rms": by_sum[0],
        "sum_max": by_sum[1],
    }


def gradients(ratios: list[float], tokens: int, outputs: int, at: float) -> Figures:
    """``dx = dy W`` where one token in 64 is larger: error of the others, tiles against blocks.

    A token's error is that of its own row. ``histogram`` counts all tokens by it where outliers are
    ``at`` times larger.
    """
    generator = torch.Generator().manual_seed(0)
    w = 0.006 * torch.randn(outputs, K_OF_THE_LAYER, generator=generator)
    plain = torch.randn(tokens, K_OF_THE_LAYER, generator=generator)
    larger = torch.rand(tokens, generator=generator) < OUTLIERS
    found: Figures = {"ratio": ratios, "outliers": int(larger.sum()), "tokens": tokens}
    found |= {"tiles": [], "blocks": [], "histogram": {"ratio": at, "edges": EDGES}}
    for ratio in sorted({*ratios, at}):
        dy = plain * torch.where(larger, ratio, 1.0)[:, None]
        exact = dy.double() @ w.double().T
        for name, quantize in (("tiles", quantize_tiles), ("blocks", quantize_blocks)):
            product = gemm_dequantized(quantize(dy), quantize_blocks(w), torch.float32)
            off = (product.double() - exact).norm(dim=1) / exact.norm(dim=1)
            if ratio in ratios:
                found[name].append(short(off[~larger].median()))
            if ratio == at:
                bins = torch.tensor([0.0, *EDGES[1:-1], math.inf], dtype=torch.float64)
                found["histogram"][name] = torch.histogram(off, bins).hist.int().tolist()
    return found


def turning(tokens: int) -> Figures:
    """Share of the numbers in tiles that change when they are turned, by the kind of scale."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.exp(0.5 * torch.randn(tokens, K_OF_THE_LAYER, generator=generator))
    x = torch.randn(tokens, K_OF_THE_LAYER, generator=generator) * sizes
    found: Figures = {}
    for name, power_of_two in (("FP32", False), ("UE8M0", True)):
        tiles = quantize_tiles(x, power_of_two=power_of_two)
        turned = dequantize(regroup(tiles, power_of_two=power_of_two))
        found[name] = short((turned.T[:tokens] != dequantize(tiles)).double().mean())
    return found


def floor(sizes: list[float]) -> Figures:
    """Error of a tile in E4M3 by its largest magnitude: below 1e-4 its scale shrinks no more."""
    x = torch.randn(64, K_OF_THE_LAYER, generator=torch.Generator().manual_seed(0))
    tiles = x.unflatten(-1, (-1, TILE))
    x = (tiles / tiles.abs().amax(-1, keepdim=True)).flatten(-2)
    back = [dequantize(quantize_tiles(x * size)) for size in sizes]
    pairs = zip(back, sizes, strict=True)
    return {"amax": sizes, "rms": [errors(y, (x * size).double())[0] for y, size in pairs]}


FORMATS: dict[str, Callable[[Tensor], Tensor]] = {
    "BF16": lambda x: x.bfloat16(),
    "E5M6": lambda x: e5m6.decode(e5m6.encode(x), x.shape[-1]),
    "LogFMT-10": lambda x: logfmt.decode(logfmt.encode(x, 10)),
    "LogFMT-8": lambda x: logfmt.decode(logfmt.encode(x, 8)),
    "E4M3": lambda x: dequantize(quantize_tiles(x)),
    "E4M3, UE8M0": lambda x: dequantize(quantize_tiles(x, power_of_two=True)),
    "E5M2": lambda x: _cast(x, torch.float8_e5m2),
}


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    tiles = x.unflatten(-1, (-1, TILE))
    scales = tiles.abs().amax(-1, keepdim=True).clamp(min=1e-4) / torch.finfo(dtype).max
    return ((tiles / scales).to(dtype).float() * scales).flatten(-2)


def activations() -> dict[str, Tensor]:
    """Numbers of several shapes, ``[64, 4096]``."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 64, K_OF_THE_LAYER, generator=generator)
    channels = torch.rand(K_OF_THE_LAYER, generator=generator)
    return {
        "normal": x,
        "outlier channels": x * torch.where(channels < 0.01, 30.0, 1.0),
        "SwiGLU": silu(x) * y,
        "SwiGLU, wide gates": silu(4 * x) * y,
    }


def formats() -> Figures:
    """Root mean square error of each format, and the binades that a tile spans on average."""
    found: Figures = {}
    for kind, x in activations().items():
        sizes = x.unflatten(-1, (-1, TILE)).abs()
        spans = (sizes.amax(-1) / sizes.amin(-1)).log2()
        errors_by_format = {
            name: errors(rounded(x), x.double())[0] for name, rounded in FORMATS.items()
        }
        found[kind] = {"binades": round(float(spans.mean()), 1), "rms": errors_by_format}
    return found
