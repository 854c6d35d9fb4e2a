"""How decoding slows as it grows, and what exact mode costs beside torch's products.

Measured on the network of ``decode_vs_peers`` with random weights: the price of exact mode for a
prompt of 512 tokens and at batch 1, 8 and 16; decoding behind 128 to 32,768 tokens; and decoding
with 8 to 256 experts of which a token always meets 6. Both modes share the weights and take turns.

The long contexts are not computed: the cache is filled with random rows, which cost as much to read
as real ones. The networks of different experts have four layers, so that they fit in memory
together. Prints tables, and the figures as JSON in the last line.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from decode_vs_peers import BATCHES, NETWORK, PREFILL, TINY, prompts
from rich.console import Console
from rich.table import Table
from support import report
from torch import Tensor

from ziphius.config.model import ModelConfig
from ziphius.inference.engine import Engine, EngineOptions
from ziphius.inference.paged import Feed
from ziphius.inference.params import SamplingParams
from ziphius.kernels.select import answering_kernels, torch_products
from ziphius.model.init import initialise
from ziphius.model.precision import Precision
from ziphius.model.transformer import Transformer

LENGTHS = (128, 512, 1024, 2048, 4096, 8192, 16384, 32768)
EXPERTS = (8, 16, 32, 64, 128, 256)
EXPERT_LAYERS = 4
PROMPT = 32

Measure = Callable[[], float]  # runs once and returns tokens a second
Modes = dict[str, Engine]


def engines(config: ModelConfig, kernels: Path, cache_tokens: int) -> Modes:
    """Return the engines of both modes over the same random weights."""
    precision = Precision.for_inference(torch.bfloat16)
    exact = Transformer(config, precision, kernels=answering_kernels(kernels))
    initialise(exact, seed=0)
    fast = Transformer(config, precision, kernels=torch_products(kernels), device="meta")
    fast.load_state_dict(exact.state_dict(), assign=True)
    # Rounds repeat their prompts: nothing may be found.
    shared: dict[str, Any] = {"cache_tokens": cache_tokens, "prefix_cache": False}
    return {
        "exact": Engine(exact, options=EngineOptions(exact=True, **shared)),
        "torch": Engine(fast, options=EngineOptions(exact=False, **shared)),
    }


def prefill(engine: Engine, prompt: list[int]) -> float:
    """Compute a prompt and a token: tokens of the prompt a second."""
    request = engine.add(prompt, _greedy(1))
    began = engine.clock()
    while not request.finished:
        engine.step()
    return len(prompt) / (engine.clock() - began)


def decode(engine: Engine, asked: list[list[int]], new: int, *, computed: bool = True) -> float:
    """Decode ``new`` tokens a prompt: tokens a second without the prompts.

    Prompts that are not ``computed`` leave the cache as it is.
    """
    requests = [engine.add(prompt, _greedy(new + 1)) for prompt in asked]
    answers = [request.answers[0] for request in requests]
    with _skipping(engine, not computed):
        while not all(answer.output for answer in answers):
            engine.step()
    had = sum(len(answer.output) for answer in answers)
    began = engine.clock()
    while not all(answer.finished for answer in answers):
        engine.step()
    seconds = engine.clock() - began
    return (sum(len(answer.output) for answer in answers) - had) / seconds


@contextmanager
def _skipping(engine: Engine, skip: bool) -> Iterator[None]:
    """Pass random hidden states for computed ones, if ``skip``."""
    real, width = engine.forward.hidden, engine.model.config.hidden_size

    def skipped(feeds: list[Feed]) -> Tensor:
        rows = sum(len(feed.tokens) for feed in feeds)
        return torch.randn(rows, width).to(engine.model.precision.compute)

    if skip:
        engine.forward.hidden = skipped  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        engine.forward.hidden = real  # type: ignore[method-assign]


def _greedy(tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)


def in_turn(measures: dict[str, Measure], rounds: int) -> dict[str, list[float]]:
    """Run every measure once a round, after one round that does not count."""
    found: dict[str, list[float]] = {name: [] for name in measures}
    for turn in range(rounds + 1):
        for name, measure in random.Random(turn).sample(list(measures.items()), len(measures)):
            speed = measure()
            if turn:
                found[name].append(speed)
    return found


def grow(cases: dict[str, Measure], rounds: int) -> dict[str, float]:
    """Measure every case in exact mode: tokens a second, the median of the rounds."""
    found = in_turn(cases, rounds)
    return {name: round(statistics.median(speeds), 1) for name, speeds in found.items()}


def compare(
    cases: dict[str, Callable[[Engine], float]], modes: Modes, rounds: int
) -> dict[str, dict[str, float]]:
    """Measure every case in both modes; ``price`` is the part of the speed that exactness takes."""
    measures: dict[str, Measure] = {
        f"{case} {mode}": partial(run, engine)
        for case, run in cases.items()
        for mode, engine in modes.items()
    }
    speeds = in_turn(measures, rounds)
    return {case: row(speeds, case) for case in cases}


def row(speeds: dict[str, list[float]], case: str) -> dict[str, float]:
    exact, fast = speeds[f"{case} exact"], speeds[f"{case} torch"]
    prices = [1 - e / f for e, f in zip(exact, fast, strict=True)]
    return {
        "exact": round(statistics.median(exact), 1),
        "torch": round(statistics.median(fast), 1),
        "price": round(statistics.median(prices), 3),
    }


def price(modes: Modes, vocab_size: int, options: argparse.Namespace) -> dict[str, Any]:
    (long,) = prompts(vocab_size, "prefill", 1, PREFILL)
    cases: dict[str, Callable[[Engine], float]] = {"prefill_512": partial(prefill, prompt=long)}
    for name, batch in BATCHES.items():
        asked = prompts(vocab_size, name, batch, PROMPT)
        cases[name] = partial(decode, asked=asked, new=options.new)
    return compare(cases, modes, options.rounds)


def over_context(engine: Engine, vocab_size: int, options: argparse.Namespace) -> dict[str, float]:
    engine.cache.pages.normal_(generator=torch.Generator().manual_seed(0))
    cases: dict[str, Measure] = {}
    for length in options.lengths:
        asked = prompts(vocab_size, "context", 1, length)
        cases[str(length)] = partial(decode, engine, asked, options.new, computed=False)
    return grow(cases, options.rounds)


def over_experts(
    network: dict[str, Any], options: argparse.Namespace
) -> dict[str, dict[str, float]]:
    cases: dict[str, Measure] = {}
    same = {"num_hidden_layers": EXPERT_LAYERS, "n_group": 1, "topk_group": 1}
    for n in options.experts:
        config = ModelConfig(**{**network, **same, "n_routed_experts": n})
        tell(f"making {n} experts")
        engine = engines(config, options.kernels, 4096)["exact"]
        for name, batch in BATCHES.items():
            asked = prompts(config.vocab_size, name, batch, PROMPT)
            cases[f"{n} {name}"] = partial(decode, engine, asked, options.new)
    speeds = grow(cases, options.rounds)
    return {str(n): {name: speeds[f"{n} {name}"] for name in BATCHES} for n in options.experts}


def tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def show(title: str, columns: list[str], rows: dict[str, list[Any]]) -> None:
    table = Table(*columns, title=title)
    for name, cells in rows.items():
        table.add_row(name, *(str(cell) for cell in cells))
    Console(stderr=True).print(table)


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    network = {**(TINY if options.quick else NETWORK), "num_nextn_predict_layers": 0}
    longest = max(options.lengths) + options.new + 64
    config = ModelConfig(**{**network, "max_position_embeddings": longest})
    tell("making the network")
    modes = engines(config, options.kernels, longest)
    figures: dict[str, Any] = {"exactness": price(modes, config.vocab_size, options)}
    prices = {
        name: [found["exact"], found["torch"], f"{found['price']:.1%}"]
        for name, found in figures["exactness"].items()
    }
    columns = ["measure", "exact tokens/s", "torch's products", "price of exactness"]
    show("exact mode beside torch's products", columns, prices)
    figures["context"] = over_context(modes["exact"], config.vocab_size, options)
    behind = {name: [speed] for name, speed in figures["context"].items()}
    show("decoding behind a context, batch 1", ["tokens before", "tokens/s"], behind)
    del modes
    figures["experts"] = over_experts(network, options)
    columns = ["experts", *(name.replace("_", " at batch ") for name in BATCHES)]
    rows = {n: list(found.values()) for n, found in figures["experts"].items()}
    show(f"tokens/s of {EXPERT_LAYERS} layers", columns, rows)
    figures |= {"rounds": options.rounds, "new": options.new, "quick": options.quick}
    report("decode_growth", figures, record=options.record)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS))
    parser.add_argument("--experts", type=int, nargs="+", default=list(EXPERTS))
    parser.add_argument("--rounds", type=int, default=5, help="rounds that count")
    parser.add_argument("--new", type=int, default=32, help="tokens decoded a prompt")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--kernels", type=Path, default=Path("runs/kernels"))
    parser.add_argument("--quick", action="store_true", help="a tiny network, two of everything")
    parser.add_argument("--record", action="store_true", help="keep the result in results/")
    options = parser.parse_args()
    if options.quick:
        options.lengths, options.experts = [128, 1024], [8, 16]
        options.rounds, options.new = 1, 8
    return options


if __name__ == "__main__":
    main()
