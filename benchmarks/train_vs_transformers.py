"""A training step of a 20 M parameter V3 beside transformers' DeepseekV3ForCausalLM at its best.

Both train the same network (no MTP) from the same weights on the same tokens: forward, loss,
backward, clipping, AdamW, gradients dropped. transformers runs under BF16 autocast with every
attention and every implementation of the experts that it has for processors, and with both of
torch's fast AdamWs; its best combination is measured against Ziphius, a step each in turn. Each has
a process of its own, so that neither works in the memory that the other has left. The last line is
one JSON object; `ratio` is the median over rounds of transformers' seconds by ours.

    python benchmarks/train_vs_transformers.py           the comparison
    python benchmarks/train_vs_transformers.py --grid    and how both grow with experts and length
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table
from support import report
from torch import Tensor

import ziphius
from ziphius.config.model import ModelConfig
from ziphius.config.pretrain import PretrainConfig
from ziphius.data.rows import Batch
from ziphius.kernels.select import Kernels, compiled_kernels, widening_pays
from ziphius.model.init import initialise
from ziphius.model.precision import DTYPES, Precision
from ziphius.model.transformer import Transformer
from ziphius.training.optimizer import AdamW
from ziphius.training.schedule import settings_at
from ziphius.training.step import train_step

NETWORK: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 6,
    "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 0,
    "max_position_embeddings": 8192,
    "num_attention_heads": 4,
    "q_lora_rank": 96,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
    "n_routed_experts": 32,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 128,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
}
# batched_mm gathers a weight matrix for every row, 6 GB a layer in FP32 and kept for backward: more
# than the memory of these machines. deepgemm and sonicmoe are for CUDA.
EXPERTS = ("eager", "grouped_mm")
ATTENTIONS = ("eager", "sdpa")
OPTIMIZERS = ("fused", "foreach")
AGREEMENT = 0.02  # of the losses, relative: BF16 in two orders of summing
STEPS_COMPARED = 5
GRID_STEPS_COMPARED = 2
GRID_EXPERTS = (8, 16, 32, 64, 128)
GRID_LENGTHS = (512, 1024, 2048, 4096, 8192)

Step = Callable[[], float]
Who = tuple[str, ...]  # ("ziphius",), or transformers' attention, experts and optimizer


@dataclass(frozen=True)
class Job:
    """What one comparison trains: the network, and the tokens of every step ``[B, T + 1]``."""

    changes: dict[str, Any]  # of NETWORK
    batch: int
    length: int
    precision: str

    @property
    def config(self) -> ModelConfig:
        return ModelConfig(**{**NETWORK, **self.changes})

    @property
    def tokens_BS(self) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        size = (self.batch, self.length + 1)
        return torch.randint(0, self.config.vocab_size, size, generator=generator)

    @property
    def tokens(self) -> int:
        return self.batch * self.length

    @property
    def settings(self) -> PretrainConfig:
        """Ours, and what both share: rates, decay and clipping."""
        return PretrainConfig(
            steps=1000,
            batch_size=self.batch,
            micro_batch_size=self.batch,
            sequence_length=self.length,
            learning_rate=1e-3,
            final_learning_rate=1e-3,
            balance_loss_weight=0,
            bias_update_speed=0,
            moments="float32",
        )


def job(precision: str, batch: int = 8, length: int = 512, **changes: Any) -> Job:
    return Job(changes, batch, length, precision)


def build(job: Job, kernels: Kernels | None = None) -> Transformer:
    precision = Precision.for_training(DTYPES[job.precision])
    model = Transformer(job.config, precision, kernels=kernels)
    initialise(model, seed=0)
    return model


def ziphius_step(job: Job, cache: Path) -> tuple[Step, Kernels]:
    """Return a step of ours, which returns its loss, and the kernels that were chosen."""
    widen = job.precision == "bfloat16" and widening_pays()
    kernels = compiled_kernels(cache, "widened" if widen else "native")
    model = build(job, kernels)
    optimizer = AdamW(model.parameters(), job.settings, kernels)
    tokens_BS = job.tokens_BS
    batch = Batch(tokens_BS, torch.zeros_like(tokens_BS))
    settings = settings_at(job.settings, step=1, tokens=0)

    def step() -> float:
        return train_step(model, optimizer, batch, job.settings, settings).loss

    return step, kernels


def transformers_step(job: Job, attention: str, experts: str, optimizer: str) -> Step:
    """Return a step of transformers' model from the same weights."""
    with tempfile.TemporaryDirectory() as folder:
        ziphius.save(build(job), f"{folder}/model")
        model = transformers.DeepseekV3ForCausalLM.from_pretrained(
            f"{folder}/model",
            dtype=torch.float32,
            attn_implementation=attention,
            experts_implementation=experts,
        ).train()
    c = job.settings
    matrices = [p for p in model.parameters() if p.ndim > 1]
    gains = [p for p in model.parameters() if p.ndim == 1]
    adamw = torch.optim.AdamW(
        [{"params": matrices}, {"params": gains, "weight_decay": 0.0}],
        lr=c.learning_rate,
        betas=(c.beta1, c.beta2),
        eps=c.adam_eps,
        weight_decay=c.weight_decay,
        **{optimizer: True},
    )
    tokens_BS = job.tokens_BS
    inputs_BT, targets_N = tokens_BS[:, :-1], tokens_BS[:, 1:].flatten()

    def step() -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=job.precision == "bfloat16"):
            logits = model(inputs_BT, use_cache=False).logits.flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits.float(), targets_N)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), c.clip_norm)
        adamw.step()
        adamw.zero_grad(set_to_none=True)
        return loss.item()

    return step


