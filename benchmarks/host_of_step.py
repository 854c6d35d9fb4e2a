"""Whether a training step on a GPU waits for its kernels or for the host that launches them.

Times steps of ``mini``, sums the time of their kernels and counts launches: FP8 with recomputation
and without, and BF16. Without a GPU the preset is ``tiny`` and there are no kernels to sum. The
last line is one JSON object.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from support import report
from support.gpu.circumstances import circumstances
from support.gpu.profile import kernels_of
from support.gpu.training import Job, Ours
from torch.profiler import ProfilerActivity, profile

WAYS = (("fp8", "selective"), ("fp8", "none"), ("bfloat16", "selective"))


def measure(job: Job, compute: str, rounds: int) -> dict[str, Any]:
    """Time ``rounds`` steps, and profile one more."""
    gpu = job.device != "cpu"
    trained = Ours(job, compute)

    def step() -> float:
        began = time.perf_counter()
        trained.step()
        if gpu:
            torch.cuda.synchronize()
        return time.perf_counter() - began

    step()
    seconds = [step() for _ in range(rounds)]
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
    with profile(activities=activities) as seen:
        step()
    kernels = kernels_of(seen)
    return {
        "step_seconds": [round(s, 3) for s in seconds],
        "median_seconds": round(statistics.median(seconds), 4),
        "kernel_ms": round(sum(row["us"] for row in kernels.values()) / 1e3, 1) if gpu else None,
        "launches": sum(row["calls"] for row in kernels.values()) if gpu else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=6, help="steps that are timed")
    parser.add_argument("--record", type=Path, help="a file to keep the result in as well")
    parser.add_argument("--commit", help="of the code, where there is no history to ask")
    options = parser.parse_args()
    gpu = torch.cuda.is_available()
    recipe, device, sizes = ("mini", "cuda", (8, 4, 4096)) if gpu else ("tiny", "cpu", (4, 4, 64))
    ways = {}
    for compute, recompute in WAYS:
        job = Job(recipe, (f"parallel.recompute={recompute}",), device, *sizes)
        name = f"{compute}, recompute {recompute}"
        ways[name] = measure(job, compute, options.rounds)
        print(name, ways[name], file=sys.stderr, flush=True)
    found = {**circumstances(), "measured_on_gpu": gpu, "ways": ways}
    report("host_of_step", found, record=False, file=options.record, commit=options.commit)


if __name__ == "__main__":
    main()
