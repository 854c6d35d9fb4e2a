"""The verbs together, and what every one of them does with an error.

Nothing heavy is imported before a verb runs, so that ``--help`` answers at once.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import Annotated, NoReturn

import typer

from ziphius import __version__
from ziphius.cli.bench import make_bench_app
from ziphius.cli.chat import chat
from ziphius.cli.convert import convert
from ziphius.cli.distill import distill
from ziphius.cli.dpo import dpo
from ziphius.cli.extend import extend
from ziphius.cli.generate import generate
from ziphius.cli.grpo import grpo
from ziphius.cli.inspect import inspect
from ziphius.cli.prepare import prepare
from ziphius.cli.pretrain import pretrain
from ziphius.cli.processes import Processes, no_word, told_by_another
from ziphius.cli.quickstart import quickstart
from ziphius.cli.reject import reject
from ziphius.cli.report import report
from ziphius.cli.reward import reward
from ziphius.cli.serve import serve
from ziphius.cli.sft import sft
from ziphius.config.errors import ZiphiusError, in_one_line

HELP = (
    "The DeepSeek-V3 system in one package: train it, open its checkpoints, let it answer.\n\n"
    "Begin with 'ziphius quickstart': it trains a small V3 on this machine in minutes.\n\n"
    "A RECIPE is a preset (tiny, mini, 16b, 671b) or the path of a TOML file; --set "
    "table.key=value changes any setting. A CHECKPOINT is a Hugging Face folder or a run folder."
)


def make_app() -> typer.Typer:
    """Build the command line."""
    app = typer.Typer(
        name="ziphius",
        help=HELP,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode="rich",
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_options)
    for verb in (
        quickstart, prepare, pretrain, extend, sft, reward, dpo, grpo, reject, distill,
        report, generate, chat, serve, inspect, convert,
    ):  # fmt: skip
        app.command()(verb)
    app.add_typer(make_bench_app(), name="bench")
    return app


def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and stop."
        ),
    ] = False,
) -> None:
    pass


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"ziphius {__version__}")
        raise typer.Exit


def run() -> None:
    """Run the command line and leave the process: 0 done, 1 failure, 2 bad input, 130 Ctrl-C.

    Errors are one line, of all processes of a job together; ``--debug`` shows where they come from.
    """
    arguments = sys.argv[1:] or ["--help"]
    # Threads that spin for long while they wait take the cores from whatever else runs there; ones
    # that do not spin at all are slow on an idle machine. dev/LOG.md has the figures.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    try:
        # typer returns the code of its own exits, and 130 for Ctrl-C.
        code = make_app()(arguments, standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except Exception as error:
        if "--debug" in arguments:
            raise
        _leave(*_told(error), error)
    if code == 130:
        _leave("stopped", 130)
    raise SystemExit(code or 0)


def _told(error: Exception) -> tuple[str, int]:
    """Return an error's one line and the exit code."""
    if isinstance(error, ZiphiusError):
        stopped = error.exit_code > 128  # by a signal, with everything saved: no error
        return str(error) if stopped else f"error: {error}", error.exit_code
    if hasattr(error, "format_message"):  # the command line's own: unknown options and the like
        return f"error: {error.format_message()} (see --help)", 2
    return f"error: {type(error).__name__}: {in_one_line(error)} (ziphius --debug shows where)", 1


def _leave(message: str, code: int, error: Exception | None = None) -> NoReturn:
    processes = Processes.told()
    if not getattr(error, "told", False) and not told_by_another(processes):
        if getattr(error, "lost", False) and (silent := no_word(processes)):
            message += f"; no word from rank {', '.join(map(str, silent))}"
        if advice := getattr(error, "advice", ""):
            message += f"; {advice}"
        with suppress(OSError):  # whoever read it is gone
            typer.echo(" ".join(message.splitlines()), err=True)
    raise SystemExit(code) from None
