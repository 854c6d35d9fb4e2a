"""What writing and reading a checkpoint hold beside what the run itself does, in bytes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

MIB = 2**20
# It prints what the process had more at most, in bytes, while it saved and while it loaded.
SCRIPT = """
import sys, torch
from pathlib import Path
from tests.parallel.sharded import settings
from tests.support import F32, random_model, tiny_config
from tests.training.spread import NUMBERS, tokenizer
from ziphius.training.ema import WeightAverage
from ziphius.training.optimizer import AdamW
from ziphius.training.saving import Saver
torch.set_num_threads(1)

def forget():
    Path("/proc/self/clear_refs").write_text("5")

def at(what):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(what))

wide = dict(hidden_size=256, moe_intermediate_size=256, n_routed_experts=32, vocab_size=500)
model = random_model(tiny_config(**wide), precision=F32)
optimizer = AdamW(model.parameters(), settings())
average = WeightAverage([model], 0.9)
sizes = dict(max_shard_bytes=8 * 2**20, file_bytes=8 * 2**20)
saver = Saver([model], **sizes)
folder = Path(sys.argv[1])
# Once, so that what is made on first use is there.
saver.save(folder / "first", optimizer, average, NUMBERS, tokenizer(), at_once=True)
saver.load(folder / "first", optimizer, average, NUMBERS)
forget()
before = at("VmRSS")
saver.save(folder / "step", optimizer, average, NUMBERS, tokenizer(), at_once=True)
wrote = at("VmHWM") - before
forget()
before = at("VmRSS")
saver.load(folder / "step", optimizer, average, NUMBERS)
print(wrote, at("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux says it")
def test_memory_is_that_of_a_file_and_not_of_the_checkpoint(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SCRIPT, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    size = sum(file.stat().st_size for file in (tmp_path / "step").rglob("*.safetensors"))
    assert size > 200 * MIB
    wrote, read = map(int, done.stdout.split())
    assert wrote < 40 * MIB
    assert read < 40 * MIB
