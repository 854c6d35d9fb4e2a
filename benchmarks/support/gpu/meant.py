"""The kernels for GPUs by the path that is meant to call them. A test finds who is on no list."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

# Of an FP8 training step: the operation, and the functions that a profile names.
STEP: Mapping[str, Sequence[str]] = {
    "attention": ("forward_kernel", "delta_kernel", "dq_kernel", "dkdv_kernel"),
}
