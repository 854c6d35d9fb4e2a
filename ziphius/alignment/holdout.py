"""Which records are held out: as their content and the seed say, wherever they stand."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

from ziphius.data.randomness import draw

T = TypeVar("T")


def divided(
    items: Sequence[T], key: Callable[[T], str], seed: int, holdout_every: int
) -> tuple[list[T], list[T]]:
    """Return items to learn and to hold out, about one in ``holdout_every``.

    Items of one key are on one side.
    """
    names = [zlib.crc32(key(item).encode(errors="surrogatepass")) for item in items]
    hashes = draw("heldout", seed, np.array(names, np.uint64))
    held = (hashes % np.uint64(holdout_every) == 0).tolist() if items else []
    return (
        [item for item, out in zip(items, held, strict=True) if not out],
        [item for item, out in zip(items, held, strict=True) if out],
    )
