"""GRPO side by side with trl, which samples with transformers: the same network and batch.

Both load once, each in a process of its own, and do a step in turn, round after round: 384 answers
of up to 64 tokens to 24 questions, then one update from them, in float32, without a reference. The
network is the preset ``tiny`` without its MTP module and with random weights, so that almost all
answers have all 64 tokens; ``--checkpoint`` takes a trained one, whose answers end when they like.
trl does its best: the fastest of several ways to compute is searched first. It computes the entropy
of every token's distribution too, which we do not; and we leave out groups of equal rewards, whose
share is told, and which the reward, a share of vowels, makes rare.

trl gets an environment of its own below ``.cache`` (1.5 GB, made once). The last line is one JSON
object: for each tokens/s sampled, of a whole step, sampling's share of the time, and the ratios.

    python benchmarks/rl.py --record
    python benchmarks/rl.py --checkpoint runs/quickstart/sft/checkpoint
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from support import report
from support.checkpoints import PLAIN, Checkpoints
from support.environments import CannotMake, trl_python
from support.workers import EngineFailed, Worker

from ziphius.alignment.questions import Prompter, mixture_of
from ziphius.checkpoint.folder import TOKENIZER_FILE
from ziphius.config.recipe import load_recipe
from ziphius.data.tokenizer import read_tokenizer

ROOT = Path(__file__).parent.parent
SUPPORT = Path(__file__).with_name("support")
# Its third, batched_mm, gathers a matrix for every row: a step took 84 s instead of 12.
EXPERTS = ("grouped_mm", "eager")
OURS, THEIRS = "ziphius", "trl"


@dataclass(frozen=True)
class Job:
    """What both do in a step. ``rows_of`` answers are packed into a row of ours."""

    prompts: list[str]
    prompt_tokens: int  # at most
    questions: int = 24
    group: int = 16
    max_tokens: int = 64
    most_steps: int = 100
    learning_rate: float = 1e-4
    rows_of: int = 4
    threads: int = 2

    def write(self, file: Path) -> str:
        """Write it for the learners, whose command lines have no room for the prompts."""
        file.write_text(json.dumps(asdict(self)), "utf-8")
        return str(file)


def job_of(checkpoint: Path, options: argparse.Namespace) -> Job:
    """Write the prompts of all steps: small tasks, as chats."""
    tokenizer = read_tokenizer(checkpoint / TOKENIZER_FILE)
    tasks, prompter = mixture_of("weekdays,sums,reversal:2,sorting"), Prompter(tokenizer, "r1")
    job = Job([], 0, questions=options.questions, group=options.group, threads=options.threads)
    count = job.questions * job.most_steps
    problems = [tasks.problem_at(0, "train", number) for number in range(count)]
    longest = max(len(prompter.ask(problem).prompt) for problem in problems)
    return replace(
        job,
        prompts=[prompter.text(problem.question) for problem in problems],
        prompt_tokens=longest,
        max_tokens=options.max_tokens,
    )


def ours(checkpoint: Path, job: Job, logs: Path) -> Worker:
    command = [sys.executable, str(SUPPORT / "learner_ziphius.py"), str(checkpoint)]
    command += [job.write(logs / "job.json"), str(logs / "kernels")]
    return Worker(OURS, command, {}, logs / "ziphius.log")


def theirs(python: str, checkpoint: Path, job: Job, variant: str, logs: Path) -> Worker:
    command = [python, str(SUPPORT / "learner_trl.py"), str(checkpoint)]
    command += [job.write(logs / "job.json"), variant]
    quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return Worker(f"{THEIRS} {variant}", command, quiet, logs / f"trl-{variant}.log")


def rounds_of(workers: Sequence[Worker], rounds: int, console: Console) -> list[list[Any]]:
    """Have every worker do a step once a round, after one that does not count."""
    steps: list[list[Any]] = [[] for _ in workers]
    for turn in range(rounds + 1):
        for worker, told in zip(workers, steps, strict=True):
            step = worker.ask("step")
            console.print(f"{worker.name}: {step['seconds']:.2f} s", style="dim")
            if turn:
                told.append(step)
    return steps


def fastest(
    python: str, checkpoint: Path, job: Job, logs: Path, console: Console
) -> tuple[str, dict[str, float | str]]:
    """Find trl's fastest way to compute; return it, and the seconds of a step of every one."""
    answers = job.questions * job.group
    found: dict[str, float | str] = {}
    for variant in (f"{experts}+{size}" for experts in EXPERTS for size in (64, answers)):
        try:
            with theirs(python, checkpoint, job, variant, logs) as worker:
                worker.wait_until_ready(300)
                found[variant] = rounds_of([worker], 1, console)[0][0]["seconds"]
        except EngineFailed as error:
            found[variant] = str(error).splitlines()[0]
    times = {name: value for name, value in found.items() if isinstance(value, float)}
    if not times:
        sys.exit(f"trl can't do a step: {found}")
    return min(times, key=times.__getitem__), found


