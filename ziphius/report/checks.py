"""What is off in a run, in plain words, and what was looked at without a finding.

The limits are ours. They are meant to make a person look, not to judge a run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from ziphius.report.balancing import layer_name
from ziphius.report.experts import LayerFigures
from ziphius.report.formats import percent, tidy
from ziphius.report.read import Run
from ziphius.report.series import head, tail

HIGH_VIOLATION = 1.0  # mean over layers, last tenth: the busiest expert has twice the mean
HIGH_LAYER_VIOLATION = 2.0  # one layer, last tenth
MANY_SKIPPED = 0.01  # of all steps
RISEN = 0.3  # nats above the lowest average
SLOWED = 0.7  # of the run's median throughput
DEAD_SHARE = 0.1  # of the logged steps
_NAMED = 4  # layers that a sentence names

Layers = tuple[LayerFigures, ...]


@dataclass(frozen=True)
class Findings:
    """Sentences about what is off, and the names of the checks that found nothing."""

    warnings: tuple[str, ...]
    passed: tuple[str, ...]


def check(run: Run, layers: Layers) -> Findings:
    """Look at everything that the files allow to look at."""
    warnings, passed = [], []
    for name, look in _CHECKS:
        found = look(run, layers)
        if found is None:
            continue
        sentences = list(found)
        warnings += sentences
        if not sentences:
            passed.append(name)
    return Findings(tuple(warnings), tuple(passed))


def planned(run: Run) -> tuple[str, int] | None:
    """Return what the recipe sets as the run's length: ("steps" or "tokens", how many)."""
    for unit in ("steps", "tokens"):
        value = run.setting("pretrain", unit)
        if isinstance(value, int):
            return unit, value
    return None


def _finished(run: Run, layers: Layers) -> Iterator[str]:
    if run.summary is not None:
        return
    plan, last = planned(run), int(run.metrics.steps[-1])
    text = f"step {last:,}"
    if plan is not None and plan[0] == "steps":
        text += f" of {plan[1]:,}"
    elif plan is not None:
        tokens = run.metrics.last("tokens") or 0.0
        text += f", {percent(tokens / plan[1])} of the planned tokens"
    yield f"The run has not finished: it goes on, or was broken off. Its last step is {text}."


def _finite(run: Run, layers: Layers) -> Iterator[str]:
    columns, applied = run.metrics.columns, run.metrics.applied
    bad = run.metrics.steps[~np.isfinite(columns["loss"]) & applied]
    if len(bad):
        yield f"{_steps(len(bad))} without a finite loss, first step {bad[0]:,}."


def _falling(run: Run, layers: Layers) -> Iterator[str] | None:
    line = run.metrics.average("loss")
    present = np.isfinite(line)
    # What is minimised of rewards is an estimate whose gradient counts; it does not fall.
    if present.sum() < 20 or run.metrics.has("reward"):
        return None
    return _rise(run, line)


def _rise(run: Run, line: np.ndarray) -> Iterator[str]:
    start, end = head(line).mean(), tail(line).mean()
    lowest = int(np.nanargmin(line))
    rise = float(line[np.isfinite(line)][-1] - line[lowest])
    if end >= start:
        yield (
            f"The loss does not fall: {start:.3f} nats in the first tenth of the run, "
            f"{end:.3f} in the last."
        )
    elif rise > RISEN:
        yield (
            f"The loss ends {rise:.2f} nats above its lowest average, "
            f"at step {run.metrics.steps[lowest]:,}."
        )


def _heldout(run: Run, layers: Layers) -> Iterator[str] | None:
    points = run.heldout()
    if points is None or len(points[1]) < 2:
        return None
    first, last = points[1][0], points[1][-1]
    if last < first:
        return iter(())
    return iter([f"Held-out text is not predicted better: {first:.3f} bits per byte before, "
                 f"{last:.3f} after."])  # fmt: skip


def _skipped(run: Run, layers: Layers) -> Iterator[str]:
    count = skipped(run)
    share = count / (len(run.metrics.steps) + run.metrics.replaced)
    if share > MANY_SKIPPED:
        yield f"{_steps(count)} ({percent(share)}) changed nothing: the guard refused the update."


def _rollbacks(run: Run, layers: Layers) -> Iterator[str]:
    count = rollbacks(run)
    if count:
        times = "once" if count == 1 else f"{count} times"
        yield f"The run went back to a checkpoint {times}."


