"""The picture and the result file of a sweep."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from typing import Any

import pytest
from matplotlib.image import imread

from tests.serving.bench.test_measure import outcome
from ziphius.serving.bench.chart import draw
from ziphius.serving.bench.measure import Goal, Summary, summarise
from ziphius.serving.bench.result import make_result
from ziphius.serving.bench.stream import Fault
from ziphius.serving.bench.texts import Texts
from ziphius.serving.bench.units import shown

SETTINGS = {
    "endpoint": "chat", "prompts": "prompts of 64 tokens", "output_tokens": 9, "temperature": 0.0,
    "slo_ttft": 0.5, "slo_itl": 0.05,
}  # fmt: skip


def level(load: int, *, rate: bool = False, fails: bool = False) -> Summary:
    outcomes = [outcome(0.1 * load, 0.01 * load + 0.001 * n, 8) for n in range(load)]
    if fails:
        outcomes = [replace(o, fault=Fault("timeout", "late")) for o in outcomes]
    how: dict[str, Any] = {"rate": float(load)} if rate else {"concurrency": load}
    return summarise(outcomes, goal=Goal(0.5, 0.05), busy=0.1, **how)


def result(*levels: Summary, **changes: Any) -> dict[str, Any]:
    server = {"url": "http://h:1", "model": "m"} | changes.pop("server", {})
    made = make_result(
        levels, Texts(), server=server, command="ziphius bench", settings=SETTINGS | changes
    )
    return dict(json.loads(json.dumps(made)))


def test_a_result_says_what_was_measured_on_what() -> None:
    made = result(level(2), level(4))
    assert made["command"] == "ziphius bench"
    assert made["server"]["model"] == "m"
    assert made["date"].endswith("+00:00")
    assert made["generator"]["cores"] >= 1
    assert made["complete"] is True
    first = made["levels"][0]
    assert (first["concurrency"], first["rate"], first["requests"]) == (2, None, 2)
    assert set(first["itl"]) == {"mean", "p50", "p90", "p99", "max"}
    assert first["ttft"]["mean"] == pytest.approx(0.2)
    assert first["late"] is None
    assert made["texts"]["compared"] == 0


@pytest.mark.parametrize(
    "made",
    [
        result(level(1), level(4), level(16)),
        result(level(3)),
        result(level(2, rate=True), level(8, rate=True), slo_ttft=None, slo_itl=None),
        result(level(1), level(4, fails=True)),
        result(level(4, fails=True)),
        result(level(1), server={"model": "$x^{" + "long/" * 40}),
    ],
    ids=["levels", "one", "rates", "a failed level", "all failed", "a name like a formula"],
)
def test_every_sweep_has_a_picture(made: dict[str, Any]) -> None:
    picture = imread(io.BytesIO(draw(made)), format="png")
    assert picture.shape[:2] == (735, 1950)
    assert 0.005 < (picture[..., :3].min(axis=-1) < 0.9).mean() < 0.5


def test_a_picture_shows_its_figures() -> None:
    assert draw(result(level(1), level(4))) == draw(result(level(1), level(4)))
    assert draw(result(level(1), level(4))) != draw(result(level(1), level(5)))


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0"), (1e-6, "1 µs"), (0.00085, "850 µs"), (0.0009996, "1 ms"), (0.01234, "12.3 ms"),
        (0.9996, "1 s"), (1.25, "1.25 s"), (75.04, "75 s"), (1234.5, "1234 s"),
    ],
)  # fmt: skip
def test_times_for_people(seconds: float, text: str) -> None:
    assert shown(seconds) == text
