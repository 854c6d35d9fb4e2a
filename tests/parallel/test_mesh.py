"""Groups between real processes: what each collective gives, counts, and says when it fails."""

from __future__ import annotations

import math
import threading
import time
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.parallel.pool import Pool
from ziphius.config.errors import BadInput
from ziphius.parallel.collectives import Lost, Traffic
from ziphius.parallel.layout import DENSE, Layout
from ziphius.parallel.mesh import JOINED, device_mesh, make_mesh


def members(**asked: int) -> dict[str, list[int]]:
    mesh = make_mesh(Layout.fill(torch.distributed.get_world_size(), **asked))
    found = {}
    for name in (*DENSE, *JOINED):
        own = torch.tensor([mesh.rank])
        found[name] = mesh[name].all_gather(own).tolist()
    return found


@pytest.mark.parametrize(
    ("world", "asked"),
    [
        (4, {"pp": 2, "tp": 2}),
        (4, {"ep": 4, "ranks_per_node": 2}),
        (4, {"cp": 2}),
        (3, {"pp": 3}),  # the rank in the middle is alone on some axes
    ],
)
def test_axes_are_those_of_the_layout(pool: Pool, world: int, asked: dict[str, int]) -> None:
    layout = Layout.fill(world, **asked)
    for rank, found in enumerate(pool.run(world, _members, asked)):
        for name, ranks in found.items():
            assert tuple(ranks) == layout.group_of(name, rank), name


def _members(asked: dict[str, int]) -> dict[str, list[int]]:
    return members(**asked)


def groups_made(layout: Layout, rank: int) -> list[tuple[int, ...]]:
    """Return the ranks of every group that a rank makes, in its order."""
    made = []

    def new_group(ranks: list[int], **how: Any) -> object:
        assert how["use_local_synchronization"], "others would have to come"
        made.append(tuple(ranks))
        return object()

    with pytest.MonkeyPatch.context() as patch:
        for name, answer in (("is_initialized", True), ("get_rank", rank)):
            patch.setattr(torch.distributed, name, lambda answer=answer: answer)
        patch.setattr(torch.distributed, "get_world_size", lambda: layout.world)
        patch.setattr(torch.distributed, "new_group", new_group)
        make_mesh(layout)
    return made


@settings(max_examples=40, deadline=None)
@given(
    pp=st.integers(1, 4), dp_replicate=st.integers(1, 2), dp_shard=st.integers(1, 4),
    cp=st.integers(1, 2), tp=st.integers(1, 2), part=st.integers(1, 8), node=st.integers(1, 4),
)  # fmt: skip
def test_a_rank_makes_its_own_groups_at_the_same_time_as_their_others(
    part: int, node: int, **sizes: int
) -> None:
    """torch counts the groups of a process to name the next: members must have made as many."""
    world, sharded = math.prod(sizes.values()), sizes["dp_shard"] * sizes["cp"]
    try:
        layout = Layout.fill(world, **sizes, ep=math.gcd(part, sharded), ranks_per_node=node)
    except BadInput:
        layout = Layout.fill(world, **sizes)
    made = [groups_made(layout, rank) for rank in range(world)]
    for rank, groups in enumerate(made):
        for number, ranks in enumerate(groups):
            assert rank in ranks
            assert all(made[other][number] == ranks for other in ranks)


def test_groups_of_two_thousand_ranks() -> None:
    layout = Layout.fill(2048, pp=16, ep=64, ranks_per_node=8)
    made = groups_made(layout, 70)
    everyone = {ranks for name in (*DENSE, *JOINED) for ranks in layout.groups(name)}
    assert len(made) == 14
    assert len([ranks for ranks in everyone if len(ranks) > 1]) > 2000


def directions() -> list[tuple[str, str]]:
    """Send to the neighbour of either side, and return which group every message went over."""
    mesh = make_mesh(Layout.fill(3, pp=3))
    axis, dist = mesh["pp"], torch.distributed
    assert axis.ways is not None
    assert axis.ways.later is not axis.ways.earlier
    assert not {id(g) for g in axis.ways} & {id(a.group) for a in mesh.axes.values()}
    used: list[tuple[str, str]] = []
    plain = {name: getattr(dist, name) for name in ("isend", "irecv")}
    with pytest.MonkeyPatch.context() as patch:
        for name in plain:

            def watched(x: Any, other: int, group: Any, tag: int, name: str = name) -> Any:
                way = {id(g): n for n, g in axis.ways._asdict().items()}.get(id(group), "axis")
                used.append((f"{name} {other}", way))
                return plain[name](x, other, group, tag)

            patch.setattr(dist, name, watched)
        others = [place for place in range(3) if place != axis.place]
        sent = [axis.start_send(torch.tensor([axis.place]), p, what="one") for p in others]
        for place in others:
            got = axis.start_receive(torch.zeros(1, dtype=torch.int64), place, what="one").wait()
            assert got.tolist() == [place]
        for pending in sent:
            pending.wait()
    return used


def test_messages_of_a_pipeline_go_over_a_group_for_each_direction(pool: Pool) -> None:
    first, middle, last = pool.run(3, directions)
    assert {way for name, way in first if "isend" in name} == {"later"}
    assert {way for name, way in first if "irecv" in name} == {"earlier"}
    assert dict(middle) == {
        "isend 0": "earlier", "isend 2": "later", "irecv 0": "later", "irecv 2": "earlier"
    }  # fmt: skip
    assert {way for name, way in last if "isend" in name} == {"earlier"}
    assert {way for name, way in last if "irecv" in name} == {"later"}


