"""Pictures show the files' numbers: axes and lines are looked at, not pixels."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text

from tests.report.synthetic import Plan, metric_lines, write_lines, write_run
from ziphius.report import balancing, curves, health, heat
from ziphius.report.experts import layer_figures
from ziphius.report.page import curve_panels, expert_panels, health_panels
from ziphius.report.read import Run, read_run
from ziphius.report.style import BLUE, GREEN, INK, NARROW, ORANGE, WIDE, Panel, drawing

BAD = Plan(
    steps=400, log_every=10, validate_every=100, spike_at=300, dead={2: [3, 5], 3: [0]},
    dead_from=200, rollback=(309, 281), ramp=True,
    skipped={300: "spike", 301: "spike", 350: "loss not finite"},
)  # fmt: skip


@pytest.fixture(autouse=True)
def _drawing() -> Iterator[None]:
    with drawing():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "bad", BAD)


@pytest.fixture(scope="module")
def run(folder: Path) -> Run:
    return read_run(folder)


def kept(folder: Path) -> list[dict[str, float]]:
    """The lines that count: of a step the last."""
    lines = [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]
    by_step = {line["step"]: line for line in lines}
    return [by_step[step] for step in sorted(by_step)]


def only(panels: Iterable[Panel | None], name: str) -> Axes:
    (panel,) = [panel for panel in panels if panel is not None and panel.name == name]
    return panel.figure.axes[0]


def lines_of(axes: Axes, colour: str) -> list[tuple[list[float], list[float]]]:
    return [
        (list(line.get_xdata()), list(line.get_ydata()))
        for line in axes.lines
        if line.get_color() == colour
    ]


@pytest.mark.parametrize("size", [WIDE, NARROW])
def test_bits_per_byte_are_the_files(run: Run, folder: Path, size: tuple[float, float]) -> None:
    axes = curves.bits_figure(run, size).axes[0]
    lines = [line for line in kept(folder) if math.isfinite(line["bpb"])]
    thin, thick = lines_of(axes, BLUE)
    assert thin == ([line["step"] for line in lines], [line["bpb"] for line in lines])
    assert thick[1][-1] == run.metrics.average("bpb")[-1]
    thin, _ = lines_of(axes, GREEN)
    assert thin[1] == [line["mtp_bpb"] for line in lines]
    ((steps, values),) = lines_of(axes, ORANGE)
    assert steps == [0, 100, 200, 300, 400]
    assert values[1:-1] == [line["heldout_bpb"] for line in lines if "heldout_bpb" in line][:-1]
    assert run.summary is not None
    assert (values[0], values[-1]) == tuple(
        run.summary[f"heldout_bpb_{when}"] for when in ("before", "after")
    )
    levels = [line.get_ydata()[0] for line in axes.lines if line.get_linestyle() == "--"]
    assert {run.summary["ngram_bpb"], run.summary["xz_bpb"]} <= set(levels)


@pytest.mark.parametrize("size", [WIDE, NARROW])
def test_everything_lies_inside_the_picture(tmp_path: Path, size: tuple[float, float]) -> None:
    run = read_run(write_run(tmp_path, Plan(steps=300)))
    axes = curves.bits_figure(run, size).axes[0]
    bottom, top = axes.get_ylim()
    values = np.concatenate([np.asarray(line.get_ydata(), float) for line in axes.lines])
    assert bottom < values.min()
    assert values.max() < top
    assert top - bottom < 1.2 * (values.max() - values.min())


def test_the_wide_pictures_labels_do_not_overlap(run: Run) -> None:
    figure = curves.bits_figure(run, WIDE)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    texts = [text for text in figure.axes[0].texts if text.get_text()]
    assert len(texts) == 5
    boxes = [Text.get_window_extent(text, canvas.get_renderer()) for text in texts]
    for one, other in itertools.combinations(boxes, 2):
        assert not one.overlaps(other)
    assert max(box.x1 for box in boxes) < figure.bbox.width


def test_the_token_axis_says_how_many_tokens_a_step_had_seen(run: Run) -> None:
    figure = curves.bits_figure(run, WIDE)
    (above,) = figure.axes[0].child_axes
    figure.draw_without_rendering()
    first, last = figure.axes[0].get_xlim()
    assert above.get_xlim() == pytest.approx((first * 8192, last * 8192))


def test_skipped_steps_and_rollbacks_are_marked(run: Run) -> None:
    axes = only([curves.loss_panel(run)], "loss")
    marks = lines_of(axes, INK)
    assert ([300, 301, 350], [1.0] * 3) in marks
    assert ([281, 281], [0, 1]) in marks


def test_the_spike_is_ringed_where_the_run_went_back_from_it(run: Run, folder: Path) -> None:
    texts = (folder / "metrics.jsonl").read_text().splitlines()
    losses = [line["loss"] for line in map(json.loads, texts) if line["step"] == 300]
    assert len(losses) == 2
    panel = curves.loss_panel(run)
    assert panel is not None
    assert ([300], [max(losses)]) in lines_of(panel.figure.axes[0], INK)
    assert panel.note == "Largest spike: step 300, 2.37 nats above the running median."


def test_steps_that_were_made_again_are_drawn_beside_the_run(run: Run) -> None:
    axes = only([curves.loss_panel(run)], "loss")
    (gone,) = [line for line in axes.lines if len(line.get_xdata()) == 29]
    assert list(gone.get_xdata()) == list(range(281, 310))
    assert gone.get_color() not in (BLUE, GREEN)


def test_a_lone_peak_does_not_flatten_the_picture(tmp_path: Path) -> None:
    lines = list(metric_lines(Plan(steps=300), np.random.default_rng(0)))
    lines[200]["loss"] = 500.0
    write_lines(tmp_path / "metrics.jsonl", lines)
    axes = only([curves.loss_panel(read_run(tmp_path))], "loss")
    assert axes.get_ylim()[1] < 20


def test_schedules_that_change_have_a_picture_and_others_a_word(run: Run, folder: Path) -> None:
    panels = {panel.name: panel for panel in health.schedule_panels(run)}
    assert set(panels) == {"lr", "batch_size", "gamma", "mtp_weight"}
    x, y = lines_of(panels["batch_size"].figure.axes[0], BLUE)[0]
    for line in kept(folder):
        at = np.searchsorted(x, line["step"], side="right") - 1
        assert y[at] == line["batch_size"]
    assert lines_of(panels["lr"].figure.axes[0], BLUE)[0][1] == [
        line["lr"] for line in kept(folder)
    ]


def test_constant_schedules_are_told_in_a_note(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path, Plan(steps=30)))
    (panel,) = health.schedule_panels(run)
    assert panel.note == "Constant: batch size 16, bias update speed 0.01, MTP loss weight 0.3."


def test_mfu_stands_on_the_right_of_the_throughput_that_it_follows(run: Run) -> None:
    panel = health.speed_panel(run)
    assert panel is not None
    axes = panel.figure.axes[0]
    (right,) = axes.child_axes
    panel.figure.draw_without_rendering()
    factor = 2.14e7 / 1.05e12
    assert right.get_ylim() == pytest.approx(tuple(factor * y for y in axes.get_ylim()))
    assert health.mfu_panel(run) is None


def test_mfu_of_its_own_has_a_picture(tmp_path: Path) -> None:
    lines = list(metric_lines(Plan(steps=30), np.random.default_rng(0)))
    for line in lines:
        line["mfu"] = 0.1 + line["step"] / 1000
    write_lines(tmp_path / "metrics.jsonl", lines)
    run = read_run(tmp_path)
    assert lines_of(only([health.mfu_panel(run)], "mfu"), BLUE)[0][1] == [
        line["mfu"] for line in lines
    ]
    panel = health.speed_panel(run)
    assert panel is not None
    assert not panel.figure.axes[0].child_axes


def test_gradients_show_where_they_are_clipped_and_go_logarithmic(tmp_path: Path) -> None:
    folder = write_run(tmp_path, Plan(steps=200))
    axes = only([health.gradient_panel(read_run(folder))], "gradient")
    assert axes.get_yscale() == "linear"
    assert [y for _, y in lines_of(axes, ORANGE)] == [[1.0, 1.0]]
    lines = list(metric_lines(Plan(steps=200), np.random.default_rng(0)))
    lines[100]["grad_norm"] = 800.0
    write_lines(folder / "metrics.jsonl", lines)
    assert only([health.gradient_panel(read_run(folder))], "gradient").get_yscale() == "log"


def test_agreement_is_the_files(run: Run, folder: Path) -> None:
    want = [line["mtp_agreement"] for line in kept(folder) if "mtp_agreement" in line]
    ((steps, values),) = lines_of(only([health.agreement_panel(run)], "agreement"), GREEN)
    assert values == want
    assert steps == [100, 200, 300, 400]


def test_the_layers_picture_has_the_busiest_expert_in_the_maps_colours(run: Run) -> None:
    assert run.balance is not None
    layers = layer_figures(run.balance)
    axes = only(expert_panels(run, layers), "layers")
    (image,) = axes.images
    busiest = np.stack([figures.violation_R + 1 for figures in layers])
    assert np.array_equal(np.asarray(image.get_array()), heat.levels(busiest))
    assert [text.get_text() for text in axes.get_yticklabels()] == ["1", "2", "3", "4"]


def test_biases_and_dead_experts_are_the_files(run: Run, folder: Path) -> None:
    lines = [json.loads(text) for text in (folder / "balance.jsonl").read_text().splitlines()]
    assert run.balance is not None
    layers = layer_figures(run.balance)
    axes = only(expert_panels(run, layers), "bias")
    low, high, mean = lines_of(axes, BLUE)
    for name, line in (("bias_min", low), ("bias_max", high), ("bias_mean", mean)):
        assert line[1] == [told["layers"]["1"][name] for told in lines]
    axes = only(expert_panels(run, layers), "dead")
    x, y = axes.lines[0].get_data()
    for told in lines:
        at = np.searchsorted(x, told["step"], side="right") - 1
        assert y[at] == sum(layer["loads"].count(0) for layer in told["layers"].values())


def test_many_layers_keep_their_biases_apart_by_depth(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path, Plan(steps=50, layers=12, experts=4)))
    assert run.balance is not None
    panel = balancing.bias_panel(run, layer_figures(run.balance))
    assert panel is not None
    assert len({line.get_color() for line in panel.figure.axes[0].lines}) == 12
    assert [key.text for key in panel.keys] == ["layer 1", "layer 7", "layer 12 (MTP)"]


def test_heat_maps_stay_within_their_cells_however_many_layers(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path, Plan(steps=300, layers=4, log_every=1)))
    assert run.balance is not None
    maps = balancing.maps(run, layer_figures(run.balance))
    assert [(one.name, one.experts, one.columns) for one in maps] == [
        *((f"Layer {i}", 32, 200) for i in (1, 2, 3)),
        ("Layer 4 (MTP)", 32, 200),
    ]
    assert {one.height for one in maps} == {128}


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_the_shortest_runs_have_pictures(tmp_path: Path, steps: int) -> None:
    run = read_run(write_run(tmp_path, Plan(steps=steps, log_every=1)))
    assert run.balance is not None
    layers = layer_figures(run.balance)
    panels = [*curve_panels(run), *expert_panels(run, layers), *health_panels(run)]
    names = {panel.name for panel in panels if panel is not None}
    assert {"loss", "lr", "gradient", "violation", "layers", "bias", "speed"} <= names
    panel = curves.bits_panel(run)
    assert panel is not None
    for drawn in (panel, *panels):
        if drawn is not None:
            drawn.figure.draw_without_rendering()


def test_a_run_whose_every_step_was_skipped_has_pictures(tmp_path: Path) -> None:
    plan = Plan(steps=30, skipped=dict.fromkeys(range(1, 31), "loss 3.00 nats above the median"))
    run = read_run(write_run(tmp_path, plan))
    for panel in (curves.bits_panel(run), *curve_panels(run), *health_panels(run)):
        if panel is not None:
            panel.figure.draw_without_rendering()
