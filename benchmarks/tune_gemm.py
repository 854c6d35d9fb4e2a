"""Which way of cutting an FP8 product is fastest on this GPU, at the report's shapes (facts 9.8).

Every candidate of ``kernels/triton`` runs every shape it is meant for: its result is checked once
against an FP32 product of the decoded operands, then timed by replays of a CUDA graph that goes
round enough copies of the operands to be past the second-level cache. torch's BF16 product is timed
alike. The floors: 2 M N K operations over the matrix peak (1,979 TFLOP/s on an H100), and the bytes
of codes, scales and results over copy bandwidth (about 3.0 TB/s there).

Prints tables, then of every shape its best, and everything as one JSON object in the last line.
A kernel that hangs cannot be stopped from inside: first another process runs every candidate once
on a small shape; what does not come back there is left out. That compiles them, too.
"""

from __future__ import annotations

import argparse
import json
import select
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ziphius.kernels.quantize import Fp8, dequantize, quantize_blocks, quantize_tiles, turn
from ziphius.kernels.stored import Codes
from ziphius.kernels.triton import gemm, grouped_gemm, weight_only

LAYERS = ((2112, 7168), (24576, 1536), (32768, 512), (7168, 16384), (4096, 7168), (7168, 2048))
EXPERTS = ((4096, 7168), (7168, 2048))
CONTIGUOUS = ((4, 8192), (8, 4096))
MASKED = ((1, 1024), (2, 512), (4, 256))
GRADIENTS = ((4096, 7168, 4096), (7168, 2048, 8192))
ROWS = (4096, 64, 128)
WEIGHTS = ((7168, 2048), (2048, 7168))
ANSWERING = (1, 8)
GROUP = 128
PARTS = ("small", "dense", "contiguous", "masked", "along_k", "tiles", "weights")
# More than a second-level cache of 60 MB.
CACHE = 160e6
MOST_COPIES = 10
REPLAYS = 5
BOUNDS = {torch.bfloat16: 4e-3, torch.float32: 1.5e-3}
# Seconds that a candidate may take to compile and run once on a small shape, and to start Python.
PATIENCE, START = 12.0, 45.0
DONE = "all tried"
# Of small shapes: an odd number of groups of K, a last one that is not whole, tiles that jut out.
SMALL_K = 1616


@dataclass
class Case:
    """One product: how to make operands, run a candidate, and what is right."""

    part: str
    name: str
    operations: float
    bytes: float
    make: Callable[[], tuple[Any, ...]]
    run: Callable[..., Tensor]
    plain: Callable[[tuple[Any, ...]], Callable[[], Tensor]] | None
    candidates: tuple[Any, ...]
    expected: Callable[[tuple[Any, ...]], Tensor]
    compare: Callable[[Tensor], Tensor] = lambda out: out


def microseconds(calls: list[Callable[[], Tensor]], around: float) -> float:
    """Return the median time of a call; ``around`` guesses it, in microseconds."""
    calls[0]()
    torch.cuda.synchronize()
    rounds = max(1, min(50, round(1500 / (around * len(calls)))))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for call in calls:
                call()
    times = []
    for _ in range(REPLAYS + 1):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1000 / (rounds * len(calls)))
    return statistics.median(times[1:])


def relative(out: Tensor, right: Tensor) -> float:
    """Return the norm of the difference over the norm of what is right; NaN stays."""
    return float((out.float() - right).norm() / right.norm())


def decoded_product(operands: tuple[Any, ...]) -> Tensor:
    """Return the FP32 product of the decoded operands."""
    a, b = operands[:2]
    return dequantize(a) @ dequantize(b).T


