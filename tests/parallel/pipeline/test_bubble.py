"""Bubbles and activations are those of the report's table 2 (facts 5.4).

What is compared: the simulated total less what a rank computes, which is the bubble in its full
width (before a rank's first action, between, and after its last), with the formula. At
(F, B, W, F&B) = (1, 2, 1, 3) it is equal for every rank; where pairs are shorter than their parts,
ranks have different numbers of pairs, and the formula is that of the rank with the largest bubble.
"""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.parallel.pipeline.tables import any_schedule, many
from tests.parallel.pipeline.test_simulate import any_times
from ziphius.parallel.pipeline.actions import Schedule
from ziphius.parallel.pipeline.bubble import bubble_formula, compare, peak_formula
from ziphius.parallel.pipeline.families import schedule
from ziphius.parallel.pipeline.simulate import Times, simulate

UNIT = Times(1, 2, 1, 3)


def expected(name: str, ranks: int, micro_batches: int) -> int:
    """Facts 5.4 at (1, 2, 1, 3), and what is added where there are few micro-batches.

    Below one micro-batch a rank, weight gradients are too few to fill the end of ZB1P, and stages
    wait for the only group of interleaved 1F1B.
    """
    missing = max(0, ranks - micro_batches)
    match name:
        case "1f1b":
            return (ranks - 1) * (1 + 2)
        case "zb1p":
            return (ranks - 1) * (1 + 2 - 2) + missing
        case "dualpipe":
            return (ranks // 2 - 1) * (3 + 2 - 3)
        case "dualpipev":
            return (ranks - 1) * (3 + 2 - 3)  # PP = 2R stages
    raise AssertionError(name)


@pytest.mark.parametrize("name", ["1f1b", "zb1p", "dualpipe", "dualpipev"])
def test_bubbles_of_the_table_for_every_rank(name: str) -> None:
    for table in many(name):
        timeline = simulate(table, UNIT)
        bubbles = {timeline.bubble(rank) for rank in range(table.ranks)}
        assert bubbles == {expected(name, table.ranks, table.micro_batches)}, str(table)


def test_interleaved_bubble_is_that_of_its_smaller_stages() -> None:
    for table in many("interleaved"):
        timeline = simulate(table, UNIT)
        (bubble,) = {timeline.bubble(rank) for rank in range(table.ranks)}
        few = max(0, table.ranks - table.micro_batches) * (table.stages // table.ranks - 1)
        assert bubble == (table.ranks - 1 + few) * 3


def test_zb_v_never_waits_in_between() -> None:
    """From 2P - 1 micro-batches; with fewer, places of those that are missing stay empty."""
    for table in many("zbv"):
        if table.micro_batches >= 2 * table.ranks - 1:
            timeline = simulate(table, UNIT)
            for rank in range(table.ranks):
                assert timeline.idle(rank) == 0
                assert timeline.bubble(rank) == table.ranks - 1


@pytest.mark.parametrize("name", ["1f1b", "zb1p", "dualpipe", "dualpipev", "zbv"])
def test_peak_activations(name: str) -> None:
    """PP for 1F1B (first rank) and ZB1P, PP + 1 for both DualPipes, PP stages of half size ZB-V."""
    for table in many(name):
        peaks = [table.peak_live(rank) for rank in range(table.ranks)]
        most = table.stages + (1 if name.startswith("dualpipe") else 0)
        assert max(peaks) <= most
        if table.micro_batches >= table.ranks:
            assert max(peaks) == most
        if name.startswith("dualpipe"):
            assert set(peaks) == {table.stages + 1}
        if name == "1f1b":
            n = table.micro_batches
            assert peaks == [min(n, table.ranks - rank) for rank in range(table.ranks)]


@pytest.mark.parametrize("name", ["zb1p", "zbv", "dualpipe", "dualpipev"])
def test_a_weight_gradient_that_waits_keeps_its_activation(name: str) -> None:
    """With it counted as freed by I, some rank of each of these would hold fewer."""
    table = schedule(name, 4, 8)
    for rank, steps in enumerate(table.steps):
        live = peak = 0
        for step in steps:
            kinds = [action.kind for action in step.actions]
            live += kinds.count("F")
            peak = max(peak, live)
            live -= kinds.count("B") + kinds.count("W")
        assert live == 0
        assert table.peak_live(rank) == peak


@given(table=any_schedule(("1f1b", "interleaved")), times=any_times())
def test_1f1b_formulas_hold_for_any_times(table: Schedule, times: Times) -> None:
    if table.name == "1f1b" or table.micro_batches >= table.ranks:
        row = compare(table, _free(times))
        assert row.bubble == row.bubble_formula


@given(table=any_schedule(("zb1p",)), times=any_times())
def test_zb1p_formula_holds_where_a_weight_gradient_fits(table: Schedule, times: Times) -> None:
    row = compare(table, _free(times))
    assert row.bubble_formula is not None
    fits = times.weight <= min(times.forward, times.backward - times.weight)
    if fits and table.micro_batches >= table.ranks:
        assert row.bubble == row.bubble_formula
    else:
        assert row.bubble >= row.bubble_formula


@given(
    table=any_schedule(("dualpipe", "dualpipev")),
    unit=st.integers(1, 9),
    overlap=st.fractions(0, 1, max_denominator=6),
)
def test_dualpipe_formula_holds_for_any_overlap(
    table: Schedule, unit: int, overlap: Fraction
) -> None:
    """F = I = W; a pair takes from 2 of them, its longer part alone, to 3, nothing saved."""
    row = compare(table, Times(unit, 2 * unit, unit, float((3 - overlap) * unit)))
    assert row.bubble == pytest.approx(row.bubble_formula)


def test_other_times_are_printed_side_by_side() -> None:
    row = compare(schedule("dualpipe", 8, 20), Times(1, 2, 0.8, 2.6))
    assert row.bubble_formula == pytest.approx(6.6)
    assert row.bubble == pytest.approx(6.0)
    assert str(row).startswith("dualpipe: bubble 6 (formula 6.6), activations 9 (formula 9), step")
    assert "bubble 7 (formula none)" in str(compare(schedule("zbv", 8, 20), UNIT))


def test_dualpipe_waits_least() -> None:
    """Of the schedules with a formula, at the report's sizes: PP 16 and 120 micro-batches."""
    of = {name: schedule(name, 16, 120) for name in ("1f1b", "zb1p", "dualpipe")}
    bubbles = {name: bubble_formula(table, UNIT) for name, table in of.items()}
    assert bubbles == {"1f1b": 45, "zb1p": 15, "dualpipe": 14}
    assert [peak_formula(table) for table in of.values()] == [16, 16, 17]
    overlapped = compare(of["dualpipe"], Times(1, 2, 1, 2.2))
    assert overlapped.total < 0.8 * compare(of["zb1p"], UNIT).total


def _free(times: Times) -> Times:
    """Without messages: the formulas know none."""
    return Times(times.forward, times.backward, times.weight, times.pair)
