"""Which version of each kernel a model runs: chosen once, at construction, and printable."""

from __future__ import annotations

import importlib
import importlib.util
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ziphius.config.errors import BadInput
from ziphius.config.table import nearest
from ziphius.kernels import (
    adamw,
    attention,
    choose,
    draw,
    e5m6,
    expand,
    gemm,
    grouped,
    grouped_gemm,
    latent,
    linear,
    loss,
    mixture,
    norm,
    permute,
    quantize,
    rows,
    swiglu,
    swiglu_fp8,
)
from ziphius.kernels.cpu.library import COMPILER, Library, build
from ziphius.kernels.fp8 import Arithmetic

COMPILED = "cpp"
TRITON = "triton"
_PRODUCTS = (torch.bfloat16, torch.float32)
# Processors differ by a factor of two either way; a busy machine should not turn the answer.
_MARGIN = 1.2
# Of every operation the table of versions, and the one that needs the library, if there is one.
OPERATIONS: Mapping[str, tuple[Mapping[str, Any], Any]] = {
    "choose": (choose.VERSIONS, choose.COMPILED),
    "attention": (attention.VERSIONS, attention.COMPILED),
    "grouped": (grouped.VERSIONS, grouped.COMPILED),
    "linear": (linear.VERSIONS, linear.COMPILED),
    "norm": (norm.VERSIONS, norm.COMPILED),
    "swiglu": (swiglu.VERSIONS, swiglu.COMPILED),
    "permute": (permute.VERSIONS, permute.COMPILED),
    "sort": (permute.SORT_VERSIONS, None),
    "unpermute": (permute.BACK_VERSIONS, permute.BACK_COMPILED),
    "expand": (expand.VERSIONS, expand.COMPILED),
    "loss": (loss.VERSIONS, loss.COMPILED),
    "adamw": (adamw.VERSIONS, adamw.COMPILED),
    "sigmoid": (choose.SIGMOID_VERSIONS, choose.SIGMOID_COMPILED),
    "gate": (choose.GATE_VERSIONS, choose.GATE_COMPILED),
    "route": (choose.ROUTE_VERSIONS, None),
    "mixture": (mixture.VERSIONS, mixture.COMPILED),
    "latent": (latent.VERSIONS, latent.COMPILED),
    "residual": (rows.RESIDUAL_VERSIONS, rows.RESIDUAL_COMPILED),
    "join": (rows.JOIN_VERSIONS, rows.JOIN_COMPILED),
    "widen": (rows.WIDEN_VERSIONS, rows.WIDEN_COMPILED),
    "draw": (draw.VERSIONS, draw.COMPILED),
    "quantize": (quantize.VERSIONS, quantize.COMPILED),
    "gemm": (gemm.VERSIONS, gemm.COMPILED),
    "grouped_gemm": (grouped_gemm.VERSIONS, grouped_gemm.COMPILED),
    "masked_gemm": (grouped_gemm.MASKED_VERSIONS, None),
    "along_k": (grouped_gemm.ALONG_K_VERSIONS, grouped_gemm.ALONG_K_COMPILED),
    "swiglu_fp8": (swiglu_fp8.VERSIONS, swiglu_fp8.COMPILED),
    "e5m6": (e5m6.VERSIONS, e5m6.COMPILED),
    "permute_tiles": (permute.TILES_VERSIONS, permute.TILES_COMPILED),
    "norm_tiles": (norm.TILES_VERSIONS, None),
}
# The module below kernels/triton, and what it has for the operation: imported where it is chosen.
ON_GPUS: Mapping[str, tuple[str, str]] = {
    "attention": ("attention", "causal_attention_triton"),
    "adamw": ("adamw", "adamw_step_triton"),
    "expand": ("expand", "expand_heads_triton"),
    "grouped": ("grouped", "grouped_linear_triton"),
    "linear": ("linear", "linear_triton"),
    "latent": ("latent", "TritonLatent"),
    "norm": ("norm", "rms_norm_triton"),
    "permute": ("permute", "permute_triton"),
    "unpermute": ("permute", "unpermute_triton"),
    "loss": ("loss", "cross_entropy_rows_triton"),
    "quantize": ("quantize", "TritonQuantize"),
    "gemm": ("gemm", "gemm_triton"),
    "grouped_gemm": ("grouped_gemm", "grouped_gemm_triton"),
    "masked_gemm": ("grouped_gemm", "masked_gemm_triton"),
    "along_k": ("grouped_gemm", "grouped_gemm_along_k_triton"),
    "swiglu_fp8": ("swiglu_fp8", "TritonSwigluFp8"),
    "e5m6": ("e5m6", "TritonE5M6"),
    "permute_tiles": ("permute", "permute_tiles_triton"),
    "norm_tiles": ("norm_operand", "norm_operand_triton"),
    "route": ("route", "route_triton"),
    "sort": ("permute", "sort_by_slot_triton"),
}
# Those of them whose programs stay on their multiprocessors to the end.
STAYING = frozenset({"gemm", "grouped_gemm", "masked_gemm", "along_k"})
# Those of them that a step of the engine runs.
ANSWER_ON_GPUS = (
    "latent", "linear", "norm", "norm_tiles", "permute", "unpermute", "permute_tiles", "quantize",
    "gemm", "grouped_gemm", "masked_gemm", "swiglu_fp8", "route", "sort",
)  # fmt: skip
# Their compiled versions have no backward.
ANSWERING = frozenset(
    {"linear", "sigmoid", "gate", "mixture", "latent", "residual", "join", "widen", "draw"}
)


