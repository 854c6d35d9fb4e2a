"""What a longer context is worth to the preset tiny that has learned recall: needles and positions.

Pre-trains it on its own text with recall text mixed in, extends it by YaRN in two phases, and asks
for facts in held-out text of every length: before, after, and after without YaRN. Prints the maps,
keeps the figures with --record and the picture with --picture.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from support import report

from ziphius.config.data import SourceConfig
from ziphius.config.recipe import Recipe, load_recipe
from ziphius.data.corpus import read_corpus
from ziphius.evaluation.long_context import lengths_between, long_context, write_needles
from ziphius.evaluation.needle import NeedleTest, recall_documents
from ziphius.report.needle import draw_needles
from ziphius.training.extend import extend
from ziphius.training.folder import RunFolder
from ziphius.training.run import pretrain
from ziphius.training.text import heldout_documents

PRESET = "tiny"
# A recall document is about as long as a row, in characters, and now and then a tenth of it.
CHARACTERS_A_TOKEN = 3
SHORTEST = 100
# Enough that a run of some million tokens meets each once or twice.
RECALL_CHARACTERS = 4_000_000
DENSE_CHARACTERS = 400


class Watch:
    """Tells what a run says, and every so many of its steps."""

    def __init__(self, every: int) -> None:
        self.every = every

    def say(self, text: str) -> None:
        print(text, flush=True)

    def step(self, record: Mapping[str, Any], steps: int) -> None:
        if record["step"] % self.every == 0 or record["step"] == steps:
            told = ("loss", "bpb", "lr", "tokens_per_s", "seconds")
            figures = "  ".join(f"{name} {record[name]:.5g}" for name in told)
            print(f"step {record['step']} of {steps}  {figures}", flush=True)


def write_recall(file: Path, texts: Sequence[str], longest: int, seed: int, **how: Any) -> None:
    """Write recall documents of up to ``longest`` characters."""
    mean = (longest - SHORTEST) / math.log(longest / SHORTEST)
    count = int(RECALL_CHARACTERS / mean)
    made = recall_documents(texts, count, characters=(SHORTEST, longest), seed=seed, **how)
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in made), "utf-8")
    print(f"{count:,} recall documents of up to {longest:,} characters")


def with_recall(recipe: Recipe, folder: Path, row: int, share: float, seed: int) -> Recipe:
    """Return the recipe with recall documents as a ``share`` of its text."""
    corpus = read_corpus(load_recipe(PRESET).data)
    texts = [document.text for document in corpus.train]
    spread, dense = folder / f"recall-{row}.jsonl", folder / f"dense-{row}.jsonl"
    write_recall(spread, texts, CHARACTERS_A_TOKEN * row, seed)
    write_recall(dense, texts, DENSE_CHARACTERS, seed, facts=6, told=(0.9, 1.0))
    weights = {"stdlib": 1 - share, str(spread): share / 2, str(dense): share / 2}
    sources = tuple(SourceConfig(path=path, weight=weight) for path, weight in weights.items())
    changes = {"sources": sources, "deduplicate": "exact"}
    return recipe.model_copy(update={"data": recipe.data.model_copy(update=changes)})


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Train, extend and measure; return the figures."""
    folder: Path = options.folder
    if not options.keep and folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    recipe = load_recipe(PRESET, [*options.set, f"run.seed={options.seed}", "run.threads=2"])
    seconds = {}
    base, out = folder / "base", folder / "long"
    if not (base / "summary.json").is_file():
        short = recipe.pretrain.sequence_length
        chosen = with_recall(recipe, folder, short, options.share, options.seed)
        began = time.perf_counter()
        pretrain(chosen, RunFolder(base), Watch(options.every))
        seconds["pretrain"] = time.perf_counter() - began
    assert recipe.extend is not None, "the preset has the table"
    if out.exists():
        shutil.rmtree(out)
    chosen = with_recall(recipe, folder, recipe.extend.lengths[-1], options.share, options.seed + 1)
    began = time.perf_counter()
    extend(chosen, base, out, Watch(max(1, options.every // 20)))
    seconds["extend"] = time.perf_counter() - began
    began = time.perf_counter()
    context = recipe.model.max_position_embeddings
    figures = long_context(
        base,
        out,
        heldout_documents(load_recipe(PRESET).data),
        NeedleTest(lengths_between(context, recipe.extend.lengths), samples=options.samples),
        trained=recipe.extend.lengths,
        options={"kernel_cache": recipe.run.cache},
        on_progress=lambda name, done, every: print(
            f"\r{name} {done}/{every} ", end="", flush=True
        ),
    )
    seconds["measure"] = time.perf_counter() - began
    print()
    write_needles(figures, out)
    summaries = [
        json.loads((at / "summary.json").read_text()) for at in (base, out / "phase-1", out)
    ]
    told = ("steps", "tokens", "tokens_per_s", "heldout_bpb_before", "heldout_bpb_after",
            "peak_memory_gib")  # fmt: skip
    names = ("pretrain", "phase 1", "phase 2")
    return {
        **figures,
        "share": options.share,
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "runs": {
            name: {key: summary[key] for key in told}
            for name, summary in zip(names, summaries, strict=True)
        },
    }


def show(figures: Mapping[str, Any]) -> None:
    for name, cells in figures["maps"].items():
        depths = [f"{100 * depth:.0f}%" for depth in figures["depths"]]
        table = Table("tokens", *depths, title=f"needles found, {name}")
        for length, row in zip(figures["lengths"], cells, strict=True):
            table.add_row(f"{length:,}", *(f"{share:.2f}" for share in row))
        Console(stderr=True).print(table)
    for name, nats in figures["positions"].items():
        print(f"{name}: nats a token up to {figures['edges'][1:]}: {nats}")


def main() -> None:
    options = parse()
    torch.set_num_threads(2)
    figures = run(options)
    show(figures)
    if options.picture:
        title = "A longer context for the preset tiny, by YaRN"
        draw_needles(figures, options.picture, title=title)
    report("long_context", figures, record=options.record)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--share", type=float, default=0.5, help="of recall text, in tokens")
    parser.add_argument("--samples", type=int, default=8, help="questions a cell")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", action="append", default=[], metavar="TABLE.KEY=VALUE")
    parser.add_argument("--folder", type=Path, default=Path("runs/long_context"))
    parser.add_argument("--keep", action="store_true", help="go on with the base model there")
    parser.add_argument("--every", type=int, default=100, help="steps between two lines")
    parser.add_argument("--picture", type=Path, help="a file to draw the maps into")
    parser.add_argument("--record", action="store_true", help="keep the result in results/")
    return parser.parse_args()


if __name__ == "__main__":
    main()
