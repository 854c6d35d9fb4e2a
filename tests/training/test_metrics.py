"""Lines of metrics that survive being cut off, and TensorBoard's copy of them."""

import json
import resource
from pathlib import Path

import pytest

from ziphius.training.metrics import Events, Lines


def test_lines_come_back(tmp_path: Path) -> None:
    lines = Lines(tmp_path / "metrics.jsonl")
    lines.append({"step": 1, "loss": 0.1})
    lines.append({"step": 2, "loss": None})
    assert lines.last() == {"step": 2, "loss": None}
    assert len(lines.path.read_text().splitlines()) == 2


def test_cutting_goes_back_to_a_size_and_drops_half_a_line(tmp_path: Path) -> None:
    lines = Lines(tmp_path / "metrics.jsonl")
    lines.append({"step": 1})
    kept, size = lines.path.read_bytes(), lines.size()
    lines.append({"step": 2})
    assert lines.cut(size)
    assert lines.path.read_bytes() == kept
    with lines.path.open("ab") as file:
        file.write(b'{"step": 2, "lo')
    assert not lines.cut(10**6), "so much was not there"
    assert lines.path.read_bytes() == kept
    assert lines.cut(0)
    assert lines.path.read_bytes() == b""


def test_a_disk_that_takes_half_a_line_is_an_error(tmp_path: Path) -> None:
    lines = Lines(tmp_path / "metrics.jsonl")
    lines.append({"step": 1})
    kept, limits = lines.path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(kept) + 4, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            lines.append({"step": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    lines.cut(10**6)
    assert lines.path.read_bytes() == kept


def test_a_log_that_is_missing_is_begun(tmp_path: Path) -> None:
    lines = Lines(tmp_path / "metrics.jsonl")
    assert not lines.cut(100)
    assert lines.path.read_bytes() == b""
    assert lines.last() == {}


def test_tensorboard_reads_back_the_numbers(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = Events(tmp_path, 1)
    for step in (1, 2):
        record = {"step": step, "seconds": 9.0, "loss": 3.0 / step, "skipped": None}
        events.write(json.loads(json.dumps(record)))
    events.close()
    reader = EventAccumulator(str(tmp_path))
    reader.Reload()
    assert reader.Tags()["scalars"] == ["loss"]
    assert [(e.step, e.value) for e in reader.Scalars("loss")] == [(1, 3.0), (2, 1.5)]
