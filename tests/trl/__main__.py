"""Ask trl for the losses and advantages of some tensors, and compare ours with them.

    python -m tests.trl            with trl's newest release, in an environment below .cache
    python -m tests.trl --write    and keep what it gave for the ordinary tests

trl is Apache-2.0; nothing of it is in this repository but the numbers that it gives. Exit code 0:
all are equal; 1: some are not; 2: there is no such environment.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
from pathlib import Path

from tests.alignment.against_trl import check
from tests.clients.environments import CannotMake, Environment, clean

ROOT = Path(__file__).parents[2]
CACHE = ROOT / ".cache" / "trl"
VECTORS = ROOT / "tests" / "alignment" / "data" / "trl.json"
ENVIRONMENT = Environment("trl", "trl", ("trl>=1.16,<2",), 1500, torch=True)


def main() -> int:
    """Compare; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.trl",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--write", action="store_true", help="keep what trl gave")
    arguments = parser.parse_args()
    CACHE.mkdir(parents=True, exist_ok=True)
    given = CACHE / "trl.json"
    try:
        python = ENVIRONMENT.python(CACHE)
    except CannotMake as error:
        print(f"error: {error}")
        return 2
    script = Path(__file__).with_name("vectors.py")
    # Nothing is looked up: networks and data are made on the spot.
    environment = clean(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")
    run = subprocess.run(
        [str(python), str(script), str(given)],
        capture_output=True, text=True, check=False, env=environment, cwd=CACHE,
    )  # fmt: skip
    if run.returncode:
        print(f"error: trl gave nothing: {run.stderr.strip()[-500:]}")
        return 1
    vectors = json.loads(given.read_text("utf-8"))
    try:
        number = check(vectors)
    except AssertionError as error:
        print(f"error: ours differ from those of trl {vectors['versions']['trl']}: {error}")
        return 1
    print(f"{number} cases are those of trl {vectors['versions']['trl']}")
    if arguments.write:
        shutil.copyfile(given, VECTORS)
        print(f"written to {VECTORS.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
