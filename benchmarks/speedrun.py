"""Minutes until `tiny` reaches a stated bits per byte on the default corpus (dev/LEADERBOARD.md).

Held-out text is measured every so many steps. The clock stands still meanwhile, as it does while
the text is prepared. The run ends at the first measurement at or below the target, or with its
schedule. Prints its figures as JSON in the last line.
"""

from __future__ import annotations

import argparse
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rich.console import Console
from support import report

from ziphius.cli.display import Display
from ziphius.config.recipe import load_recipe
from ziphius.training import run
from ziphius.training.folder import RunFolder
from ziphius.training.loop import Stopped


class Race:
    """Follows a run, and asks it to stop when the target is reached."""

    def __init__(self, display: Display, target: float) -> None:
        self.display, self.target = display, target
        self.measured: list[dict[str, float]] = []
        self.last: dict[str, Any] = {}

    def say(self, text: str) -> None:
        self.display.say(text)

    def step(self, record: dict[str, Any], steps: int) -> None:
        self.display.step(record, steps)
        self.last = record
        if "heldout_bpb" in record:
            keys = ("step", "seconds", "heldout_bpb")
            self.measured.append({key: record[key] for key in keys})

    @property
    def reached(self) -> bool:
        return bool(self.measured) and self.measured[-1]["heldout_bpb"] <= self.target

    @contextmanager
    def stopping(self) -> Iterator[Callable[[], int]]:
        yield lambda: signal.SIGTERM if self.reached else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", type=float, default=1.9, help="bits per byte to reach")
    parser.add_argument("--every", type=int, default=50, help="steps between measurements")
    parser.add_argument("--steps", type=int, help="length of the schedule, by default the preset's")
    parser.add_argument("--out", type=Path, default=Path("runs/speedrun"), help="the run's folder")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE")
    parser.add_argument("--record", action="store_true", help="keep the result in results/")
    options = parser.parse_args()
    length = [f"pretrain.steps={options.steps}"] if options.steps else []
    changes = [*length, *options.overrides]
    recipe = load_recipe("tiny", [f"run.validate_every={options.every}", *changes])
    with Display(Console(stderr=True)) as display:
        race = Race(display, options.target)
        with suppress(Stopped):
            folder = RunFolder(options.out, replace=True)
            run.pretrain(run.resolve(recipe), folder, race, stopping=race.stopping)
    figures = {
        "target": options.target,
        "reached": race.reached,
        "minutes": round(race.last["seconds"] / 60, 2),
        "heldout_bpb": race.measured[-1]["heldout_bpb"] if race.measured else None,
        "steps": race.last["step"],
        "tokens": race.last["tokens"],
        "measured": race.measured,
        "changes": changes,
    }
    report("speedrun", figures, record=options.record)


if __name__ == "__main__":
    main()
