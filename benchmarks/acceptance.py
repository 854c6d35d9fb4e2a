"""How many drafts of the MTP module a model accepts of itself, on a run's held-out text.

Prompts are the beginnings of held-out rows. Speculation is forced on; a draft is accepted when it
is the token that is sampled anyway, so that the answers are those without speculation, which is
checked. No speed is measured. Prints a table, and the figures as JSON in the last line.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from support import report

from ziphius.config.recipe import load_recipe
from ziphius.data.corpus import read_corpus
from ziphius.data.heldout import heldout_rows
from ziphius.data.tokenizer import load_tokenizer
from ziphius.inference.llm import LLM
from ziphius.inference.params import SamplingParams

CACHE_TOKENS = 16_384


def prompts(run: Path, count: int, length: int) -> list[list[int]]:
    """Return the first tokens of held-out rows that lie at even distances."""
    recipe, tokenizer = load_recipe(str(run / "recipe.toml")), load_tokenizer(run / "checkpoint")
    width = recipe.pretrain.sequence_length
    rows = heldout_rows(read_corpus(recipe.data).heldout, tokenizer, width, 10**6)
    step = max(1, len(rows.tokens_MT) // count)
    found: list[list[int]] = rows.tokens_MT[::step][:count, :length].tolist()
    return found


def answers(llm: LLM, asked: list[list[int]], temperature: float, new: int) -> list[Any]:
    params = [
        SamplingParams(temperature=temperature, max_tokens=new, seed=seed, detokenize=False)
        for seed in range(len(asked))
    ]
    return [output.outputs[0].token_ids for output in llm.generate(asked, params)]


def measure(run: Path, asked: list[list[int]], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a row a temperature and depth: acceptance and judged drafts by place."""
    how: dict[str, Any] = {"kernel_cache": options.kernels, "cache_tokens": CACHE_TOKENS}
    found = []
    for temperature in options.temperatures:
        plain = LLM(run, speculation="off", **how)
        expected = answers(plain, asked, temperature, options.new)
        for depth in options.depths:
            llm = LLM(run, speculation="on", draft_depth=depth, **how)
            if answers(llm, asked, temperature, options.new) != expected:
                raise SystemExit(f"depth {depth} at temperature {temperature}: other tokens")
            noted = llm.engine.acceptance
            row = {
                "temperature": temperature,
                "depth": depth,
                "acceptance": [round(rate, 4) for rate in noted.rates],
                "judged": noted.judged,
                "tokens_a_step": round(1 + sum(noted.accepted) / noted.judged[0], 3),
                "tokens": sum(map(len, expected)),
            }
            print(row, flush=True)
            found.append(row)
    return found


def show(rows: list[dict[str, Any]]) -> None:
    title = "drafts accepted, by place"
    table = Table("temperature", "depth", "place 1", "place 2", "tokens a step", title=title)
    for row in rows:
        rates = [f"{rate:.1%}" for rate in (*row["acceptance"], 0)[:2]]
        second = rates[1] if row["depth"] > 1 else ""
        shown = (f"{row['temperature']:g}", str(row["depth"]), rates[0], second)
        table.add_row(*shown, f"{row['tokens_a_step']:.2f}")
    Console(stderr=True).print(table)


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    asked = prompts(options.run, options.prompts, options.prompt)
    rows = measure(options.run, asked, options)
    show(rows)
    figures = {"rows": rows, "prompts": len(asked), "prompt": options.prompt, "new": options.new}
    report("acceptance", figures, record=options.record)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "run", type=Path, nargs="?", default=Path("runs/quickstart"), help="a finished run"
    )
    parser.add_argument("--depths", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 0.7, 1.0])
    parser.add_argument("--prompts", type=int, default=64, help="how many")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of each")
    parser.add_argument("--new", type=int, default=96, help="tokens of an answer, at most")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--kernels", type=Path, default=Path("runs/kernels"))
    parser.add_argument("--record", action="store_true", help="keep the result in results/")
    return parser.parse_args()


if __name__ == "__main__":
    main()
