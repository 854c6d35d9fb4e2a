"""Compile the products' kernels for Hopper without a GPU, as their callers launch them.

The interpreter runs no Gluon, and cannot say what fits in registers. Prints a JSON list: of every
kernel its name, grid, shared memory, stack, whether it multiplies FP8 in the tensor cores, and
whether every such instruction waits for the one before ("serial": of the four of a product, only
the last one ends a group).
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonJITFunction
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from ziphius.kernels.latent import LatentPages
from ziphius.kernels.quantize import Fp8
from ziphius.kernels.triton import gemm, grouped_gemm, latent, product
from ziphius.kernels.triton.product import Config

compiled: list[dict[str, Any]] = []


class NoDriver:
    """Says what machine is meant; nothing can be launched."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def compile_only(kernel: Any, grid: tuple[int, ...]) -> Any:
    def launch(*args: Any, **options: Any) -> None:
        binary = kernel.warmup(*args, grid=grid, **options)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(binary.asm["cubin"])
            file.flush()
            tool = triton.knobs.nvidia.cuobjdump.path
            used = subprocess.check_output([tool, "--dump-resource-usage", file.name], text=True)
            code = subprocess.check_output([tool, "-sass", file.name], text=True)
        products = re.findall(r"QGMMA.*", code)
        stack = re.search(r"STACK:(\d+)", used)
        compiled.append(
            {
                "name": kernel.fn.__name__,
                "grid": grid,
                "shared": binary.metadata.shared,
                "stack": int(stack[1]) if stack else None,
                "serial": 4 * sum("gsb0" in line for line in products) > len(products),
                "fp8": "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3" in binary.asm["ptx"],
            }
        )

    return launch


def operand(*shape: int, rows: int = 1) -> Fp8:
    *stack, R, C = shape
    codes = torch.zeros(shape, dtype=torch.float8_e4m3fn)
    return Fp8(codes, torch.ones(*stack, -(-R // rows), -(-C // 128)), rows)


def decode() -> None:
    """Attention over the latent cache: all heads of two queries, 64 of one, and parts in FP32."""
    latent.copyable = lambda *_: True
    for heads, queries, splits in ((16, 2, 1), (128, 1, 1), (16, 1, 2)):
        N = 4 * queries
        one_N, tables = torch.zeros(N, dtype=torch.int64), torch.zeros(4, 8, dtype=torch.int64)
        pages = torch.zeros(8, 64, 576, dtype=torch.bfloat16)
        cache = LatentPages(pages, one_N, tables, one_N, one_N)
        q_NHc = torch.zeros(N, heads, 576, dtype=torch.bfloat16)
        latent.even_splits = lambda *_, splits=splits: splits
        latent.TritonLatent().attend(q_NHc, 512, 0.1, cache)


def main() -> None:
    driver.set_active(NoDriver())
    for jit in (JITFunction, GluonJITFunction):
        jit.__getitem__ = compile_only
    torch.cuda.get_device_properties = lambda device: SimpleNamespace(multi_processor_count=132)
    for module in (gemm, grouped_gemm):
        module.available = lambda chosen, a, b: chosen
    a, b = operand(1024, 1536), operand(2112, 1536, rows=128)
    small = Config("plain", 64, 128, stages=4)
    large = [chosen for chosen in gemm.CANDIDATES if chosen.engine != "plain"]
    for chosen in (*large, small):
        assert product.copyable(a, b)
        gemm.gemm_triton(a, b, torch.bfloat16, config=chosen)
    # 4 rounds of 132 tiles and 16 tiles, as in the report's product.
    whole = operand(4096, 7168), operand(2112, 7168, rows=128)
    for dtype in (torch.bfloat16, torch.float32):
        gemm.gemm_triton(*whole, dtype, config=gemm.PAIRS)
    # Rows of a result that the copy engine cannot store.
    gemm.gemm_triton(a, operand(2117, 1536, rows=128), torch.bfloat16, config=gemm.PAIRS)
    counts = torch.tensor([600, 0, 424])
    experts = operand(3, 256, 1536, rows=128)
    for chosen in large:
        grouped_gemm.grouped_gemm_triton(a, experts, counts, torch.bfloat16, config=chosen)
    turned = operand(512, 1536), operand(256, 1536)
    for dtype in (torch.bfloat16, torch.float32):
        grouped_gemm.grouped_gemm_along_k_triton(*turned, counts, dtype, config=gemm.PAIRS)
        gemm.gemm_triton(*turned, dtype, config=gemm.PAIRS)
    decode()
    print(json.dumps(compiled))


if __name__ == "__main__":
    main()
