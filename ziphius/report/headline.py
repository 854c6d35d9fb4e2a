"""The figures at the top of a report, and how its MFU comes about."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from ziphius.report.checks import planned
from ziphius.report.formats import duration, percent, short, si, whole
from ziphius.report.read import Run

_FOLDERS = re.compile(r"(?<= )/\S*/(?=\S)")


@dataclass(frozen=True)
class Headline:
    """A figure at the top: what it is, its value as shown, the file's own number, a remark."""

    label: str
    shown: str
    value: float
    remark: str = ""


def subtitle(run: Run) -> str:
    """Return the run in one line: its network, its text, its arithmetic, as far as files say."""
    layers, hidden, experts, chosen = (
        run.setting("model", key)
        for key in ("num_hidden_layers", "hidden_size", "n_routed_experts", "num_experts_per_tok")
    )
    parts = ["A finished training run" if run.summary else "A training run that has not finished"]
    if layers is not None and hidden is not None:
        parts.append(f"{layers} layers of width {hidden}")
    if experts is not None and chosen is not None:
        parts.append(f"{chosen} of {experts} routed experts a token")
    if text := run.text("corpus"):
        parts.append(_FOLDERS.sub("", text))  # the table below has whole paths
    if text := run.text("compute"):
        parts.append(text)
    return " · ".join(parts)


def headlines(run: Run) -> list[Headline]:
    """Return the figures that say how a run went, as far as its files have them."""
    worth = _reward(run) or _loss(run)
    found = (_bits(run), worth, _speed(run), _mfu(run), _violation(run), _length(run))
    return [headline for headline in found if headline is not None]


def _bits(run: Run) -> Headline | None:
    points = run.heldout()
    if points is not None:
        value, step = float(points[1][-1]), int(points[0][-1])
        remark = f"held-out text, step {step:,}"
        before = run.number("heldout_bpb_before")
        if run.summary is not None and before is not None:
            remark = f"held-out text; {before:.3f} before training"
        return Headline("bits per byte", f"{value:.3f}", value, remark)
    values = run.metrics.average("bpb")
    values = values[np.isfinite(values)]
    if not len(values):
        return None
    value = float(values[-1])
    return Headline("bits per byte", f"{value:.3f}", value, "training text, average at the end")


def _reward(run: Run) -> Headline | None:
    if not run.metrics.has("reward"):
        return None
    value = float(run.metrics.average("reward")[-1])
    return Headline("reward", f"{value:.3f}", value, "mean of a rollout, average at the end")


def _loss(run: Run) -> Headline | None:
    value = run.number("final_loss")
    if value is None:
        value = run.metrics.last("loss")
    if value is None:
        return None
    mtp = run.number("final_mtp_loss")
    if mtp is None:
        mtp = run.metrics.last("mtp_loss")
    remark = "nats per token, last step" + ("" if mtp is None else f"; MTP {mtp:.3f}")
    return Headline("loss", f"{value:.3f}", value, remark)


def _speed(run: Run) -> Headline | None:
    value, seconds = run.number("tokens_per_s"), run.number("train_seconds")
    if value is not None and not run.metrics.has("reward"):
        remark = f"over {duration(seconds)}" if seconds is not None else ""
        return Headline("tokens/s", _digits(value), value, remark)
    value = _median(run, "tokens_per_s")
    if value is None:
        return None
    return Headline("tokens/s", _digits(value), value, "median of the steps")


def _mfu(run: Run) -> Headline | None:
    value, peak = run.number("mfu"), run.number("peak_flops")
    if value is not None and not run.metrics.has("reward"):
        remark = f"of {si(peak, 'FLOP/s')}" if peak is not None else "of the machine's peak"
        return Headline("MFU", percent(value), value, remark)
    value = _median(run, "mfu")
    if value is None:
        return None
    return Headline("MFU", percent(value), value, "median of the steps")


def _median(run: Run, name: str) -> float | None:
    """Return the median over steps.

    It stands in while a run has no summary, and for rollouts, whose rows are no fixed batch: only
    steps know how much was learned, and how long answering took.
    """
    values = run.metrics.points(name)[1]
    return float(np.median(values)) if len(values) else None


def _violation(run: Run) -> Headline | None:
    value = run.number("final_max_violation")
    if value is None:
        value = run.metrics.last("max_violation")
    if value is None:
        return None
    return Headline("MaxVio", f"{value:.2f}", value, "last step; 0 is even load")


def _length(run: Run) -> Headline:
    steps = run.number("steps") or float(run.metrics.steps[-1])
    tokens = run.number("tokens") or run.metrics.last("tokens")
    plan = planned(run)
    remark = f"{short(tokens)} tokens" if tokens is not None else ""
    if run.summary is None and plan is not None:
        remark += f"; planned: {short(plan[1])} {plan[0]}"
    return Headline("steps", whole(steps), steps, remark)


def _digits(speed: float) -> str:
    return short(speed) if speed >= 1e6 else whole(speed) if speed >= 100 else f"{speed:.3g}"


@dataclass(frozen=True)
class Formula:
    """MFU, term by term, with the numbers of this run."""

    speed: str
    flops: str
    peak: str
    result: str
    notes: tuple[str, ...]


def mfu_formula(run: Run) -> Formula | None:
    """Write out how MFU comes about, if the summary has every term of it."""
    speed, flops, peak = (
        run.number(name) for name in ("tokens_per_s", "training_flops_per_token", "peak_flops")
    )
    if speed is None or flops is None or not peak:
        return None
    share, notes = speed * flops / peak, []
    mean = run.number("mfu")
    if mean is not None and abs(mean - share) > 0.02 * share:
        notes.append(f"The mean over the steps is {percent(mean)}.")
    if formula := run.text("flops_formula"):
        notes.append(f"FLOPs per token: {formula}.")
    if source := run.text("peak_source"):
        notes.append(f"Peak: {source}.")
    return Formula(
        speed=_digits(speed),
        flops=si(flops, "FLOP"),
        peak=si(peak, "FLOP/s"),
        result=percent(share),
        notes=tuple(notes),
    )