def speeds(steps: Sequence[Any]) -> dict[str, float]:
    """Return medians over the steps: tokens a second, and the share of time spent sampling."""

    def median(value: Any) -> float:
        return statistics.median(map(value, steps))

    return {
        "sampled_per_s": round(median(lambda s: s["tokens"] / s["sampling_seconds"])),
        "learned_per_s": round(
            median(lambda s: s["tokens"] / (s["seconds"] - s["sampling_seconds"]))
        ),
        "step_per_s": round(median(lambda s: s["tokens"] / s["seconds"])),
        "sampling_share": round(median(lambda s: s["sampling_seconds"] / s["seconds"]), 3),
        "tokens_a_step": round(statistics.fmean(s["tokens"] for s in steps)),
        "groups_left_out": statistics.fmean(s.get("groups_left_out", 0) for s in steps),
    }


def show(found: dict[str, dict[str, float]], console: Console) -> None:
    table = Table("", "sampled/s", "learned/s", "whole step/s", "sampling", title="answer tokens")
    for name, figures in found.items():
        numbers = [figures[key] for key in ("sampled_per_s", "learned_per_s", "step_per_s")]
        table.add_row(name, *(f"{n:,.0f}" for n in numbers), f"{figures['sampling_share']:.0%}")
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, help="a trained one, instead of random weights")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--questions", type=int, default=24)
    parser.add_argument("--group", type=int, default=16)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--variant", help="trl's way to compute, as grouped_mm+64; else searched")
    parser.add_argument("--name", default="rl", help="of the file in results/")
    parser.add_argument("--record", action="store_true", help="keep the result in results/")
    options = parser.parse_args()
    console = Console(stderr=True, width=100)
    torch.set_num_threads(options.threads)  # for the record: the learners do so too
    checkpoint = options.checkpoint
    if checkpoint is None:
        made = Checkpoints.random(ROOT / "runs" / "peers", load_recipe("tiny").model)
        checkpoint = made.form(PLAIN)
    logs = ROOT / "runs" / "rl"
    logs.mkdir(parents=True, exist_ok=True)
    job = job_of(checkpoint, options)
    try:
        python = trl_python(ROOT / ".cache" / "trl")
    except CannotMake as error:
        sys.exit(f"error: {error}")
    variant, tried = options.variant, {}
    if variant is None:
        variant, tried = fastest(python, checkpoint, job, logs, console)
    with ExitStack() as stack:
        workers = [
            stack.enter_context(ours(checkpoint, job, logs)),
            stack.enter_context(theirs(python, checkpoint, job, variant, logs)),
        ]
        for worker in workers:
            worker.wait_until_ready(300)
        about = {worker.name: worker.ask("about") for worker in workers}
        steps = rounds_of(workers, options.rounds, console)
    found = {worker.name: speeds(told) for worker, told in zip(workers, steps, strict=True)}
    show(found, console)
    first, second = found.values()
    kinds = ("sampled_per_s", "learned_per_s", "step_per_s")
    figures = {
        "ratios": {kind: round(first[kind] / second[kind], 2) for kind in kinds},
        **found,
        "weights": "trained" if options.checkpoint else "random",
        "seconds_a_step": {
            w.name: [round(s["seconds"], 3) for s in told]
            for w, told in zip(workers, steps, strict=True)
        },
        "trl_tried": tried,
        "about": about,
        "job": {k: v for k, v in asdict(job).items() if k not in ("prompts", "most_steps")},
    }
    report(options.name, figures, record=options.record)


if __name__ == "__main__":
    main()
