"""The contract of a transport, to be run on every rank of a group with any implementation."""

from __future__ import annotations

import torch

from ziphius.parallel.transport import Spread, Transport

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.uint8, torch.int32, torch.int64)


def check_transport(transport: Transport) -> None:
    """Assert everything the protocol promises; all ranks of the group call it together."""
    for dtype in DTYPES:
        check_write(transport, dtype)
    check_empty(transport)
    check_read(transport)
    check_multicast(transport)
    check_reduce(transport)
    check_order(transport)


def row(source: int, number: int, width: int = 3) -> torch.Tensor:
    return torch.arange(width) + 10 * number + 40 * source


def matrix(source: int, rows: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    made = [row(source, number) for number in range(rows)]
    return torch.stack(made).to(dtype) if made else torch.zeros(0, 3, dtype=dtype)


def given(source: int, target: int) -> int:
    """How many rows go from one place to another: uneven, and sometimes none."""
    return (source + 2 * target) % 3


def check_write(transport: Transport, dtype: torch.dtype) -> None:
    here, places = transport.place, range(transport.size)
    sent, received = [given(here, p) for p in places], [given(p, here) for p in places]
    came = transport.write(matrix(here, sum(sent), dtype), sent, received).wait()
    wanted = []
    for source in places:
        first = sum(given(source, p) for p in range(here))
        wanted += [row(source, first + i) for i in range(given(source, here))]
    assert came.dtype == dtype
    assert torch.equal(came, torch.stack(wanted).to(dtype) if wanted else matrix(0, 0, dtype))


def check_empty(transport: Transport) -> None:
    none = [0] * transport.size
    assert transport.write(torch.zeros(0, 5), none, none).wait().shape == (0, 5)


def check_read(transport: Transport) -> None:
    here, places = transport.place, range(transport.size)
    wanted = [torch.tensor([2, 0, 2][: given(here, p) + 1]) for p in places]
    wanted[(here + 1) % transport.size] = torch.zeros(0, dtype=torch.int64)
    came = transport.read(matrix(here, 3), wanted).wait()
    rows = [row(p, int(n)) for p in places for n in wanted[p]]
    assert torch.equal(came, torch.stack(rows).double() if rows else matrix(0, 0))


def targets(source: int, size: int) -> list[list[int]]:
    """The rows of four that a source sends to each place; its row 3 goes nowhere."""
    return [[n for n in range(3) if (n + source + place) % 2 or n == 0] for place in range(size)]


def spread(here: int, size: int) -> Spread:
    own = targets(here, size)
    received = [len(targets(source, size)[here]) for source in range(size)]
    rows = torch.tensor([n for numbers in own for n in numbers])
    return Spread(rows, [len(numbers) for numbers in own], received, 4)


def check_multicast(transport: Transport) -> None:
    here, size = transport.place, transport.size
    came = transport.multicast(matrix(here, 4), spread(here, size)).wait()
    rows = [row(source, n) for source in range(size) for n in targets(source, size)[here]]
    assert torch.equal(came, torch.stack(rows).double())


def check_reduce(transport: Transport) -> None:
    here, size = transport.place, transport.size
    way = spread(here, size)
    for dtype in (torch.float64, torch.bfloat16):
        # Every place gives what it got and its own number.
        came = transport.multicast(matrix(here, 4, dtype) / 8, way).wait()
        back = transport.reduce(came + here, way).wait()
        expected = torch.zeros(4, 3, dtype=torch.promote_types(dtype, torch.float32))
        for place, numbers in enumerate(targets(here, size)):
            for n in numbers:
                expected[n] += (row(here, n).to(dtype) / 8 + place).to(expected.dtype)
        assert back.dtype == dtype
        assert torch.equal(back, expected.to(dtype))
    # In BF16 256 + 1 + 1 is 258 if it is rounded once.
    if size > 2:
        ones = Spread(torch.zeros(size, dtype=torch.int64), [1] * size, [1] * size, 1)
        x = torch.full((size, 1), 256.0 if here == 0 else 1.0, dtype=torch.bfloat16)
        assert transport.reduce(x, ones).wait().item() == 256 + 2 * ((size - 1) // 2)


def check_order(transport: Transport) -> None:
    """Several are under way at once, and are waited for in another order."""
    here, size = transport.place, transport.size
    ones = [1] * size
    begun = [transport.write(torch.full((size, 2), 10.0 * i + here), ones, ones) for i in range(4)]
    for i in (2, 0, 3, 1):
        assert begun[i].wait()[:, 0].tolist() == [10.0 * i + place for place in range(size)]
