"""A training step of ``mini`` beside transformers, FP8 on and off, on one GPU.

Everyone trains the same network (no MTP) from the same weights on the same tokens, in a process of
its own: ours in BF16 and in FP8, transformers with FP32 weights under BF16 autocast, as ours has
them, and all in BF16. First each makes some steps whose losses are compared, then they take turns;
a turn begins with a step that does not count. MFU divides by a product in BF16, FP8 or not.
Without a GPU the preset is ``tiny``, which says nothing of one: ``measured_on_gpu`` is then false.
The last line is one JSON object.

    python benchmarks/train_on_gpu.py             the comparison
    python benchmarks/train_on_gpu.py --profile   the kernels of one FP8 step of ours, with
                                                  MTP: fails where one that is meant is missing
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from support import report
from support.gpu import process
from support.gpu.circumstances import circumstances
from support.gpu.measure import one_line
from support.gpu.process import Gone, Line, Process
from support.gpu.profile import missing, profile_step
from support.gpu.training import Job, Ours, Theirs, peak_gib

from ziphius.config.errors import BadInput
from ziphius.model.count import count, training_flops
from ziphius.training.machine import peak_flops

OURS, FP8 = "ziphius bfloat16", "ziphius fp8"
THEIRS, PURE = "transformers autocast", "transformers bfloat16"
CONTENDERS = (FP8, OURS, PURE, THEIRS)
LOSSES = 5
AGREEMENT = 0.02  # of the losses, relative: BF16 in two orders of summing
TURN = 3  # steps that count


class Contender:
    """What a process does when it is asked; each method but ``answer`` is a request."""

    def __init__(self, name: str, job: Job) -> None:
        self.name, self.job = name, job
        self.trained: Ours | Theirs | None = None

    def answer(self, request: Line) -> Line:
        """Do what is asked; an error is an answer too."""
        try:
            found: Line = getattr(self, request["do"])(**request.get("with", {}))
        except Exception as error:
            return {"error": one_line(error)}
        return found

    def prepare(self) -> Line:
        """Build."""
        who, _, how = self.name.partition(" ")
        if who == "ziphius":
            self.trained = Ours(self.job, how)
        else:
            self.trained = Theirs(self.job, master=how == "autocast")
        return {}

    def search(self) -> Line:
        """Find the best way, where there are several."""
        assert self.trained is not None
        return {"seconds": self.trained.search(2, self._timed), "about": self.trained.about()}

    def losses(self, steps: int) -> Line:
        """Make the first steps."""
        assert self.trained is not None
        if self.job.device != "cpu":
            torch.cuda.reset_peak_memory_stats()
        found = [self.trained.step() for _ in range(steps)]
        self._rest()
        return {"losses": found, "peak_gib": peak_gib(self.job.device)}

    def turn(self, steps: int) -> Line:
        """Make a step that does not count, and some that do: seconds of each."""
        assert self.trained is not None
        self.trained.step()
        seconds = [self._timed(self.trained.step) for _ in range(steps)]
        self._rest()
        return {"seconds": seconds}

    def peak(self) -> Line:
        """Measure the peak that MFU divides by."""
        return {"flops": peak_flops(self.job.device, torch.bfloat16)}

    def _timed(self, step: Any) -> float:
        began = time.perf_counter()
        step()  # reads its loss, and so waits for the device
        if self.job.device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    def _rest(self) -> None:
        """Give memory back for the others' turns."""
        if self.job.device != "cpu":
            torch.cuda.empty_cache()