@dataclass(frozen=True)
class Kernels:
    """The chosen version of every operation that has more than one.

    The version ``cpp`` is that of ``library``, for tensors on a processor. Large products are
    torch's in every version. ``linear=widened`` is about all of them: those of linear layers, of
    experts and of the loss. ``spared`` multiprocessors of a GPU are left to communication by
    kernels that would take all of them.
    """

    choose: str = "torch"
    attention: str = "sdpa"
    grouped: str = "loop"
    linear: str = "native"
    norm: str = "torch"
    swiglu: str = "torch"
    permute: str = "torch"
    unpermute: str = "torch"
    sort: str = "torch"
    expand: str = "torch"
    loss: str = "torch"
    adamw: str = "torch"
    sigmoid: str = "torch"
    gate: str = "torch"
    route: str = "torch"
    mixture: str = "stages"
    latent: str = "torch"
    residual: str = "torch"
    join: str = "torch"
    widen: str = "torch"
    draw: str = "torch"
    quantize: str = "torch"
    gemm: str = "reference"
    grouped_gemm: str = "reference"
    masked_gemm: str = "reference"
    along_k: str = "reference"
    swiglu_fp8: str = "torch"
    e5m6: str = "torch"
    permute_tiles: str = "torch"
    norm_tiles: str = "two_steps"
    library: Library | None = None
    spared: int = 0

    def __post_init__(self) -> None:
        for op, (versions, compiled) in OPERATIONS.items():
            name = getattr(self, op)
            if name == TRITON and op in ON_GPUS:
                if not has_triton():
                    raise BadInput(f"kernel {op}: '{TRITON}' needs the package triton")
            elif name == COMPILED and compiled is not None:
                if self.library is None:
                    raise BadInput(f"kernel {op}: '{COMPILED}' needs the compiled library")
            elif name not in versions:
                names = [*versions, *([COMPILED] if compiled else [])]
                names += [TRITON] if op in ON_GPUS else []
                raise BadInput(f"kernel {op}: no version '{name}'{nearest(name, names)}")

    def function(self, op: str) -> Any:
        """Return the chosen version of an operation."""
        name, (versions, compiled) = getattr(self, op), OPERATIONS[op]
        if name == TRITON:
            module, function = ON_GPUS[op]
            found = getattr(importlib.import_module(f"ziphius.kernels.triton.{module}"), function)
            return partial(found, spared=self.spared) if self.spared and op in STAYING else found
        return partial(compiled, self.library) if name == COMPILED else versions[name]

    def fp8(self, power_of_two: bool = False) -> Arithmetic:
        """Return the chosen versions of what FP8 layers are made of."""
        return Arithmetic(
            quantize=self.function("quantize")(),
            gemm=self.function("gemm"),
            grouped=self.function("grouped_gemm"),
            masked=self.function("masked_gemm"),
            along_k=self.function("along_k"),
            swiglu=self.function("swiglu_fp8")(),
            e5m6=self.function("e5m6")(),
            power_of_two=power_of_two,
        )

    def product_dtype(self, compute: torch.dtype) -> torch.dtype:
        """Return the dtype that experts and the loss multiply in."""
        widened = self.linear == "widened" and compute == torch.bfloat16
        return torch.float32 if widened else compute

    def __str__(self) -> str:
        chosen = (f.name for f in fields(self) if f.name in OPERATIONS)
        named = " ".join(f"{op}={getattr(self, op)}" for op in chosen)
        return f"{named} spared={self.spared}" if self.spared else named


