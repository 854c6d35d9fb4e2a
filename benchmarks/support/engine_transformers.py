"""transformers behind the protocol: ``engine_transformers.py CHECKPOINT THREADS``.

A plain greedy loop over its model and cache, without the bookkeeping of ``generate``. Variants are
its implementations of attention and experts for processors.
"""

from __future__ import annotations

import sys
import time
from typing import Any

from protocol import resident_bytes, serve

ATTENTIONS = ("sdpa", "eager")
EXPERTS = ("grouped_mm", "batched_mm", "eager")


class Transformers:
    def __init__(self, checkpoint: str, threads: int) -> None:
        import torch
        import transformers

        transformers.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        torch.set_num_threads(threads)
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            checkpoint, dtype="auto"
        ).eval()

    def about(self) -> dict[str, Any]:
        import torch
        import transformers

        return {
            "version": transformers.__version__,
            "torch": torch.__version__,
            "resident_bytes": resident_bytes(),
        }

    def variants(self, measure: str) -> list[str]:
        # batched_mm gathers a matrix for every row, also for the prompts before decoding: 6 GB a
        # layer at 512 tokens, and at batch 8 a fifth of the others' speed.
        fit = [e for e in EXPERTS if e != "batched_mm" or measure == "decode_1"]
        return [f"{attention}+{experts}" for attention in ATTENTIONS for experts in fit]

    def prefill(self, prompt: list[int], variant: str) -> dict[str, float]:
        import torch

        self._use(variant)
        with torch.inference_mode():
            began = time.perf_counter()
            self._first([prompt])
            return {"seconds": time.perf_counter() - began}

    def decode(self, prompts: list[list[int]], new: int, variant: str) -> dict[str, float]:
        import torch

        self._use(variant)
        with torch.inference_mode():
            tokens_B1, cache = self._first(prompts)
            began = time.perf_counter()
            for _ in range(new):
                tokens_B1, cache = self._next(tokens_B1, cache)
            seconds = time.perf_counter() - began
        return {"seconds": seconds, "tokens": new * len(prompts), "batch": len(prompts)}

    def tokens(self, prompt: list[int], new: int) -> list[int]:
        import torch

        self._use("sdpa+eager")
        with torch.inference_mode():
            tokens_B1, cache = self._first([prompt])
            found = [int(tokens_B1)]
            while len(found) < new:
                tokens_B1, cache = self._next(tokens_B1, cache)
                found.append(int(tokens_B1))
        return found

    def _use(self, variant: str) -> None:
        attention, experts = variant.split("+")
        if self.model.config._attn_implementation != attention:
            self.model.set_attn_implementation(attention)
        if self.model.config._experts_implementation != experts:
            self.model.set_experts_implementation(experts)

    def _first(self, prompts: list[list[int]]) -> tuple[Any, Any]:
        import torch

        out = self.model(torch.tensor(prompts), use_cache=True, logits_to_keep=1)
        return out.logits[:, -1:].argmax(-1), out.past_key_values

    def _next(self, tokens_B1: Any, cache: Any) -> tuple[Any, Any]:
        out = self.model(tokens_B1, past_key_values=cache, use_cache=True)
        return out.logits[:, -1:].argmax(-1), out.past_key_values


if __name__ == "__main__":
    serve(lambda: Transformers(sys.argv[1], int(sys.argv[2])))
