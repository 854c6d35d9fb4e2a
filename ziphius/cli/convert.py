"""``ziphius convert``"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ziphius.cli import options

if TYPE_CHECKING:
    from ziphius.inference.gptq import Calibration

DEFAULT_GROUP = 128


def convert(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="The checkpoint to read.")],
    target: Annotated[Path, typer.Argument(metavar="TARGET", help="The folder to write.")],
    to: Annotated[
        str, typer.Option(help="How weights are stored: bf16, fp32, fp8, int8 or int4.")
    ] = "bf16",
    group_size: Annotated[
        int | None,
        typer.Option(help="int8, int4: inputs that share a scale, by default 128; -1: a row."),
    ] = None,
    method: Annotated[
        str, typer.Option(help="int8, int4: rounding, or gptq with a calibration text.")
    ] = "rounding",
    calibration: Annotated[
        Path | None, typer.Option(help="gptq: a text file that is like what the model will meet.")
    ] = None,
    calibration_tokens: Annotated[
        int | None, typer.Option(help="gptq: how much of it counts, by default 65536.")
    ] = None,
    act_order: Annotated[
        bool, typer.Option("--act-order", help="gptq: begin with the largest inputs.")
    ] = False,
    damping: Annotated[
        float | None, typer.Option(help="gptq: added to the Hessian's diagonal, by default 0.01.")
    ] = None,
    head: Annotated[
        bool,
        typer.Option(
            "--head",
            help="int8, int4: the output head in eight bits too, by rounding: a small model "
            "answers faster.",
        ),
    ] = False,
    without_mtp: options.WithoutMTP = False,
) -> None:
    """Write a checkpoint in another form, tensor by tensor. Quantised sources are dequantised.

    int8 and int4 have the compressed-tensors layout, fp8 the published one. gptq holds one layer
    and the calibration text's activations in memory; everything else one shard.

    Example: ziphius convert DeepSeek-V3 DeepSeek-V3-int4 --to int4
    """
    from rich.console import Console
    from rich.progress import Progress

    from ziphius.checkpoint.convert import convert as convert_checkpoint

    given = {
        "--group-size": group_size,
        "--calibration": calibration,
        "--calibration-tokens": calibration_tokens,
        "--act-order": act_order or None,
        "--damping": damping,
        "--head": head or None,
    }
    _require_sense(to, method, {name for name, value in given.items() if value is not None})
    console = Console()
    with ExitStack() as stack:
        quantizer = None
        if method == "gptq":
            quantizer = stack.enter_context(_calibration(source, to, given, mtp=not without_mtp))
        progress = stack.enter_context(Progress(console=console))
        task = progress.add_task("tensors", total=None)
        comparison = convert_checkpoint(
            source,
            target,
            to,
            mtp=not without_mtp,
            group_size=DEFAULT_GROUP if group_size is None else group_size,
            quantizer=quantizer,
            head=head,
            on_tensor=lambda done, total: progress.update(task, completed=done, total=total),
        )
    lines = [f"{target}: {len(comparison.used)} tensors used, {len(comparison.ignored)} ignored"]
    if quantizer is not None and quantizer.experts:
        lines.append(
            f"{quantizer.experts_rounded} of {quantizer.experts} experts were rounded: fewer than "
            f"{quantizer.how.least_rows} rows of the calibration text reached them"
        )
    if to in ("int8", "int4"):
        lines += _ragged(target, DEFAULT_GROUP if group_size is None else group_size)
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _require_sense(to: str, method: str, given: set[str]) -> None:
    """Refuse options that the form or the method has no use for: none is dropped."""
    from ziphius.checkpoint.forms import INTEGERS
    from ziphius.config.errors import BadInput
    from ziphius.config.table import nearest

    methods = ("rounding", "gptq")
    if method not in methods:
        raise BadInput(f"--method {method}: no such method{nearest(method, methods)}")
    if to not in INTEGERS and (given or method != "rounding"):
        name = min(given) if given else "--method"
        raise BadInput(f"{name} is for --to {' and --to '.join(INTEGERS)}, not for --to {to}")
    if method == "rounding" and given - {"--group-size", "--head"}:
        raise BadInput(f"{min(given - {'--group-size', '--head'})} is for --method gptq")
    if method == "gptq" and "--calibration" not in given:
        raise BadInput("--method gptq needs --calibration FILE: a text like the model's own work")


def _calibration(source: Path, to: str, given: Mapping[str, object], *, mtp: bool) -> Calibration:
    from ziphius.checkpoint.forms import INTEGERS
    from ziphius.inference.gptq import Calibration, Gptq

    fields = {
        "--group-size": "group_size",
        "--calibration-tokens": "tokens",
        "--act-order": "act_order",
        "--damping": "damping",
    }
    chosen = {field: given[name] for name, field in fields.items() if given[name] is not None}
    text = given["--calibration"]
    assert isinstance(text, Path), "checked before"
    return Calibration(source, text, Gptq(bits=INTEGERS[to], **chosen), mtp=mtp)  # type: ignore[arg-type]


def _ragged(target: Path, group_size: int) -> list[str]:
    """Say which matrices have groups that other engines refuse."""
    from ziphius.checkpoint.config_json import read_config
    from ziphius.checkpoint.forms import ragged_weights

    ragged = ragged_weights(read_config(target), group_size)
    if not ragged:
        return []
    return [
        f"{len(ragged)} matrices ({ragged[0]} and so on) have inputs that do not divide into groups"
        f" of {group_size}: only this package reads them; choose --group-size for other engines"
    ]
