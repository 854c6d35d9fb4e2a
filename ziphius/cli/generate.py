"""``ziphius generate``"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ziphius.cli import options


def generate(
    checkpoint: options.Checkpoint,
    prompt: Annotated[str | None, typer.Argument(help="The text to go on from.")] = None,
    input_file: Annotated[
        Path | None, typer.Option(help="A file of prompts, one a line, in place of PROMPT.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="The most tokens to write.")] = 200,
    temperature: Annotated[float, typer.Option(help="0 always takes the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Sample among the likeliest, up to this sum.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Repeats a sampled text.")] = 0,
    dtype: options.DType = None,
    without_mtp: options.WithoutMTP = False,
) -> None:
    """Let a CHECKPOINT go on from a text, and print it as it is written.

    Example: ziphius generate runs/quickstart "def " --temperature 0.7 --top-p 0.9
    """
    from ziphius.config.errors import BadInput
    from ziphius.inference.params import SamplingParams
    from ziphius.inference.writer import load_writer

    if (prompt is None) == (input_file is None):
        raise BadInput("give either a PROMPT or --input-file")
    prompts = [prompt] if prompt is not None else _read_prompts(input_file)
    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed)
    writer = load_writer(checkpoint, dtype, mtp=not without_mtp)
    for text in prompts:
        writer.check(text)
    for number, text in enumerate(prompts):
        print("\n---\n" if number else "", end="")
        print(text, end="", flush=True)
        for piece in writer.write(text, params):
            print(piece, end="", flush=True)
    print()


def _read_prompts(path: Path | None) -> list[str]:
    from ziphius.config.errors import BadInput

    assert path is not None, "called with a file"
    try:
        lines = path.read_text("utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"--input-file {path}: cannot be read: {error}") from None
    prompts = [line for line in lines if line]
    if not prompts:
        raise BadInput(f"--input-file {path}: holds no prompt: write one a line")
    return prompts
