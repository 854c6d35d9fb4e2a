"""Numbered things, made one after the other: by the caller, or ahead of it by threads."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

Thing = TypeVar("Thing")


class Ahead(Generic[Thing]):
    """What ``make(number)`` returns, for numbers that mostly grow by one.

    ``workers`` threads make as many things beyond the one that was asked for last, and no more.
    ``make`` must be a function of the number alone, and must not refer to this object's owner:
    then the threads end when the owner is dropped.
    """

    def __init__(self, make: Callable[[int], Thing], workers: int) -> None:
        self._make, self._workers = make, workers
        self._last: tuple[int, Thing] | None = None
        self._pool = ThreadPoolExecutor(workers, "ziphius-data") if workers else None
        self._ahead: dict[int, Future[Thing]] = {}

    def get(self, number: int) -> Thing:
        """Return thing ``number``; the threads go on with those after it.

        Raises what ``make`` raised; asked for again, the thing is made again.
        """
        if self._last is None or self._last[0] != number:
            self._last = None  # free its memory before the new one is there
            self._last = number, self._made(number)
        return self._last[1]

    def close(self) -> None:
        """End the threads, the things at work being finished. Others are made by the caller."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        self._pool, self._ahead = None, {}

    def _made(self, number: int) -> Thing:
        if self._pool is None:
            return self._make(number)
        wanted = range(number, number + self._workers + 1)
        for other in self._ahead.keys() - set(wanted):
            self._ahead.pop(other).cancel()
        for new in wanted:
            if new not in self._ahead:
                self._ahead[new] = self._pool.submit(self._make, new)
        return self._ahead.pop(number).result()
