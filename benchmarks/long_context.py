"""What a longer context is worth to a network of tiny's size: needles, and loss by position.

Pre-trains it on words said twice, then on its own text with facts to recall mixed in, in rows of
512; extends it by YaRN in two phases, to 2K and 8K tokens, with longer documents; settles it in
some steps of 8K at a smaller rate; and asks for facts in held-out text of every length: before,
after, and after without YaRN. Prints the maps, keeps the figures with --record and the picture with
--picture.

    python benchmarks/long_context.py --record --picture docs/images/needles.png
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from support import report

from ziphius.config.data import SourceConfig
from ziphius.config.recipe import Recipe, load_recipe
from ziphius.data.corpus import read_corpus
from ziphius.data.tokenizer import train_tokenizer
from ziphius.evaluation.long_context import lengths_between, long_context, write_needles
from ziphius.evaluation.needle import NeedleTest
from ziphius.evaluation.recall import copy_documents, recall_documents
from ziphius.report.needle import draw_needles
from ziphius.training.extend import extend
from ziphius.training.folder import RunFolder
from ziphius.training.run import pretrain
from ziphius.training.text import heldout_documents

PRESET = "tiny"
# At the preset's own rate, which suits few tokens, attention learns no recall; eight numbers of
# position hardly tell a neighbour from a token 63 further, where the two fastest turn alike: see
# dev/LOG.md.
SETTINGS = (
    "model.max_position_embeddings=512",
    "model.qk_nope_head_dim=16",
    "model.qk_rope_head_dim=16",
    "pretrain.steps=3600",
    "pretrain.sequence_length=512",
    "pretrain.batch_size=4",
    "pretrain.micro_batch_size=4",
    "pretrain.decay_start=60%",
    "pretrain.learning_rate=1.5e-3",
    "pretrain.final_learning_rate=2.5e-4",
    "data.document_mask=true",
    "data.fim_rate=0",
    "data.token_split_rate=0",
    "extend.steps=[500, 500]",
    "extend.batch_sizes=[4, 2]",
    "run.threads=2",
    "run.checkpoint_every=1000000",
    "run.validate_bytes=50000",
)
# Both phases have the rate that pre-training ends with, as published. After so few tokens far facts
# are found by a narrow margin, until some steps at less than half of it.
SETTLING = (
    "extend.lengths=[8192]",
    "extend.steps=[160]",
    "extend.batch_sizes=[2]",
    "extend.learning_rate=1e-4",
)
COPYING = "36%"  # of pre-training, on copies alone
COPIES, ALIKE = 40_000, 0.7
# Documents of facts: in tightly packed short ones it pays to look back, in others how far.
DENSE: dict[str, Any] = {"characters": (200, 700), "told": (0.8, 1.0)}
SPREAD: dict[str, Any] = {"characters": (200, 1600), "told": (0.1, 0.8)}
# Of many facts, so that the last sentence of most lies far back.
LONG: dict[str, Any] = {"told": (0.05, 0.5), "facts": 200, "most": 300}
# Shares of tokens; the preset's own text is the rest.
PRETRAINED = {"copies": 0.2, "dense": 0.25, "spread": 0.25}
EXTENDED = {"long": 0.3, "longer": 0.45, "copies": 0.05, "spread": 0.05}
SETTLED = {"longer": 0.75, "copies": 0.05, "spread": 0.05}


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


def write_texts(folder: Path, texts: Sequence[str], seed: int) -> dict[str, Path]:
    """Write what teaches recall; return the files by name."""
    made = {
        "plain": copy_documents(texts, COPIES, seed=seed),
        "copies": copy_documents(texts, COPIES, seed=seed + 1, alike=ALIKE),
        "dense": recall_documents(texts, 12_000, seed=seed, **DENSE),
        "spread": recall_documents(texts, 8000, seed=seed + 1, **SPREAD),
        "long": recall_documents(texts, 900, seed=seed + 2, characters=(2000, 8000), **LONG),
        "longer": recall_documents(texts, 500, seed=seed + 3, characters=(8000, 26_000), **LONG),
    }
    files = {}
    for name, documents in made.items():
        files[name] = folder / f"{name}.jsonl"
        lines = (json.dumps({"text": text}) + "\n" for text in documents)
        files[name].write_text("".join(lines), "utf-8")
    return files


def write_tokenizer(file: Path, texts: Sequence[str], files: Mapping[str, Path]) -> None:
    """Train the preset's tokenizer on its text, and on some of what is mixed into that."""
    mixed = [files[name].read_text("utf-8")[:1_000_000] for name in ("copies", "dense")]
    size = load_recipe(PRESET).tokenizer.vocab_size
    train_tokenizer([*texts, *mixed], size).save(str(file))


