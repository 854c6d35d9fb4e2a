"""Ziphius behind the protocol: ``engine_ziphius.py CHECKPOINT KERNELS THREADS``.

The variants ``off`` and ``on`` are its speculation; one model in memory serves both.
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from typing import Any

from protocol import resident_bytes, serve


class Ziphius:
    """Exact mode, as it is by default, without its cache of prefixes."""

    def __init__(self, checkpoint: str, kernels: str, threads: int) -> None:
        import torch

        from ziphius.inference.engine import Engine
        from ziphius.inference.llm import LLM

        torch.set_num_threads(threads)
        options: dict[str, Any] = {"prefix_cache": False, "max_running": 16}
        plain = LLM(checkpoint, kernel_cache=kernels, speculation="off", **options)
        self.engines = {"off": plain.engine}
        self.model = plain.model
        if self.model.mtp:
            drafting = replace(plain.engine.options, speculation="on")
            self.engines["on"] = Engine(self.model, None, drafting)

    def about(self) -> dict[str, Any]:
        import ziphius

        return {
            "version": ziphius.__version__,
            "kernels": str(self.model.kernels),
            "resident_bytes": resident_bytes(),
        }

    def variants(self, measure: str) -> list[str]:
        return list(self.engines)

    def prefill(self, prompt: list[int], variant: str) -> dict[str, float]:
        engine = self.engines[variant]
        began = time.perf_counter()
        request = engine.add(prompt, self._greedy(1))
        while not request.finished:
            engine.step()
        return {"seconds": time.perf_counter() - began}

    def decode(self, prompts: list[list[int]], new: int, variant: str) -> dict[str, float]:
        engine = self.engines[variant]
        requests = [engine.add(prompt, self._greedy(new + 1)) for prompt in prompts]
        answers = [request.answers[0] for request in requests]
        while not all(answer.output for answer in answers):
            engine.step()
        had = sum(len(answer.output) for answer in answers)
        steps, fed = engine.steps, engine.batched
        drafted, accepted = self._drafts(requests)
        began = time.perf_counter()
        while not all(answer.finished for answer in answers):
            engine.step()
        seconds = time.perf_counter() - began
        judged, taken = self._drafts(requests)
        return {
            "seconds": seconds,
            "tokens": sum(len(answer.output) for answer in answers) - had,
            "batch": (engine.batched - fed) / (engine.steps - steps),
            "steps": engine.steps - steps,
            "drafted": judged - drafted,
            "accepted": taken - accepted,
        }

    def tokens(self, prompt: list[int], new: int) -> list[int]:
        engine = self.engines["off"]
        request = engine.add(prompt, self._greedy(new))
        while not request.finished:
            engine.step()
        return list(request.answers[0].output)

    def experts(self, rows: list[list[int]], start: int) -> float:
        """Count the experts that rows of equal length meet together at a position.

        The mean over mixture layers, and over positions from ``start`` on.
        """
        import torch

        with torch.no_grad():
            _, routings = self.model.trunk(torch.tensor(rows))
        counts = []
        for routing in routings.values():
            chosen_BTK = routing.chosen_NK.view(len(rows), len(rows[0]), -1)[:, start:]
            counts += [len(chosen_BTK[:, t].unique()) for t in range(chosen_BTK.shape[1])]
        return sum(counts) / len(counts)

    def _greedy(self, tokens: int) -> Any:
        from ziphius.inference.params import SamplingParams

        return SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)

    def _drafts(self, requests: list[Any]) -> tuple[int, int]:
        return sum(r.drafted for r in requests), sum(r.accepted for r in requests)


if __name__ == "__main__":
    serve(lambda: Ziphius(sys.argv[1], sys.argv[2], int(sys.argv[3])))
