"""``ziphius quickstart``: the main job, end to end, on this machine."""

from __future__ import annotations

import math
import shlex
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ziphius.cli import options

if TYPE_CHECKING:
    from rich.console import Console

    from ziphius.cli.display import Display
    from ziphius.cli.function import Function
    from ziphius.config.recipe import Recipe
    from ziphius.training.folder import RunFolder
    from ziphius.training.run import Trained
    from ziphius.training.text import Text

# Steps that are timed, after some that are not, to see how many fit into the minutes.
_UNTIMED_STEPS, _TIMED_STEPS = 4, 16
_FEWEST_STEPS = 20
# Where the machine turns out slower than it was timed, training ends after this many times the
# minutes that were asked for.
_OVERTIME = 1.1


def quickstart(
    out: Annotated[
        Path, typer.Option(help="The run's folder; an earlier run moves to NAME.previous.")
    ] = Path("runs/quickstart"),
    minutes: Annotated[
        float, typer.Option(min=0.01, help="How long to train; it decides the number of steps.")
    ] = 6.5,
    steps: Annotated[int | None, typer.Option(min=2, help="Steps, in place of minutes.")] = None,
    overrides: options.Overrides = None,
) -> None:
    """Train a small V3 on this machine in minutes, measure it, and let it write.

    It learns the Python standard library's own source, trains its tokenizer first, and is measured
    on packages that it has not seen, beside an n-gram model and xz on the same text.
    """
    from rich.console import Console

    from ziphius.cli.display import Display
    from ziphius.cli.pretrain import telling_how_to_go_on
    from ziphius.cli.signals import saving_on_signals
    from ziphius.config.errors import BadInput
    from ziphius.config.recipe import load_recipe
    from ziphius.report.page import write_report
    from ziphius.training import run
    from ziphius.training.folder import RunFolder
    from ziphius.training.text import prepare_text

    if not math.isfinite(minutes):
        raise BadInput(f"--minutes {minutes}: give a number of minutes")
    folder = RunFolder(out, replace=True)
    folder.require_room()
    console = Console()
    with Display(console) as display:
        settings = [*(overrides or ()), *options.length(steps)]
        recipe = run.resolve(load_recipe("tiny", settings))
        text = prepare_text(recipe, display)
        limit = math.inf
        if not steps:
            settings += options.length(tokens=_tokens_that_fit(recipe, text, minutes, display))
            recipe, limit = run.resolve(load_recipe("tiny", settings)), 60 * minutes * _OVERTIME
        stopping = partial(saving_on_signals, console)
        with telling_how_to_go_on(out):
            trained = run.pretrain(
                recipe, folder, display, text=text, seconds=limit, stopping=stopping
            )
        summary = _measure(trained, text, recipe, folder, display)
        report = write_report(folder.path)
    _tell(console, summary, out, report)


def _tokens_that_fit(recipe: Recipe, text: Text, minutes: float, display: Display) -> int:
    """Time some steps of a throw-away model; return the tokens that fit, at most the preset's."""
    import time

    import torch

    from ziphius.training.optimizer import AdamW
    from ziphius.training.run import build_model
    from ziphius.training.schedule import settings_at
    from ziphius.training.step import train_step

    display.say(f"timing {_TIMED_STEPS} steps of a throw-away model")
    torch.set_num_threads(recipe.run.threads)
    config = recipe.pretrain
    model = build_model(recipe)
    optimizer = AdamW(model.parameters(), config, model.kernels)
    state, settings = text.loader.state(), settings_at(config, 1, config.total_tokens)
    seconds = []
    for _ in range(_UNTIMED_STEPS + _TIMED_STEPS):
        began = time.perf_counter()
        batch = text.loader.next_batch(settings.batch_size).to(recipe.run.device)
        train_step(model, optimizer, batch, config, settings)
        seconds.append(time.perf_counter() - began)
    text.loader.load_state(state)
    step_tokens = settings.batch_size * config.sequence_length
    # The fastest step: where others use the machine meanwhile, the clock ends the training in time,
    # with the learning rate that belongs there, but nothing would make up for too few steps.
    fitting = int(60 * minutes / min(seconds[_UNTIMED_STEPS:]))
    return min(config.total_tokens, step_tokens * max(_FEWEST_STEPS, fitting))