def measure(case: Case, deadline: float) -> Iterator[dict[str, Any]]:
    """Check and time every candidate of a case, torch's BF16 product first."""
    copies = int(max(1, min(MOST_COPIES, CACHE // case.bytes)))
    sets = [case.make() for _ in range(copies)]
    right = case.expected(sets[0])
    around = max(3.0, case.operations / 600e6, case.bytes / 2.5e6)
    usual = None
    if case.plain is not None:
        usual = microseconds([case.plain(operands) for operands in sets], 2 * around)
        yield {"config": "torch bf16", "us": usual, "error": None}
    for config in case.candidates:
        if time.monotonic() > deadline:
            yield {"config": str(tuple(config)), "skipped": "no time left"}
            continue
        try:
            began = time.monotonic()
            out = case.run(*sets[0], config=config)
            torch.cuda.synchronize()
            first = time.monotonic() - began
            error = relative(case.compare(out), right)
            calls = [lambda o=operands, c=config: case.run(*o, config=c) for operands in sets]
            taken = microseconds(calls, around)
        except Exception as problem:  # one candidate's failure must not hide the others' figures
            yield {"config": str(tuple(config)), "failed": f"{type(problem).__name__}: {problem}"}
            continue
        result = {"config": str(tuple(config)), "us": taken, "error": error, "first_s": first}
        result["right"] = error < BOUNDS[out.dtype]
        if usual is not None:
            result["over_bf16"] = usual / taken
        yield result


def dense(parts: set[str], device: torch.device, small: bool = False) -> Iterator[Case]:
    """Products of linear layers, BF16 out."""
    for M in (656, 64, 128) if small else ROWS:
        part = "small" if M <= 128 else "dense"
        if part not in parts:
            continue
        wanted = ("hopper", "pairs") if part == "dense" else ("plain",)
        chosen = [c for c in gemm.CANDIDATES if c.engine in wanted]
        for N, K in [(2112, SMALL_K)] if small else LAYERS:

            def make(M: int = M, N: int = N, K: int = K) -> tuple[Fp8, Fp8]:
                a, b = (torch.randn(rows, K, device=device) for rows in (M, N))
                return quantize_tiles(a), quantize_blocks(b)

            yield Case(
                part, f"{M} x {N} x {K}", 2.0 * M * N * K, M * K + N * K + 2.0 * M * N, make,
                lambda a, b, config: gemm.gemm_triton(a, b, torch.bfloat16, config=config),
                _plain, tuple(chosen), decoded_product,
            )  # fmt: skip


def gradients(device: torch.device, small: bool = False) -> Iterator[Case]:
    """Gradients of weights: both operands in tiles, FP32 out."""
    for M, N, K in [(656, 528, SMALL_K)] if small else GRADIENTS:

        def make(M: int = M, N: int = N, K: int = K) -> tuple[Fp8, Fp8]:
            a, b = (torch.randn(rows, K, device=device) for rows in (M, N))
            return quantize_tiles(a), quantize_tiles(b)

        yield Case(
            "tiles", f"{M} x {N} x {K}", 2.0 * M * N * K, M * K + N * K + 4.0 * M * N, make,
            lambda a, b, config: gemm.gemm_triton(a, b, torch.float32, config=config),
            _plain, gemm.TILES_CANDIDATES, decoded_product,
        )  # fmt: skip


def contiguous(device: torch.device, small: bool = False) -> Iterator[Case]:
    """Products of experts, segments one after the other and of unequal lengths."""
    for experts, rows in [(3, 320)] if small else CONTIGUOUS:
        counts = torch.full((experts,), rows, device=device)
        counts[0] += 37
        counts[-1] -= 37
        for N, K in [(528, SMALL_K)] if small else EXPERTS:

            def make(counts: Tensor = counts, N: int = N, K: int = K) -> tuple[Fp8, Fp8, Tensor]:
                a = torch.randn(int(counts.sum()), K, device=device)
                b = torch.randn(len(counts), N, K, device=device)
                return quantize_tiles(a), quantize_blocks(b), counts

            M = experts * rows
            yield Case(
                "contiguous", f"{experts} x {rows} x {N} x {K}", 2.0 * M * N * K,
                M * K + experts * N * K + 2.0 * M * N, make,
                lambda a, b, c, config: grouped_gemm.grouped_gemm_triton(
                    a, b, c, torch.bfloat16, config=config
                ),
                _plain_grouped, grouped_gemm.CANDIDATES, _expected_rows,
            )  # fmt: skip


def masked(device: torch.device, small: bool = False) -> Iterator[Case]:
    """Products of experts with room for as many rows each, all of it used but a few."""
    for experts, rows in [(3, 320)] if small else MASKED:
        counts = torch.full((experts,), rows, device=device) - 3
        for N, K in [(528, SMALL_K)] if small else EXPERTS:

            def make(
                experts: int = experts, rows: int = rows, counts: Tensor = counts,
                N: int = N, K: int = K,
            ) -> tuple[Fp8, Fp8, Tensor]:  # fmt: skip
                a = torch.randn(experts, rows, K, device=device)
                b = torch.randn(experts, N, K, device=device)
                return quantize_tiles(a), quantize_blocks(b), counts

            def expected(operands: tuple[Any, ...], rows: int = rows) -> Tensor:
                a, b = (dequantize(q) for q in operands[:2])
                return torch.bmm(a, b.transpose(1, 2))[:, : rows - 3]

            M = experts * rows
            yield Case(
                "masked", f"{experts} x {rows} x {N} x {K}", 2.0 * M * N * K,
                M * K + experts * N * K + 2.0 * M * N, make,
                lambda a, b, c, config: grouped_gemm.masked_gemm_triton(
                    a, b, c, torch.bfloat16, config=config
                ),
                None, grouped_gemm.CANDIDATES, expected,
                lambda out, rows=rows: out[:, : rows - 3],
            )  # fmt: skip


def along_k(device: torch.device, small: bool = False) -> Iterator[Case]:
    """Gradients of experts' weights: one expert without rows, lengths no multiples of 128."""
    for experts, rows in [(3, 320)] if small else CONTIGUOUS:
        counts = torch.full((experts,), rows, device=device)
        counts[0] += counts[1] - 50
        counts[1] = 0
        N, K = (528, 272) if small else EXPERTS[-1]

        def make(counts: Tensor = counts, N: int = N, K: int = K) -> tuple[Fp8, Fp8, Tensor]:
            x, y = (torch.randn(int(counts.sum()), width, device=device) for width in (N, K))
            return turn(x, counts), turn(y, counts), counts

        S = int(counts.sum())
        yield Case(
            "along_k", f"{experts} x {rows} x {N} x {K}", 2.0 * S * N * K,
            S * (N + K) + 4.0 * experts * N * K, make,
            lambda a, b, c, config: grouped_gemm.grouped_gemm_along_k_triton(
                a, b, c, torch.float32, config=config
            ),
            None, gemm.TILES_CANDIDATES, _expected_along_k,
        )  # fmt: skip


def weights(device: torch.device, small: bool = False) -> Iterator[Case]:
    """Products with integer weights; the floor is the bytes of their codes."""
    for form, bits in (("int8", 8), ("int4", 4), ("fp8", 8)):
        for N in ANSWERING:
            for O, I in WEIGHTS:  # noqa: E741

                def make(
                    form: str = form,
                    bits: int = bits,
                    N: int = N,
                    O: int = O,  # noqa: E741
                    I: int = I,  # noqa: E741
                ) -> tuple[Tensor, Codes]:
                    codes = torch.randn(O, I * bits // 8, device=device) * 60 + 128
                    data = codes.clamp(0, 255).to(torch.uint8)
                    if form == "fp8":
                        data = torch.randn(O, I, device=device).to(torch.float8_e4m3fn)
                    rows = GROUP if form == "fp8" else 1
                    scales = torch.rand(-(-O // rows), I // GROUP, device=device) + 0.5
                    x = torch.randn(N, I, device=device, dtype=torch.bfloat16)
                    return x, Codes(data.view(torch.uint8), scales, form, GROUP, rows)

                candidates = weight_only.DOTS + (weight_only.ONE_ROW if N == 1 else ())
                yield Case(
                    "weights", f"{form} {N} x {O} x {I}", 2.0 * N * O * I,
                    O * I * bits / 8 + 2.0 * N * (O + I), make,
                    lambda x, w, config: weight_only.weight_only_triton(x, w, config=config),
                    _plain_weights, candidates, _expected_weights,
                )  # fmt: skip


def _plain_weights(operands: tuple[Any, ...]) -> Callable[[], Tensor]:
    x, decoded = operands[0], operands[1].decode(torch.bfloat16)
    return lambda: x @ decoded.T


def _expected_weights(operands: tuple[Any, ...]) -> Tensor:
    return operands[0].float() @ operands[1].decode(torch.float32).T


def _plain(operands: tuple[Any, ...]) -> Callable[[], Tensor]:
    a, b = (dequantize(q, torch.bfloat16) for q in operands[:2])
    return lambda: a @ b.T


def _plain_grouped(operands: tuple[Any, ...]) -> Callable[[], Tensor]:
    a, b = (dequantize(q, torch.bfloat16) for q in operands[:2])
    ends = operands[2].cumsum(0).to(torch.int32)
    return lambda: torch.nn.functional.grouped_mm(a, b.transpose(1, 2), offs=ends)


def _expected_rows(operands: tuple[Any, ...]) -> Tensor:
    a, b, counts = dequantize(operands[0]), dequantize(operands[1]), operands[2].tolist()
    return torch.cat([part @ w.T for part, w in zip(a.split(counts), b, strict=True)])


def _expected_along_k(operands: tuple[Any, ...]) -> Tensor:
    a, b = (dequantize(q) for q in operands[:2])
    widths = ((operands[2] + 127) // 128 * 128).tolist()
    parts = zip(
        a[:, : sum(widths)].split(widths, 1), b[:, : sum(widths)].split(widths, 1), strict=True
    )
    return torch.stack([x @ y.T for x, y in parts])


def cases(parts: set[str], device: torch.device, small: bool = False) -> Iterator[Case]:
    """Return the cases of ``parts``, the most wanted first; ``small``: one of each, to try."""
    made = {
        "tiles": gradients,
        "contiguous": contiguous,
        "along_k": along_k,
        "masked": masked,
        "weights": weights,
    }
    yield from dense(parts - {"small"}, device, small)
    for part, make in made.items():
        if part in parts:
            yield from make(device, small)
        if part == "masked":
            yield from dense(parts - {"dense"}, device, small)


def try_all(parts: set[str], skipped: set[str], device: torch.device) -> None:
    """Run every candidate once, on a small shape; print a line before each and one behind it."""
    for case in cases(parts, device, small=True):
        operands = case.make()
        right = case.expected(operands)
        for config in case.candidates:
            name = f"{case.part} {tuple(config)}"
            if name in skipped:
                continue
            print(name, flush=True)
            try:
                error = relative(case.compare(case.run(*operands, config=config)), right)
                print("", flush=True) if error < 5e-3 else print(f"error {error:.2e}", flush=True)
            except Exception as problem:  # one candidate's failure must not hide the others'
                print(f"{type(problem).__name__}: {problem}".replace("\n", " "), flush=True)
                if "CUDA" in str(problem):
                    return  # nothing runs in this process any more
    print(DONE, flush=True)


def unfit(parts: set[str]) -> dict[str, str]:
    """Return which candidates do not come back from a small shape, or not with what is right."""
    bad: dict[str, str] = {}
    while True:
        command = [sys.executable, __file__, "--parts", ",".join(sorted(parts)), "--try"]
        tried = subprocess.Popen(
            [*command, *(f"--skip={name}" for name in bad)], stdout=subprocess.PIPE, bufsize=0
        )
        assert tried.stdout is not None
        before, current, said, patience = len(bad), "", "", START
        while select.select([tried.stdout], [], [], patience)[0]:
            line_read = tried.stdout.readline().decode()
            said = line_read.strip()
            if not line_read or said == DONE:
                break
            patience = PATIENCE
            if not current:
                current = said
                continue
            if said:
                bad[current] = said
            current = ""
        tried.kill()
        tried.wait()
        if current:
            bad[current] = "did not come back from a small shape"
        if said == DONE or len(bad) == before:
            return bad


def line(case: Case, result: dict[str, Any], best: float) -> str:
    """Return a line of the table."""
    if "us" not in result:
        return f"  {result['config']:58} {result.get('failed') or result.get('skipped')}"
    tflops, gbs = case.operations / result["us"] / 1e6, case.bytes / result["us"] / 1e3
    mark = "*" if result["us"] == best else " "
    wrong = "" if result.get("right", True) else f"  WRONG: error {result['error']:.2e}"
    over = f"{result['over_bf16']:5.2f}x" if "over_bf16" in result else " " * 6
    return (
        f"{mark} {result['config']:58} {result['us']:9.1f} us {tflops:7.0f} TFLOP/s "
        f"{gbs:6.0f} GB/s {over}{wrong}"
    )


def summary(cases: list[dict[str, Any]]) -> Iterator[str]:
    """Return a line for every shape: its best candidate."""
    for case in cases:
        right = [r for r in case["results"] if r.get("right")]
        if right:
            best = min(right, key=lambda r: float(r["us"]))
            tflops = case["operations"] / best["us"] / 1e6
            over = f" {best['over_bf16']:.2f}x" if "over_bf16" in best else ""
            yield f"{case['part']} {case['name']}: {best['config']} {tflops:.0f}{over}"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", default=",".join(PARTS), help=f"of {','.join(PARTS)}")
    parser.add_argument("--limit", type=float, default=85, help="seconds; what is left is skipped")
    parser.add_argument("--try", action="store_true", dest="trying", help=argparse.SUPPRESS)
    parser.add_argument("--skip", action="append", default=[], help=argparse.SUPPRESS)
    options = parser.parse_args()
    deadline = time.monotonic() + options.limit
    parts = set(options.parts.split(","))
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = False
    device = torch.device("cuda")
    if options.trying:
        try_all(parts, set(options.skip), device)
        return
    bad = unfit(parts)
    for name, why in bad.items():
        print(f"left out: {name}: {why}", flush=True)
    figures: dict[str, Any] = {"device": torch.cuda.get_device_name(device), "cases": []}
    for case in cases(parts, device):
        if time.monotonic() > deadline:
            print(f"{case.part} {case.name}: no time left", flush=True)
            continue
        case.candidates = tuple(c for c in case.candidates if f"{case.part} {tuple(c)}" not in bad)
        results = list(measure(case, deadline))
        best = min((r["us"] for r in results if r.get("right")), default=0.0)
        print(f"{case.part} {case.name}", flush=True)
        for result in results:
            print(line(case, result, best), flush=True)
        figures["cases"].append(
            {
                "part": case.part,
                "name": case.name,
                "operations": case.operations,
                "results": results,
            }
        )
    print(*summary(figures["cases"]), sep="\n")
    print(json.dumps({**figures, "left_out": bad}))


if __name__ == "__main__":
    main()
