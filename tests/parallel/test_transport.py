"""The transport over collectives keeps the contract of transports."""

from __future__ import annotations

import pytest
import torch

from tests.parallel.pool import Pool
from tests.parallel.transports import check_transport
from ziphius.parallel.layout import Layout
from ziphius.parallel.mesh import make_mesh
from ziphius.parallel.transport import AxisTransport, Spread


def check_axis() -> None:
    layout = Layout.fill(torch.distributed.get_world_size())
    check_transport(AxisTransport(make_mesh(layout)["world"]))


@pytest.mark.parametrize("world", [2, 3])
def test_contract_over_collectives(pool: Pool, world: int) -> None:
    pool.run(world, check_axis)


def test_contract_alone() -> None:
    check_transport(AxisTransport(make_mesh(Layout())["world"]))


def count_bytes() -> dict[tuple[str, str], int]:
    mesh = make_mesh(Layout.fill(2))
    transport = AxisTransport(mesh["dp"])
    x = torch.zeros(3, 4)
    # Two rows to the first place, all three to the second.
    spread = Spread(torch.tensor([0, 1, 0, 1, 2]), [2, 3], [2 + mesh.rank] * 2, 3)
    transport.reduce(transport.multicast(x, spread).wait(), spread).wait()
    return dict(mesh.traffic.sent)


def test_only_what_leaves_is_counted(pool: Pool) -> None:
    first, second = pool.run(2, count_bytes)
    assert first["dp", "all_to_all"] == 3 * 16 + 2 * 16
    assert second["dp", "all_to_all"] == 2 * 16 + 3 * 16
