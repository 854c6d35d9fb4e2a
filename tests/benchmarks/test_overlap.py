"""The slow transport of ``benchmarks/overlap.py`` is a transport, and is slow."""

from __future__ import annotations

import time

import torch
from support.links import Slow

from tests.parallel.transports import check_transport
from ziphius.parallel.layout import Layout
from ziphius.parallel.mesh import make_mesh
from ziphius.parallel.transport import AxisTransport, Spread


def test_contract() -> None:
    check_transport(Slow(AxisTransport(make_mesh(Layout())["ep"]), lambda x, counts: 0.0))


def test_what_comes_waits_for_what_came_before() -> None:
    link = Slow(AxisTransport(make_mesh(Layout())["ep"]), lambda x, counts: 0.1 * counts[0])
    x, began = torch.ones(3, 2), time.perf_counter()
    first, second = (
        link.write(x, [3], [3]),
        link.multicast(x, Spread(torch.tensor([1]), [1], [1], 3)),
    )
    assert time.perf_counter() - began < 0.05, "begun, and not waited for"
    assert len(first.wait()) == 3
    assert time.perf_counter() - began >= 0.06
    second.wait()
    assert time.perf_counter() - began >= 0.08
