"""vLLM for processors behind the protocol: ``engine_vllm.py CHECKPOINT COMPILE THREADS``.

``COMPILE`` is ``compiled`` or ``eager``. The engine runs in this process and is stepped, so that
decoding is timed without what comes before it.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from protocol import resident_bytes, serve

LENGTH = 1024
SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    # Its own binding of threads to cores counts cores that containers may not have.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
}


class Vllm:
    def __init__(self, checkpoint: str, compiling: str, threads: int) -> None:
        os.environ.update(SETTINGS, OMP_NUM_THREADS=str(threads))
        import torch
        from vllm import LLM

        torch.set_num_threads(threads)
        self.compiling = compiling
        config = json.loads((Path(checkpoint) / "config.json").read_text("utf-8"))
        self.engine = LLM(
            checkpoint,
            dtype=config["dtype"],
            max_model_len=min(LENGTH, config["max_position_embeddings"]),
            max_num_batched_tokens=2 * LENGTH,
            max_num_seqs=16,
            skip_tokenizer_init=True,
            enable_prefix_caching=False,
            enforce_eager=compiling == "eager",
        ).llm_engine
        self.names = map(str, itertools.count())

    def about(self) -> dict[str, Any]:
        import torch
        import vllm

        return {
            "version": vllm.__version__,
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "how": self.compiling,
            "resident_bytes": resident_bytes(),
        }

    def variants(self, measure: str) -> list[str]:
        return [self.compiling]

    def prefill(self, prompt: list[int], variant: str) -> dict[str, float]:
        began = time.perf_counter()
        run = self._begin([prompt], 1)
        while self.engine.has_unfinished_requests():
            self._step(run)
        return {"seconds": time.perf_counter() - began}

    def decode(self, prompts: list[list[int]], new: int, variant: str) -> dict[str, float]:
        run = self._begin(prompts, new + 1)
        while not all(run.values()):
            self._step(run)
        had, steps = self._count(run), 0
        began = time.perf_counter()
        while self.engine.has_unfinished_requests():
            self._step(run)
            steps += 1
        seconds = time.perf_counter() - began
        tokens = self._count(run) - had
        return {"seconds": seconds, "tokens": tokens, "batch": tokens / steps}

    def tokens(self, prompt: list[int], new: int) -> list[int]:
        run = self._begin([prompt], new)
        while self.engine.has_unfinished_requests():
            self._step(run)
        (tokens,) = run.values()
        return tokens

    def _begin(self, prompts: list[list[int]], tokens: int) -> dict[str, list[int]]:
        """Add a request a prompt; return what each has answered so far, by its name."""
        from vllm import SamplingParams

        params = SamplingParams(max_tokens=tokens, temperature=0, detokenize=False, ignore_eos=True)
        run: dict[str, list[int]] = {}
        for prompt in prompts:
            name = next(self.names)
            run[name] = []
            self.engine.add_request(name, {"prompt_token_ids": prompt}, params)
        return run

    def _step(self, run: dict[str, list[int]]) -> None:
        for output in self.engine.step():
            run[output.request_id] = list(output.outputs[0].token_ids)

    def _count(self, run: dict[str, list[int]]) -> int:
        return sum(len(tokens) for tokens in run.values())


if __name__ == "__main__":
    serve(lambda: Vllm(sys.argv[1], sys.argv[2], int(sys.argv[3])))
