"""Compile for a Hopper GPU whatever a call launches, where there is no GPU.

``python -m tests.kernels.triton.compiled NAME...`` prints one line a kernel, of those that
``CALLS`` lists at the published sizes.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

HOPPER = GPUTarget("cuda", 90, 32)
SHARED = 227 * 1024  # bytes that a block may have there
LAUNCH = {"num_warps", "num_stages", "maxnreg", "enable_fp_fusion"}
TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.uint8: "*u8",
    torch.int8: "*i8",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.bool: "*i1",
}


class Report(NamedTuple):
    """What the compiler made of one kernel."""

    name: str
    registers: int
    spilled: int  # bytes a thread
    shared: int  # bytes a block
    matrix: str  # wgmma, mma or nothing
    mixed: bool  # threads exchange a matrix of bytes, which Triton 3.6 mixes up
    lost: bool  # fewer conversions to E4M3 than there should be: ptxas leaves their codes undefined
    apart: bool  # an axis is reduced over threads that are no neighbours: it takes wrong ones

    def __str__(self) -> str:
        return (
            f"{self.name}: {self.registers} registers, {self.spilled} bytes spilled, "
            f"{self.shared} bytes shared, {self.matrix or 'no matrix unit'}"
            f"{', BYTES BETWEEN THREADS' if self.mixed else ''}"
            f"{', CONVERSIONS LOST' if self.lost else ''}"
            f"{', REDUCED OVER THREADS APART' if self.apart else ''}"
        )


@contextmanager
def launches_compiled() -> Iterator[list[Report]]:
    """Compile kernels instead of launching them; outputs keep what their memory held."""
    reports: list[Report] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        reports.append(_compiled(self, args, options))

    JITFunction.run = compile_only
    try:
        yield reports
    finally:
        JITFunction.run = run


def _compiled(function: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Report:
    values = dict(zip(function.arg_names, args, strict=False))
    values |= {name: options[name] for name in function.arg_names if name in options}
    launch = {name: options[name] for name in options if name not in function.arg_names}
    # A launch on a GPU would refuse others.
    assert launch.keys() <= LAUNCH, launch
    signature, constants, attributes = {}, {}, {}
    for number, parameter in enumerate(function.params):
        value = values.get(parameter.name, parameter.default)
        plain = parameter.do_not_specialize and isinstance(value, int)
        kind = "i32" if plain else "constexpr" if parameter.is_constexpr else _type(value)
        signature[parameter.name] = kind
        if kind == "constexpr":
            constants[(number,)] = value
        elif not plain and _is_aligned(value):
            attributes[(number,)] = [["tt.divisibility", 16]]
    source = ASTSource(function, signature, constants, attributes)
    kernel = triton.compile(source, target=HOPPER, options=launch)
    registers, spilled = _resources(kernel.asm["cubin"])
    ptx = kernel.asm["ptx"]
    matrix = "wgmma" if "wgmma.mma_async" in ptx else "mma" if "mma.sync" in ptx else ""
    lines = kernel.asm["ttgir"].splitlines()
    mixed = any("convert_layout" in line and re.search(r"<\d+x\d+x(i8|f8)", line) for line in lines)
    name, shared = kernel.metadata.name, kernel.metadata.shared
    lost = _conversions(kernel.asm["cubin"]) < ptx.count("cvt.rn.satfinite.e4m3x2")
    return Report(name, registers, spilled, shared, matrix, mixed, lost, reduced_apart(lines))


def reduced_apart(lines: list[str]) -> bool:
    """Say whether an axis is reduced whose threads are no neighbours, in Triton's GPU dialect.

    Triton 3.6 reduces over as many threads as the axis has, neighbours of the first of them. Only
    layouts that it derives, as that of a reshaped matrix, have them apart.
    """
    lanes = {}
    for line in lines:
        if found := re.match(r"(#\w+) = #ttg.linear<.*lane = (\[\[.*?\]\]), warp", line):
            lanes[found[1]] = json.loads(found[2])
    axis = 0
    for line in lines:
        if found := re.search(r'"tt.reduce".*axis = (\d+)', line):
            axis = int(found[1])
        elif found := re.match(r"\s*}\) : \(tensor<[^#]*(#\w+)>", line):
            along = [base[axis] != 0 for base in lanes.get(found[1], ())]
            if "10" in "".join(str(int(x)) for x in along).strip("0"):
                return True
    return False


def _is_aligned(value: Any) -> bool:
    """Say whether the compiler is told that a number or an address is a multiple of 16."""
    if isinstance(value, torch.Tensor):
        return value.data_ptr() % 16 == 0
    return isinstance(value, int) and value % 16 == 0


def _type(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return TYPES[value.dtype]
    if isinstance(value, TensorDescriptor):
        return f"tensordesc<{TYPES[value.base.dtype][1:]}{list(value.block_shape)}>"
    if isinstance(value, float):
        return "fp32"
    if value is None or value == 1 or isinstance(value, bool):
        return "constexpr"
    return "i32" if abs(value) < 2**31 else "i64"


def _conversions(cubin: bytes) -> int:
    """Count the instructions that make two codes."""
    return _dumped(cubin, "-sass").count("F2FP.SATFINITE.E4M3")


def _resources(cubin: bytes) -> tuple[int, int]:
    told = _dumped(cubin, "--dump-resource-usage")
    found = re.search(r"REG:(\d+) STACK:(\d+)", told)
    assert found, told
    return int(found[1]), int(found[2])


def _dumped(cubin: bytes, what: str) -> str:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, what, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def attention() -> None:
    """Causal attention, forward and backward, at 192 and 128 columns."""
    from ziphius.kernels.triton.attention import causal_attention_triton

    for T, packed in ((4096, False), (4096, True), (4000, True)):
        q, k, v = (
            torch.empty(1, T, 16, d, dtype=torch.bfloat16).transpose(1, 2).requires_grad_()
            for d in (192, 192, 128)
        )
        documents = torch.zeros(1, T, dtype=torch.int64) if packed else None
        out = causal_attention_triton(q, k, v, 0.07, documents)
        out.backward(torch.empty_like(out))


def latent() -> None:
    """Attention over the latent cache, and what stands around it, with few and with many heads."""
    from ziphius.kernels.latent import LatentPages
    from ziphius.kernels.triton.latent import HALF_LAUNCHES, TritonLatent

    C, R, nope = 512, 64, 128
    for H, batch, queries in ((16, 64, 1), (16, 64, 2), (16, 8, 64), (128, 64, 1), (128, 8, 2)):
        N = batch * queries
        slots, tables = torch.zeros(N, dtype=torch.int64), torch.zeros(batch, 64, dtype=torch.int64)
        pages = torch.empty(8, 64, C + R, dtype=torch.bfloat16)
        cache, triton_latent = LatentPages(pages, slots, tables, slots, slots), TritonLatent()
        turns = torch.empty(2, N, R // 2).unbind()
        triton_latent.append(torch.empty(N, C + R).bfloat16(), torch.ones(C), 1e-6, turns, cache)
        q_NHd = torch.empty(N, H, nope + R, dtype=torch.bfloat16)
        up_HCn = torch.empty(H, C, nope, dtype=torch.bfloat16)
        q_NHc = triton_latent.queries(q_NHd, up_HCn, turns)
        z_NHC = triton_latent.attend(q_NHc, C, 0.07, cache)
        triton_latent.values(z_NHC, up_HCn.transpose(1, 2))
        for launches in HALF_LAUNCHES[1:] if queries == 1 else ():
            TritonLatent(launches).attend(q_NHc, C, 0.07, cache)


def e5m6() -> None:
    """What is kept of attention's output, of whole tiles and of ragged ones."""
    from ziphius.kernels.triton.e5m6 import CANDIDATES, TritonE5M6

    for width, tried in ((16384, CANDIDATES), (1000, CANDIDATES[:1])):
        for launch in tried:
            q = TritonE5M6(launch).encode(torch.empty(64, width, dtype=torch.bfloat16))
            TritonE5M6(launch).decode(q, width, torch.bfloat16)
            TritonE5M6(launch).encode(torch.empty(64, width))
            TritonE5M6(launch).decode(q, width)


