"""A training step on a GPU runs the kernels that were written for it."""

from __future__ import annotations

import pytest
import torch
from support.gpu.profile import missing, profile_step
from support.gpu.training import Job

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: make test-gpu"),
]
# Like `mini`, with fewer layers and experts, and rows enough for tall tiles.
SMALL = ("model.num_hidden_layers=2", "model.n_routed_experts=16", "model.vocab_size=4096")
SMALL += ("tokenizer.vocab_size=4096",)


def test_an_fp8_step_runs_every_kernel_meant_for_it() -> None:
    found = profile_step(Job("mini", SMALL, "cuda", 2, 1, 1024))
    assert list(missing(found)) == [], sorted(found)


def test_a_bf16_step_runs_the_experts_in_kernels_of_ours() -> None:
    found = profile_step(Job("mini", SMALL, "cuda", 2, 1, 1024), "bfloat16")
    for kernel in ("grouped_rows_kernel", "grouped_weights_kernel"):
        assert any(name.startswith(kernel) for name in found), sorted(found)
