"""Every row of the table of combinations is a run of one process: see ``tests/combos.py``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from tests.combos import (
    BEYOND,
    COMBOS,
    LOSS,
    NORM,
    PAGE,
    PROBLEMS,
    REFUSALS,
    STEPS,
    TOLERANCES,
    Combo,
    Refusal,
    page,
)
from tests.parallel.combined import (
    HOT,
    NONE,
    State,
    Sums,
    Trained,
    by_kind,
    by_many,
    by_one,
    compared,
    refused,
    together,
    travelled,
)
from tests.parallel.distinct import distinct
from tests.parallel.pool import Pool
from ziphius.parallel.rectangles import Rectangle
from ziphius.training.step import StepResult


class One(NamedTuple):
    """What one process did, and the file with its state."""

    results: list[StepResult]
    file: Path

    def state(self) -> State:
        return torch.load(self.file, mmap=True)


Alone = Callable[[str, str], One]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Alone:
    """Runs of one process, each made once."""
    folder = tmp_path_factory.mktemp("alone")

    @cache
    def run(problem: str, precision: str) -> One:
        file = folder / f"{problem}-{precision}.pt"
        silent = PROBLEMS[problem].silent
        results = by_one(problem, precision, silent, file)
        for step in results:
            for counts in step.loads.values():
                assert 4 * counts[HOT] > 0.6 * sum(counts), "one of the four choices of a token"
                assert counts[NONE] == 0
                assert not (silent and any(counts[len(counts) // 2 :]))
        return One(results, file)

    return run


@pytest.mark.parametrize("combo", COMBOS, ids=lambda combo: combo.name)
def test_a_combination_is_one_process(pool: Pool, alone: Alone, combo: Combo) -> None:
    error, one = TOLERANCES[combo.precision].error, alone(combo.problem, combo.precision)
    expected = [one] if error is not None else [one, alone(combo.problem, "float64")]
    files = [run.file for run in expected]
    told = pool.run(combo.world, by_many, combo, PROBLEMS[combo.problem].silent, files)
    for rank in told[1:]:
        assert rank.results == told[0].results
    biases: dict[str, list[float]] = {}
    for rank in told:
        for name, bias in rank.biases.items():
            assert biases.setdefault(name, bias) == bias, f"{name} differs between ranks"
    assert every_number_is_there_once(told, one.state()) > 2e6
    found = together(rank.weights | rank.moments for rank in told)
    if error is not None:
        assert_same(told[0].results, one.results, error)
        for name, (sums,) in found.items():
            assert sums.error <= (0 if name in biases else error), f"{name}: {sums.error}"
    else:
        assert_near(told[0].results, one.results)
        assert_as_far(found, one.state(), expected[1].state(), biases)


def every_number_is_there_once(told: list[Trained], state: State) -> int:
    """Check that owners, and ranks that answer for moments, have all; return how much that is."""
    owned: Counter[str] = Counter()
    for rank in told:
        owned.update(rank.owned)
    moments = together(rank.moments for rank in told if rank.answers)
    assert owned.keys() | moments.keys() == state.keys()
    for name, tensor in state.items():
        if name in owned:
            assert owned[name] == tensor.numel(), name
        else:
            sums = moments[name][0]
            assert sums.count == tensor.numel(), name
            # As many numbers as there are could be some twice and others not at all.
            assert sums.size == pytest.approx(tensor.double().square().sum().item(), rel=1e-9)
    return sum(owned.values())


def assert_same(found: list[StepResult], expected: list[StepResult], error: float) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        for name, value in vars(theirs).items():
            near = pytest.approx(value, rel=error) if isinstance(value, float) else value
            assert getattr(ours, name) == near, name


def assert_near(found: list[StepResult], expected: list[StepResult]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        for name in ("loss", "mtp_loss", "balance_loss", "total_loss"):
            assert getattr(ours, name) == pytest.approx(getattr(theirs, name), rel=LOSS), name
        assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=NORM)
        assert ours.skipped is None
        assert ours.targets == theirs.targets
        for layer, counts in theirs.loads.items():
            assert sum(ours.loads[layer]) == sum(counts)


def assert_as_far(
    found: dict[str, list[Sums]], one: State, exact: State, biases: dict[str, list[float]]
) -> None:
    """Compare distances from float64, and biases, which move by a fixed speed."""
    whole = (Rectangle(name, (0,) * x.ndim, tuple(x.shape), x) for name, x in one.items())
    distances = by_kind(compared(whole, [exact]))
    for kind, (_, sums) in by_kind(found).items():
        if "correction_bias" in kind:
            continue
        beyond = BEYOND**2 if kind.startswith("second.") else BEYOND
        (of_one,) = distances[kind]
        assert sums.error <= beyond * of_one.error, kind
    for name, bias in biases.items():
        most = STEPS * 2 * 0.01 + 1e-6
        torch.testing.assert_close(torch.tensor(bias), one[name].float(), rtol=0, atol=most)


@pytest.mark.parametrize("refusal", REFUSALS, ids=lambda refusal: refusal.name)
def test_what_cannot_work_is_refused_with_what_can(pool: Pool, refusal: Refusal) -> None:
    for line in pool.run(refusal.world, refused, refusal):
        assert refusal.nearest in line
        assert "\n" not in line


def test_the_page_is_written_from_the_table() -> None:
    assert page() == PAGE.read_text("utf-8"), "run python -m tests.combos"


def test_every_setting_is_in_some_row() -> None:
    rows = [combo.parallel for combo in COMBOS]
    schedules = {"1f1b", "interleaved", "zb1p", "zbv", "dualpipe", "dualpipev"}
    assert {row.get("schedule") for row in rows} == {None, *schedules}
    assert {row.get("sharding") for row in rows} == {None, "fsdp", "hsdp"}
    assert {row.get("recompute") for row in rows} == {None, "selective", "full"}
    for key in ("pp", "ep", "tp", "cp", "dp_replicate", "ranks_per_node", "chunks"):
        assert sum(key in row for row in rows) >= 3, key
    assert {combo.problem for combo in COMBOS} == set(PROBLEMS)
    assert {combo.precision for combo in COMBOS} == set(TOLERANCES)


@pytest.mark.parametrize("precision", ["float64", "fp8"])
@pytest.mark.parametrize(("world", "per_node"), [(8, 1), (8, 2), (4, 4)])
def test_a_step_sends_no_byte_more_than_its_choices_ask_for(
    pool: Pool, world: int, per_node: int, precision: str
) -> None:
    """Once per (token, node) and once per (token, rank); back come the rows of pairs, exactly."""
    chunks, top_k, D = 2, 4, 128
    keys = {"ep": world, "ranks_per_node": per_node, "chunks": chunks}
    told = pool.run(world, travelled, Combo(world, keys, "eight", precision))
    layers, nodes = len(told[0].chosen), world // per_node
    assert layers == 4
    tiles, row, number = (D + 4, 2 * D, 4) if precision == "fp8" else (8 * D, 8 * D, 8)
    # How much comes, before it comes: to every node, and to every rank inside.
    tables = [(nodes - 1) * chunks * (1 + 2 * per_node) * 8, (per_node - 1) * chunks * nodes * 16]
    expected, most = [[layers * table for table in tables] for _ in range(world)], 0
    for layer in range(layers):
        ways = distinct([rank.chosen[layer] for rank in told], per_node, experts=32 // world)
        most = max(most, ways.nodes)
        for rank, of_rank in enumerate(expected):
            for hop in range(2):
                tokens, pairs = ways.tokens_out[rank][hop], ways.pairs_out[rank][hop]
                # Slots and rows there, a gate a pair; in backward the gradient goes there again.
                of_rank[hop] += tokens * (4 * top_k + 2 * tiles) + pairs * number
                # The experts' rows back, then their gradients; and the gates'.
                of_rank[hop] += ways.pairs_back[rank][hop] * (2 * row + number)
    assert [rank.bytes for rank in told] == expected
    # Tokens choose four of the eight groups: so they go to four nodes at most, and some do.
    assert most == min(nodes, 4)
