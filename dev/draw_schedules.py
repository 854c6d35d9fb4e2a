"""Draw pipeline schedules for the docs, DualPipe as in the report's figure, with table 2's numbers.

python dev/draw_schedules.py docs/images
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ziphius.parallel.pipeline.bubble import compare
from ziphius.parallel.pipeline.families import schedule
from ziphius.parallel.pipeline.simulate import Times, simulate
from ziphius.report.pipeline import draw_pipeline

TIMES = Times(forward=1, backward=2, weight=1, pair=3)
V = ("way down", "way up")
SCHEDULES = (
    ("1f1b", "1F1B", 8, 20, ()),
    ("zb1p", "ZB1P", 8, 20, ()),
    ("dualpipe", "DualPipe", 8, 20, ("first direction", "second direction")),
    ("dualpipev", "DualPipeV", 4, 10, V),
    ("zbv", "ZB-V", 4, 10, V),
    ("interleaved", "Interleaved 1F1B", 4, 8, ("first stage", "second stage")),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--format", choices=("svg", "png"), default="svg")
    options = parser.parse_args()
    for name, title, ranks, micro_batches, chunks in SCHEDULES:
        table = schedule(name, ranks, micro_batches)
        row = compare(table, TIMES)
        draw_pipeline(
            simulate(table, TIMES).pictured(),
            options.folder / f"schedule-{name}.{options.format}",
            title=f"{title}: {ranks} ranks, {micro_batches} micro-batches",
            chunk_names=chunks,
            note=f"step {row.total:g}, of which bubble {row.bubble:g}",
        )
        print(row)


if __name__ == "__main__":
    main()
