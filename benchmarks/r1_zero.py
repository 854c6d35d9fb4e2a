"""R1-Zero in miniature: rewards alone on a base model, beside as much more pre-training.

The base model is ``tiny``, pre-trained on dialogues in R1-Zero's form (facts 8.7): problems of two
small tasks, where every other one is answered with its reasoning and the rest at once. It is asked
problems that nobody trains on, and trained on twice for the same time: by GRPO, with accuracy and
form as rewards and no fine-tuning before; and on more dialogues, which it has not read, as its
control. The last line is one JSON object with shares of right answers, for each of several seeds.

    python benchmarks/r1_zero.py --record
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.table import Table
from support import report

from ziphius.alignment.measure import measure
from ziphius.alignment.questions import ZERO, mixture_of, open_for_asking, zero_prompt
from ziphius.alignment.reinforce import learning_from_rewards
from ziphius.alignment.tasks.mixture import Mixture
from ziphius.cli.display import Display
from ziphius.config.recipe import Recipe, load_recipe
from ziphius.training import run
from ziphius.training.folder import RunFolder
from ziphius.training.start import open_start

TASKS = "weekdays,sums"
DIALOGUES = 60_000  # for the base model, and as many others for its control
PROBLEMS, MAX_TOKENS = 100, 80
OTHERS = 1000


def dialogues(tasks: Mixture, numbers: range, seed: int) -> Iterator[str]:
    """Yield training problems as a base model may have read them; every other one reasons."""
    for number in numbers:
        problem = tasks.problem_at(seed, "train", number)
        thought = f" <think> {problem.steps} </think>" if number % 2 else ""
        yield f"{zero_prompt(problem.question)}{thought} <answer> {problem.answer} </answer>"


def write(path: Path, texts: Iterator[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts)


def pretrained(folder: Path, text: Path, seconds: float, seed: int, display: Display) -> Path:
    """Pre-train on a file until the time is up; the learning rate follows the clock."""
    recipe = run.resolve(recipe_of(text, seed))
    run.pretrain(recipe, RunFolder(folder), display, seconds=seconds)
    return folder


def continued(
    base: Path, folder: Path, text: Path, seconds: float, seed: int, display: Display
) -> Path:
    """Pre-train a model on, at a rate that rises and falls once more."""
    rates = ("pretrain.learning_rate=1e-3", "pretrain.final_learning_rate=1e-4")
    run.pretrain(
        recipe_of(text, seed, *rates),
        RunFolder(folder),
        display,
        start=open_start(base),
        seconds=seconds,
    )
    return folder


def recipe_of(text: Path, seed: int, *settings: str) -> Recipe:
    given = (
        f"data.source={text}",
        "data.deduplicate=none",
        "data.fim_rate=0",
        "data.document_mask=true",
        "model.vocab_size=1024",
        "tokenizer.vocab_size=1024",
        "pretrain.steps=4000",
        f"run.seed={seed}",
        "run.checkpoint_every=1000000",
        "run.validate_bytes=50000",
    )
    return load_recipe("tiny", [*given, *settings])


def reinforced(base: Path, folder: Path, seconds: float, seed: int, display: Display) -> Path:
    """GRPO from the base model, by accuracy and form."""
    settings = (
        f"grpo.tasks={TASKS}",
        f"grpo.prompt={ZERO}",
        "grpo.rewards=answer,zero_form=0.2",
        "grpo.steps=2000",
        f"grpo.max_tokens={MAX_TOKENS}",
        f"run.seed={seed + OTHERS}",  # other problems than those of the dialogues
        "run.checkpoint_every=1000000",
        "run.validate_bytes=50000",
    )
    start = open_start(base)
    run.train(
        start.into(load_recipe("tiny", settings)),
        lambda settled, watch: learning_from_rewards(settled, start, watch),
        RunFolder(folder, "grpo"),
        display,
        seconds=seconds,
    )
    return folder


def asked(path: Path, seed: int) -> dict[str, Any]:
    """Ask test problems of every task, as the policy samples."""
    llm, prompter = open_for_asking(path, recipe_of(path, seed).run, ZERO, MAX_TOKENS)
    how = {"problems": PROBLEMS, "max_tokens": MAX_TOKENS, "temperature": 1.0}
    found = measure(llm, mixture_of(TASKS), prompter, **how)
    return {"accuracy": found.accuracy, "lengths": found.lengths, "samples": found.samples}


def one_seed(out: Path, seed: int, minutes: float, console: Console) -> dict[str, Any]:
    """Train one seed's three models; return what each answers."""
    shutil.rmtree(out, ignore_errors=True)
    text, others = out / "dialogues.jsonl", out / "others.jsonl"
    write(text, dialogues(mixture_of(TASKS), range(DIALOGUES), seed))
    write(others, dialogues(mixture_of(TASKS), range(DIALOGUES, 2 * DIALOGUES), seed))
    with Display(console) as display:
        base = pretrained(out / "base", text, 60 * minutes, seed, display)
        more = 30 * minutes
        folders = {
            "base": base,
            "control": continued(base, out / "control", others, more, seed, display),
            "grpo": reinforced(base, out / "grpo", more, seed, display),
        }
    return {name: asked(folder, seed) for name, folder in folders.items()}


def show(seeds: dict[str, dict[str, Any]], console: Console) -> None:
    table = Table("seed", "model", *TASKS.split(","), "tokens")
    for seed, found in seeds.items():
        for name, figures in found.items():
            shares = (f"{share:.0%}" for share in figures["accuracy"].values())
            lengths = (f"{length:.1f}" for length in figures["lengths"].values())
            table.add_row(seed, name, *shares, " ".join(lengths))
    console.print(table)


def gains(seeds: dict[str, dict[str, Any]], other: str) -> dict[str, list[float]]:
    """Return, by task, how many points GRPO is above another model, for every seed."""
    return {
        task: [
            round(100 * (f["grpo"]["accuracy"][task] - f[other]["accuracy"][task]), 1)
            for f in seeds.values()
        ]
        for task in TASKS.split(",")
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--minutes", type=float, default=4.0, help="of pre-training; half for each")
    parser.add_argument("--out", type=Path, default=Path("runs/r1_zero"))
    parser.add_argument("--record", action="store_true", help="keep the result in results/")
    options = parser.parse_args()
    if not (options.minutes > 0 and math.isfinite(options.minutes)):
        parser.error("--minutes: give a number above 0")
    console = Console(stderr=True, width=100)
    seeds: dict[str, dict[str, Any]] = {}
    for seed in map(int, options.seeds.split(",")):
        seeds[str(seed)] = one_seed(options.out / str(seed), seed, options.minutes, console)
        show(seeds, console)
    figures = {
        "points_over_base": gains(seeds, "base"),
        "points_over_control": gains(seeds, "control"),
        "mean_over_base": {k: round(fmean(v), 1) for k, v in gains(seeds, "base").items()},
        "mean_over_control": {k: round(fmean(v), 1) for k, v in gains(seeds, "control").items()},
        "minutes": options.minutes,
        "seeds": seeds,
    }
    report("r1_zero", figures, record=options.record)


if __name__ == "__main__":
    main()
