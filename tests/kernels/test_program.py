"""Calls of kernels that are repeated: the same numbers, and nothing left out without a word."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from ziphius.kernels.cpu.library import Library
from ziphius.kernels.cpu.program import Program, Unrepeatable
from ziphius.kernels.mixture import Expert, Experts, mixture_compiled
from ziphius.kernels.norm import rms_norm_compiled
from ziphius.kernels.project import project_compiled, project_heads_compiled
from ziphius.kernels.rows import join_compiled, residual_compiled, widen_compiled


def test_it_computes_from_what_its_inputs_hold_by_then(library: Library) -> None:
    torch.manual_seed(0)
    x_ND, weight_DD, gain_D = torch.randn(3, 32), torch.randn(32, 32), torch.rand(32)

    def run() -> torch.Tensor:
        y_ND = project_compiled(library, rms_norm_compiled(library, x_ND, gain_D, 1e-6), weight_DD)
        return residual_compiled(library, x_ND, y_ND)[1:].unsqueeze(0)

    program = Program(library, run)
    with torch.no_grad():
        first = program.result.clone()
        assert torch.equal(first, run())
        x_ND.normal_()
        assert torch.equal(program.repeat(), run())
        assert not torch.equal(program.result, first)
    assert len(program) == 3
    assert program.nbytes > 0


@pytest.mark.parametrize(
    "foreign",
    [
        lambda x: x + 1,
        lambda x: x.to(torch.float64),
        lambda x: x.T.contiguous(),
        lambda x: x.new_zeros(3),
        lambda x: x[x > 0],
        lambda x: x[: int(x[0, 0])],
        lambda x: x.clone(),
        lambda x: x.view(-1).copy_(x.view(-1)),
    ],
    ids=["sum", "cast", "copy", "zeros", "mask", "number", "clone", "write"],
)
def test_what_no_kernel_computes_is_refused(library: Library, foreign: object) -> None:
    x_ND = torch.rand(2, 3)
    with pytest.raises(Unrepeatable, match="is no kernel of the library"):
        Program(library, lambda: residual_compiled(library, foreign(x_ND), x_ND))  # type: ignore[operator]


def test_kernels_for_training_are_not_repeated(library: Library) -> None:
    x_MD = torch.randn(4, 8)

    def run() -> torch.Tensor:
        out = torch.empty_like(x_MD)
        library.call(
            "swiglu_backward", x_MD.dtype, *[x_MD] * 2, 8, None, x_MD, out, out, 8, None, 4, 8
        )
        return out

    with pytest.raises(Unrepeatable, match="swiglu_backward is no kernel that can be called again"):
        Program(library, run)


def test_other_threads_are_not_recorded(library: Library) -> None:
    x_ND = torch.randn(2, 4)
    with library.recording() as calls:
        thread = threading.Thread(target=lambda: residual_compiled(library, x_ND, x_ND))
        thread.start()
        thread.join(60)
        assert not calls
        residual_compiled(library, x_ND, x_ND)
        assert len(calls) == 1
    residual_compiled(library, x_ND, x_ND)
    assert len(calls) == 1, "and nothing behind the end"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1, 5), (3, 16), (2, 7, 33), (300, 256)])
def test_passes_over_rows_are_torchs(
    library: Library, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    torch.manual_seed(1)
    x, y = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    assert torch.equal(residual_compiled(library, x, y), x + y)
    assert torch.equal(join_compiled(library, x, y), torch.cat((x, y), -1))
    high = torch.promote_types(dtype, torch.float32)
    assert torch.equal(widen_compiled(library, x, high), x.to(high))


def test_gradients_are_refused(library: Library) -> None:
    x = torch.randn(2, 2, requires_grad=True)
    for compute in (residual_compiled, join_compiled):
        with pytest.raises(RuntimeError, match="no backward"):
            compute(library, x, x)


def test_torchs_compiler_is_not_loaded_for_it(kernel_folder: Path) -> None:
    """It takes longer than loading a model, and more memory than some have."""
    code = """
import sys, torch
from pathlib import Path
from ziphius.kernels.cpu.library import build
from ziphius.kernels.cpu.program import Program
from ziphius.kernels.rows import residual_compiled
x, library = torch.ones(2), build(Path(sys.argv[1]))
program = Program(library, lambda: residual_compiled(library, x, x))
print(len(program), "torch._dynamo" in sys.modules)
"""
    command = [sys.executable, "-c", code, str(kernel_folder)]
    said = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True).stdout
    assert said.split() == ["1", "False"]


@pytest.mark.parametrize("kind", ["plain", "heads", "experts"])
def test_weights_outlive_their_owner(library: Library, kind: str) -> None:
    """A program holds addresses: another engine may give the model new weights meanwhile."""
    x_ND, owner = torch.randn(2, 32), [torch.randn(2, 32, 32)]
    chosen_NK, gates_NK = torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1)
    out_NHD = torch.empty(2, 2, 32)

    def run() -> torch.Tensor:
        weights = owner[0]
        if kind == "plain":
            return project_compiled(library, x_ND, weights[0])
        if kind == "heads":
            x_NHD = x_ND.unsqueeze(1).expand(-1, 2, -1)
            project_heads_compiled(library, x_NHD, weights, out_NHD)
            return out_NHD
        experts = Experts([Expert(weights[0], weights[1], weights[0])], [])
        return mixture_compiled(library, x_ND, chosen_NK, gates_NK, experts)

    program = Program(library, run)
    expected, memory = program.result.clone(), owner[0].untyped_storage()._weak_ref()
    owner.clear()
    gc.collect()
    assert not torch.UntypedStorage._expired(memory)
    assert torch.equal(program.repeat(), expected)
