"""``ziphius generate``"""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ziphius.cli import options
from ziphius.cli.plan import expert_bytes, show_plan

if TYPE_CHECKING:
    from ziphius.inference.llm import LLM
    from ziphius.inference.params import SamplingParams

BETWEEN = "\n---\n"


def generate(
    checkpoint: options.Checkpoint,
    prompt: Annotated[
        str | None, typer.Argument(metavar="[PROMPT]", help="The text to go on from.")
    ] = None,
    input_file: Annotated[
        Path | None,
        typer.Option(help="A file of prompts, one a line, in place of PROMPT: answered together."),
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="The most tokens to write.")] = 200,
    temperature: Annotated[float, typer.Option(help="0 always takes the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Sample among the likeliest, up to this sum.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Sample among so many likeliest; 0: all.")] = 0,
    min_p: Annotated[
        float, typer.Option(help="Sample among those this share as likely as the likeliest.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="Repeats a sampled text.")] = 0,
    n: Annotated[int, typer.Option("--n", help="Answers to each prompt.")] = 1,
    stop: Annotated[
        list[str] | None, typer.Option(help="Ends before this text; may be repeated.")
    ] = None,
    json_schema: Annotated[
        Path | None, typer.Option(help="A file with a JSON schema that the answer must follow.")
    ] = None,
    regex: Annotated[
        str | None, typer.Option(help="A regular expression that the answer must match.")
    ] = None,
    speculation: options.Speculation = "auto",
    draft_depth: options.DraftDepth = 1,
    fast_math: options.FastMath = False,
    kernels: options.KernelChoice = "auto",
    device: options.Device = "cpu",
    cache_tokens: options.CacheTokens = 16_384,
    dtype: options.DType = None,
    without_mtp: options.WithoutMTP = False,
    lazy_experts: options.LazyExperts = None,
    plan: options.Plan = False,
    memory: options.Memory = None,
    stats: Annotated[
        bool, typer.Option("--stats", help="Tell at the end how fast it was, and why.")
    ] = False,
) -> None:
    """Let a CHECKPOINT go on from a text, and print it as it is written.

    Equal commands write equal texts, alone or in a file of prompts; --fast-math gives that up.

    Sample a text: ziphius generate runs/quickstart "def " --temperature 0.7

    Up to a line's end: ziphius generate runs/quickstart "import " --stop $'\\n'

    A file of prompts: ziphius generate runs/quickstart --input-file prompts.txt

    Of a given form: ziphius generate runs/quickstart "It is " --regex "(yes|no)"

    On a GPU: ziphius generate DeepSeek-V3 "Whales" --device cuda --fast-math

    Larger than the memory: ziphius generate DeepSeek-V3 "Whales" --lazy-experts auto

    Will it fit? ziphius generate DeepSeek-V3 --plan --memory 64GiB
    """
    from ziphius.config.errors import BadInput
    from ziphius.inference.llm import LLM
    from ziphius.inference.params import SamplingParams

    how: dict[str, Any] = {
        "dtype": dtype, "mtp": not without_mtp, "fast_math": fast_math, "kernels": kernels,
        "device": device, "speculation": speculation, "draft_depth": draft_depth,
        "cache_tokens": cache_tokens, "expert_bytes": expert_bytes(lazy_experts),
    }  # fmt: skip
    if plan:
        show_plan(checkpoint, memory, how)
        return
    if memory is not None:
        raise BadInput("--memory is for --plan; --cache-tokens and --lazy-experts bound answers")
    if (prompt is None) == (input_file is None):
        raise BadInput("give either a PROMPT or --input-file")
    prompts = [prompt] if prompt is not None else _read_prompts(input_file)
    params = SamplingParams(
        n=n, max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p,
        seed=seed, stop=stop or (), regex=regex,
        json_schema=None if json_schema is None else _read("--json-schema", json_schema),
    )  # fmt: skip
    llm = LLM(checkpoint, **how)
    if llm.tokenizer is None:
        raise BadInput(f"{checkpoint}: no tokenizer.json beside the weights: add the model's own")
    began = time.monotonic()
    if len(prompts) == n == 1:
        _write(llm, prompts[0], params)
    else:
        _write_together(llm, prompts, params)
    if stats:
        _tell(llm, time.monotonic() - began)


def _write(llm: LLM, prompt: str, params: SamplingParams) -> None:
    """Print an answer as it comes."""
    from ziphius.inference.errors import RequestError

    stream = llm.stream(prompt, params)
    first = next(stream)  # what must be refused is refused before anything is printed
    print(prompt, end="")
    error = None
    for (delta,) in chain([first], stream):
        print(delta.text, end="", flush=True)
        error = delta.error or error
    print()
    if error is not None:
        raise RequestError(error)


def _write_together(llm: LLM, prompts: Sequence[str], params: SamplingParams) -> None:
    """Answer all prompts in one batch, then print the answers in their order."""
    from rich.console import Console
    from rich.progress import Progress

    from ziphius.inference.errors import RequestError

    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("prompts", total=len(prompts))
        outputs = llm.generate(
            prompts,
            params,
            on_progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    answers = [(output.prompt, answer) for output in outputs for answer in output.outputs]
    print(BETWEEN.join(f"{prompt}{answer.text}" for prompt, answer in answers))
    errors = [answer.error for _, answer in answers if answer.error is not None]
    if errors:
        raise RequestError(f"{len(errors)} of {len(answers)} answers broke off: {errors[0]}")


def _tell(llm: LLM, seconds: float) -> None:
    """Say how fast answers came, what speculation and known prefixes gave, and by which kernels."""
    from ziphius.inference.choose import device_name
    from ziphius.planning.memory import shown

    engine = llm.engine
    numbers = engine.stats()
    steps = max(engine.steps, 1)
    lines = [
        f"{engine.tokens} tokens in {seconds:.2f} s: {engine.tokens / max(seconds, 1e-9):.1f} "
        f"tokens/s, {engine.tokens / steps:.2f} a step",
        f"prompts: {numbers.prefix_queries} tokens, {numbers.prefix_hits} found in the cache",
    ]
    judged = engine.acceptance.judged
    for place, (rate, count) in enumerate(zip(engine.acceptance.rates, judged, strict=True), 1):
        lines.append(f"drafts: {rate:.0%} of {count} accepted at place {place}")
    if not judged:
        lines.append("drafts: none")
    if llm.loaded is not None and (experts := llm.loaded.experts) is not None:
        lines.append(f"experts: read {experts.reads} times, {shown(experts.bytes)} kept")
    lines += [] if llm.loaded is None else llm.loaded.notes
    lines.append(f"device: {device_name(engine.model.device)}")
    lines.append(f"kernels: {engine.model.kernels}")
    typer.echo("\n".join(lines), err=True)


def _read(option: str, path: Path) -> str:
    from ziphius.config.errors import BadInput

    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{option} {path}: cannot be read: {error}") from None


def _read_prompts(path: Path | None) -> list[str]:
    from ziphius.config.errors import BadInput

    assert path is not None, "called with a file"
    prompts = [line for line in _read("--input-file", path).split("\n") if line]
    if not prompts:
        raise BadInput(f"--input-file {path}: holds no prompt: write one a line")
    return prompts