def norm() -> None:
    """RMSNorm of the report's widths and of odd ones, in every way for the widest."""
    from ziphius.kernels.triton import norm as kernels

    def both(x_MD: torch.Tensor, forward: Any = None, backward: Any = None) -> None:
        gain_D = torch.empty(x_MD.shape[1])
        for power_of_two in (None, False, True):
            root = kernels.norm_forward(x_MD, gain_D, 1e-6, power_of_two, forward)[2]
        kernels.norm_backward_triton(x_MD, gain_D, root, x_MD, launch=backward)

    for D, dtype in ((512, torch.bfloat16), (1536, torch.bfloat16), (700, torch.float32)):
        both(torch.empty(4096, D, dtype=dtype))
    widest = torch.empty(4096, 7168, dtype=torch.bfloat16)
    for launch in kernels.CANDIDATES:
        kernels.norm_forward(widest, torch.empty(7168), 1e-6, False, launch)
    for launch in kernels.BACKWARD_CANDIDATES:
        both(widest, None, launch)


def permute() -> None:
    """Rows and tiles to eight places and back."""
    from ziphius.kernels.triton import permute as kernels
    from ziphius.kernels.triton.groups import empty_tiles

    u_ND, where_M = torch.empty(4096, 7168).bfloat16(), torch.empty(32768, dtype=torch.int64)
    kernels.unpermute_triton(kernels.permute_triton(u_ND, where_M, where_M, 8), *[where_M] * 2, 8)
    q = empty_tiles(u_ND.shape, u_ND.device)
    for launch in kernels.TILES_CANDIDATES:
        kernels.permute_tiles_triton(q, where_M, where_M, 8, launch=launch)


