"""The quickstart, whole: every stage's figures, speed, memory and time of `ziphius quickstart`.

Runs it in a process of its own, as a user would, and prints its figures as JSON in the last line.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from support import report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.5, help="minutes of training")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark"), help="the run's folder")
    parser.add_argument("--record", action="store_true", help="keep the result in results/")
    parser.add_argument("--run", type=Path, help="record this run, which 'make run' has left")
    options = parser.parse_args()
    if options.run:
        summary = json.loads((options.run / "summary.json").read_text("utf-8"))
        report("quickstart", summary, record=options.record)
        return
    command = [sys.executable, "-m", "ziphius", "quickstart", "--out", str(options.out)]
    began = time.perf_counter()
    subprocess.run([*command, "--minutes", str(options.minutes)], check=True)
    seconds = time.perf_counter() - began
    summary = json.loads((options.out / "summary.json").read_text("utf-8"))
    report("quickstart", {**summary, "seconds": round(seconds, 1)}, record=options.record)


if __name__ == "__main__":
    main()
