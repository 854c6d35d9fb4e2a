"""Entries of ``benchmarks/kernels.py`` at toy sizes: what is wrong is seen. Ours are tested beside
the kernels."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.gpu.check import Poison, Wrong, check, wanted_of
from support.gpu.clock import count_bytes
from support.gpu.entry import Entry, Place, Version
from support.gpu.registry import SECTIONS, entries
from torch import Tensor

PLACE = Place(torch.device("cpu"), torch.float32)
SEED = 3


@functools.cache
def every_entry() -> dict[str, Entry]:
    found = [entry for section in SECTIONS for entry in entries(section, PLACE, "toy")]
    return {f"{entry.section}: {entry.name}": entry for entry in found}


@pytest.fixture(params=list(every_entry()))
def entry(request: pytest.FixtureRequest) -> Entry:
    return every_entry()[request.param]


def test_the_plain_version_and_the_peers_are_what_the_reference_says(entry: Entry) -> None:
    wanted = wanted_of(entry, PLACE, SEED)
    for version in (entry.plain, *(peer for peer in entry.peers if not peer.slow)):
        check(entry, version, PLACE, SEED, wanted)


def spoiled(entry: Entry, spoil: Callable[[Sequence[Tensor]], Sequence[Tensor]]) -> Entry:
    """Return the entry with what is compared changed after its plain version has run."""

    def answer(inputs: Any, result: Any) -> Sequence[Tensor]:
        return spoil([t.clone() for t in entry.answer(inputs, result)])

    return replace(entry, answer=answer)


def with_nan(found: Sequence[Tensor]) -> Sequence[Tensor]:
    """One number of the last result is missing."""
    last = found[-1].double()
    last.view(-1)[-1] = torch.nan
    return [*found[:-1], last]


def twice(found: Sequence[Tensor]) -> Sequence[Tensor]:
    return [*found[:-1], found[-1].double() * 2 + 1]


def turned_round(found: Sequence[Tensor]) -> Sequence[Tensor]:
    """Every number is there, in another place."""
    return [x.reshape(-1).roll(1).view(x.shape) if x.numel() > 1 else x + 1 for x in found]


@pytest.mark.parametrize("spoil", [with_nan, twice, turned_round, lambda found: found[:-1]])
def test_what_is_wrong_is_seen(
    entry: Entry, spoil: Callable[[Sequence[Tensor]], Sequence[Tensor]]
) -> None:
    wanted = wanted_of(entry, PLACE, SEED)
    with pytest.raises(Wrong):
        check(spoiled(entry, spoil), entry.plain, PLACE, SEED, wanted)


def test_equal_seeds_make_equal_inputs_and_others_do_not(entry: Entry) -> None:
    first, again, other = (
        entry.answer(inputs, entry.plain.run(inputs))
        for inputs in (entry.make(PLACE.generator(seed)) for seed in (1, 1, 2))
    )
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_the_floor_counts_what_is_read_and_written(entry: Entry) -> None:
    """Unused room and the inputs of peers are not; what changes in place is counted twice."""
    inputs = entry.make(PLACE.generator(SEED))
    moved = count_bytes(inputs) + count_bytes(entry.plain.run(inputs))
    assert moved / 4 < entry.nbytes < 2 * moved


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float8_e4m3fn])
def test_memory_that_is_not_written_is_nan(dtype: torch.dtype) -> None:
    x = torch.ones(2, 3, device=PLACE.device).to(dtype)
    with Poison():
        taken = [
            torch.empty(4, 5, dtype=dtype, device=PLACE.device),
            torch.empty_like(x),
            x.new_empty(3, 2),
            torch.empty_strided((2, 3), (1, 2), dtype=dtype, device=PLACE.device),
            torch.empty((), dtype=dtype, device=PLACE.device),
        ]
        written = torch.zeros(3, dtype=torch.float32, device=PLACE.device)
    assert all(t.float().isnan().all() for t in taken)
    assert not written.any()


def test_a_version_that_leaves_something_unwritten_is_refused() -> None:
    entry = every_entry()["quantize: tiles 37 x 200"]

    def careless(x: Tensor) -> Any:
        codes, scales, _ = entry.plain.run(x)
        out = torch.empty_like(scales)
        out[:-1] = scales[:-1]
        return codes, out

    version = Version("careless", careless)
    with pytest.raises(Wrong, match="result 1"):
        check(entry, version, PLACE, SEED, wanted_of(entry, PLACE, SEED))
