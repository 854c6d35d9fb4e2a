"""The same tests on a GPU and, under Triton's interpreter, on a processor.

The interpreter has its own BF16 and its own rounding (``kernels/triton/bits.py``), so there numbers
are stored in FP32; exact bits of BF16 are a matter for a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

ON_GPU = torch.cuda.is_available()


@pytest.fixture(autouse=True, scope="session")
def bounds_of_loops() -> Iterator[None]:
    """Let loops end at a kernel's argument: Triton 3.6 takes an array of one number for an integer,
    which numpy refuses from 2.4 on.
    """
    if ON_GPU:
        yield
        return
    from triton.runtime import interpreter

    patch_tensor = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang_tensor", patched)
        yield


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where kernels run; one for a session, as hypothesis wants of what examples share."""
    return torch.device("cuda" if ON_GPU else "cpu")


@pytest.fixture(scope="session")
def storage() -> torch.dtype:
    """How activations are stored."""
    return torch.bfloat16 if ON_GPU else torch.float32


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what runs on a GPU too, for ``make test-gpu``."""
    for item in items:
        if "tests/kernels/triton/" in item.nodeid:
            item.add_marker("gpu")