def compiled_kernels(folder: Path, products: str = "native") -> Kernels:
    """Choose the compiled version of everything that has one; ``folder`` keeps the library.

    ``products`` is the version of ``linear``. Raises BadInput where there is no compiler.
    """
    return Kernels(**_compiled_but(ANSWERING), linear=products, library=build(folder))


def triton_kernels(spared: int = 0) -> Kernels:
    """Choose the kernels for GPUs wherever there is one. Raises BadInput without Triton."""
    chosen: dict[str, Any] = dict.fromkeys(ON_GPUS.keys() - ANSWERING, TRITON)
    return Kernels(**chosen, spared=spared)


def gpu_answering_kernels() -> Kernels:
    """Choose the versions that answer on a GPU: no step waits for what the GPU has counted.

    Raises BadInput without Triton.
    """
    chosen: dict[str, Any] = dict.fromkeys(ANSWER_ON_GPUS, TRITON)
    return Kernels(grouped="grouped_mm", mixture="stages", **chosen)


def answering_kernels(folder: Path | None) -> Kernels:
    """Choose the versions that answer: compiled ones if there is a folder to keep them, or torch's.

    With the compiled ones no token's numbers depend on what else is in the batch. torch's have this
    property for batches of one size only.
    """
    if folder is None:
        return Kernels(mixture="reference")
    return Kernels(**_compiled_but(frozenset()), library=build(folder))


def fast_kernels(folder: Path | None) -> Kernels:
    """Choose what is fastest, whatever its sums depend on.

    Compiled versions are, exact as they are; torch's own are all there is without ``folder``.
    """
    return Kernels() if folder is None else answering_kernels(folder)


def torch_products(folder: Path) -> Kernels:
    """Choose torch's products with compiled passes beside: what exact mode is compared with."""
    return Kernels(**_compiled_but(frozenset({"linear", "mixture"})), library=build(folder))


def _compiled_but(left: frozenset[str]) -> dict[str, Any]:
    compiled = (op for op, (_, function) in OPERATIONS.items() if function is not None)
    return {op: COMPILED for op in compiled if op not in left}


def has_compiler() -> bool:
    """Say whether kernels can be compiled here."""
    return shutil.which(COMPILER) is not None


def has_triton() -> bool:
    """Say whether kernels for GPUs can be compiled here."""
    return importlib.util.find_spec(TRITON) is not None


def require_interpreter() -> None:
    """Raise BadInput where processors are to run kernels for GPUs, but under the interpreter."""
    if not has_triton():
        raise BadInput(f"kernels = '{TRITON}': the package triton is not installed")
    from ziphius.kernels.triton import bits

    if not bits.interpreted():
        raise BadInput(
            f"kernels = '{TRITON}': processors run them under Triton's interpreter alone, very "
            "slowly: name a GPU as the device (cuda), or set TRITON_INTERPRET=1"
        )


def widening_pays(size: int = 512, rounds: int = 12) -> bool:
    """Measure whether a product in FP32 is faster here than one in BF16, each at its best.

    Processors differ by a factor of two either way. One thread measures, because several wait for
    each other on a busy machine, which turned the answer. For a run that is about to begin: what it
    decides should be written down with the run.
    """
    operands = {dtype: torch.randn(2, size, size).to(dtype) for dtype in _PRODUCTS}
    best = dict.fromkeys(_PRODUCTS, float("inf"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _ in range(rounds):
            for dtype, (a, b) in operands.items():
                began = time.perf_counter()
                torch.mm(a, b)
                best[dtype] = min(best[dtype], time.perf_counter() - began)
    finally:
        torch.set_num_threads(threads)
    return best[torch.float32] * _MARGIN < best[torch.bfloat16]
