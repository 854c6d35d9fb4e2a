"""Who answers for which weight."""

from __future__ import annotations

import pytest
import torch

from tests.parallel.pool import Pool
from ziphius.config.errors import ZiphiusError
from ziphius.model.weights import Split
from ziphius.parallel.agree import gather_json, share_json
from ziphius.parallel.layout import Layout
from ziphius.parallel.mesh import SAVING, make_mesh
from ziphius.parallel.owners import Owners, owned

# By rank: what it holds, and which part of a whole one that is.
Held = dict[str, tuple[tuple[int, ...], Split | None]]
WHOLE: Held = {f"w{n}": ((10, 3), None) for n in range(9)}
ROWS: list[Held] = [
    {**WHOLE, "cut": ((4, 6), Split(0, 0, 4, 7))},
    {**WHOLE, "cut": ((3, 6), Split(0, 4, 3, 7))},
    {**WHOLE, "cut": ((4, 6), Split(0, 0, 4, 7)), "mine": ((8,), None)},
]


def agreed(held: list[Held]) -> tuple[Owners, list[str]]:
    mesh = make_mesh(Layout.fill(len(held)))
    own = held[mesh.rank]
    weights = [(name, torch.empty(shape)) for name, (shape, _) in own.items()]
    owners = Owners.agree(
        [*weights, *weights[:1]], mesh[SAVING], {n: s for n, (_, s) in own.items()}.get
    )
    owners.split_of = None  # type: ignore[assignment]  # does not travel
    return owners, [name for name, _ in owned(owners, [*weights, *weights[:1]])]


def test_everything_has_one_owner_and_all_have_about_as_much(pool: Pool) -> None:
    (owners, first), *others = pool.run(3, agreed, ROWS)
    assert all(o.entries == owners.entries for o, _ in others)
    counted = sorted([*first, *(name for _, own in others for name in own)])
    assert counted == sorted([*WHOLE, "cut", "cut", "mine"])
    cut = owners.entries["cut"]
    assert [(p.start, p.size, p.holders) for p in cut.pieces] == [(0, 4, (0, 2)), (4, 3, (1,))]
    assert cut.writer in {p.owner for p in cut.pieces}
    sizes = [0, 0, 0]
    for entry in owners.entries.values():
        for piece in entry.pieces:
            assert piece.owner in piece.holders
            sizes[piece.owner] += piece.size
    assert max(sizes) - min(sizes) <= 10


def refused(held: list[Held]) -> str:
    with pytest.raises(ZiphiusError) as error:
        agreed(held)
    return str(error.value)


@pytest.mark.parametrize(
    "other",
    [
        ((3, 6), Split(0, 3, 3, 7)),
        ((2, 6), Split(0, 4, 2, 7)),
        ((3, 5), Split(0, 4, 3, 7)),
        ((7, 6), None),
    ],
    ids=["overlap", "a gap", "another width", "whole elsewhere"],
)
def test_pieces_that_make_no_whole_are_refused(
    other: tuple[tuple[int, ...], Split | None], pool: Pool
) -> None:
    for said in pool.run(2, refused, [ROWS[0], {**WHOLE, "cut": other}]):
        assert said.startswith("cut: ranks hold")


def told() -> tuple[list[object], object]:
    axis = make_mesh(Layout.fill(3))[SAVING]
    values: list[object] = [None, {"a": [1.5, "ü"]}, "x" * 1000]
    return gather_json(axis, values[axis.place]), share_json(axis, values[axis.place], 1)


def test_values_of_json_are_told(pool: Pool) -> None:
    for gathered, shared in pool.run(3, told):
        assert gathered == [None, {"a": [1.5, "ü"]}, "x" * 1000]
        assert shared == {"a": [1.5, "ü"]}


def brought(held: list[Held]) -> set[int]:
    mesh = make_mesh(Layout.fill(len(held)))
    own = held[mesh.rank]
    weights = [(name, torch.full(shape, -1.0)) for name, (shape, _) in own.items()]
    owners = Owners.agree(weights, mesh[SAVING], {n: s for n, (_, s) in own.items()}.get)
    averages = {n: torch.full_like(w, mesh.rank) for n, w in owned(owners, weights)}
    owners.bring(averages, weights, mesh["world"])
    assert all((w == owners.piece(n).owner).all() for n, w in weights)
    return {owners.piece(name).owner for name, _ in weights}


def test_all_get_what_the_owner_has(pool: Pool) -> None:
    assert all(len(owners) > 1 for owners in pool.run(3, brought, ROWS))
