"""Things made ahead: the same ones, no more than promised, and threads that end."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ziphius.data.ahead import Ahead


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait for what threads do; a minute is for a machine that is very busy."""
    ends = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < ends, "it never happened"
        time.sleep(0.002)


def threads() -> int:
    return sum(thread.name.startswith("ziphius-data") for thread in threading.enumerate())


@given(workers=st.integers(0, 3), numbers=st.lists(st.integers(0, 9), min_size=1, max_size=12))
def test_every_number_gives_its_thing(workers: int, numbers: list[int]) -> None:
    ahead = Ahead(lambda number: number * number, workers)
    assert [ahead.get(number) for number in numbers] == [number * number for number in numbers]
    ahead.close()


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_as_many_are_made_ahead_as_there_are_threads(workers: int) -> None:
    made: list[int] = []
    ahead = Ahead(made.append, workers)
    ahead.get(3)
    wait_until(lambda: len(made) == 1 + workers)
    ahead.get(3)
    assert sorted(made) == list(range(3, 4 + workers))
    ahead.get(4)
    wait_until(lambda: len(made) == 2 + workers)
    ahead.close()  # waits for the threads
    assert sorted(made) == list(range(3, 5 + workers)), "each was made once, and no more of them"


def test_the_next_is_made_while_the_caller_does_something_else() -> None:
    went_on = threading.Event()

    def make(number: int) -> int:
        assert number == 0 or went_on.wait(60)
        return number

    ahead = Ahead(make, 1)
    assert ahead.get(0) == 0  # would wait for ever, were number 1 made before this returns
    went_on.set()
    assert ahead.get(1) == 1
    ahead.close()


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_an_error_is_raised_where_the_thing_is_asked_for(workers: int) -> None:
    broken = {2}

    def make(number: int) -> int:
        if number in broken:
            raise OSError(f"thing {number} cannot be read")
        return number

    ahead = Ahead(make, workers)
    assert [ahead.get(0), ahead.get(1)] == [0, 1]
    for _ in range(2):
        with pytest.raises(OSError, match="thing 2 cannot be read"):
            ahead.get(2)
    broken.clear()
    assert [ahead.get(2), ahead.get(3)] == [2, 3], "repaired, it goes on"
    ahead.close()


def test_closing_ends_the_threads() -> None:
    before = threads()
    ahead = Ahead(lambda number: number, 3)
    ahead.get(0)
    assert threads() > before
    ahead.close()
    assert threads() == before
    assert ahead.get(7) == 7, "made by the caller"
    assert threads() == before
    ahead.close()


def test_dropping_it_ends_the_threads() -> None:
    before = threads()
    ahead = Ahead(lambda number: number, 2)
    ahead.get(0)
    assert threads() > before
    del ahead
    gc.collect()
    wait_until(lambda: threads() == before)


def test_a_program_that_fails_ends_although_threads_are_at_work() -> None:
    program = (
        "import time\n"
        "from ziphius.data.ahead import Ahead\n"
        "def make(number):\n"
        "    time.sleep(0.2 if number else 0)\n"
        "ahead = Ahead(make, 2)\n"
        "ahead.get(0)\n"
        "raise SystemExit(7)\n"
    )
    assert subprocess.run([sys.executable, "-c", program], timeout=60).returncode == 7
