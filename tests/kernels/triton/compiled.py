"""Compile for a Hopper GPU whatever a call launches, where there is no GPU.

``python -m tests.kernels.triton.compiled NAME...`` prints one line a kernel, of those that
``CALLS`` lists at the published sizes.
"""

from __future__ import annotations

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

HOPPER = GPUTarget("cuda", 90, 32)
SHARED = 227 * 1024  # bytes that a block may have there
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

    def __str__(self) -> str:
        return (
            f"{self.name}: {self.registers} registers, {self.spilled} bytes spilled, "
            f"{self.shared} bytes shared, {self.matrix or 'no matrix unit'}"
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
    signature, constants, attributes = {}, {}, {}
    for number, parameter in enumerate(function.params):
        value = values.get(parameter.name, parameter.default)
        kind = "constexpr" if parameter.is_constexpr else _type(value)
        signature[parameter.name] = kind
        if kind == "constexpr":
            constants[(number,)] = value
        elif kind != "fp32" and (not isinstance(value, int) or value % 16 == 0):
            attributes[(number,)] = [["tt.divisibility", 16]]
    source = ASTSource(function, signature, constants, attributes)
    kernel = triton.compile(source, target=HOPPER, options=launch)
    registers, spilled = _resources(kernel.asm["cubin"])
    ptx = kernel.asm["ptx"]
    matrix = "wgmma" if "wgmma.mma_async" in ptx else "mma" if "mma.sync" in ptx else ""
    return Report(kernel.metadata.name, registers, spilled, kernel.metadata.shared, matrix)


def _type(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return TYPES[value.dtype]
    if isinstance(value, float):
        return "fp32"
    if value is None or value == 1 or isinstance(value, bool):
        return "constexpr"
    return "i32" if abs(value) < 2**31 else "i64"


def _resources(cubin: bytes) -> tuple[int, int]:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        told = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", told)
    assert found, told
    return int(found[1]), int(found[2])


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
    from ziphius.kernels.triton.latent import TritonLatent

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


def e5m6() -> None:
    """What is kept of attention's output, of whole tiles and of ragged ones."""
    from ziphius.kernels.triton.e5m6 import TritonE5M6

    for width in (16384, 1000):
        q = TritonE5M6().encode(torch.empty(64, width, dtype=torch.bfloat16))
        TritonE5M6().decode(q, width, torch.bfloat16)


def loss() -> None:
    """Cross entropy over the published vocabulary, and over one whose rows are not aligned."""
    from ziphius.kernels.triton.loss import cross_entropy_rows_triton

    for V, dtype in ((129280, torch.bfloat16), (129280, torch.float32), (50257, torch.bfloat16)):
        logits_nV, targets_n = torch.empty(2, V, dtype=dtype), torch.zeros(2, dtype=torch.int64)
        cross_entropy_rows_triton(logits_nV, targets_n)


def route() -> None:
    """The router of the published model, forward and backward."""
    from ziphius.kernels.triton.route import route_triton

    logits_NE = torch.empty(4096, 256, requires_grad=True)
    rule = {"top_k": 8, "n_group": 8, "topk_group": 4, "normalise": True, "scale": 2.5}
    _, weights_NK, scores_NE = route_triton(logits_NE, torch.empty(256), **rule)
    (weights_NK.sum() + scores_NE.sum()).backward()


CALLS: dict[str, Callable[[], None]] = {
    "attention": attention,
    "e5m6": e5m6,
    "latent": latent,
    "loss": loss,
    "route": route,
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
