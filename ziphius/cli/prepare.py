"""``ziphius prepare``"""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ziphius.cli import options

if TYPE_CHECKING:
    from rich.console import Console

    from ziphius.data.engine import LocalEngine
    from ziphius.data.prepared import Prepared
    from ziphius.data.ray_engine import RayEngine


def prepare(
    recipe: options.Recipe,
    out: Annotated[Path, typer.Option(help="The folder to make; it must be new or empty.")],
    engine: Annotated[
        Literal["local", "ray"],
        typer.Option(help="This machine's processes, or Ray Data; RAY_ADDRESS names a cluster."),
    ] = "local",
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes; by default one a core.")
    ] = None,
    overrides: options.Overrides = None,
) -> None:
    """Clean, deduplicate, tokenise and shard the text of a RECIPE, once for many runs.

    Prints what it left out and why. The folder gets the token ids, the held-out documents, the
    tokenizer, and a list of everything that was left out; a recipe trains on it as data.source.

    Example: ziphius prepare tiny --out prepared --set data.source=texts/
    """
    from rich.console import Console

    from ziphius.cli.follower import Follower
    from ziphius.config.recipe import load_recipe
    from ziphius.data.prepare import prepare as prepare_text
    from ziphius.training.machine import usable_threads

    loaded = load_recipe(recipe, overrides or ())
    console = Console()
    with Follower(console) as follower, _engine(engine, workers or usable_threads()) as chosen:
        prepared = prepare_text(loaded, out, chosen, follower.tell)
    _tell(console, prepared, recipe)


def _engine(name: str, workers: int) -> LocalEngine | RayEngine:
    if name == "ray":
        from ziphius.data.ray_engine import RayEngine

        return RayEngine(workers, os.environ.get("RAY_ADDRESS"))
    from ziphius.data.engine import LocalEngine

    if workers > 1:
        # Each process would otherwise start threads for every core.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    return LocalEngine(workers)


def _tell(console: Console, prepared: Prepared, recipe: str) -> None:
    from rich.table import Table

    from ziphius.cli.display import program

    table = Table(title="left out", title_justify="left")
    table.add_column("reason")
    table.add_column("documents", justify="right")
    table.add_column("bytes", justify="right")
    table.add_column("for example", overflow="fold")
    for count in prepared.removed_counts:
        table.add_row(
            count.reason, f"{count.documents:,}", f"{count.bytes:,}", "\n".join(count.examples)
        )
    if prepared.removed_counts:
        console.print(table, markup=False)
    text_tokens = prepared.tokens - 2 * prepared.documents
    setting = shlex.quote(f"data.source={prepared.path}")
    console.print(
        f"{prepared.description}; sha256 {prepared.sha256[:16]}\n"
        f"to train on: {prepared.documents:,} documents, {prepared.train_bytes:,} bytes, "
        f"{prepared.tokens:,} tokens with BOS and EOS, "
        f"{prepared.train_bytes / max(1, text_tokens):.2f} bytes per token without\n"
        f"held out: {len(prepared.heldout):,} documents, {prepared.heldout_bytes:,} bytes\n"
        f"{prepared.path}: {len(prepared.sources)} source(s), vocabulary "
        f"{prepared.tokenizer.get_vocab_size():,}; everything left out is in removed.jsonl\n"
        f"next: {program()} pretrain {shlex.quote(recipe)} --out runs/first --set {setting}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
