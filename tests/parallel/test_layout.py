"""Who shares an axis with whom, by the definition and by its laws."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, reject
from hypothesis import strategies as st

from ziphius.config.errors import BadInput
from ziphius.parallel.layout import DENSE, Layout, Place
from ziphius.parallel.mesh import JOINED

sizes = st.integers(1, 3)


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    """Draw one of at most 54 ranks that works."""
    dense = {name: draw(sizes) for name in DENSE}
    dense[draw(st.sampled_from(DENSE))] = 1
    sharded = dense["dp_shard"] * dense["cp"]
    experts = draw(st.sampled_from([d for d in range(1, sharded + 1) if sharded % d == 0]))
    world = Layout(**dense).world
    node = draw(st.sampled_from([d for d in range(1, world + 1) if world % d == 0]))
    try:
        return Layout.fill(world, **dense, ep=experts, ranks_per_node=node)
    except BadInput:
        reject()


@given(layouts())
def test_every_axis_has_every_rank_once(layout: Layout) -> None:
    for axis in (*DENSE, *JOINED):
        ranks = [rank for group in layout.groups(axis) for rank in group]
        assert sorted(ranks) == list(range(layout.world))
        assert all(group == tuple(sorted(group)) for group in layout.groups(axis))
        if axis not in (
            "ends",
            "mirror_dp",
            "mirror_stage",
            "mirror_edp",
        ):  # a stage in the middle stands alone
            assert len({len(group) for group in layout.groups(axis)}) == 1


@given(layouts())
def test_sizes_and_crossings(layout: Layout) -> None:
    """Two axes that together span a third meet in one rank each."""
    expected: dict[str, int] = {name: getattr(layout, name) for name in DENSE}
    expected["world"] = layout.world
    expected["stage"] = layout.world // layout.pp
    expected["dp"] = layout.dp_replicate * layout.dp_shard * layout.cp
    expected["batch"] = layout.dp_replicate * layout.dp_shard
    expected["sequence"] = layout.cp * layout.tp
    expected["ep"] = layout.ep
    expected["edp"] = layout.world // layout.pp // layout.ep
    expected["shard"] = layout.dp_shard * layout.cp
    expected["expert_shard"] = expected["shard"] // layout.ep
    for axis, size in expected.items():
        assert {len(group) for group in layout.groups(axis)} == {size}, axis
    for rank in {0, layout.world // 2, layout.world - 1}:
        for first, second, whole in (
            ("ep", "edp", "stage"),
            ("ep_node", "ep_peers", "ep"),
            ("shard", "dp_replicate", "dp"),
            ("expert_shard", "ep", "shard"),
            ("cp", "tp", "sequence"),
            ("batch", "sequence", "stage"),
            ("dp", "tp", "stage"),
            ("pp", "stage", "world"),
        ):
            a, b = (set(layout.group_of(axis, rank)) for axis in (first, second))
            assert a & b == {rank}
            assert len(a) * len(b) == len(layout.group_of(whole, rank))


def test_the_report() -> None:
    """PP16 x EP64 on 2048 GPUs of eight a node (facts 5.1): 128 ranks a stage, two EP groups."""
    layout = Layout.fill(2048, pp=16, ep=64, ranks_per_node=8)
    assert layout.dp_shard == 128
    assert len(layout.group_of("dp", 5)) == 128
    assert layout.group_of("ep", 70) == tuple(range(64, 128))
    assert layout.group_of("ep_node", 70) == tuple(range(64, 72))
    assert layout.group_of("ep_peers", 70) == tuple(range(70, 128, 8))
    assert layout.group_of("edp", 70) == (6, 70)
    layout.check_groups(8)


def test_the_order_of_ranks() -> None:
    layout = Layout.fill(16, pp=2, dp_replicate=2, cp=2, tp=2)
    assert layout.place(0b1011) == Place(1, 0, 0, 1, 1)
    assert layout.group_of("tp", 10) == (10, 11)
    assert layout.group_of("pp", 3) == (3, 11)


@pytest.mark.parametrize(
    ("world", "asked", "message"),
    [
        (6, {"pp": 4}, "does not divide 6 processes: start 8"),
        (4, {"pp": 2, "dp_shard": 1}, "= 2, and there are 4 processes: start 2"),
        (4, {"pp": 0}, "pp = 0: use 1 or more"),
        (4, {"pp": -2, "dp_shard": -2}, "pp = -2: use 1 or more"),
        (4, {"dp_shard": 0}, "dp_shard = 0: use 1 or more"),
        (8, {"ep": 3}, "does not divide dp_shard . cp = 8: use 2"),
        (8, {"ep": 4, "ranks_per_node": 3}, "unevenly over nodes of 3"),
        (6, {"cp": 2, "tp": 3, "ep": 2, "ranks_per_node": 2}, "unevenly over nodes of 2"),
    ],
)
def test_what_cannot_work_says_what_would(world: int, asked: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        Layout.fill(world, **asked)


def test_routing_groups_lie_whole_on_nodes() -> None:
    layout = Layout.fill(6, ep=6, ranks_per_node=2)
    with pytest.raises(BadInput, match=r"spans 3 nodes, which model.n_group = 8"):
        layout.check_groups(8)
    layout.check_groups(6)