class Worker:
    """A process that trains one of both, a step when it is asked to."""

    def __init__(self, who: Who, job: Job, cache: Path) -> None:
        what = {"who": who, "job": dataclasses.asdict(job), "cache": str(cache)}
        command = [sys.executable, __file__, "--worker", json.dumps(what)]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
        self.about: str = self._read()["about"]

    def step(self) -> dict[str, float]:
        """Do a step; return its loss and its seconds."""
        assert self.process.stdin is not None
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"a worker ended: {self.process.args}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.wait()


def work(what: dict[str, Any]) -> None:
    """Be a worker: a line of JSON for every line that comes in."""
    job, who = Job(**what["job"]), tuple(what["who"])
    if who == ("ziphius",):
        step, kernels = ziphius_step(job, Path(what["cache"]))
        print(json.dumps({"about": str(kernels)}), flush=True)
    else:
        step = transformers_step(job, *who)
        print(json.dumps({"about": "+".join(who)}), flush=True)
    for _ in sys.stdin:
        began = time.perf_counter()
        loss = step()
        seconds = time.perf_counter() - began
        print(json.dumps({"loss": loss, "seconds": seconds}), flush=True)


def take_turns(workers: Sequence[Worker], rounds: int) -> list[list[float]]:
    """Have every worker do a step once a round, after one that does not count: seconds."""
    seconds: list[list[float]] = [[] for _ in workers]
    for turn in range(rounds + 1):
        for worker, times in zip(workers, seconds, strict=True):
            taken = worker.step()["seconds"]
            if turn:
                times.append(taken)
    return seconds


def best_of_transformers(job: Job, rounds: int, cache: Path) -> tuple[Who, dict[str, float]]:
    """Find the fastest combination; return it and the median seconds of every one."""
    combinations: list[Who] = list(itertools.product(ATTENTIONS, EXPERTS, ("fused",)))
    combinations += [("sdpa", "grouped_mm", name) for name in OPTIMIZERS if name != "fused"]
    with ExitStack() as stack:
        workers = [stack.enter_context(Worker(c, job, cache)) for c in combinations]
        times = [statistics.median(seconds) for seconds in take_turns(workers, rounds)]
    found = {"+".join(c): t for c, t in zip(combinations, times, strict=True)}
    return min(combinations, key=lambda c: found["+".join(c)]), found


def peak_gflops(dtype: torch.dtype, size: int = 2048) -> float:
    """Measure torch's product of two square matrices."""
    a, b = torch.randn(2, size, size).to(dtype)
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        a @ b
        seconds.append(time.perf_counter() - began)
    return 2 * size**3 / min(seconds) / 1e9


def step_gflop(job: Job) -> float:
    """Count the products of one step: 6 a weight and token, and causal attention's half square."""
    c, batch, S = job.config, job.batch, job.length + 1
    model = Transformer(c, device="meta")
    routed = sum(p.numel() for n, p in model.named_parameters() if ".store." in n)
    others = sum(p.numel() for n, p in model.named_parameters() if p.ndim > 1) - routed
    active = others - model.embed_tokens.weight.numel()
    active += routed * c.num_experts_per_tok / c.n_routed_experts
    widths = c.num_attention_heads * (c.qk_head_dim + c.v_head_dim) * c.num_hidden_layers
    scores = batch * (S - 1) ** 2 / 2
    return (6 * active * job.tokens + 6 * widths * scores) / 1e9


