"""Run folders as training would leave them, made of formulas and a seed instead of training."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

RECIPE = """\
[model]
num_hidden_layers = {layers}
n_routed_experts = {experts}
num_experts_per_tok = 4
first_k_dense_replace = 1
hidden_size = 128

[pretrain]
steps = {planned}
batch_size = 16
sequence_length = 512
learning_rate = 6e-3
clip_norm = 1.0

[data]
source = "stdlib"

[run]
seed = 0
threads = 2
"""
PROMPT = "def read(path):"
TEXT = (
    "\n    with open(path) as file:\n        lines = file.readlines()\n"
    "    return [line.strip() for line in lines if line]\n\n\n"
    "def _get_name(self, name, default=None):\n    if name not in self._names:\n"
    "        return default\n    return self._names[name]\n"
)


@dataclass
class Plan:
    """What happens in a run. ``dead`` maps a layer to experts that starve from ``dead_from`` on."""

    steps: int = 2000
    planned: int | None = None
    layers: int = 4
    experts: int = 32
    log_every: int = 10
    validate_every: int = 200
    tokens: int = 8192
    seed: int = 0
    unevenness: float = 0.12
    dead: dict[int, list[int]] = field(default_factory=dict)
    dead_from: int = 600
    spike_at: int | None = None
    skipped: dict[int, str] = field(default_factory=dict)
    rollback: tuple[int, int] | None = None  # (left after this step, on from this step)
    final: float = 2.9
    ramp: bool = False
    finished: bool = True


def write_run(folder: Path, plan: Plan) -> Path:
    """Write the run's folder and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(plan.seed)
    lines = list(metric_lines(plan, rng))
    write_lines(folder / "metrics.jsonl", lines)
    if plan.log_every:
        with (folder / "balance.jsonl").open("w") as file:
            for line in balance_lines(plan, rng):
                file.write(json.dumps(line) + "\n")
    recipe = RECIPE.format(
        layers=plan.layers, experts=plan.experts, planned=plan.planned or plan.steps
    )
    (folder / "recipe.toml").write_text(recipe)
    if plan.finished:
        text = json.dumps(summary(plan, lines), indent=2)
        (folder / "summary.json").write_text(text + "\n")
    return folder


