"""What ``benchmarks/kernels.py`` measures of ours, at toy sizes: it is what the reference says."""

from __future__ import annotations

import functools

import pytest
import torch
from support.gpu.check import check, wanted_of
from support.gpu.entry import Entry, Place
from support.gpu.registry import SECTIONS, entries

from tests.kernels.triton.conftest import ON_GPU

PLACE = Place(
    torch.device("cuda" if ON_GPU else "cpu"), torch.bfloat16 if ON_GPU else torch.float32
)
SEED = 3


@functools.cache
def every_entry() -> dict[str, Entry]:
    found = [entry for section in SECTIONS for entry in entries(section, PLACE, "toy")]
    return {f"{entry.section}: {entry.name}": entry for entry in found}


@pytest.mark.parametrize("name", list(every_entry()))
def test_ours_is_what_the_reference_says(name: str) -> None:
    entry = every_entry()[name]
    error = check(entry, entry.ours, PLACE, SEED, wanted_of(entry, PLACE, SEED))
    assert error <= entry.bound
