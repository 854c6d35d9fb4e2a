"""Kernels at the published sizes are compiled for a Hopper GPU, where there is none too."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

GROUPED = {"grouped_rows_kernel", "grouped_weights_kernel"}
MATRIX: dict[str, set[str]] = {
    "adamw": set(),
    "attention": {"forward_kernel", "dq_kernel", "dkdv_kernel"},
    "e5m6": set(),
    "expand": set(),
    "grouped": GROUPED,
    "grouped_cuts": GROUPED,
    "latent": {"attend_kernel"},
    "loss": set(),
    "norm": set(),
    "permute": set(),
    "quantize": set(),
    "ragged_quantize": set(),
    "ragged_rows": set(),
    "route": set(),
    "swiglu": set(),
}


@pytest.mark.parametrize("name", MATRIX)
def test_compiles_for_hopper(name: str) -> None:
    """They fit its memory, hold their numbers in registers, and multiply with its matrix units."""
    free = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.triton.compiled", name]
    told = subprocess.run(command, env=free, capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stderr
    lines = told.stdout.splitlines()
    assert lines
    for line in lines:
        assert ("wgmma" in line) == (line.split(":")[0] in MATRIX[name]), line
        assert "BYTES" not in line, line
        assert "LOST" not in line, line
        assert "APART" not in line, line
        spilled = int(line.split(" bytes spilled")[0].split()[-1])
        assert spilled <= 128, line