def compare(job: Job, names: Sequence[str], ends: float, rounds: int) -> dict[str, Any]:
    """Have all of them train; who fails says why and is left out from then on."""
    found: dict[str, Any] = {name: {} for name in names}
    running = {
        name: Process(name, __file__, {"name": name, "job": dataclasses.asdict(job)})
        for name in names
    }
    try:
        for one in running.values():
            one.send({"do": "prepare"})
        for name in names:
            # A fast start leaves its time to the others; a slow one leaves them most.
            one = partial(_ask, running, found, name, ends)
            one(None, "built", share=0.5)
            one({"do": "search"}, "ready", share=0.5)
            one({"do": "losses", "with": {"steps": LOSSES}}, "losses", share=0.5)
        took, turns = 0.0, 0
        while running and turns < rounds and time.monotonic() + took < ends:
            began = time.monotonic()
            request = {"do": "turn", "with": {"steps": TURN}}
            for name in names:
                _ask(
                    running, found, name, ends, request, f"turn {turns + 1}", least=60, add="turns"
                )
            took, turns = time.monotonic() - began, turns + 1
        if running:
            first = next(iter(running.values()))
            found["peak_flops"] = first.ask({"do": "peak"}, 60).get("flops")
    finally:
        for one in running.values():
            one.close()
    return found


def _ask(
    running: dict[str, Process],
    found: dict[str, Any],
    name: str,
    ends: float,
    request: Line | None,
    what: str,
    *,
    share: float = 1.0,
    least: float = 5.0,
    add: str = "",
) -> None:
    """Ask one for something, or wait for what was asked; note the answer, drop who failed.

    It may take a ``share`` of the time that is left, and ``least`` seconds whatever is left.
    """
    if name not in running:
        return
    one, left = running[name], ends - time.monotonic()
    seconds = max(least, left * share)
    try:
        answer = one.answer(seconds) if request is None else one.ask(request, seconds)
    except Gone as gone:
        answer = {"error": f"{what}: {gone}"}
    if "error" in answer:
        one.close()
        del running[name]
        found[name]["error"] = answer["error"]
    elif add:
        found[name].setdefault(add, []).append(answer["seconds"])
    else:
        found[name] |= answer
    said = answer.get("error", f"{what} {_short(answer)}")
    print(f"[{ends - time.monotonic():4.0f} s left] {name}: {said}", file=sys.stderr, flush=True)


def _short(answer: Line) -> str:
    figures = answer.get("losses") or answer.get("seconds") or ""
    if isinstance(figures, list):
        return " ".join(f"{x:.4f}" for x in figures)
    return str(figures)


def figures_of(job: Job, found: Mapping[str, Any]) -> dict[str, Any]:
    """Turn what was answered into speeds, ratios, MFU and the distance of losses."""
    config, peak = job.load("model.num_nextn_predict_layers=0").model, found.get("peak_flops")
    flops = training_flops(config, job.length)
    counted = count(config)
    rows: dict[str, Any] = {}
    for name in (n for n in CONTENDERS if n in found):
        row = dict(found[name])
        seconds = [s for turn in row.pop("turns", []) for s in turn]
        if seconds and peak:
            speed = job.tokens / statistics.median(seconds)
            row |= {
                "tokens_per_s": round(speed),
                "step_seconds": round(statistics.median(seconds), 5),
                "step_seconds_range": [round(min(seconds), 5), round(max(seconds), 5)],
                "mfu": round(speed * flops / peak, 4),
            }
        rows[name] = row
    return {
        "contenders": rows,
        "ratios": ratios(rows),
        "losses_apart": apart(rows),
        "parameters": counted.total,
        "active_parameters": counted.active,
        "training_flops_per_token": flops,
        "peak_bf16_tflops": round(peak / 1e12, 3) if peak else None,
        "tokens_a_step": job.tokens,
        "job": dataclasses.asdict(job),
    }


def ratios(rows: Mapping[str, Any]) -> dict[str, float]:
    """Divide speeds where both are there."""
    pairs = ((FP8, OURS), (FP8, PURE), (FP8, THEIRS), (OURS, PURE), (OURS, THEIRS))
    speeds = {name: row["tokens_per_s"] for name, row in rows.items() if "tokens_per_s" in row}
    return {
        f"{a} / {b}": round(speeds[a] / speeds[b], 3)
        for a, b in pairs
        if a in speeds and b in speeds
    }


def apart(rows: Mapping[str, Any]) -> dict[str, float]:
    """Return by how much the first steps' losses differ from ours in BF16, relative, at most."""
    losses = {name: row["losses"] for name, row in rows.items() if "losses" in row}
    if OURS not in losses:
        return {}
    return {
        name: round(max(abs(a / b - 1) for a, b in zip(one, losses[OURS], strict=True)), 6)
        for name, one in losses.items()
        if name != OURS
    }


