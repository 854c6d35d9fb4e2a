"""Whether other engines write what Ziphius writes, from the checkpoints that it exports.

Every checkpoint is written in FP32, BF16, INT8, INT4 and FP8; transformers, vLLM for processors and
llama.cpp open what they can of it, each in a process of its own, and answer the same prompts, token
ids, greedily, in FP32 from FP32 weights and else in BF16. Told is how many answers are those of
Ziphius; of others the first token that is not, and by how much the logit of its own token was above
that of the other there: engines round differently, so that near ties may fall either way. What an
engine does not open has its message.

    python benchmarks/same_tokens.py                      the run of a quickstart
    python benchmarks/same_tokens.py RUN CHECKPOINT ...

The peers' environments are those of ``decode_vs_peers.py``. transformers wants compressed-tensors
for integers and accelerate for FP8. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from support import report
from support.environments import CannotMake, llama_python, llama_source, vllm_preload, vllm_python
from support.workers import EngineFailed, Worker

import ziphius
from ziphius.checkpoint.config_json import read_config
from ziphius.checkpoint.forms import ragged_weights
from ziphius.inference.params import ALL

PEERS = ("transformers", "vllm", "llama.cpp")
FORMS = ("fp32", "bf16", "int8", "int4", "fp8")
GGUF_TYPES = {"fp32": "f32"}
PROMPTS = ("def ", "class ", "import os", "for name in sorted(", "    raise ValueError(")
GROUP_SIZES = (128, 64, 32, 16, 8)
LOADING_SECONDS = 600.0
SUPPORT = Path(__file__).parent / "support"

Command = tuple[list[str], dict[str, str]]


class Ours:
    """The answers of Ziphius to all prompts, and its log-probabilities at every token."""

    def __init__(self, folder: Path, options: argparse.Namespace) -> None:
        llm = ziphius.LLM(folder, kernel_cache=options.kernels, cache_tokens=4096)
        params = ziphius.SamplingParams(
            temperature=0, max_tokens=options.new, ignore_eos=True, logprobs=ALL
        )
        outputs = llm.generate(list(PROMPTS), params)
        self.prompts = [list(output.prompt_token_ids) for output in outputs]
        self.tokens = [list(output.outputs[0].token_ids) for output in outputs]
        self._logprobs = [output.outputs[0].logprobs for output in outputs]

    def gap(self, prompt: int, place: int, other: int) -> float:
        """How much the logit of the token at a place is above that of another one."""
        scored = self._logprobs[prompt][place]
        (theirs,) = (entry.logprob for entry in scored.top if entry.token == other)
        return float(scored.logprob - theirs)

    def gaps(self) -> list[float]:
        """The gap between the likeliest token and the next one, at every place."""
        every = [scored.top for scores in self._logprobs for scored in scores]
        return [top[0].logprob - top[1].logprob for top in every]

    def compare(self, prompt: int, theirs: list[int]) -> dict[str, Any]:
        """Say how many leading tokens are equal, and what parts the first ones that are not."""
        for place, (own, other) in enumerate(zip(self.tokens[prompt], theirs, strict=True)):
            if own != other:
                gap = round(self.gap(prompt, place, other), 4)
                return {"leading": place, "ours": own, "theirs": other, "gap": gap}
        return {"leading": len(theirs)}


def transformers_command(folder: Path, options: argparse.Namespace, work: Path) -> Command:
    script = str(SUPPORT / "engine_transformers.py")
    return [sys.executable, script, str(folder), str(options.threads)], {}


def vllm_command(folder: Path, options: argparse.Namespace, work: Path) -> Command:
    python = vllm_python(options.environments)
    script = str(SUPPORT / "engine_vllm.py")
    command = [python, script, str(folder), "eager", str(options.threads)]
    return command, vllm_preload(options.environments)


def llama_command(folder: Path, options: argparse.Namespace, work: Path) -> Command:
    """Convert a folder to GGUF by llama.cpp's own script. Raises CannotMake where it stops."""
    file = work / f"{folder.name}.gguf"
    source = llama_source(options.environments)
    how = ["--outtype", GGUF_TYPES.get(folder.name, "bf16"), "--outfile", str(file)]
    command = [sys.executable, str(SUPPORT / "to_gguf.py"), str(source), str(folder), *how]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        raise CannotMake(run.stderr.strip().splitlines()[-1])
    script = str(SUPPORT / "engine_llama.py")
    return [llama_python(options.environments), script, str(file), str(options.threads)], {}


