"""The same tests on a GPU and, under Triton's interpreter, on a processor.

The interpreter has its own BF16 and its own rounding (``kernels/triton/bits.py``), so there numbers
are stored in FP32; exact bits of BF16 are a matter for a GPU.
"""

from __future__ import annotations

import os

import pytest
import torch

ON_GPU = torch.cuda.is_available()
if not ON_GPU:
    # Triton reads it when a kernel is decorated, so it is set before any is imported.
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture
def device() -> torch.device:
    """Where kernels run."""
    return torch.device("cuda" if ON_GPU else "cpu")


@pytest.fixture
def storage() -> torch.dtype:
    """How activations are stored."""
    return torch.bfloat16 if ON_GPU else torch.float32


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what runs on a GPU too, for ``make test-gpu``."""
    for item in items:
        if "tests/kernels/triton/" in item.nodeid:
            item.add_marker("gpu")
