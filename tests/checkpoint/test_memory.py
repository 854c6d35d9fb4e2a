"""What a conversion holds: processes that are given a limit, and checkpoints larger than it."""

import json
import mmap
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.checkpoint.published import layout
from tests.support import tiny_config
from ziphius.checkpoint import memory
from ziphius.checkpoint.config_json import config_json
from ziphius.checkpoint.memory import numbers_at_a_time, resident_bytes
from ziphius.config.errors import BadInput
from ziphius.config.model import ModelConfig

MIB = 2**20
# Embedding and head take 340 MB each in FP32, far more than the room.
ROOM = 96 * MIB
CONFIG = tiny_config(
    vocab_size=41_500, hidden_size=2048, intermediate_size=1024, moe_intermediate_size=128,
    num_hidden_layers=2, num_nextn_predict_layers=0,
)  # fmt: skip
# Peak of this very program: what a parent held before is not in it, as it is in ru_maxrss.
CONVERT = """
import sys, torch
from ziphius.checkpoint.convert import convert
from ziphius.checkpoint.memory import resident_bytes
torch.set_num_threads(2)
source, target, to, room = sys.argv[1:]
limit = resident_bytes() + int(room)
convert(source, target, to, group_size=32, memory=limit)
line = next(l for l in open("/proc/self/status") if l.startswith("VmHWM"))
print(limit, int(line.split()[1]) * 1024)
"""


def write_sparse(folder: Path, config: ModelConfig) -> int:
    """Write a checkpoint of zeros in FP32 that takes no room on the disk; return its bytes."""
    folder.mkdir()
    header, end = {}, 0
    for name, shape in layout(config).items():
        size = 4 * torch.Size(shape).numel()
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    settings = config_json(config, dtype=torch.float32)
    (folder / "config.json").write_text(json.dumps(settings))
    return end


@pytest.mark.parametrize("to", ["bf16", "fp8", "int4"])
def test_a_conversion_stays_below_its_limit(place: Path, to: str) -> None:
    size = write_sparse(place / "source", CONFIG)
    command = [sys.executable, "-c", CONVERT, place / "source", place / "target", to, str(ROOM)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr
    limit, held = map(int, result.stdout.split())
    assert limit - ROOM < held <= limit, f"{held / MIB:.0f} MiB of {limit / MIB:.0f}"
    assert size > limit


def test_a_limit_that_is_too_small_says_what_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "resident_bytes", lambda: 300 * MIB)
    shapes = {"narrow": (10_000, 8), "wide": (10, 18_432), "vector": (10**9,)}
    need = 128 * 18_432 * (memory.NUMBER_BYTES + memory.BLOCK_NUMBER_BYTES)
    with pytest.raises(BadInput, match=r"--memory: 400 MiB .* 300 MiB, and 128 rows of wide"):
        numbers_at_a_time(shapes, 400 * MIB)
    enough = 300 * MIB + need
    assert numbers_at_a_time(shapes, enough) >= 128 * 18_432
    with pytest.raises(BadInput) as caught:
        numbers_at_a_time(shapes, enough - 1)
    said = int(str(caught.value).split("give it ")[1].split("MiB")[0]) * MIB
    assert numbers_at_a_time(shapes, said) >= 128 * 18_432


def test_more_memory_than_is_of_use_is_not_taken() -> None:
    shapes = {"w": (10**6, 512)}
    most = memory.PIECE_BYTES // memory.NUMBER_BYTES
    assert numbers_at_a_time(shapes, 2**50) == numbers_at_a_time(shapes, None) <= most


def test_resident_bytes_counts_what_is_held() -> None:
    before = resident_bytes()
    assert before > 50 * MIB
    with mmap.mmap(-1, 64 * MIB) as block:  # not what the process had and gave back to itself
        block.write(bytes(MIB) * 64)
        assert resident_bytes() - before > 50 * MIB
