"""``ziphius quickstart``: the main job, end to end, on this machine."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ziphius.cli import options
from ziphius.cli.miniature import STAGES

if TYPE_CHECKING:
    from rich.console import Console

    from ziphius.cli.display import Display
    from ziphius.cli.function import Function
    from ziphius.config.recipe import Recipe
    from ziphius.data.documents import Document
    from ziphius.training.folder import RunFolder
    from ziphius.training.run import Trained
    from ziphius.training.text import Text

# Steps that are timed, after some that are not, to see how many fit into the minutes.
_UNTIMED_STEPS, _TIMED_STEPS = 4, 16
_FEWEST_STEPS = 20
# Where steps are counted, a later stage makes one for so many of pre-training's.
_FEWER = 20
# Where the machine turns out slower than it was timed, pre-training ends after this many times its
# share of the minutes.
_OVERTIME = 1.1


def quickstart(
    out: Annotated[
        Path, typer.Option(help="The run's folder; an earlier run moves to NAME.previous.")
    ] = Path("runs/quickstart"),
    minutes: Annotated[
        float, typer.Option(min=0.01, help="How long to train; every stage has its share.")
    ] = 10.5,
    steps: Annotated[
        int | None,
        typer.Option(min=2, help="Steps of pre-training, in place of minutes; others make fewer."),
    ] = None,
    until: Annotated[
        str,
        typer.Option(metavar="|".join(STAGES), help="The last stage."),
    ] = STAGES[-1],
    overrides: options.Overrides = None,
) -> None:
    """Make a small V3 on this machine in minutes: from text to an assistant that reasons.

    It learns to copy, then the Python standard library's own source, with its tokenizer, and small
    tasks and facts; it is measured on packages that it has not seen, beside an n-gram model and xz.
    Then its context is extended; it is fine-tuned on chats and small tasks; an expert learns from
    rewards of its own answers; and the final model learns what the expert answers rightly. Test
    problems are asked after every stage.
    """
    from rich.console import Console

    from ziphius.cli.display import Display
    from ziphius.cli.miniature import PRESET, Miniature, figures_of, seconds_of
    from ziphius.cli.mixture import mixture
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
    if until not in STAGES:
        raise BadInput(f"--until {until}: give one of {', '.join(STAGES)}")
    stages = STAGES[: STAGES.index(until) + 1]
    seconds = seconds_of(stages, minutes)
    folder = RunFolder(out, replace=True)
    folder.require_room()
    console = Console()
    stopping = partial(saving_on_signals, console)
    fewer = max(1, steps // _FEWER) if steps else None
    with Display(console) as display:
        if not steps:
            told = ", ".join(f"{stage} {seconds[stage] / 60:.1f}" for stage in stages)
            display.say(f"minutes of training: {told}")
        mixed = mixture(PRESET, overrides or (), display.say)
        later = Miniature(
            folder.path, mixed.settings, seconds, fewer, display, stopping, mixed.extension
        )
        if len(stages) > 1:
            later.check()
        settings = [*mixed.settings, *options.length(steps)]
        recipe = run.resolve(load_recipe(PRESET, settings))
        text = prepare_text(recipe, display)
        limit = math.inf
        if not steps:
            fitting = _tokens_that_fit(recipe, text, seconds["pretrain"], display)
            settings += options.length(tokens=fitting)
            recipe = run.resolve(load_recipe(PRESET, settings))
            text = text.lasting(recipe)
            limit = seconds["pretrain"] * _OVERTIME
        with telling_how_to_go_on(out):
            trained = run.pretrain(
                recipe, folder, display, text=text, seconds=limit, stopping=stopping
            )
        summary = _measure(trained, text, recipe, folder, display)
        summary["stages"] = {"pretrain": figures_of(summary)}
        report = write_report(folder.path)
        for stage in stages[1:]:
            display.say(f"[{stage}]")
            summary["stages"][stage] = later.run(stage, _files(text))
            folder.write_summary(summary)
            report = write_report(folder.path)
        if len(stages) > 1:
            folder.publish(later.folder(stages[-1]) / "checkpoint")
    _tell(console, summary, out, report)


def _files(text: Text) -> list[Document]:
    """Return the files among the text that is trained on."""
    documents = getattr(text.corpus, "train", ())
    return [document for document in documents if not document.is_record]


def _tokens_that_fit(recipe: Recipe, text: Text, limit: float, display: Display) -> int:
    """Time some steps of a throw-away model; return the tokens of a limit in seconds.

    These are the preset's at most.
    """
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
    fitting = int(limit / min(seconds[_UNTIMED_STEPS:]))
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
        held = [source.holdout for source in recipe.data.mixture]  # like with like
        learned = (document.text for document in corpus.train if held[document.source])
        ngram = NgramModel(b"".join(text.encode() for text in learned))
        summary["ngram_bpb"] = ngram.bits_per_byte(heldout_text)
    display.say("writing a function")
    told = recipe.run
    assert trained.model is not None, "one process has trained"
    llm = LLM.of(
        trained.model,
        text.tokenizer,
        fast_math=told.device != "cpu",
        kernels=told.kernels,
        kernel_cache=told.cache,
        device=told.device,
    )
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
    _tell_stages(console, summary["stages"])
    asked = any("accuracy" in figures for figures in summary["stages"].values())
    talk = f"ask it: {program()} chat {shlex.quote(str(out))} --thinking\n" if asked else ""
    console.print(
        f"text: {summary['corpus']}, {summary['corpus_files']} files, "
        f"{summary['corpus_bytes']:,} bytes, sha256 {summary['corpus_sha256'][:16]}\n"
        f"{summary['steps']} steps, {summary['tokens']:,} tokens in "
        f"{summary['train_seconds']:.0f} s: {summary['tokens_per_s']:,.0f} tokens/s, "
        f"{summary['peak_memory_gib']:.1f} GiB at most\n"
        f"{out}: checkpoint/, metrics.jsonl, summary.json, loss.png\n"
        f"report: {report}\n"
        f"let it write: {program()} generate {shlex.quote(str(out))} 'class' --temperature 0.7\n"
        f"{talk}"
        f"in your browser: {program()} serve {shlex.quote(str(out))}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


def _tell_stages(console: Console, stages: Mapping[str, Mapping[str, Any]]) -> None:
    """Show what was answered after every stage that was asked."""
    from rich.table import Table

    asked = {name: figures for name, figures in stages.items() if "accuracy" in figures}
    if not asked:
        return
    table = Table("right answers to test problems", *asked)
    for task in next(iter(asked.values()))["accuracy"]:
        table.add_row(task, *(f"{figures['accuracy'][task]:.0%}" for figures in asked.values()))
    table.add_row("tokens an answer", *(f"{figures['length']:.1f}" for figures in asked.values()))
    console.print(table)
