"""The picture of a schedule has its boxes where the simulation has them, with numbers to read."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.image import imread

from ziphius.config.errors import BadInput
from ziphius.parallel.pipeline.families import schedule
from ziphius.parallel.pipeline.simulate import Times, simulate
from ziphius.report.pipeline import KINDS, Box, draw_pipeline, ink, pipeline_figure, shade
from ziphius.report.style import drawing

UNIT = Times(1, 2, 1, 3)
NAMES = ("first direction", "second direction")


@pytest.fixture(autouse=True)
def _drawing() -> Iterator[None]:
    with drawing():
        yield


def boxes_of(name: str, ranks: int, micro_batches: int) -> list[Box]:
    return list(simulate(schedule(name, ranks, micro_batches), UNIT).pictured())


def drawn(figure: Figure) -> dict[tuple[float, ...], list[tuple[float, float, float, float]]]:
    """Return (left, right, top, bottom) of every rectangle, by colour."""
    found = {}
    for collection in figure.axes[0].collections:
        assert isinstance(collection, PolyCollection)
        (colour,) = collection.get_facecolor()
        found[tuple(colour[:3])] = [
            (*path.get_extents().intervalx, *path.get_extents().intervaly)
            for path in collection.get_paths()
        ]
    return found


def numbers(figure: Figure) -> list[tuple[float, float, str]]:
    return [
        (*(round(float(at), 6) for at in text.get_position()), text.get_text())
        for text in figure.axes[0].texts
    ]


def test_every_action_is_a_rectangle_of_its_colour_with_its_number() -> None:
    boxes = boxes_of("dualpipe", 4, 8)
    figure = pipeline_figure(boxes, title="DualPipe", chunk_names=NAMES)
    found, texts = drawn(figure), numbers(figure)
    colours = {kind: colour for kind, colour, _ in KINDS}
    count = 0
    for rank, start, end, parts in boxes:
        for place, (kind, micro_batch, chunk) in enumerate(parts):
            inside = [
                (left, right, top, bottom)
                for left, right, top, bottom in found[shade(colours[kind], chunk, 2)]
                if (left, right) == (start, end) and rank < top < bottom < rank + 1
            ]
            if len(parts) == 2:  # the forward above, the backward below
                inside = [r for r in inside if (r[2] < rank + 0.4) == (place == 0)]
            ((left, right, top, bottom),) = inside
            middle = (float(left + right) / 2, round(float(top + bottom) / 2, 6))
            assert (*middle, str(micro_batch)) in texts
            count += 1
    assert count == sum(map(len, found.values())) == len(texts)


def test_ranks_go_down_and_time_goes_right() -> None:
    axes = pipeline_figure(boxes_of("1f1b", 3, 4), title="1F1B").axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["rank 0", "rank 1", "rank 2"]
    assert axes.get_ylim() == (3, 0)
    assert axes.get_xlim() == (0, 18)


def test_the_legend_names_what_is_there() -> None:
    def names(name: str, chunks: tuple[str, ...]) -> list[str]:
        figure = pipeline_figure(boxes_of(name, 2, 4), title="title", chunk_names=chunks, note="n")
        return [text.get_text() for text in figure.texts]

    assert names("1f1b", ()) == ["title", "n", "forward", "full backward"]
    assert names("zb1p", ()) == ["title", "n", "forward", "backward for input",
                                 "backward for weights"]  # fmt: skip
    assert names("dualpipe", NAMES)[2:] == [
        "forward", "full backward", "backward for input", "backward for weights",
        "overlapped pair", *NAMES,
    ]  # fmt: skip


def test_the_longest_legend_and_a_note_fit_a_small_picture() -> None:
    boxes = boxes_of("dualpipe", 2, 4)
    figure = pipeline_figure(boxes, title="DualPipe: 2 ranks", chunk_names=NAMES, note="step 12")
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    extents = [text.get_window_extent(canvas.get_renderer()) for text in figure.texts]
    assert all(e.x0 >= 0 and e.x1 <= figure.bbox.x1 and e.y1 <= figure.bbox.y1 for e in extents)
    for place, one in enumerate(extents):
        assert not any(one.overlaps(other) for other in extents[place + 1 :])


@pytest.mark.parametrize(
    ("name", "ranks", "micro_batches"),
    [("dualpipe", 8, 20), ("dualpipev", 4, 10), ("zbv", 4, 12), ("1f1b", 2, 120)],
)
def test_numbers_fit_into_their_boxes(name: str, ranks: int, micro_batches: int) -> None:
    figure = pipeline_figure(boxes_of(name, ranks, micro_batches), title=name)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    to_pixels = figure.axes[0].transData.transform
    frames = [
        (*to_pixels((left, bottom)), *to_pixels((right, top)))
        for rectangles in drawn(figure).values()
        for left, right, top, bottom in rectangles
    ]
    for text in figure.axes[0].texts:
        extent = text.get_window_extent(canvas.get_renderer())
        assert any(
            x0 <= extent.x0 and extent.x1 <= x1 and y0 <= extent.y0 and extent.y1 <= y1
            for x0, y0, x1, y1 in frames
        ), text


def test_a_long_schedule_stays_a_picture() -> None:
    """It is no wider than a screen or two; numbers that do not fit are left out, boxes are not."""
    boxes = boxes_of("1f1b", 4, 300)
    figure = pipeline_figure(boxes, title="long")
    assert figure.get_figwidth() < 36
    assert sum(map(len, drawn(figure).values())) == len(boxes)
    assert len(numbers(figure)) < len(boxes)


def test_kinds_and_chunks_can_be_told_apart_and_numbers_read() -> None:
    colours = [shade(colour, chunk, 2) for _, colour, _ in KINDS for chunk in (0, 1)]
    for place, one in enumerate(colours):
        for two in colours[place + 1 :]:
            assert np.abs(np.subtract(one, two)).sum() > 0.15
    for colour in [shade(c, chunk, 4) for _, c, _ in KINDS for chunk in range(4)]:
        assert contrast(colour, to_rgb(ink(colour))) > 3.4


def contrast(one: tuple[float, ...], two: tuple[float, ...]) -> float:
    """The ratio of the accessibility guidelines (WCAG)."""

    def luminance(rgb: tuple[float, ...]) -> float:
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgb]
        return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))

    low, high = sorted((luminance(one), luminance(two)))
    return (high + 0.05) / (low + 0.05)


def test_files_are_whole_and_repeat(tmp_path: Path) -> None:
    boxes = boxes_of("dualpipe", 2, 4)
    for path in (tmp_path / "a.svg", tmp_path / "b.svg", tmp_path / "new" / "c.png"):
        draw_pipeline(boxes, path, title="DualPipe", chunk_names=NAMES, note="4 micro-batches")
    one, two = (tmp_path / "a.svg").read_bytes(), (tmp_path / "b.svg").read_bytes()
    assert one == two
    assert re.search(rb">second direction</text>", one)
    assert b">4 micro-batches</text>" in one
    picture = imread(io.BytesIO((tmp_path / "new" / "c.png").read_bytes()), format="png")
    assert picture.shape[0] > 200


def test_what_cannot_be_drawn_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"\.svg or \.png"):
        draw_pipeline(boxes_of("1f1b", 2, 2), tmp_path / "a.pdf", title="no")
    with pytest.raises(BadInput, match="without actions"):
        draw_pipeline([], tmp_path / "a.svg", title="no")
    assert list(tmp_path.iterdir()) == []
