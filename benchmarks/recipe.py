"""What rewards are worth: GRPO beside as much more fine-tuning, for several seeds.

Begins with the extended model of a quickstart, for each seed fine-tunes it, and trains the result
on twice for the same time: from rewards, and on the same conversations again. Prints shares of
right answers to problems that nobody trained on; the last line is one JSON object.

    python benchmarks/recipe.py runs/quickstart --record
"""

from __future__ import annotations

import argparse
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from support import report

from ziphius.alignment.sft import fine_tuning
from ziphius.cli.display import Display
from ziphius.cli.miniature import STAGES, Miniature, seconds_of
from ziphius.config.recipe import load_recipe
from ziphius.training.loop import never_stopping
from ziphius.training.text import prepare_text

TOLD = ("sft", "control", "grpo")


def one_seed(
    run: Path, out: Path, seed: int, minutes: float, given: list[str], console: Console
) -> dict[str, Any]:
    """Train one seed's three models; return what each answers."""
    if out.exists():
        shutil.rmtree(out)
    out.mkdir(parents=True)
    (out / "extend").symlink_to((run / "extend").absolute())
    seconds = {**seconds_of(STAGES, minutes)}
    seconds["control"] = seconds["grpo"]
    recipe = load_recipe(str(run / "recipe.toml"))
    with Display(console) as display:
        text = prepare_text(recipe, display)
        settings = [*given, f"run.seed={seed}"]
        work = Miniature(out, settings, seconds, None, display, never_stopping)
        found = {stage: work.run(stage, list(text.corpus.train)) for stage in ("sft", "grpo")}
        # As often as the time allows, at a rate that has begun to fall.
        again = (work.source("sft", "sft"), "sft.epochs=200", "sft.learning_rate=2e-3")
        found["control"] = work.train("control", "sft", fine_tuning, *again)
    return {
        name: {key: value for key, value in figures.items() if key != "samples"}
        for name, figures in found.items()
    }


def gains(seeds: Mapping[str, Mapping[str, Any]], other: str) -> dict[str, list[float]]:
    """Return, by task, how many points GRPO is above another model, for every seed."""
    found: dict[str, list[float]] = {}
    for figures in seeds.values():
        for task, share in figures["grpo"]["accuracy"].items():
            gain = 100 * (share - figures[other]["accuracy"][task])
            found.setdefault(task, []).append(round(gain, 1))
    return found


def show(seeds: Mapping[str, Mapping[str, Any]], console: Console) -> None:
    table = Table("task", *(f"{name}, seed {seed}" for seed in seeds for name in TOLD))
    first = next(iter(seeds.values()))
    for task in first["grpo"]["accuracy"]:
        table.add_row(
            task, *(f"{f[n]['accuracy'][task]:.0%}" for f in seeds.values() for n in TOLD)
        )
    table.add_row("tokens", *(f"{f[n]['length']:.1f}" for f in seeds.values() for n in TOLD))
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="the folder of a quickstart")
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--minutes", type=float, default=10.5, help="as of a quickstart")
    parser.add_argument("--out", type=Path, default=Path("runs/recipe"))
    parser.add_argument("--set", action="append", default=[], help="of the recipe, as grpo.steps=9")
    parser.add_argument("--record", action="store_true", help="keep the result in results/")
    options = parser.parse_args()
    if not (options.minutes > 0 and math.isfinite(options.minutes)):
        parser.error("--minutes: give a number above 0")
    console = Console(stderr=True, width=140)
    seeds = {}
    for seed in map(int, options.seeds.split(",")):
        out = options.out / str(seed)
        seeds[str(seed)] = one_seed(options.run, out, seed, options.minutes, options.set, console)
    show(seeds, console)
    over_sft, over_control = gains(seeds, "sft"), gains(seeds, "control")
    figures = {"points_over_sft": over_sft, "points_over_control": over_control, "seeds": seeds}
    report("recipe", figures, record=options.record)


if __name__ == "__main__":
    main()
