"""The heat map's file shows the loads, and its colours say what they should on both pages."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
from matplotlib.image import imread

from ziphius.report import heat


def over(colours: np.ndarray, page: float) -> np.ndarray:
    """Lay colours with opacity over a grey page."""
    opacity = colours[:, 3:]
    return colours[:, :3] * opacity + page * (1 - opacity)


def lightness(rgb: np.ndarray) -> np.ndarray:
    """CIE L* of sRGB colours."""
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    y = linear @ np.array([0.2126, 0.7152, 0.0722])
    return np.where(y > 216 / 24389, 116 * np.cbrt(y) - 16, y * 24389 / 27)


def test_the_file_is_a_png_of_the_palettes_colours() -> None:
    relative = np.array([[0.0, 0.25, 1.0], [2.0, 9.0, np.nan]])
    uri = heat.picture(relative)
    data = base64.b64decode(uri.removeprefix("data:image/png;base64,"))
    pixels = imread(io.BytesIO(data), format="png")
    want = heat.palette()[heat.levels(relative)] / 255
    assert pixels.shape == (2, 3, 4)
    assert np.allclose(pixels, want, atol=1 / 255)


def test_the_scale_is_logarithmic_ends_at_four_times_and_singles_out_the_dead() -> None:
    loads = np.array([0.01, 0.25, 0.5, 1.0, 2.0, 4.0, 40.0])
    middle, end = heat.LEVELS, 2 * heat.LEVELS
    want = [0, 0, middle // 2, middle, middle + heat.LEVELS // 2, end, end]
    assert heat.levels(loads).tolist() == want
    assert heat.levels(np.array([0.0, np.nan])).tolist() == [heat.DEAD, heat.ABSENT]


@pytest.mark.parametrize("page", [1.0, 0.08])
def test_lightness_moves_evenly_away_from_the_mean_on_light_and_dark_pages(page: float) -> None:
    colours = over(heat.palette() / 255, page)
    light = lightness(colours)
    for side in (light[: heat.LEVELS + 1][::-1], light[heat.LEVELS : 2 * heat.LEVELS + 1]):
        moves = np.diff(side) * (-1 if page > 0.5 else 1)
        assert (moves > 0).all()
        assert moves.max() < 2 * moves.min()


@pytest.mark.parametrize("page", [1.0, 0.08])
def test_a_dead_expert_looks_like_no_load(page: float) -> None:
    colours = over(heat.palette() / 255, page)
    loads, dead = colours[: 2 * heat.LEVELS + 1], colours[heat.DEAD]
    assert np.abs(loads - dead).max(axis=1).min() > 0.25


def test_underload_is_blue_and_overload_orange() -> None:
    red, _, blue, opacity = heat.palette()[heat.levels(np.array([0.4, 1.0, 2.5]))].T.astype(int)
    assert blue[0] > red[0]
    assert red[2] > blue[2]
    assert opacity[1] == 0
    assert opacity[0] == opacity[2] > 100
