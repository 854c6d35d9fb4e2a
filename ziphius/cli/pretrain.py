"""``ziphius pretrain``"""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from ziphius.cli import options
from ziphius.cli.processes import Processes, joined


def pretrain(
    recipe: options.Recipe,
    out: options.Out,
    resume: options.Resume = False,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Optimizer steps, in place of the recipe's length.")
    ] = None,
    overrides: options.Overrides = None,
) -> None:
    """Pre-train the network of a RECIPE on its text.

    The folder gets recipe.toml (every setting), metrics.jsonl (a line a step), checkpoints as often
    as run.checkpoint_every says, report.html, summary.json and checkpoint/, a Hugging Face
    directory.

    Ctrl-C and SIGTERM finish the step and save. The same command with --resume goes on, bit for bit
    as if nothing had happened; without a checkpoint it starts from the beginning.

    Example: ziphius pretrain tiny --out runs/one --steps 20 --set data.source=my-texts
    """
    from rich.console import Console
    from rich.markup import escape

    from ziphius.cli.display import Display, program
    from ziphius.cli.signals import saving_on_signals
    from ziphius.config.recipe import load_recipe
    from ziphius.report.page import write_report
    from ziphius.training import run
    from ziphius.training.folder import RunFolder

    chosen = load_recipe(recipe, [*(overrides or []), *options.length(steps)])
    processes = Processes.told()
    console = Console(quiet=processes.rank > 0)
    folder = RunFolder(out, resume=resume, job=processes.job)
    # A job that torchrun has begun again goes on with what it has saved, and with nobody else's.
    folder.resume |= processes.restarts > 0 and folder.is_of(processes.job)
    going_on = telling_how_to_go_on(out, processes)
    with going_on, joined(chosen, processes) as mesh, Display(console) as display:
        stopping = partial(saving_on_signals, console)
        trained = run.pretrain(chosen, folder, display, mesh=mesh, stopping=stopping)
    if processes.rank:
        return
    report = write_report(folder.path)
    before, after = (trained.summary[f"heldout_bpb_{when}"] for when in ("before", "after"))
    console.print(
        f"\nheld-out text: {before:.3f} bits per byte before, [bold]{after:.3f}[/bold] after\n"
        f"next: {escape(program())} generate {escape(shlex.quote(str(out)))} 'def'\n"
        f"report: {escape(str(report))}",
        highlight=False,
        soft_wrap=True,
    )


@contextmanager
def telling_how_to_go_on(
    out: Path, processes: Processes | None = None, verb: str = "pretrain", *begun: str
) -> Iterator[None]:
    """Add the command that goes on with a run to the word of what has stopped it.

    ``begun`` are the arguments that follow the recipe.
    """
    from ziphius.config.errors import ZiphiusError
    from ziphius.parallel.collectives import Lost
    from ziphius.training.loop import Stopped

    going_on = partial(resume_command, out, processes, verb, *begun)
    try:
        yield
    except Stopped as stopped:
        stopped.advice = f"go on with: {going_on()}"
        raise
    except Lost as lost:
        if written_recipe(out).is_file():
            lost.advice = f"go on with: {going_on()}"
        raise
    except KeyboardInterrupt:
        if not written_recipe(out).is_file():
            raise
        at_once = ZiphiusError("stopped")
        at_once.exit_code = 130
        at_once.advice = f"go on with: {going_on()}"
        raise at_once from None


def written_recipe(out: Path) -> Path:
    """Return the recipe that a run has written: an extension's first phases lie in its folder."""
    own = out / "recipe.toml"
    return own if own.is_file() else next(iter(sorted(out.glob("phase-*/recipe.toml"))), own)


def resume_command(
    out: Path, processes: Processes | None = None, verb: str = "pretrain", *begun: str
) -> str:
    """Return the command that goes on with a run, whatever began it."""
    from ziphius.cli.display import program, python

    recipe, called = shlex.quote(str(written_recipe(out))), program()
    if processes is not None and processes.world > 1:
        torchrun = (
            "torchrun" if shutil.which("torchrun") else f"{python()} -m torch.distributed.run"
        )
        nodes = processes.world // processes.per_node  # if several, they have to meet as before
        several = f" --nnodes {nodes}" * (nodes > 1)
        called = f"{torchrun}{several} --nproc-per-node {processes.per_node} -m ziphius"
    arguments = "".join(f" {shlex.quote(argument)}" for argument in begun)
    return f"{called} {verb} {recipe}{arguments} --out {shlex.quote(str(out))} --resume"
