"""llama.cpp behind the protocol: ``engine_llama.py FILE.gguf THREADS``.

Its C interface through llama-cpp-python's bindings: a batch is decoded, the largest logit of every
sequence is the next token. Variants are its attention with and without the fused kernel, and one
cache for all sequences in place of one for each.
"""

from __future__ import annotations

import ctypes
import sys
import time
from typing import Any

from protocol import resident_bytes, serve

SEQUENCES, LENGTH, BATCH = 16, 1024, 512
# Of every variant the kernel of attention (enum llama_flash_attn_type), and whether caches are one.
VARIANTS = {"plain": (0, False), "fused": (1, False), "fused+unified": (1, True)}


class Llama:
    def __init__(self, file: str, threads: int) -> None:
        import llama_cpp

        self.lib = llama_cpp
        self.threads = threads
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(
            file.encode(), llama_cpp.llama_model_default_params()
        )
        if not self.model:
            raise RuntimeError(f"{file}: llama.cpp can't load it")
        vocabulary = llama_cpp.llama_model_get_vocab(self.model)
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(vocabulary)
        self.contexts = {name: self._context(*how) for name, how in VARIANTS.items()}
        self.batch = llama_cpp.llama_batch_init(BATCH, 0, 1)

    def about(self) -> dict[str, Any]:
        return {
            "version": self.lib.__version__,
            "system": self.lib.llama_print_system_info().decode(),
            "resident_bytes": resident_bytes(),
        }

    def variants(self, measure: str) -> list[str]:
        return list(self.contexts)

    def prefill(self, prompt: list[int], variant: str) -> dict[str, float]:
        context = self._fresh(variant)
        began = time.perf_counter()
        self._first(context, [prompt])
        return {"seconds": time.perf_counter() - began}

    def decode(self, prompts: list[list[int]], new: int, variant: str) -> dict[str, float]:
        context = self._fresh(variant)
        tokens = self._first(context, prompts)
        length = len(prompts[0])
        began = time.perf_counter()
        for position in range(length, length + new):
            tokens = self._next(context, tokens, position)
        seconds = time.perf_counter() - began
        return {"seconds": seconds, "tokens": new * len(prompts), "batch": len(prompts)}

    def tokens(self, prompt: list[int], new: int) -> list[int]:
        context = self._fresh("plain")
        found = self._first(context, [prompt])
        while len(found) < new:
            found += self._next(context, found[-1:], len(prompt) + len(found) - 1)
        return found

    def _context(self, fused: int, unified: bool) -> Any:
        params = self.lib.llama_context_default_params()
        params.n_ctx, params.n_seq_max = SEQUENCES * LENGTH, SEQUENCES
        params.n_batch = params.n_ubatch = BATCH
        params.n_threads = params.n_threads_batch = self.threads
        params.flash_attn_type, params.kv_unified = fused, unified
        context = self.lib.llama_init_from_model(self.model, params)
        if not context:
            raise RuntimeError("llama.cpp can't make a context")
        return context

    def _fresh(self, variant: str) -> Any:
        context = self.contexts[variant]
        self.lib.llama_memory_clear(self.lib.llama_get_memory(context), True)
        return context

    def _first(self, context: Any, prompts: list[list[int]]) -> list[int]:
        """Compute prompts of equal length; return the token behind each.

        Together they fill a batch or more: as many as fit are computed at once.
        """
        length, found = len(prompts[0]), []
        at_once = max(1, BATCH // length)
        for start in range(0, len(prompts), at_once):
            part = prompts[start : start + at_once]
            rows = [
                (token, position, start + index, position == length - 1)
                for index, prompt in enumerate(part)
                for position, token in enumerate(prompt)
            ]
            found += self._run(context, rows)
        return found

    def _next(self, context: Any, tokens: list[int], position: int) -> list[int]:
        rows = [(token, position, index, True) for index, token in enumerate(tokens)]
        return self._run(context, rows)

    def _run(self, context: Any, rows: list[tuple[int, int, int, bool]]) -> list[int]:
        """Decode rows of (token, position, sequence, wanted); return the tokens behind wanted."""
        import numpy as np

        batch = self.batch
        batch.n_tokens = len(rows)
        for i, (token, position, sequence, wanted) in enumerate(rows):
            batch.token[i], batch.pos[i] = token, position
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
            batch.logits[i] = wanted
        status = self.lib.llama_decode(context, batch)
        if status:
            raise RuntimeError(f"llama_decode gave {status}")
        found = []
        for i, (_, _, _, wanted) in enumerate(rows):
            if wanted:
                logits = self.lib.llama_get_logits_ith(context, i)
                pointer = ctypes.cast(logits, ctypes.POINTER(ctypes.c_float))
                found.append(int(np.ctypeslib.as_array(pointer, (self.vocab_size,)).argmax()))
        return found


if __name__ == "__main__":
    serve(lambda: Llama(sys.argv[1], int(sys.argv[2])))