def quantize() -> None:
    """Every quantiser, with and without experts; in other blocks for experts alone."""
    from ziphius.kernels.triton.quantize import CANDIDATES, TritonQuantize

    x_MC, counts_E = torch.empty(4096, 7168).bfloat16(), torch.zeros(256, dtype=torch.int64)
    for power_of_two in (False, True):
        how = {"power_of_two": power_of_two}
        for counts in (None, counts_E):
            tiles, _ = TritonQuantize().both(x_MC, counts, **how)
            TritonQuantize().turn(x_MC, counts, **how)
            TritonQuantize().regroup(tiles, counts, **how)
    for launch in CANDIDATES:
        for power_of_two in (False, True) if launch is CANDIDATES[0] else (False,):
            TritonQuantize(launch).tiles(x_MC, power_of_two=power_of_two)
            TritonQuantize(launch).blocks(torch.empty(2, 2048, 7168), power_of_two=power_of_two)
    TritonQuantize().blocks(x_MC)


RAGGED = ((1, 1), (5, 3), (200, 300), (64, 24), (100, 130), (64, 1), (64, 128))
# How numbers are stored, and at how many of them rows begin.
STORED = ((torch.bfloat16, 0), (torch.bfloat16, 4), (torch.float32, 0))


def ragged_quantize() -> None:
    """Every quantiser of matrices that are not whole squares, or do not lie at whole addresses."""
    from ziphius.kernels.triton.quantize import TritonQuantize

    ours, counts_E = TritonQuantize(), torch.zeros(7, dtype=torch.int64)
    for rows, columns in RAGGED:
        for dtype, begin in STORED:
            x_MC = torch.empty(rows, columns + begin, dtype=dtype)[:, begin:]
            for counts in (None, counts_E):
                tiles, _ = ours.both(x_MC, counts)
                if dtype == torch.float32:
                    ours.regroup(tiles, counts)
            ours.blocks(x_MC)


def ragged_rows() -> None:
    """SwiGLU, the norm and the permute of tiles, of the same matrices."""
    from ziphius.kernels.triton.norm import norm_backward_triton, norm_forward
    from ziphius.kernels.triton.permute import permute_tiles_triton
    from ziphius.kernels.triton.swiglu_fp8 import TritonSwigluFp8

    ours, counts_E = TritonSwigluFp8(), torch.zeros(7, dtype=torch.int64)
    for rows, columns in RAGGED:
        gates_M, where_M = torch.empty(rows), torch.empty(8 * rows, dtype=torch.int64)
        for dtype, begin in STORED:
            gate, up = torch.empty(rows, 2 * columns + begin, dtype=dtype)[:, begin:].chunk(2, 1)
            _, *coded = ours.forward(gate, up, gates_M)
            ours.backward(*coded, gates_M, gate, gate, up)
            root = norm_forward(gate, torch.empty(columns), 1e-6, False)[2]
            norm_backward_triton(gate, torch.empty(columns), root, up)
        for gates, counts in ((gates_M, counts_E), (None, None)):
            ours.turned(*coded, gates, counts)
        permute_tiles_triton(coded[0], where_M, where_M, 8)


def swiglu() -> None:
    """SwiGLU with its quantisers, with experts and, in the first blocks, without."""
    from ziphius.kernels.triton.swiglu_fp8 import CANDIDATES, TritonSwigluFp8

    halves, gates_M = torch.empty(4096, 4096).bfloat16().chunk(2, 1), torch.empty(4096)
    experts = torch.zeros(256, dtype=torch.int64), gates_M
    for launch in CANDIDATES:
        ours = TritonSwigluFp8(launch)
        for counts, gates in (experts, (None, None)) if launch is CANDIDATES[0] else (experts,):
            _, gate, up = ours.forward(*halves, gates)
            ours.turned(gate, up, gates, counts)
            ours.backward(gate, up, gates, halves[0], *halves)


def loss() -> None:
    """Cross entropy over the published vocabulary, and over one whose rows are not aligned."""
    from ziphius.kernels.triton.loss import LAUNCHES, cross_entropy_rows_triton

    targets_n = torch.zeros(2, dtype=torch.int64)
    for launch in LAUNCHES:
        logits_nV = torch.empty(2, 129280, dtype=torch.bfloat16)
        cross_entropy_rows_triton(logits_nV, targets_n, launch=launch)
    for V, dtype in ((129280, torch.float32), (50257, torch.bfloat16)):
        cross_entropy_rows_triton(torch.empty(2, V, dtype=dtype), targets_n)