def _measure(
    trained: Trained, text: Text, recipe: Recipe, folder: RunFolder, display: Display
) -> dict[str, Any]:
    """Add baselines and a generated function to the run's figures; draw its loss."""
    from ziphius.cli.function import PROMPT, write_function
    from ziphius.data.corpus import Corpus
    from ziphius.data.heldout import select_heldout
    from ziphius.evaluation.baselines import NgramModel, xz_bits_per_byte
    from ziphius.inference.llm import LLM
    from ziphius.report.loss import draw_loss

    corpus = text.corpus
    heldout = select_heldout(corpus.heldout, recipe.run.validate_bytes)
    heldout_text = b"".join(document.text.encode() for document in heldout)
    display.say("measuring an n-gram model and xz on the same text")
    summary = {**trained.summary, "xz_bpb": xz_bits_per_byte(heldout_text)}
    if isinstance(corpus, Corpus):  # prepared text is there as tokens only
        ngram = NgramModel(b"".join(document.text.encode() for document in corpus.train))
        summary["ngram_bpb"] = ngram.bits_per_byte(heldout_text)
    display.say("writing a function")
    kernels, cache = recipe.run.kernels, recipe.run.cache
    assert trained.model is not None, "one process has trained"
    llm = LLM.of(trained.model, text.tokenizer, kernels=kernels, kernel_cache=cache)
    function = write_function(llm)
    summary |= {
        "generated": function.text,
        "generated_seed": function.seed,
        "generated_is_valid_python": function.parses,
        "samples": [{"prompt": PROMPT, "text": function.text, "note": _note(function)}],
    }
    folder.write_summary(summary)
    if summary["steps"] > 1:
        draw_loss(
            folder.metrics.path,
            folder.path / "loss.png",
            baselines={
                name: summary[key]
                for name, key in (("n-gram", "ngram_bpb"), ("xz", "xz_bpb"))
                if key in summary
            },
            heldout=(summary["heldout_bpb_before"], summary["heldout_bpb_after"]),
        )
    return summary


def _note(function: Function) -> str:
    return f"seed {function.seed}, {'valid' if function.parses else 'not valid'} Python"


def _tell(console: Console, summary: dict[str, Any], out: Path, report: Path) -> None:
    from rich.panel import Panel
    from rich.syntax import Syntax
    from rich.table import Table

    from ziphius.cli.display import program

    title = f"a function it wrote ({summary['samples'][0]['note']})"
    function = Syntax(summary["generated"], "python", word_wrap=True)
    console.print()
    console.print(Panel(function, title=title, expand=False, width=max(len(title) + 6, 80)))
    table = Table(
        title="held-out bits per byte (less is better)",
        show_header=False,
        title_justify="left",
    )
    table.add_column()
    table.add_column(justify="right")
    for name, key in (
        ("before training", "heldout_bpb_before"),
        ("n-gram model of the training text", "ngram_bpb"),
        ("xz on the held-out text", "xz_bpb"),
        ("[bold]after training[/bold]", "heldout_bpb_after"),
    ):
        if key in summary:
            table.add_row(name, f"{summary[key]:.3f}")
    console.print(table)
    console.print(
        f"text: {summary['corpus']}, {summary['corpus_files']} files, "
        f"{summary['corpus_bytes']:,} bytes, sha256 {summary['corpus_sha256'][:16]}\n"
        f"{summary['steps']} steps, {summary['tokens']:,} tokens in "
        f"{summary['train_seconds']:.0f} s: {summary['tokens_per_s']:,.0f} tokens/s, "
        f"{summary['peak_memory_gib']:.1f} GiB at most\n"
        f"{out}: checkpoint/, metrics.jsonl, summary.json, loss.png\n"
        f"report: {report}\n"
        f"let it write: {program()} generate {shlex.quote(str(out))} 'class' --temperature 0.7\n"
        f"in your browser: {program()} serve {shlex.quote(str(out))}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
