"""What the server costs: tokens a second over HTTP beside the same engine in this process.

With as many threads as cores the engine shares them with the server and the client; with one fewer
it has its own. Both answer the same prompts with the same options, in turn; over HTTP every answer
is a stream of its own on loopback, read by the client of ``ziphius bench serve``, which takes cores
too. Texts must be equal. Prints a table, and the figures as JSON in the last line.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from support import alternate, report

from ziphius.inference.llm import LLM
from ziphius.inference.params import SamplingParams
from ziphius.model.count import count
from ziphius.serving.bench.load import Asking, Client
from ziphius.serving.bench.prompts import Prompt
from ziphius.serving.server import bind

READY_SECONDS = 300


@contextmanager
def serving(checkpoint: Path, threads: int) -> Iterator[str]:
    """Start ``ziphius serve`` on a free port; yield its address once it answers."""
    with bind("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
    command = [
        *(sys.executable, "-m", "ziphius", "serve", str(checkpoint)),
        *("--port", str(port), "--threads", str(threads), "--speculation", "off"),
    ]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        try:
            assert server.stderr is not None
            ends = time.monotonic() + READY_SECONDS
            for line in server.stderr:
                if "chat page" in line:
                    break
                if time.monotonic() > ends:
                    raise SystemExit("the server was not ready in time")
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()
            server.communicate(timeout=60)


def measure(options: argparse.Namespace, llm: LLM, url: str, at_once: int) -> dict[str, Any]:
    """Return both speeds at ``at_once`` requests, and the median of their ratios."""
    vocabulary = llm.model.config.vocab_size
    generator = torch.Generator().manual_seed(at_once)
    prompts = torch.randint(10, vocabulary, (at_once, options.prompt), generator=generator).tolist()
    params = SamplingParams(temperature=0, max_tokens=options.new, ignore_eos=True)
    texts: dict[str, list[str]] = {}

    def in_process() -> None:
        outputs = llm.generate(prompts, params)
        texts["in process"] = [output.outputs[0].text for output in outputs]

    def over_http() -> None:
        texts["over HTTP"] = asyncio.run(ask(url, prompts, options.new))

    times = alternate({"in process": in_process, "over HTTP": over_http}, options.rounds)
    if texts["in process"] != texts["over HTTP"]:
        raise SystemExit("the server's texts are others")
    tokens = at_once * options.new
    ratios = [a / b for a, b in zip(times["in process"], times["over HTTP"], strict=True)]
    return {
        "parameters": count(llm.model.config).total,
        "threads": torch.get_num_threads(),
        "at_once": at_once,
        **{
            f"{name.replace(' ', '_').lower()}_tokens_per_s": round(
                tokens / statistics.median(seconds), 1
            )
            for name, seconds in times.items()
        },
        "ratio": round(statistics.median(ratios), 3),
        "ratio_range": [round(min(ratios), 3), round(max(ratios), 3)],
    }


async def ask(url: str, prompts: list[list[int]], new: int) -> list[str]:
    """Ask for all answers at once, as streams; return their texts."""
    asking = Asking(endpoint="completions", output_tokens=new, ignore_eos=True)
    async with Client(url, asking) as client:
        await client.meet()
        outcomes = await asyncio.gather(
            *(client.ask(number, Prompt("ids", ids)) for number, ids in enumerate(prompts))
        )
    for outcome in outcomes:
        if outcome.fault is not None:
            raise SystemExit(f"a request failed: {outcome.fault.message}")
    return [outcome.text for outcome in outcomes]


def show(rows: list[dict[str, Any]]) -> None:
    title = "tokens a second over HTTP, beside the engine in this process"
    table = Table(
        "parameters", "threads", "at once", "in process", "over HTTP", "ratio", title=title
    )
    for row in rows:
        table.add_row(
            f"{row['parameters']:,}",
            str(row["threads"]),
            str(row["at_once"]),
            f"{row['in_process_tokens_per_s']:.0f}",
            f"{row['over_http_tokens_per_s']:.0f}",
            f"{row['ratio']:.2f} ({row['ratio_range'][0]:.2f} to {row['ratio_range'][1]:.2f})",
        )
    Console(stderr=True).print(table)


def main() -> None:
    options = parse()
    rows = []
    for checkpoint in options.checkpoints:
        for threads in options.threads:
            torch.set_num_threads(threads)
            llm = LLM(checkpoint, speculation="off", max_running=max(options.at_once))
            with serving(checkpoint, threads) as url:
                rows += [measure(options, llm, url, at_once) for at_once in options.at_once]
    show(rows)
    figures = {"rows": rows, "prompt": options.prompt, "new": options.new}
    report("serving_overhead", figures, record=options.record)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "checkpoints", type=Path, nargs="*", default=[Path("runs/quickstart")], help="what answers"
    )
    parser.add_argument("--at-once", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--prompt", type=int, default=64, help="tokens of each prompt")
    parser.add_argument("--new", type=int, default=64, help="tokens of an answer")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="of the engine")
    parser.add_argument("--record", action="store_true", help="keep the result in results/")
    return parser.parse_args()


if __name__ == "__main__":
    main()
