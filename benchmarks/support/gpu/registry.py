"""Every entry of ``kernels.py``, by section, at the report's sizes, at a processor's, and tiny."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

from support.gpu import attention, experts, moves, passes, products, rows, steps, weights
from support.gpu.entry import Entry, Place

Size = Literal["full", "small", "toy"]
Make = Callable[[Place, Any], list[Entry]]

# The first are the most important: a budget that ends early leaves the last sections out.
SECTIONS: Mapping[str, tuple[Make, Any]] = {
    "gemm": (products.dense, products),
    "decode": (attention.decode, attention),
    "quantize": (rows.quantisers, rows),
    "grouped": (products.grouped, products),
    "experts": (experts.experts, experts),
    "permute": (moves.moves, moves),
    "swiglu": (passes.activations, passes),
    "norm": (passes.norms, passes),
    "expand": (steps.heads, steps),
    "adamw": (steps.updates, steps),
    "prefill": (attention.prefill, attention),
    "router": (moves.routers, moves),
    "loss": (moves.losses, moves),
    "weights": (weights.weight_only, weights),
}


def entries(section: str, place: Place, size: Size) -> list[Entry]:
    """Return a section's entries."""
    make, module = SECTIONS[section]
    return make(place, getattr(module, size.upper()))