def as_torch_has_it(asked: dict[str, int]) -> list[tuple[Any, Any]]:
    mesh = make_mesh(Layout.fill(4, **asked))
    found = []
    for axis in ("shard", "expert_shard"):
        made = device_mesh(mesh, axis)
        own = [
            torch.distributed.get_process_group_ranks(made.get_group(n)) for n in range(made.ndim)
        ]
        assert made.get_coordinate()[-1] == mesh[axis].place
        assert own[-1] == list(mesh[axis].ranks)
        found.append((made.mesh_dim_names, made.mesh.tolist()))
    return found


@pytest.mark.parametrize(
    ("asked", "shard", "experts"),
    [
        ({"ep": 2}, [0, 1, 2, 3], [[0, 2], [1, 3]]),
        ({"dp_replicate": 2}, [[0, 1], [2, 3]], [[[0, 1], [2, 3]]]),
        ({"dp_replicate": 2, "ep": 2}, [[0, 1], [2, 3]], [[[0], [2]], [[1], [3]]]),
        ({"dp_replicate": 2, "tp": 2}, None, None),
    ],
)
def test_meshes_for_fsdp(pool: Pool, asked: dict[str, int], shard: Any, experts: Any) -> None:
    for rank, ((names, dense), (_, stacks)) in enumerate(pool.run(4, as_torch_has_it, asked)):
        assert names == (("dp_replicate", "shard") if "dp_replicate" in asked else ("shard",))
        if shard is None:
            assert dense == stacks == [[rank % 2], [2 + rank % 2]]
        else:
            assert dense == shard
            assert stacks == experts[rank % len(experts)]


def collect() -> dict[str, Any]:
    mesh = make_mesh(Layout.fill(2))
    axis, rank = mesh["dp"], mesh.rank
    x = torch.arange(4.0) + 10 * rank
    found: dict[str, Any] = {
        "sum": axis.all_reduce(x.clone()).tolist(),
        "gathered": axis.all_gather(x[:1]).tolist(),
        "scattered": axis.reduce_scatter(x).tolist(),
        "broadcast": axis.broadcast(x.clone(), 1).tolist(),
    }
    codes = torch.tensor([1.0, 2.0, 3.0])[:, None].to(torch.float8_e4m3fn)
    sent, received = ([1, 2], [1, 3]) if rank == 0 else ([3, 0], [2, 0])
    arrived = axis.all_to_all(codes, sent, received)
    assert arrived.dtype == torch.float8_e4m3fn
    found["exchanged"] = arrived.float().flatten().tolist()
    found["bytes"] = dict(mesh.traffic.sent)
    return found


def test_collectives(pool: Pool) -> None:
    first, second = pool.run(2, collect)
    assert first["sum"] == second["sum"] == [10, 12, 14, 16]
    assert first["gathered"] == second["gathered"] == [0, 10]
    assert (first["scattered"], second["scattered"]) == ([10, 12], [14, 16])
    assert first["broadcast"] == second["broadcast"] == [10, 11, 12, 13]
    assert first["exchanged"] == [1, 1, 2, 3]
    assert second["exchanged"] == [2, 3]
    assert first["bytes"]["dp", "all_to_all"] == 2
    assert second["bytes"]["dp", "all_to_all"] == 3
    assert first["bytes"]["dp", "all_gather"] == 4
    assert first["bytes"]["dp", "all_reduce"] == 16
    assert first["bytes"]["dp", "broadcast"] == 0
    assert second["bytes"]["dp", "broadcast"] == 16


def test_one_process_needs_no_group() -> None:
    mesh = make_mesh(Layout.fill(1))
    x = torch.arange(3.0)
    assert torch.equal(mesh["dp"].all_reduce(x.clone()), x)
    assert torch.equal(mesh["ep"].all_to_all(x, [3], [3]), x)
    assert torch.equal(mesh["dp"].reduce_scatter(x), x)
    assert set(mesh.traffic.sent.values()) <= {0}


def test_a_layout_of_other_processes_is_refused() -> None:
    with pytest.raises(BadInput, match="a layout of 2 processes, and there are 1: start as many"):
        make_mesh(Layout.fill(2))


def late() -> str:
    mesh = make_mesh(Layout.fill(2), deadline=2)
    mesh.traffic.step = 7
    mesh["dp"].barrier()
    if mesh.rank == 1:
        return ""
    try:
        mesh["dp"].all_reduce(torch.ones(1))
    except Lost as error:
        return str(error)
    return "nothing was raised"


def test_who_waits_in_vain_says_where(pool: Pool) -> None:
    message, _ = pool.run(2, late)
    assert message.startswith("rank 0: all_reduce over dp (ranks 0 1) failed at step 7: ")


def fail() -> None:
    raise ValueError("on purpose")


def test_the_pool_tells_who_failed_and_goes_on(pool: Pool) -> None:
    with pytest.raises(AssertionError, match=r"(?s)rank 0: .*on purpose.*rank 1: "):
        pool.run(2, fail)
    assert pool.run(2, int) == [0, 0]


def test_who_stands_still_is_the_thread_that_computes() -> None:
    traffic = Traffic()

    def wait() -> None:
        with traffic.standing_still():
            time.sleep(0.01)

    carrier = threading.Thread(target=wait)
    carrier.start()
    carrier.join()
    assert traffic.waited == 0
    wait()
    assert traffic.waited >= 0.01