def _dead(run: Run, layers: Layers) -> Iterator[str] | None:
    if not layers:
        return None
    return _dead_layers(run, layers)


def _dead_layers(run: Run, layers: Layers) -> Iterator[str]:
    assert run.balance is not None, "layers come from balance.jsonl"
    now = [figures for figures in layers if figures.last_dead]
    if now:
        named = [
            f"{figures.last_dead} of {figures.experts} in {layer_name(run, figures.index)}"
            for figures in sorted(now, key=lambda figures: -figures.last_dead)
        ]
        yield (
            f"Experts without a token in the last logged step, {run.balance.steps[-1]:,}: "
            f"{_some(named)}."
        )
    enough = max(3.0, DEAD_SHARE * len(run.balance.steps))
    long = [f for f in layers if f not in now and f.worst is not None and f.worst.lines >= enough]
    if long:
        named = [
            f"{layer_name(run, f.index)}, expert {f.worst.expert}, "
            f"steps {f.worst.first:,} to {f.worst.last:,}"
            for f in long if f.worst is not None
        ]  # fmt: skip
        yield f"Experts that were long without a token, and have some now: {_some(named)}."


def _balanced(run: Run, layers: Layers) -> Iterator[str] | None:
    values = tail(run.metrics.columns["max_violation"])
    if not len(values):
        return None
    return _violation(run, layers, float(values.mean()))


def _violation(run: Run, layers: Layers, late: float) -> Iterator[str]:
    speeds = run.metrics.points("gamma")[1]
    reason = " The bias update speed is 0 all along, so nothing evens them out."
    why = reason if len(speeds) and not speeds.any() else ""
    high = [f for f in layers if f.late_violation > HIGH_LAYER_VIOLATION]
    named = [
        f"{1 + f.late_violation:.1f} in {layer_name(run, f.index)}"
        for f in sorted(high, key=lambda f: -f.late_violation)
    ]
    if late > HIGH_VIOLATION:
        yield (
            f"Experts are loaded unevenly: over the last tenth of the run the busiest of a layer "
            f"has {1 + late:.1f} times the mean load (MaxVio {late:.2f})."
            + (f" Highest: {_some(named)}." if named else "")
            + why
        )
    elif named:
        yield f"Busiest expert over the last tenth, in multiples of the mean: {_some(named)}.{why}"


def _speed(run: Run, layers: Layers) -> Iterator[str] | None:
    values = run.metrics.points("tokens_per_s")[1]
    if len(values) < 20:
        return None
    late, median = float(np.median(tail(values))), float(np.median(values))
    if late >= SLOWED * median:
        return iter(())
    return iter([f"Throughput fell: {late:,.0f} tokens/s over the last tenth, "
                 f"{median:,.0f} over the whole run (medians)."])  # fmt: skip


def _utilisation(run: Run, layers: Layers) -> Iterator[str] | None:
    mfu = run.number("mfu")
    if mfu is None:
        return None
    if mfu <= 1:
        return iter(())
    return iter([f"MFU is {tidy(mfu)}, above 1: the peak it refers to is too low."])


def skipped(run: Run) -> int:
    """Return how many steps were not applied: the summary's number, else what the lines say."""
    told = run.number("skipped_steps")
    return len(run.metrics.skips) if told is None else int(told)


def rollbacks(run: Run) -> int:
    """Return how often the run went back: the summary's number, else what the lines say."""
    told = run.number("rollbacks")
    return len(run.metrics.rollbacks) if told is None else int(told)


def _steps(count: int) -> str:
    return "1 step" if count == 1 else f"{count:,} steps"


def _some(parts: list[str]) -> str:
    more = f"; and {len(parts) - _NAMED} more layers" if len(parts) > _NAMED else ""
    return "; ".join(parts[:_NAMED]) + more


# Name of the check as the page lists it, and the check: None where the files lack what it needs.
_CHECKS: tuple[tuple[str, Callable[[Run, Layers], Iterator[str] | None]], ...] = (
    ("the run finished", _finished),
    ("every applied step had a finite loss", _finite),
    ("the loss falls", _falling),
    ("held-out text is predicted better", _heldout),
    ("few steps were skipped", _skipped),
    ("no rollbacks", _rollbacks),
    ("no dead experts", _dead),
    ("loads are even", _balanced),
    ("throughput is steady", _speed),
    ("MFU is below 1", _utilisation),
)
