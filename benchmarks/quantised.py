"""What each quantised form costs: bits per byte on the held-out text of a run, and bytes of file.

Converts the run's checkpoint to FP8, INT8 and INT4, by rounding and by GPTQ calibrated on a part of
the training text, and measures each on the same held-out rows in FP32 arithmetic. Prints a table,
and the figures as JSON in the last line.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

import torch
from support import report

from ziphius.checkpoint.convert import convert
from ziphius.checkpoint.forms import INTEGERS
from ziphius.checkpoint.huggingface import load
from ziphius.config.recipe import load_recipe
from ziphius.data.corpus import read_corpus
from ziphius.data.heldout import HeldoutRows, heldout_rows
from ziphius.data.tokenizer import load_tokenizer
from ziphius.inference.gptq import Calibration, Gptq
from ziphius.model.transformer import Transformer
from ziphius.training.validate import bits_per_byte, mtp_agreement


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "run", type=Path, nargs="?", default=Path("runs/quickstart"), help="a finished run"
    )
    parser.add_argument("--group-sizes", type=int, nargs="+", default=[32, 128])
    parser.add_argument("--tokens", type=int, default=65536, help="of the calibration text")
    parser.add_argument("--bytes", type=int, default=400_000, help="of held-out text")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--record", action="store_true", help="keep the result in results/")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    recipe, source = load_recipe(str(options.run / "recipe.toml")), options.run / "checkpoint"
    corpus, length = read_corpus(recipe.data), recipe.pretrain.sequence_length
    rows = heldout_rows(corpus.heldout, load_tokenizer(source), length, options.bytes)
    figures: dict[str, Any] = {"heldout_bytes": rows.bytes, "forms": {}}
    with tempfile.TemporaryDirectory() as work:
        text, target = Path(work) / "calibration.txt", Path(work) / "target"
        # Documents of all sources in turn, so that the text is like the whole.
        every = corpus.train[:: max(1, len(corpus.train) // 100)]
        text.write_text("\n\n".join(document.text[:4000] for document in every), "utf-8")
        first: Transformer | None = None
        for name, to, size, how, head in _cases(options.group_sizes, options.tokens, length):
            folder = Path(f"{target}-{name.replace(' ', '-')}")
            if how is None:
                convert(source, folder, to, group_size=size, head=head)
            else:
                with Calibration(source, text, how) as quantizer:
                    convert(source, folder, to, quantizer=quantizer)
            model = load(folder, "float32")
            first = first or model
            figures["forms"][name] = found = _measured(folder, model, first, rows)
            if how is not None:
                found["experts_rounded"] = quantizer.experts_rounded
            loss = found["bits_per_byte"] - figures["forms"]["bf16"]["bits_per_byte"]
            found["loss"] = round(loss, 5)
            shown = f"{found['bits_per_byte']:.4f} bpb {loss:+.4f}, KL {found['divergence']:.5f}"
            print(f"{name:24} {shown}, {found['bytes']:,} B", flush=True)
    report("quantised", figures, record=options.record)


Case = tuple[str, str, int, Gptq | None, bool]


def _cases(sizes: list[int], tokens: int, length: int) -> list[Case]:
    """List (name, form, group size, GPTQ settings or None, whether the head is in integers)."""
    cases: list[Case] = [("bf16", "bf16", 128, None, False), ("fp8", "fp8", 128, None, False)]
    for (to, bits), size in product(INTEGERS.items(), sizes):
        cases.append((f"{to} {size} rounding", to, size, None, False))
        cases.append((f"{to} {size} rounding head", to, size, None, True))
        for act_order in (False, True):
            how = Gptq(bits, size, act_order, tokens=tokens, sequence_length=length)
            cases.append((f"{to} {size} gptq{' ordered' * act_order}", to, size, how, False))
    return cases


def _measured(
    folder: Path, model: Transformer, first: Transformer, rows: HeldoutRows
) -> dict[str, Any]:
    """``divergence`` is KL from the unquantised model in bits a token, on the first rows."""
    few = slice(32)
    tokens_BT = rows.tokens_MT[few]
    agreement = mtp_agreement(model, tokens_BT, rows.targets_MT[few])
    with torch.no_grad():
        right, found = (m(tokens_BT).double().log_softmax(-1) for m in (first, model))
    divergence = float((right.exp() * (right - found)).sum(-1).mean()) / math.log(2)
    bits = bits_per_byte(model, rows.tokens_MT, rows.targets_MT, rows.bytes)
    return {
        "bits_per_byte": round(bits, 5),
        "divergence": round(divergence, 6),
        "mtp_agreement": None if agreement is None else round(agreement, 4),
        "bytes": sum(path.stat().st_size for path in folder.glob("*.safetensors")),
    }


if __name__ == "__main__":
    main()
