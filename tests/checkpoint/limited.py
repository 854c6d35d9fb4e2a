"""A checkpoint that is large beside the process, and processes whose memory is limited."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

import ziphius
from tests.support import random_model, tiny_config
from ziphius.model.precision import Precision

# Widths that products of codes take.
WIDE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "q_lora_rank": 32,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 32,
}
LIMIT = """
import resource, sys, torch
torch.set_num_threads(1)
folder, kernels, room, how = sys.argv[1:]
def limit(room):
    held = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + room, held + room))
"""


def large_checkpoint(folder: Path, vocab_size: int = 61) -> int:
    """Save a model of 150 MB, most of it experts; return the bytes of its weights."""
    changes = {**WIDE, "hidden_size": 256, "moe_intermediate_size": 512, "vocab_size": vocab_size}
    config = tiny_config(**changes, n_routed_experts=64)
    model = random_model(config, precision=Precision.for_inference(torch.bfloat16), seed=3)
    ziphius.save(model, folder, max_shard_bytes=20_000_000)
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    assert size > 140_000_000
    return size


def run_limited(
    script: str, folder: Path, kernels: Path, room: int, how: str
) -> subprocess.CompletedProcess[str]:
    """Run a script that calls ``limit(int(room))`` when it has imported what it needs."""
    arguments = [str(folder), str(kernels), str(room), how]
    command = [sys.executable, "-c", LIMIT + script, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=200)
