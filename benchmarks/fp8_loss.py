"""The loss of FP8 training beside that of BF16, step by step on the same batches (facts 4.5).

All runs start from the same weights and see the same tokens. Their losses are smoothed as the
report's curves are (EMA 0.9); what counts is the largest relative difference from BF16 over all
steps after the smoothing has something to smooth. The control is BF16 again with other kernels,
which sum in another order: what is left of a difference that no precision causes. `ue8m0` rounds
all scales to powers of two, as V3.1 was trained. The last line is one JSON object.

    python benchmarks/fp8_loss.py                      500 steps of the preset tiny
    python benchmarks/fp8_loss.py --plot docs/images   and a picture of the curves
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress, TimeRemainingColumn
from rich.table import Table
from support import report

from ziphius.config.recipe import Recipe, load_recipe
from ziphius.training.optimizer import AdamW
from ziphius.training.run import build_model, resolve
from ziphius.training.schedule import settings_at
from ziphius.training.step import train_step
from ziphius.training.text import prepare_text
from ziphius.training.watch import Watch

SMOOTHING = 0.9
SETTLED = 20  # steps until the average of the first losses has lost its beginning
BOUND = 0.0025
CALM = (
    "pretrain.batch_size=32",
    "pretrain.micro_batch_size=32",
    "pretrain.learning_rate=1e-3",
)
RUNS: dict[str, list[str]] = {
    "bfloat16": ["precision.compute=bfloat16"],
    "fp8": ["precision.compute=fp8"],
    "fp8, ue8m0 scales": ["precision.compute=fp8", "precision.scales=ue8m0"],
    "bfloat16, other kernels": ["precision.compute=bfloat16", "run.kernels=torch"],
}


class Quiet(Watch):
    """Says nothing."""

    def say(self, text: str) -> None: ...

    def step(self, record: Any, steps: int) -> None: ...


def losses_of(recipe: Recipe, batches: list[Any]) -> Iterator[float]:
    """Train on the batches; yield the main loss of every step."""
    config = recipe.pretrain
    model = build_model(recipe)
    optimizer = AdamW(model.parameters(), config, model.kernels)
    tokens = 0
    for step, batch in enumerate(batches, start=1):
        settings = settings_at(config, step, tokens)
        yield train_step(model, optimizer, batch.to(recipe.run.device), config, settings).loss
        tokens += len(batch.tokens_BS) * config.sequence_length


def smoothed(losses: list[float]) -> list[float]:
    """Return the exponential moving average, its beginning corrected."""
    average, weight, found = 0.0, 0.0, []
    for loss in losses:
        average = SMOOTHING * average + (1 - SMOOTHING) * loss
        weight = SMOOTHING * weight + (1 - SMOOTHING)
        found.append(average / weight)
    return found


def compare(losses: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Return of every run the differences of its smoothed loss from that of BF16, relative."""
    base = smoothed(losses["bfloat16"])
    found = {}
    for name, values in losses.items():
        relative = [a / b - 1 for a, b in zip(smoothed(values), base, strict=True)]
        found[name] = {
            "final_loss": smoothed(values)[-1],
            "largest": max(map(abs, relative[SETTLED:])),
            "mean": sum(relative[SETTLED:]) / len(relative[SETTLED:]),
            "last": relative[-1],
        }
    return found


def draw(losses: dict[str, list[float]], path: Path) -> None:
    """Draw the curves, and below them their differences."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (top, below) = pyplot.subplots(2, 1, figsize=(8, 6), sharex=True, layout="constrained")
    base = smoothed(losses["bfloat16"])
    styles = itertools.cycle(["-", "--", ":", "-."])
    for name, values in losses.items():
        style = next(styles)
        curve = smoothed(values)
        top.plot(range(1, len(curve) + 1), curve, style, label=name, linewidth=1.4)
        relative = [100 * (a / b - 1) for a, b in zip(curve, base, strict=True)]
        steps = range(SETTLED + 1, len(curve) + 1)
        below.plot(steps, relative[SETTLED:], style, label=name, linewidth=1.2)
    top.set_ylabel("loss (nats a token), smoothed")
    top.legend(frameon=False)
    below.set_ylabel("difference from BF16, %")
    below.set_xlabel("step")
    lines = [below.axhline(s * 100 * BOUND, color="grey", linewidth=0.8) for s in (1, -1)]
    below.legend(lines[:1], ["0.25 %, the report's bound"], loc="upper right", frameon=False)
    for axes in (top, below):
        axes.grid(alpha=0.25)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", nargs="?", default="tiny")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--as-preset", action="store_true", help="the recipe's batch and rate")
    parser.add_argument("--set", action="append", default=[], metavar="TABLE.KEY=VALUE")
    parser.add_argument("--runs", default=",".join(RUNS), help="names, comma-separated by ';' too")
    parser.add_argument("--plot", type=Path, metavar="FOLDER")
    parser.add_argument("--record", action="store_true", help="keep the figures in results/")
    arguments = parser.parse_args()
    # The schedule stays that of the preset: only its beginning is run.
    changes = [*(() if arguments.as_preset else CALM), *arguments.set]
    recipes = {
        name: resolve(load_recipe(arguments.recipe, [*settings, *changes]))
        for name, settings in RUNS.items()
        if name in arguments.runs
    }
    first = recipes["bfloat16"]
    torch.set_num_threads(first.run.threads)
    text = prepare_text(first, Quiet())
    size = first.pretrain.batch_size
    batches = [text.loader.next_batch(size) for _ in range(arguments.steps)]
    losses: dict[str, list[float]] = {name: [] for name in recipes}
    console = Console(stderr=True)
    with Progress(*Progress.get_default_columns(), TimeRemainingColumn(), console=console) as bar:
        task = bar.add_task("steps", total=len(recipes) * arguments.steps)
        for name, recipe in recipes.items():
            for loss in losses_of(recipe, batches):
                losses[name].append(loss)
                bar.advance(task)
    compared = compare(losses)
    table = Table("run", "smoothed loss at the end", "largest difference", "mean", "at the end")
    for name, row in compared.items():
        shares = (f"{100 * row[key]:+.3f} %" for key in ("largest", "mean", "last"))
        table.add_row(name, f"{row['final_loss']:.4f}", *shares)
    Console().print(table)
    name = "fp8_loss_as_preset" if arguments.as_preset else "fp8_loss"
    if arguments.plot:
        draw(losses, arguments.plot / f"{name}.png")
    figures = {
        "recipe": arguments.recipe,
        "changes": changes,
        "steps": arguments.steps,
        "bound": BOUND,
        "smoothing": SMOOTHING,
        "settled": SETTLED,
        "runs": compared,
        "losses": {name: [round(loss, 5) for loss in values] for name, values in losses.items()},
    }
    report(name, figures, record=arguments.record)
    if arguments.plot:
        print(json.dumps({"picture": f"{name}.png"}))


if __name__ == "__main__":
    main()