COMMANDS: dict[str, Callable[[Path, argparse.Namespace, Path], Command]] = {
    "transformers": transformers_command,
    "vllm": vllm_command,
    "llama.cpp": llama_command,
}


def ask(engine: str, folder: Path, ours: Ours, options: argparse.Namespace, work: Path) -> Any:
    """Let an engine answer; return what ``compare`` finds for each prompt, or its message."""
    log = options.environments / f"same-{engine}-{folder.name}.log"
    try:
        command, settings = COMMANDS[engine](folder, options, work)
        settings = {"OMP_NUM_THREADS": str(options.threads), **settings}
        with Worker(engine, command, settings, log) as worker:
            worker.wait_until_ready(LOADING_SECONDS)
            answers = [worker.ask("tokens", prompt=p, new=options.new) for p in ours.prompts]
            version = worker.ask("about")["version"]
    except (CannotMake, EngineFailed) as error:
        return str(error).removeprefix(f"{engine}: ").partition(" (more in ")[0]
    rows = [ours.compare(number, theirs) for number, theirs in enumerate(answers)]
    return {"version": version, "prompts": rows}


def convert(checkpoint: Path, folder: Path, form: str, size: int) -> None:
    """Write a form; integers have groups of ``size`` inputs."""
    if form in ("int8", "int4"):
        ziphius.convert(checkpoint, folder, form, group_size=size)
    else:
        ziphius.convert(checkpoint, folder, form)


def measure(checkpoint: Path, options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Ask all engines about all forms of a checkpoint, in the largest groups that are whole."""
    ziphius.convert(checkpoint, work / "bf16", "bf16")
    config = read_config(work / "bf16")
    whole = (size for size in GROUP_SIZES if not ragged_weights(config, size))
    size = next(whole, GROUP_SIZES[0])
    found = {"model": config.model_dump(mode="json"), "group_size": size, "forms": {}}
    closed: dict[str, str] = {}
    for form in options.forms:
        folder = work / form
        if form != "bf16":
            convert(checkpoint, folder, form, size)
        ours = Ours(folder, options)
        gaps = ours.gaps()
        row: dict[str, Any] = {"median_gap": round(statistics.median(gaps), 4)}
        for engine in options.engines:
            # What does not take the network does not take its other forms either.
            row[engine] = closed.get(engine) or ask(engine, folder, ours, options, work)
            if form == "bf16" and isinstance(row[engine], str):
                closed[engine] = row[engine]
            print(f"{checkpoint} {form} {engine}: {told(row[engine])}", file=sys.stderr, flush=True)
        found["forms"][form] = row
    return found


def told(result: Any) -> str:
    """Say in short what an engine did."""
    if isinstance(result, str):
        return f"no: {result}"
    rows = result["prompts"]
    same = sum("gap" not in row for row in rows)
    if same == len(rows):
        return f"all of {len(rows)} x {rows[0]['leading']}"
    parted = [f"token {r['leading'] + 1}, gap {r['gap']:.3f}" for r in rows if "gap" in r]
    return f"{same} of {len(rows)} answers; parted at {'; '.join(parted)}"


def show(checkpoint: str, found: dict[str, Any], engines: list[str]) -> None:
    title = f"{checkpoint}: equal greedy tokens"
    table = Table("form", *engines, "median gap", title=title, show_lines=True)
    for form, row in found["forms"].items():
        table.add_row(form, *(told(row[engine]) for engine in engines), f"{row['median_gap']:.2f}")
    Console(stderr=True, width=130).print(table)


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    options.environments.mkdir(parents=True, exist_ok=True)
    figures: dict[str, Any] = {"checkpoints": {}}
    for checkpoint in options.checkpoints:
        with tempfile.TemporaryDirectory() as work:
            found = measure(checkpoint, options, Path(work))
        show(str(checkpoint), found, options.engines)
        figures["checkpoints"][str(checkpoint)] = found
    figures |= {"prompts": list(PROMPTS), "new": options.new}
    report("same_tokens", figures, record=options.record)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "checkpoints", nargs="*", type=Path, default=[Path("runs/quickstart")], help="or runs"
    )
    parser.add_argument("--engines", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--new", type=int, default=24, help="tokens of an answer")
    parser.add_argument("--threads", type=int, default=2, help="of every engine")
    parser.add_argument("--environments", type=Path, default=Path("runs/peers"))
    parser.add_argument("--kernels", type=Path, default=Path("runs/kernels"))
    parser.add_argument("--record", action="store_true", help="keep the result in results/")
    return parser.parse_args()


if __name__ == "__main__":
    main()
