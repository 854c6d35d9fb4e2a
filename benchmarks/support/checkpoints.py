"""The checkpoints of a comparison: one network with random weights, in every form, made once."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

import ziphius
from ziphius.checkpoint.config_json import read_config
from ziphius.checkpoint.convert import convert
from ziphius.checkpoint.forms import INTEGERS
from ziphius.config.model import ModelConfig
from ziphius.data.tokenizer import save_tokenizer, train_tokenizer
from ziphius.model.count import count
from ziphius.model.init import initialise
from ziphius.model.precision import Precision
from ziphius.model.transformer import Transformer
from ziphius.planning import memory

BITS = {"bf16": 16, "fp8": 8, "int8": 8, "q8_0": 8, "int4": 4, "q4_0": 4}
OURS = ("bf16", "fp8", "int8", "int4")
GGUF = ("bf16", "q8_0", "q4_0")
# Bits a weight of llama.cpp's blocks: 32 codes and a scale of 16 bits.
GGUF_BITS = {"bf16": 16.0, "q8_0": 8.5, "q4_0": 4.5}
PLAIN = "plain"  # BF16 without the MTP module, which no peer uses


@dataclass(frozen=True)
class Checkpoints:
    """The folder of one network: ``bf16`` is made or found, the others are made from it."""

    folder: Path
    original: Path

    @classmethod
    def random(cls, folder: Path, config: ModelConfig) -> Checkpoints:
        """Choose the folder of a configuration, and make its random weights."""
        name = hashlib.sha256(config.model_dump_json().encode()).hexdigest()[:8]
        found = cls(folder / name, folder / name / "bf16")
        if not found.original.is_dir():
            _say(f"making {count(config).total / 1e6:,.0f} M random parameters")
            _make(found.original, config)
        return found

    @classmethod
    def of(cls, folder: Path, checkpoint: Path) -> Checkpoints:
        """Use a checkpoint that is there, a trained one say."""
        name = hashlib.sha256(str(checkpoint.resolve()).encode()).hexdigest()[:8]
        return cls(folder / name, checkpoint)

    def form(self, form: str) -> Path:
        """Return a folder of ours in a form, or ``PLAIN``; made if need be."""
        if form == "bf16":
            return self.original
        # Peers' files have their output head in few bits too.
        integers = form in INTEGERS
        folder = self.folder / (f"{form}-head" if integers else form)
        if not folder.is_dir():
            _say(f"converting to {form}")
            if form == PLAIN:
                convert(self.original, folder, "bf16", mtp=False)
            else:
                convert(self.original, folder, form, head=integers)
        return folder

    def gguf(self, form: str, llama_python: str, llama_source: Path, threads: int) -> Path:
        """Return the file of a form for llama.cpp. Raises RuntimeError where it can't be made."""
        file = self.folder / f"{form}.gguf"
        if file.is_file():
            return file
        partial = file.with_suffix(".partial")
        if form == "q4_0":  # the conversion script does not write it
            source = self.gguf("bf16", llama_python, llama_source, threads)
            command = [llama_python, _beside("to_q4_0.py"), str(source), str(partial), str(threads)]
        else:
            how = ["--outtype", form, "--outfile", str(partial)]
            given = [str(llama_source), str(self.form(PLAIN)), *how]
            command = [sys.executable, _beside("to_gguf.py"), *given]
        _say(f"converting to GGUF, {form}")
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        if run.returncode:
            last = run.stderr.strip().splitlines()[-3:]
            raise RuntimeError(f"no GGUF could be made: {' / '.join(last)}")
        partial.rename(file)
        return file


def _beside(name: str) -> str:
    return str(Path(__file__).with_name(name))


def touched_bytes(checkpoint: Path, experts: float, batch: int, context: int, bits: float) -> float:
    """Count the bytes that a decoding step reads, divided by the tokens of the step.

    ``experts`` are the different ones that the batch meets in a mixture layer. ``bits`` a weight
    are those of a form that only llama.cpp has, made from this folder in BF16; 0 for its own.
    """
    planned = memory.plan(checkpoint, mtp=False)
    scale = bits / BITS["bf16"] if bits else 1.0
    all_experts = planned.items[memory.ROUTED]
    # Of the embedding a token reads one row.
    once = planned.weight_bytes - planned.items[memory.EMBEDDING] - all_experts
    routed = all_experts * experts / read_config(checkpoint).n_routed_experts
    cached = planned.cache_token_bytes * context * batch
    return (scale * (once + routed) + cached) / batch


def _make(folder: Path, config: ModelConfig) -> None:
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model = Transformer(config, Precision.for_inference(torch.bfloat16))
    initialise(model, seed=0)
    ziphius.save(model, partial)
    save_tokenizer(train_tokenizer(_texts(), config.vocab_size), partial)
    partial.rename(folder)


def _texts() -> Iterator[str]:
    """Yield Python's own library, which is on every machine."""
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        yield path.read_text("utf-8", errors="replace")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
