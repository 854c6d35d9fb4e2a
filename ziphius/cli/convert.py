"""``ziphius convert``"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ziphius.cli import options

if TYPE_CHECKING:
    from rich.console import Console

    from ziphius.checkpoint.proof import Proved
    from ziphius.cli.follower import Follower
    from ziphius.inference.gptq import Calibration

DEFAULT_GROUP = 128


def convert(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="The checkpoint to read.")],
    target: Annotated[Path, typer.Argument(metavar="TARGET", help="The folder to write.")],
    to: Annotated[
        str, typer.Option(help="How weights are stored: bf16, fp32, fp8, int8 or int4.")
    ] = "bf16",
    check: Annotated[
        bool,
        typer.Option(
            "--check",
            help="bf16, fp32, fp8: afterwards read both and compare every tensor with what the "
            "form allows it to be off. A TARGET that is there already is only compared.",
        ),
    ] = False,
    memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="The most that the process may hold (4G, 600MB), whatever the checkpoint's size; "
            "by default about 200 MiB beside the program itself.",
        ),
    ] = None,
    scales: Annotated[
        str | None,
        typer.Option(
            metavar="float32|ue8m0",
            help="fp8: any FP32 scales, as V3 has them, or powers of two, as V3.1; by default "
            "those of an FP8 source, else float32.",
        ),
    ] = None,
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
    """Write a checkpoint in another form, some rows at a time. Quantised sources are dequantised.

    fp8 has the published layout, int8 and int4 that of compressed-tensors; everything beside the
    weights comes along. TARGET appears when it is whole. Stopped in between, by Ctrl-C, a kill or a
    full disk, the same command goes on behind the last finished file (of 4 GiB); gptq begins anew.
    gptq holds one layer and the calibration text's activations in memory.

    Examples:

        ziphius convert DeepSeek-V3 DeepSeek-V3-bf16 --to bf16 --check

        ziphius convert runs/mine runs/mine-fp8 --to fp8 --scales ue8m0

        ziphius convert DeepSeek-V3 DeepSeek-V3-int4 --to int4 --memory 2G
    """
    from rich.console import Console

    from ziphius.cli.follower import Follower

    given = {
        "--group-size": group_size,
        "--calibration": calibration,
        "--calibration-tokens": calibration_tokens,
        "--act-order": act_order or None,
        "--damping": damping,
        "--head": head or None,
    }
    _require_sense(to, method, {name for name, value in given.items() if value is not None})
    _require_other_sense(to, method, {"--check": check, "--scales": scales, "--memory": memory})
    console, mtp = Console(), not without_mtp
    if not (check and _is_there(target)):
        with _telling_how_to_go_on(target), ExitStack() as stack:
            quantizer = None
            if method == "gptq":
                quantizer = stack.enter_context(_calibration(source, to, given, mtp=mtp))
            follower = stack.enter_context(Follower(console))
            lines = _convert(source, target, to, given, quantizer, follower,
                             mtp=mtp, scales=scales, memory=memory)  # fmt: skip
        for line in lines:
            console.print(line, highlight=False, markup=False, soft_wrap=True)
    if check:
        _check(source, target, to, console, mtp=mtp)


def _convert(
    source: Path,
    target: Path,
    to: str,
    given: Mapping[str, object],
    quantizer: Calibration | None,
    follower: Follower,
    *,
    mtp: bool,
    scales: str | None,
    memory: str | None,
) -> list[str]:
    """Convert, and return what is to be said about it."""
    from ziphius.checkpoint.convert import convert as convert_checkpoint
    from ziphius.cli.sizes import read_size

    size = given["--group-size"]
    group = DEFAULT_GROUP if size is None else size
    assert isinstance(group, int), "it is the option's type"
    comparison = convert_checkpoint(
        source,
        target,
        to,
        mtp=mtp,
        group_size=group,
        quantizer=quantizer,
        head=bool(given["--head"]),
        scales=scales,
        memory=None if memory is None else read_size("--memory", memory),
        on_progress=follower.tell,
    )
    lines = [f"{target}: {len(comparison.used)} tensors used, {len(comparison.ignored)} ignored"]
    if quantizer is not None and quantizer.experts:
        lines.append(
            f"{quantizer.experts_rounded} of {quantizer.experts} experts were rounded: fewer than "
            f"{quantizer.how.least_rows} rows of the calibration text reached them"
        )
    return lines + _ragged(target, to, group)


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


def _require_other_sense(to: str, method: str, given: Mapping[str, object]) -> None:
    from ziphius.checkpoint.forms import FP8, INTEGERS, PLAIN
    from ziphius.config.errors import BadInput

    for name, forms in (("--check", (*PLAIN, FP8)), ("--scales", (FP8,))):
        if given[name] and to not in forms and to in (*PLAIN, FP8, *INTEGERS):
            raise BadInput(f"{name} is for --to {' and --to '.join(forms)}, not for --to {to}")
    if given["--memory"] is not None and method == "gptq":
        raise BadInput("--memory does not bound --method gptq, which holds a layer: leave it out")


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


@contextmanager
def _telling_how_to_go_on(target: Path) -> Iterator[None]:
    """Say after Ctrl-C what is kept, and the command that goes on: this one."""
    from ziphius.checkpoint.unfinished import finished_shards, unfinished_folder
    from ziphius.cli.display import program
    from ziphius.config.errors import ZiphiusError

    try:
        yield
    except KeyboardInterrupt:
        kept = finished_shards(target)
        if not kept:
            raise
        stopped = ZiphiusError(
            f"stopped; {kept} finished file(s) are kept in {unfinished_folder(target)}; "
            f"go on with: {program()} {shlex.join(sys.argv[1:])}"
        )
        stopped.exit_code = 130
        raise stopped from None


def _ragged(target: Path, to: str, group_size: int) -> list[str]:
    """Say which matrices other engines refuse."""
    from ziphius.checkpoint.config_json import read_config
    from ziphius.checkpoint.forms import FP8, INTEGERS, ragged_blocks, ragged_weights

    config = read_config(target)
    if to == FP8 and (blocks := ragged_blocks(config)):
        name, shape = next(iter(blocks.items()))
        return [
            f"{len(blocks)} matrices ({name} {list(shape)} and so on) have sides that are no "
            "multiple of 128, and their last blocks are cut off as in the published weights: "
            "transformers refuses such sides or reads wrong weights (docs/peers.md)"
        ]
    if to in INTEGERS and (ragged := ragged_weights(config, group_size)):
        return [
            f"{len(ragged)} matrices ({ragged[0]} and so on) have inputs that do not divide into "
            f"groups of {group_size}: only this package reads them; choose --group-size for other "
            "engines"
        ]
    return []


# The proof


def _is_there(target: Path) -> bool:
    return (target / "config.json").is_file()


def _check(source: Path, target: Path, to: str, console: Console, *, mtp: bool) -> None:
    """Compare both, and print the worst tensor of every kind; ZiphiusError if one is wrong."""
    from ziphius.checkpoint.forms import stored_name
    from ziphius.checkpoint.proof import prove
    from ziphius.cli.follower import Follower
    from ziphius.config.errors import BadInput, ZiphiusError

    if (found := stored_name(target)) != to:
        raise BadInput(f"{target}: is stored as {found}, not as {to}: give --to {found}")
    with Follower(console) as follower:
        proved = prove(source, target, mtp=mtp, on_progress=follower.tell)
    _print(proved, console)
    wrong = [each for each in proved if each.fault]
    if wrong:
        raise ZiphiusError(
            f"{target}: {len(wrong)} of {len(proved)} tensors are not what {source} converts to: "
            f"{wrong[0].name}: {wrong[0].fault}: remove it and convert again"
        )
    console.print(f"proved: all {len(proved)} tensors", highlight=False)


def _print(proved: list[Proved], console: Console) -> None:
    """Print a line for every kind of tensor and bound, and below it the worst tensor of each."""
    from rich.table import Table
    from rich.text import Text

    table, named = Table(), []
    table.add_column("")
    for title in ("tensors", "largest error", "allowed"):
        table.add_column(title, justify="right")
    table.add_column("share of")
    for kind, bound in sorted({(each.kind, each.bound) for each in proved}, reverse=True):
        same = [each for each in proved if (each.kind, each.bound) == (kind, bound)]
        worst = max(same, key=lambda each: (bool(each.fault), each.error))
        error, allowed = (f"{share:.3%}" if share else "0" for share in (worst.error, bound))
        row = (kind, f"{len(same):,}", error, allowed, worst.share_of)
        table.add_row(*map(Text, row), style="bold red" if worst.fault else "")
        if worst.error or worst.fault:
            named.append(f"worst, {kind}: {worst.name}")
    console.print(table)
    for line in named:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