def write_lines(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def metric_lines(plan: Plan, rng: np.random.Generator) -> Iterator[dict[str, Any]]:
    order = list(range(1, plan.steps + 1))
    back = 0
    if plan.rollback:
        left, on = plan.rollback
        order = [*range(1, left + 1), *range(on, plan.steps + 1)]
        back = left
    for place, step in enumerate(order):
        yield metric_line(plan, step, int(place >= back) if plan.rollback else 0, rng)


def metric_line(plan: Plan, step: int, rollbacks: int, rng: np.random.Generator) -> dict[str, Any]:
    share = step / plan.steps
    fall = (plan.steps / 12) ** 0.75
    noise = 0.06 * rng.standard_normal()
    loss = plan.final + (8.3 - plan.final) / (1 + (step / fall) ** 1.1) + noise
    again = bool(plan.rollback and rollbacks)
    if plan.spike_at is not None and step >= plan.spike_at and not again:
        loss += 2.4 * math.exp(-(step - plan.spike_at) / (0.004 * plan.steps + 1))
    mtp = loss + 0.25 + 0.3 * share + 0.04 * rng.standard_normal()
    speed = 5800 + 160 * rng.standard_normal() - (2500 if step == 1 else 0)
    batch = 16 if not plan.ramp else min(16, 4 + 4 * int(8 * share))
    skipped = None if again and step <= plan.rollback[0] else plan.skipped.get(step)
    nan = skipped is not None and "finite" in skipped
    line: dict[str, Any] = {
        "step": step,
        "tokens": step * plan.tokens,
        "seconds": step * 1.41,
        "loss": math.nan if nan else loss,
        "mtp_loss": math.nan if nan else mtp,
        "balance_loss": 4.4e-4 * (1 + 0.2 * math.exp(-9 * share)),
        "total_loss": math.nan if nan else loss + 0.3 * mtp,
        "bpb": math.nan if nan else loss * 0.437,
        "mtp_bpb": math.nan if nan else mtp * 0.437,
        "lr": 6e-3 * min(step / (0.02 * plan.steps + 1), 0.525 + 0.475 * math.cos(math.pi * share)),
        "batch_size": batch,
        "gamma": 0.01 if not plan.ramp or share < 0.9 else 0.0,
        "mtp_weight": 0.3 if not plan.ramp or share < 0.6 else 0.1,
        "tokens_per_s": speed,
        "mfu": speed * 2.14e7 / 1.05e12,
        "grad_norm": (0.4 + 1.5 * math.exp(-8 * share)) * math.exp(0.18 * rng.standard_normal()),
        "max_violation": 0.28 + 1.2 * math.exp(-14 * share) + 0.05 * abs(rng.standard_normal()),
        "skipped": skipped,
        "rollbacks": rollbacks,
    }
    if step % plan.validate_every == 0:
        line["heldout_bpb"] = loss * 0.437 + 0.16
        line["mtp_agreement"] = 0.66 * (1 - math.exp(-5 * share)) + 0.004 * rng.standard_normal()
    return line


def balance_lines(plan: Plan, rng: np.random.Generator) -> Iterator[dict[str, Any]]:
    layers = range(1, plan.layers + 1)
    tastes = {layer: rng.standard_normal(plan.experts) for layer in layers}
    for step in range(plan.log_every, plan.steps + 1, plan.log_every):
        share = step / plan.steps
        told = {}
        for layer in layers:
            pull = 0.7 * math.exp(-12 * share) * tastes[layer]
            weights = np.exp(pull + plan.unevenness * rng.standard_normal(plan.experts))
            if step >= plan.dead_from:
                weights[plan.dead.get(layer, [])] = 0
            loads = np.rint(weights / weights.sum() * plan.tokens * 4).astype(int)
            reach = 0.25 * (1 - math.exp(-6 * share)) * (1 + 0.3 * layer / plan.layers)
            told[str(layer)] = {
                "loads": loads.tolist(),
                "bias_min": -reach,
                "bias_mean": 0.01 * reach,
                "bias_max": 1.2 * reach,
            }
        yield {"step": step, "tokens": step * plan.tokens, "layers": told}


def summary(plan: Plan, lines: list[dict[str, Any]]) -> dict[str, Any]:
    last = lines[-1]
    spike = None
    if plan.spike_at is not None:
        spike = {"step": plan.spike_at, "nats": 2.371}
    return {
        "steps": last["step"],
        "tokens": last["tokens"],
        "train_seconds": 1.41 * last["step"],
        "tokens_per_s": plan.tokens / 1.41,
        "final_loss": last["loss"],
        "final_mtp_loss": last["mtp_loss"],
        "final_max_violation": last["max_violation"],
        "heldout_bpb_before": 3.5466,
        "heldout_bpb_after": plan.final * 0.437 + 0.201,
        "ngram_bpb": 1.92164,
        "xz_bpb": 1.59295,
        "corpus": "standard library of CPython 3.11.7",
        "corpus_files": 729,
        "corpus_bytes": 12079736,
        "corpus_sha256": "4e387dcbff10720f2ea99144f6f984ce0b3d80414344d9fb5f4943edf94ad88f",
        "heldout_packages": ["colorsys", "ctypes", "enum", "mailbox", "pickletools", "tarfile"],
        "heldout_bytes": 511995,
        "removed": {
            "exact duplicate": {"documents": 31, "bytes": 402117},
            "near duplicate": {"documents": 12, "bytes": 98211},
            "too short": {"documents": 48, "bytes": 1204},
        },
        "vocab_size": 4096,
        "compute": "float32",
        "seed": plan.seed,
        "threads": 2,
        "peak_memory_gib": 1.1826171875,
        "torch": "2.13.0+cpu",
        "kernels": "attention=sdpa grouped=loop",
        "peak_flops": 1.05e12,
        "peak_source": "largest of 5 float32 matrix products of 2048 on this machine",
        "training_flops_per_token": 2.14e7,
        "flops_formula": "forward = 2 * (active - embedding) + layers * heads * "
        "(qk_head_dim + v_head_dim) * (T + 1); training = 3 * forward",
        "mfu": plan.tokens / 1.41 * 2.14e7 / 1.05e12,
        "rollbacks": last["rollbacks"],
        "skipped_steps": sum(line["skipped"] is not None for line in lines),
        "largest_spike": spike,
        "resumed": 0,
        "mtp_layers": [plan.layers],
        "samples": [
            {"prompt": PROMPT, "text": TEXT, "note": "temperature 0.7, seed 3"},
            {"prompt": "class ", "text": "Reader(object):\n    pass\n", "note": "greedy"},
        ],
    }
