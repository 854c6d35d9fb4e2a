"""``ziphius inspect``"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ziphius.cli import options

if TYPE_CHECKING:
    from ziphius.config.model import ModelConfig


def inspect(
    target: Annotated[
        str, typer.Argument(metavar="RECIPE|CHECKPOINT", help="A preset, a TOML file or a folder.")
    ],
    length: Annotated[int, typer.Option(min=1, help="Sequence length for FLOPs.")] = 4096,
    overrides: options.Overrides = None,
) -> None:
    """Count parameters, bytes and operations per token, on the meta device: any size, no memory.

    For a checkpoint it also compares the file's tensors with the config, and the weights with their
    checksums.

    Example: ziphius inspect 671b
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from ziphius.model.count import FLOPS_FORMULA

    table = Table(title=Text(target), show_header=False)
    table.add_column(style="dim")
    table.add_column(justify="right")
    table.add_column(style="dim")
    for name, value, note in _rows(_read_config(target, overrides), length):
        table.add_row(name, value, note)
    console = Console()
    console.print(table)
    if _is_folder(target):
        report = _tensor_report(Path(target))
        console.print(report, highlight=False, markup=False, soft_wrap=True)
    console.print(f"FLOPs, causal attention counted as causal: {FLOPS_FORMULA}", style="dim")


def _read_config(target: str, overrides: list[str] | None) -> ModelConfig:
    from ziphius.checkpoint.config_json import read_config
    from ziphius.checkpoint.folder import checkpoint_folder
    from ziphius.config.errors import BadInput
    from ziphius.config.recipe import load_recipe

    if not _is_folder(target):
        return load_recipe(target, overrides or ()).model
    if overrides:
        raise BadInput(f"--set changes a recipe, and {target} is a checkpoint")
    return read_config(checkpoint_folder(Path(target)))


def _is_folder(target: str) -> bool:
    """Say whether a checkpoint is meant: a preset's name comes first, as everywhere."""
    from ziphius.config.recipe import preset_names

    return target not in preset_names() and Path(target).is_dir()


def _tensor_report(path: Path) -> str:
    """Say how a checkpoint's tensors compare with its config; damaged files raise BadInput."""
    from ziphius.checkpoint.huggingface import examine

    result = examine(path)
    kinds = ("used", "missing", "unused", "ignored")
    counts = ", ".join(f"{len(getattr(result, kind))} {kind}" for kind in kinds)
    named = [f"{kind}: {name}" for kind in kinds[1:] for name in sorted(getattr(result, kind))]
    return "\n".join([f"tensors: {counts}", *named])


def _rows(config: ModelConfig, length: int) -> list[tuple[str, str, str]]:
    import torch

    from ziphius.model.count import cache_bytes, count, forward_flops

    n = count(config)
    forward = forward_flops(config, length, n)
    return [
        ("total", f"{n.total:,}", "main model"),
        ("active", f"{n.active:,}", "embedding and head included"),
        ("active", f"{n.active_without_embedding:,}", "without the embedding"),
        ("active", f"{n.active_without_embedding - n.head:,}", "without embedding and head"),
        ("embedding", f"{n.embedding:,}", ""),
        ("output head", f"{n.head:,}", ""),
        ("MTP", f"{n.mtp_unique:,}", f"unique, depth {config.num_nextn_predict_layers}"),
        ("MTP", f"{n.mtp_unique + n.mtp_copies:,}", "with its copies of embedding and head"),
        ("MTP active", f"{n.mtp_active:,}", "unique"),
        ("checkpoint", f"{n.checkpoint:,}", "everything a Hugging Face folder holds"),
        ("routing biases", f"{n.routing_biases:,}", "counted in the totals"),
        ("BF16 weights", f"{2 * n.checkpoint / 2**30:,.2f} GiB", "the whole checkpoint"),
        ("latent cache", f"{cache_bytes(config, torch.bfloat16):,} B", "a token, BF16"),
        ("forward", f"{forward / 1e9:,.3f} GFLOP", f"a token at length {length}"),
        ("training", f"{3 * forward / 1e9:,.3f} GFLOP", f"a token at length {length}"),
    ]
