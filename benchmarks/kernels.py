"""Every kernel beside torch's own, at the report's shapes, and as a share of measured peaks.

On a GPU the peaks are measured first: matrix products in BF16 and FP8 by torch's fastest, bandwidth
by a large copy. Every version is then checked against a float64 or FP32 reference, on fresh inputs
and poisoned memory, and timed by CUDA graphs over inputs that do not fit into the cache. One that
fails, hangs or takes the device with it has a row that says why, and the run goes on. Sections
share the time of ``--seconds``; what was not reached is named. On a processor small shapes of the
plain PyTorch reference are timed, which says nothing of a GPU: ``measured_on_gpu`` is then false.
The last line is one JSON object.

    python benchmarks/kernels.py                      all sections
    python benchmarks/kernels.py --only gemm,decode   some of them
    python benchmarks/kernels.py --slow               and peers that torch.compile makes
    python benchmarks/kernels.py --tune               ours in other blocks as well
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from support import report
from support.gpu import show
from support.gpu.circumstances import circumstances
from support.gpu.entry import Place
from support.gpu.process import Gone
from support.gpu.registry import SECTIONS, entries
from support.gpu.worker import Setting, Worker, serve

START_SECONDS, ENTRY_SECONDS = 120, 60


def names(sections: Sequence[str], device: str, size: Any) -> dict[str, list[str]]:
    """Return the entries of every section, by name; nothing is made for them yet."""
    place = Place(torch.device(device), torch.bfloat16)
    return {section: [e.name for e in entries(section, place, size)] for section in sections}


def run(worker: Worker, todo: Mapping[str, Sequence[str]], ends: float) -> list[dict[str, Any]]:
    """Measure what fits: each section has its share of the time that is left when it begins."""
    rows = []
    for place, (section, found) in enumerate(todo.items()):
        left = ends - time.monotonic()
        until = time.monotonic() + left / (len(todo) - place)
        for number, name in enumerate(found):
            row = {"section": section, "name": name}
            if time.monotonic() >= until:
                rows.append({**row, "error": "not reached in the time given"})
                continue
            try:
                row |= worker.ask(section, number, ENTRY_SECONDS)
            except Gone as gone:
                row["error"] = str(gone)
            rows.append(row)
            print(show.line(row, ends - time.monotonic()), file=sys.stderr, flush=True)
    return rows


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Say what failed, what was not reached, and which goals were met."""
    failed = [
        f"{row['section']} {row['name']}: {name}: {figures['error']}"
        for row in rows
        for name, figures in row.get("versions", {}).items()
        if "error" in figures
    ]
    failed += [f"{r['section']} {r['name']}: {r['error']}" for r in rows if _broke(r)]
    goals = [row["goal"]["met"] for row in rows if row.get("goal")]
    unreached = [f"{r['section']} {r['name']}" for r in rows if "not reached" in r.get("error", "")]
    return {
        "goals_met": sum(goals),
        "goals_missed": len(goals) - sum(goals),
        "failed": failed,
        "not_reached": unreached,
    }


def _broke(row: Mapping[str, Any]) -> bool:
    return "error" in row and "not reached" not in row["error"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections, with commas between")
    parser.add_argument("--seconds", type=float, default=150, help="for all of it, more or less")
    parser.add_argument("--slow", action="store_true", help="also peers that compile for long")
    parser.add_argument("--tune", action="store_true", help="only ours, in all of its blocks")
    parser.add_argument("--record", type=Path, help="a file to keep the result in as well")
    parser.add_argument("--commit", help="of the code, where there is no history to ask")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        serve(Setting(**json.loads(options.worker)))
        return
    ends = time.monotonic() + options.seconds
    sections = [name.strip() for name in options.only.split(",")]
    unknown = sorted(set(sections) - set(SECTIONS))
    if unknown:
        parser.error(f"no section {', '.join(unknown)}; there are {', '.join(SECTIONS)}")
    gpu = torch.cuda.is_available()
    setting = Setting("cuda" if gpu else "cpu", "full" if gpu else "small")
    setting = Setting(setting.device, setting.size, options.slow, options.tune)
    worker = Worker(__file__, setting)
    try:
        peaks = worker.start(START_SECONDS).as_figures()
        print(f"peaks: {peaks}", file=sys.stderr, flush=True)
        rows = run(worker, names(sections, setting.device, setting.size), ends)
    except Gone as gone:
        sys.exit(f"the peaks could not be measured: {gone}")
    finally:
        worker.close()
    show.table(rows)
    about = {**circumstances(), "measured_on_gpu": gpu, "size": setting.size, "peaks": peaks}
    figures = {**about, **summary(rows), "rows": rows}
    report("kernels", figures, record=False, file=options.record, commit=options.commit)


if __name__ == "__main__":
    main()
