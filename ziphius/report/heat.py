"""Heat maps as small indexed PNGs that lie on a light page and on a dark one.

The scale is logarithmic around the mean load: a cell at the mean is transparent, an overloaded one
turns orange, an underloaded one blue, both in steps of equal size up to 4 times and a quarter.
Because the colours are laid over the page with growing opacity, the same picture diverges from
white on a light page and from black on a dark one. An expert without a token is purple.
"""

from __future__ import annotations

import base64
import struct
import zlib

import numpy as np
from numpy.typing import NDArray

from ziphius.report.style import BLUE, ORANGE, PURPLE

OCTAVES = 2  # the scale ends at 2**2 times and 2**-2 times the mean load
LEVELS = 16  # to either side of the mean
DEAD, ABSENT = 2 * LEVELS + 1, 2 * LEVELS + 2


def levels(relative: NDArray[np.floating]) -> NDArray[np.uint8]:
    """Return the palette's index of every load, given as a multiple of the mean load."""
    with np.errstate(divide="ignore", invalid="ignore"):
        place = np.log2(relative) * (LEVELS / OCTAVES)
    index = np.rint(np.clip(np.nan_to_num(place, neginf=-LEVELS), -LEVELS, LEVELS)) + LEVELS
    index[relative == 0] = DEAD
    index[np.isnan(relative)] = ABSENT
    return index.astype(np.uint8)


def palette() -> NDArray[np.uint8]:
    """Return red, green, blue and opacity of every index."""
    share = np.linspace(0, 1, LEVELS + 1)
    rows = [(*_rgb(BLUE), opacity) for opacity in share[:0:-1]]
    rows += [(*_rgb(ORANGE), opacity) for opacity in share]
    rows += [(*_rgb(PURPLE), 1.0), (0.0, 0.0, 0.0, 0.0)]
    return np.rint(255 * np.array(rows)).astype(np.uint8)


def picture(relative: NDArray[np.floating]) -> str:
    """Return the heat map of loads ``[rows, columns]`` as a data URI."""
    return "data:image/png;base64," + base64.b64encode(png(levels(relative))).decode()


def scale() -> str:
    """Return the colours from a quarter to 4 times the mean, as a picture one cell high."""
    return (
        "data:image/png;base64,"
        + base64.b64encode(png(np.arange(2 * LEVELS + 1, dtype=np.uint8)[None])).decode()
    )


def png(index: NDArray[np.uint8]) -> bytes:
    """Write palette indices ``[rows, columns]`` as an indexed PNG with opacity."""
    height, width = index.shape
    colours = palette()
    # Every row begins with its filter, 0: none.
    rows = np.concatenate([np.zeros((height, 1), np.uint8), index], axis=1).tobytes()
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        _chunk(kind, data)
        for kind, data in (
            (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)),
            (b"PLTE", colours[:, :3].tobytes()),
            (b"tRNS", colours[:, 3].tobytes()),
            (b"IDAT", zlib.compress(rows, 9)),
            (b"IEND", b""),
        )
    )


def _chunk(kind: bytes, data: bytes) -> bytes:
    checksum = zlib.crc32(kind + data)
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)


def _rgb(colour: str) -> tuple[float, float, float]:
    red, green, blue = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    return red, green, blue