def compare(
    job: Job,
    combination: Who,
    cache: Path,
    rounds: int,
    steps_compared: int = STEPS_COMPARED,
) -> dict[str, Any]:
    """Run both in turn; return the figures of one comparison."""
    with Worker(("ziphius",), job, cache) as ours, Worker(combination, job, cache) as theirs:
        losses = [(ours.step()["loss"], theirs.step()["loss"]) for _ in range(steps_compared)]
        apart = max(abs(z / t - 1) for z, t in losses)
        if apart > AGREEMENT:
            sys.exit(f"the losses are {apart:.1%} apart, which is no comparison: {losses}")
        our_seconds, their_seconds = take_turns((ours, theirs), rounds)
        kernels = ours.about
    ratios = [t / z for z, t in zip(our_seconds, their_seconds, strict=True)]
    return {
        "ziphius_tokens_per_s": round(job.tokens / statistics.median(our_seconds)),
        "transformers_tokens_per_s": round(job.tokens / statistics.median(their_seconds)),
        "ratio": round(statistics.median(ratios), 3),
        "ratio_range": [round(min(ratios), 3), round(max(ratios), 3)],
        "losses_first": [round(x, 4) for x in losses[0]],
        "losses_last": [round(x, 4) for x in losses[-1]],
        "losses_apart": round(apart, 5),
        "kernels": kernels,
    }


def grid(combination: Who, cache: Path, rounds: int) -> dict[str, list[dict[str, Any]]]:
    """Compare over the number of experts, and over lengths at the same tokens a step."""
    rows: dict[str, list[dict[str, Any]]] = {"experts": [], "length": []}
    how = (combination, cache, rounds, GRID_STEPS_COMPARED)
    for n in GRID_EXPERTS:
        small = job("bfloat16", n_routed_experts=n)
        rows["experts"].append({"experts": n, **compare(small, *how)})
        tell(rows["experts"][-1])
    for length in GRID_LENGTHS:
        batch = max(1, 8192 // length)
        long = job("bfloat16", batch=batch, length=length)
        rows["length"].append({"length": length, **compare(long, *how)})
        tell(rows["length"][-1])
    return rows


def tell(row: Mapping[str, Any]) -> None:
    """Show a row as soon as it is there: the longest take minutes."""
    (name, value), *_ = row.items()
    speeds = f"{row['ziphius_tokens_per_s']:,} and {row['transformers_tokens_per_s']:,} tokens/s"
    print(f"{name} {value}: {speeds}, ratio {row['ratio']}", file=sys.stderr, flush=True)


def show(name: str, rows: list[Mapping[str, Any]]) -> None:
    table = Table(name, "ziphius tokens/s", "transformers tokens/s", "ratio")
    for row in rows:
        keys = (name, "ziphius_tokens_per_s", "transformers_tokens_per_s", "ratio")
        table.add_row(*(f"{row[key]:,}" for key in keys))
    Console(stderr=True).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7, help="rounds that count")
    parser.add_argument("--search-rounds", type=int, default=2, help="rounds of the combinations")
    parser.add_argument("--grid", action="store_true", help="also over experts and lengths")
    parser.add_argument("--cache", type=Path, default=Path("runs/kernels"), help="compiled kernels")
    parser.add_argument("--record", action="store_true", help="keep the result in results/")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if options.worker:
        work(json.loads(options.worker))
        return
    main_job, plain_job = job("bfloat16"), job("float32")
    combination, searched = best_of_transformers(main_job, options.search_rounds, options.cache)
    figures = compare(main_job, combination, options.cache, options.rounds)
    plain_combination, plain_searched = best_of_transformers(
        plain_job, options.search_rounds, options.cache
    )
    plain = compare(plain_job, plain_combination, options.cache, options.rounds)
    gflop, peak = step_gflop(main_job), peak_gflops(torch.bfloat16)
    achieved = gflop * figures["ziphius_tokens_per_s"] / main_job.tokens
    figures |= {
        "winner": "+".join(combination),
        "transformers_seconds": {k: round(v, 3) for k, v in searched.items()},
        "gflop_a_step": round(gflop, 1),
        "peak_gflops": round(peak, 1),
        "peak_gflops_float32": round(peak_gflops(torch.float32), 1),
        "share_of_peak": round(achieved / peak, 3),
        "float32": {
            **plain,
            "winner": "+".join(plain_combination),
            "transformers_seconds": {k: round(v, 3) for k, v in plain_searched.items()},
        },
        "parameters": sum(
            p.numel() for p in Transformer(main_job.config, device="meta").parameters()
        ),
        "tokens_a_step": main_job.tokens,
        "rounds": options.rounds,
        "transformers": transformers.__version__,
    }
    if options.grid:
        figures["grid"] = grid(combination, options.cache, max(2, options.rounds // 2))
        for name, rows in figures["grid"].items():
            show(name, rows)
    report("train_vs_transformers", figures, record=options.record)


if __name__ == "__main__":
    main()