def show(figures: Mapping[str, Any]) -> None:
    table = Table("", "tokens/s", "MFU", "s a step", "peak GiB", "losses", "remarks")
    for name, row in figures["contenders"].items():
        losses = " ".join(f"{x:.3f}" for x in row.get("losses", []))
        speed = f"{row['tokens_per_s']:,}" if "tokens_per_s" in row else ""
        mfu = f"{row['mfu']:.1%}" if "mfu" in row else ""
        seconds = str(row.get("step_seconds", ""))
        memory = f"{row['peak_gib']:.1f}" if "peak_gib" in row else ""
        remarks = row.get("error") or row.get("about", {}).get("experts", "")
        table.add_row(name, speed, mfu, seconds, memory, losses, remarks)
    Console(stderr=True, width=150).print(table)


def problems(figures: Mapping[str, Any]) -> list[str]:
    """Say what makes it no comparison."""
    found = [f"{n}: {r['error']}" for n, r in figures["contenders"].items() if "error" in r]
    for name, off in figures["losses_apart"].items():
        if not off <= AGREEMENT:
            found.append(f"{name}: losses are {off:.1%} from ours in BF16, {AGREEMENT:.0%} allowed")
    return found


def show_profile(found: Mapping[str, Any]) -> None:
    table = Table("kernel", "calls", "us", title="kernels of one FP8 step")
    for name, row in sorted(found.items(), key=lambda item: -item[1]["us"]):
        table.add_row(name[:100], str(row["calls"]), f"{row['us']:,.0f}")
    Console(stderr=True, width=130).print(table)


def main() -> None:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="mini" if gpu else "tiny")
    parser.add_argument("--set", action="append", default=[], metavar="TABLE.KEY=VALUE")
    parser.add_argument("--batch", type=int, default=8 if gpu else 4, help="sequences of a step")
    parser.add_argument("--micro", type=int, default=4, help="sequences of a micro-batch")
    parser.add_argument("--length", type=int, default=4096 if gpu else 128, help="tokens of each")
    parser.add_argument("--only", default=",".join(CONTENDERS), help="who takes part")
    parser.add_argument("--rounds", type=int, default=6, help="turns of each, at most")
    parser.add_argument("--seconds", type=float, default=150, help="for all of it, more or less")
    parser.add_argument("--profile", action="store_true", help="list the kernels of an FP8 step")
    parser.add_argument("--record", type=Path, help="a file to keep the result in as well")
    parser.add_argument("--commit", help="of the code, where there is no history to ask")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        what = json.loads(options.worker)
        process.serve(Contender(what["name"], Job(**what["job"])).answer)
        return
    device = "cuda" if gpu else "cpu"
    sizes = (options.batch, options.micro, options.length)
    job = Job(options.recipe, options.set, device, *sizes)
    try:
        job.load()
    except BadInput as error:
        parser.error(str(error))
    about = {**circumstances(), "measured_on_gpu": gpu}
    if options.profile:
        found = profile_step(job)
        show_profile(found)
        wrong = [f"no {kernel} for {operation}" for operation, kernel in missing(found)]
        name, figures = "train_profile", {"kernels": found, "missing": wrong}
    else:
        names = [name.strip() for name in options.only.split(",")]
        unknown = sorted(set(names) - set(CONTENDERS))
        if unknown:
            parser.error(f"nobody called {', '.join(unknown)}; there are {', '.join(CONTENDERS)}")
        ends = time.monotonic() + options.seconds
        figures = figures_of(job, compare(job, names, ends, options.rounds))
        show(figures)
        wrong = problems(figures)
        name, figures = "train_on_gpu", {**figures, "problems": wrong}
    for problem in wrong:
        print(f"problem: {problem}", file=sys.stderr, flush=True)
    record = {"record": False, "file": options.record, "commit": options.commit}
    report(name, {**about, **figures}, **record)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
