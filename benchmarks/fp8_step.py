"""A training step of the preset tiny in FP8 beside one in BF16, on a processor.

Both start from the same weights and see the same tokens, a step each in turn; the ratio is the
median over rounds of BF16's seconds by FP8's. The last line is one JSON object.

    python benchmarks/fp8_step.py
"""

from __future__ import annotations

import argparse
import statistics

import torch
from rich.console import Console
from rich.table import Table
from support import alternate, report
from torch import Tensor

from ziphius.config.recipe import load_recipe
from ziphius.data.rows import Batch
from ziphius.training.optimizer import AdamW
from ziphius.training.run import build_model, resolve
from ziphius.training.schedule import settings_at
from ziphius.training.step import train_step


class Steps:
    """One model and its optimizer; every call is a step on the same batch."""

    def __init__(self, recipe: str, compute: str) -> None:
        self.recipe = resolve(load_recipe(recipe, [f"precision.compute={compute}"]))
        torch.set_num_threads(self.recipe.run.threads)
        self.model = build_model(self.recipe)
        self.optimizer = AdamW(self.model.parameters(), self.recipe.pretrain, self.model.kernels)
        config = self.recipe.pretrain
        size = (config.batch_size, config.sequence_length + 1)
        generator = torch.Generator().manual_seed(0)
        tokens_BS = torch.randint(2, self.recipe.model.vocab_size, size, generator=generator)
        self.batch = Batch(tokens_BS, torch.zeros_like(tokens_BS))
        self.settings = settings_at(config, step=1, tokens=0)
        self.losses: list[float] = []

    def __call__(self) -> Tensor | None:
        config = self.recipe.pretrain
        result = train_step(self.model, self.optimizer, self.batch, config, self.settings)
        self.losses.append(result.loss)
        return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", nargs="?", default="tiny")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--record", action="store_true", help="keep the figures in results/")
    arguments = parser.parse_args()
    steps = {name: Steps(arguments.recipe, name) for name in ("bfloat16", "fp8")}
    times = alternate(steps, arguments.rounds)
    ratios = [b / f for b, f in zip(times["bfloat16"], times["fp8"], strict=True)]
    table = Table("step", "seconds, median", "loss after the last")
    for name, seconds in times.items():
        table.add_row(name, f"{statistics.median(seconds):.3f}", f"{steps[name].losses[-1]:.4f}")
    Console().print(table)
    figures = {
        "recipe": arguments.recipe,
        "rounds": arguments.rounds,
        "seconds": {name: round(statistics.median(t), 4) for name, t in times.items()},
        "ratio": round(statistics.median(ratios), 3),
        "ratio_range": [round(min(ratios), 3), round(max(ratios), 3)],
        "kernels": str(steps["fp8"].model.kernels),
    }
    report("fp8_step", figures, record=arguments.record)


if __name__ == "__main__":
    main()