def of_texts(recipe: Recipe, *sources: SourceConfig) -> Recipe:
    """Return the recipe with other text."""
    changes = {"sources": sources, "deduplicate": "none"}
    return recipe.model_copy(update={"data": recipe.data.model_copy(update=changes)})


def mixture(
    files: Mapping[str, Path], shares: Mapping[str, float], begin: str = "0%"
) -> list[SourceConfig]:
    """Return the preset's own text with some files mixed in, from a moment of the run on."""
    weights = {str(files[name]): share for name, share in shares.items()}
    weights["stdlib"] = 1 - sum(shares.values())
    return [SourceConfig(path=path, weight=weight, begin=begin) for path, weight in weights.items()]


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Train, extend and measure; return the figures."""
    folder: Path = options.folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    texts = [document.text for document in read_corpus(load_recipe(PRESET).data).train]
    files = write_texts(folder, texts, options.seed)
    tokenizer = folder / "tokenizer.json"
    write_tokenizer(tokenizer, texts, files)
    own = (f"tokenizer.path={tokenizer}", *options.set, f"run.seed={options.seed}")
    recipe = load_recipe(PRESET, [*SETTINGS, *own])
    settling = load_recipe(PRESET, [*SETTINGS, *own, *SETTLING])
    assert recipe.extend is not None, "the preset has the table"
    watch = Watch(options.every)
    base, extended, out = folder / "base", folder / "extended", folder / "long"
    seconds = {}

    def timed(name: str, work: Callable[[], Any]) -> Any:
        print(f"[{name}]", flush=True)
        began = time.perf_counter()
        done = work()
        seconds[name] = time.perf_counter() - began
        return done

    copying = SourceConfig(path=str(files["plain"]), end=COPYING)
    first = of_texts(recipe, copying, *mixture(files, PRETRAINED, COPYING))
    timed("pretrain", lambda: pretrain(first, RunFolder(base), watch))
    second = of_texts(recipe, *mixture(files, EXTENDED))
    often = Watch(max(1, options.every // 10))
    timed("extend", lambda: extend(second, base, extended, often))
    third = of_texts(settling, *mixture(files, SETTLED))
    timed("settle", lambda: extend(third, extended, out, often))
    context = recipe.model.max_position_embeddings
    lengths = lengths_between(context, recipe.extend.lengths)
    figures = timed(
        "measure",
        lambda: long_context(
            base,
            out,
            heldout_documents(load_recipe(PRESET).data),
            NeedleTest(lengths, samples=options.samples),
            trained=recipe.extend.lengths,
            options={"kernel_cache": recipe.run.cache},
            on_progress=tell,
        ),
    )
    write_needles(figures, out)
    return {
        **figures,
        "seed": options.seed,
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "runs": {
            name: told_of(at)
            for name, at in zip(
                ("pretrain", "phase 1", "phase 2", "settling"),
                (base, extended / "phase-1", extended, out),
                strict=True,
            )
        },
    }


def tell(name: str, done: int, every: int) -> None:
    if done % 20 == 0 or done == every:
        print(f"{name} {done}/{every}", flush=True)


def told_of(folder: Path) -> dict[str, Any]:
    summary = json.loads((folder / "summary.json").read_text())
    told = ("steps", "tokens", "tokens_per_s", "peak_memory_gib")
    return {key: summary[key] for key in told}


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
    report("long_context", figures, record=options.record)
    if options.picture:
        title = "A longer context for a network of tiny's size, by YaRN"
        draw_needles(figures, options.picture, title=title)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=8, help="questions a cell")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", action="append", default=[], metavar="TABLE.KEY=VALUE")
    parser.add_argument("--folder", type=Path, default=Path("runs/long_context"))
    parser.add_argument("--every", type=int, default=100, help="steps between two lines")
    parser.add_argument("--picture", type=Path, help="a file to draw the maps into")
    parser.add_argument("--record", action="store_true", help="keep the result in results/")
    return parser.parse_args()


if __name__ == "__main__":
    main()