def route() -> None:
    """The router of the published model, forward and backward, and those of small ones."""
    from ziphius.kernels.triton.route import route_triton

    for E, groups, kept, top_k in ((256, 8, 4, 8), (64, 1, 1, 6), (16, 4, 2, 4), (12, 3, 1, 1)):
        logits_NE = torch.empty(4096, E, requires_grad=True)
        rule = {"top_k": top_k, "n_group": groups, "topk_group": kept, "normalise": True}
        _, weights_NK, scores_NE = route_triton(logits_NE, torch.empty(E), **rule, scale=2.5)
        (weights_NK.sum() + scores_NE.sum()).backward()


def expand() -> None:
    """Heads of the published widths and back, in place and beside, and a few odd ones."""
    from ziphius.kernels.triton.expand import expand_heads_triton

    published, odd = (128, 64, 128), (24, 6, 13)
    for H, (nope, R, v), own_q in ((128, published, True), (16, published, False), (3, odd, True)):
        q, kv = (torch.empty(1, 64, H, nope + w, dtype=torch.bfloat16) for w in (R, v))
        k_rope = torch.empty(1, 64, 512 + R, dtype=torch.bfloat16)[..., 512:]
        inputs = (q, kv.requires_grad_(), k_rope)
        outputs = expand_heads_triton(*inputs, *torch.empty(2, 64, R // 2).unbind(), own_q=own_q)
        torch.autograd.backward(outputs, [torch.empty_like(x) for x in outputs])


def adamw() -> None:
    """An update with moments in BF16 and in FP32."""
    from ziphius.kernels.adamw import Rates
    from ziphius.kernels.triton.adamw import adamw_step_triton

    for count, kept in ((4096, torch.bfloat16), (4097, torch.float32)):
        moments = torch.empty(2, count, dtype=kept).unbind()
        p, grad = torch.empty(2, count).unbind()
        adamw_step_triton(p, grad, *moments, Rates(0.9, 0.95, 1.0, 1e-3, 0.1, 1e-8, 0.5))


def grouped() -> None:
    """Experts in BF16, forward and backward: of preset mini, of the report, and of odd widths."""
    from ziphius.kernels.triton.grouped import grouped_linear_triton

    mini, report = ((128, 1024, 512, 1024), (128, 1024, 1024, 256)), (2, 512, 4096, 7168)
    few, odd = (4, 32, 512, 640), (4, 99, 7, 9)
    for experts, rows, outer, inner in (*mini, report, few, odd):
        x_MI = torch.empty(experts * rows, inner, dtype=torch.bfloat16, requires_grad=True)
        weight_EOI = torch.empty(experts, outer, inner, requires_grad=True)
        out_MO = grouped_linear_triton(x_MI, weight_EOI, torch.full((experts,), rows))
        out_MO.backward(torch.empty_like(out_MO))


def grouped_cuts() -> None:
    """The same in every way that a benchmark tries."""
    from ziphius.kernels.triton.grouped import ROWS_CUTS, WEIGHTS_CUTS, rows_times, weight_gradient

    x_MI, dout_MO = (torch.empty(4096, width, dtype=torch.bfloat16) for width in (1024, 512))
    weight_EOI, counts_E = torch.empty(8, 512, 1024), torch.full((8,), 512)
    for cut in ROWS_CUTS:
        rows_times(x_MI, weight_EOI.bfloat16(), counts_E, turned=True, cut=cut)
        rows_times(dout_MO, weight_EOI.bfloat16(), counts_E, turned=False, cut=cut)
    for cut in WEIGHTS_CUTS:
        weight_gradient(dout_MO, x_MI, counts_E, weight_EOI, cut=cut)


CALLS: dict[str, Callable[[], None]] = {
    "adamw": adamw,
    "attention": attention,
    "e5m6": e5m6,
    "expand": expand,
    "grouped": grouped,
    "grouped_cuts": grouped_cuts,
    "latent": latent,
    "loss": loss,
    "norm": norm,
    "permute": permute,
    "quantize": quantize,
    "ragged_quantize": ragged_quantize,
    "ragged_rows": ragged_rows,
    "route": route,
    "swiglu": swiglu,
}


def main(names: list[str]) -> None:
    """Print what the compiler makes of the kernels of the named calls, or of all."""
    for name in names or CALLS:
        with launches_compiled() as reports:
            CALLS[name]()
        for report in reports:
            print(report)
            assert report.shared <= SHARED, "more shared memory than there is"


if __name__ == "__main__":
    main(sys.argv[1:])
