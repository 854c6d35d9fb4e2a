"""The loss picture shows the file's numbers, its labels do not collide, and bad files are named."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.text import Text

from ziphius.config.errors import BadInput
from ziphius.report.loss import draw_loss, loss_figure


def entry(step: int, bpb: float = 2.0) -> dict[str, float]:
    return {"step": step, "tokens": step * 8192, "loss": 5.0, "mtp_loss": 5.5, "bpb": bpb}


def write(path: Path, entries: list[dict[str, float]]) -> Path:
    path.write_text("".join(json.dumps(e) + "\n" for e in entries))
    return path


@pytest.fixture
def metrics(tmp_path: Path) -> Path:
    entries = [entry(i, 1.7 + 2 * math.exp(-i / 30) + 0.1 * math.sin(i)) for i in range(1, 301)]
    return write(tmp_path / "metrics.jsonl", entries)


def written_texts(figure: Figure) -> list[str]:
    return [t.get_text() for t in (*figure.axes[0].texts, *figure.texts)]


def test_picture_is_a_png_with_ink_and_replaces_the_old_one(metrics: Path, tmp_path: Path) -> None:
    output = tmp_path / "new" / "loss.png"
    draw_loss(metrics, output, baselines={"n-gram": 1.9}, heldout=None)
    first = output.read_bytes()
    draw_loss(metrics, output, baselines={"n-gram": 1.9, "xz": 1.6}, heldout=(3.6, 1.8))
    assert output.read_bytes() != first
    assert [p.name for p in output.parent.iterdir()] == ["loss.png"]
    image = imread(output)[..., :3]
    height, width = image.shape[:2]
    assert width >= 1200
    assert height >= 700
    assert 0.01 < (image < 0.9).any(axis=-1).mean() < 0.3


def test_lines_are_the_files_numbers(metrics: Path) -> None:
    entries = [json.loads(line) for line in metrics.read_text().splitlines()]
    figure = loss_figure(metrics, baselines={"n-gram": 1.9, "xz": 1.6}, heldout=(3.6, 1.8))
    raw, smooth, *levels = figure.axes[0].lines
    assert np.array_equal(raw.get_xdata(), [e["tokens"] for e in entries])
    assert np.array_equal(raw.get_ydata(), [e["bpb"] for e in entries])
    assert [level.get_ydata()[0] for level in levels] == [1.9, 1.6]
    (points,) = figure.axes[0].collections
    assert points.get_offsets().tolist() == [[0.0, 3.6], [300 * 8192.0, 1.8]]
    # Steps 295 to 300 make the last average of a window of 5 to either side.
    last = np.mean([e["bpb"] for e in entries[-6:]])
    assert smooth.get_ydata()[-1] == pytest.approx(last)
    middle = np.mean([e["bpb"] for e in entries[95:106]])
    assert smooth.get_ydata()[100] == pytest.approx(middle)
    texts = written_texts(figure)
    assert {f"training  {last:.2f}", "n-gram  1.90", "xz  1.60"} <= set(texts)
    assert {"held-out before  3.60", "held-out after  1.80"} <= set(texts)


def test_smoothing_keeps_a_straight_line_straight_but_at_its_end(tmp_path: Path) -> None:
    path = write(tmp_path / "m.jsonl", [entry(i, 5.0 - i / 100) for i in range(1, 201)])
    raw, smooth = loss_figure(path, baselines={}, heldout=None).axes[0].lines
    assert np.allclose(smooth.get_ydata()[:190], raw.get_ydata()[:190])


@settings(max_examples=20, deadline=None)
@given(
    levels=st.lists(st.floats(0.5, 4.0), max_size=4),
    heldout=st.none() | st.tuples(st.floats(2.0, 4.0), st.floats(0.5, 2.0)),
    end=st.floats(0.5, 2.0),
)
def test_no_two_labels_overlap(
    tmp_path_factory: pytest.TempPathFactory,
    levels: list[float],
    heldout: tuple[float, float] | None,
    end: float,
) -> None:
    path = tmp_path_factory.mktemp("metrics") / "m.jsonl"
    write(path, [entry(i, end + 2 / i) for i in range(1, 50)])
    baselines = {f"baseline {i}": level for i, level in enumerate(levels)}
    figure = loss_figure(path, baselines=baselines, heldout=heldout)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    right = [t for t in figure.axes[0].texts if not t.get_text().startswith("held-out before")]
    renderer = canvas.get_renderer()
    # An annotation's own extent would take in its leader line.
    boxes = [Text.get_window_extent(text, renderer) for text in (*right, *figure.texts)]
    assert len(right) == 1 + len(levels) + (heldout is not None)
    for one, other in itertools.combinations(boxes, 2):
        assert not one.overlaps(other)


def test_a_step_run_again_after_a_resume_counts_once(tmp_path: Path) -> None:
    entries = [entry(1, 3.0), entry(2, 2.9), entry(3, 9.9), entry(3, 2.8), entry(4, 2.7)]
    path = write(tmp_path / "m.jsonl", entries)
    raw = loss_figure(path, baselines={}, heldout=None).axes[0].lines[0]
    assert raw.get_ydata().tolist() == [3.0, 2.9, 2.8, 2.7]


def test_steps_without_finite_numbers_are_left_out(tmp_path: Path) -> None:
    entries = [entry(1, 3.0), entry(2, math.nan), entry(3, 2.8), entry(4, 2.7)]
    path = write(tmp_path / "m.jsonl", entries)
    with path.open("a") as file:
        file.write('{"step": 5, "tok')
    raw = loss_figure(path, baselines={}, heldout=None).axes[0].lines[0]
    assert raw.get_ydata().tolist() == [3.0, 2.8, 2.7]
    assert raw.get_xdata().tolist() == [8192, 3 * 8192, 4 * 8192]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        ("", ": 0 steps with finite tokens and bpb"),
        ('{"step": 1, "tokens": 8, "bpb": 2.0}\n', ": 1 steps with finite"),
        ('{"step": 1, "tokens": 8, "bpb": 2.0}\n{"step": 2, "tok', ": 1 steps with finite"),
        ('{"step": 1, "tokens": 8}\n{"step": 2, "tokens": "9", "bpb": 2.0}', ": 0 steps with"),
    ],
)
def test_bad_metrics_are_named_and_leave_the_old_picture(
    tmp_path: Path, content: str | None, message: str
) -> None:
    path, output = tmp_path / "metrics.jsonl", tmp_path / "loss.png"
    output.write_bytes(b"old")
    if content is not None:
        path.write_text(content)
    with pytest.raises(BadInput, match=message) as error:
        draw_loss(path, output, baselines={}, heldout=None)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    assert output.read_bytes() == b"old"


def test_drawing_asks_for_no_window_system(metrics: Path, tmp_path: Path) -> None:
    """pyplot would pick a backend for the whole process and keep every figure alive."""
    import subprocess
    import sys

    program = (
        "import sys; from pathlib import Path; from ziphius.report.loss import draw_loss;"
        f"draw_loss(Path({str(metrics)!r}), Path({str(tmp_path / 'p.png')!r}),"
        " baselines={}, heldout=None); assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
