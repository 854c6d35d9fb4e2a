"""An engine that does not start, and one whose server is gone."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

from tests.serving.programs import ENDLESS, Asking, alive, program


def test_the_engine_ends_with_its_server(checkpoint: Path, home: Path) -> None:
    with program(checkpoint, home) as started:
        started.until_ready()
        engine = started.engine()
        asking = Asking(started, ENDLESS)
        assert asking.begun.wait(30)
        started.process.kill()
        started.process.wait()
        ends = time.monotonic() + 5
        while alive(engine):
            assert time.monotonic() < ends, "an orphan"
            time.sleep(0.02)


def test_weights_that_cannot_be_read(checkpoint: Path, home: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(checkpoint, broken)
    for weights in broken.glob("*.safetensors"):
        weights.write_bytes(weights.read_bytes()[:1000])
    with program(broken, home) as started:
        assert started.ends(60) == 2
        (error,) = [line for line in started.lines if line.startswith("error: ")]
        assert str(broken) in error
        assert "Traceback" not in "".join(started.lines)


def test_a_folder_that_is_no_checkpoint(home: Path, tmp_path: Path) -> None:
    with program(tmp_path / "nowhere", home) as started:
        assert started.ends(60) == 2
        assert started.lines[-1].startswith("error: ")
        assert "Traceback" not in "".join(started.lines)
