"""Quantised checkpoints answer from their codes, bit for bit as from the numbers they mean."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ziphius
from tests.support import random_model, random_tokens, tiny_config
from ziphius.checkpoint.convert import convert
from ziphius.checkpoint.in_place import LazyExperts, load_in_place
from ziphius.inference.engine import Engine, EngineOptions
from ziphius.inference.params import SamplingParams
from ziphius.kernels.select import answering_kernels
from ziphius.kernels.stored import Codes
from ziphius.model.precision import Precision
from ziphius.model.transformer import Transformer

# Of all experts in BF16, 295 kB, and enough for those of one layer.
ROOM = 100_000
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


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "model"
    precision = Precision.for_inference(torch.bfloat16)
    ziphius.save(random_model(tiny_config(**WIDE), precision=precision, seed=3), folder)
    return folder


def converted(source: Path, folder: Path, form: str, group: int = 32) -> Path:
    if form == "bf16":
        return source
    convert(source, folder / form, form, group_size=group)
    return folder / form


def answers(model: Transformer) -> list[object]:
    engine = Engine(model, options=EngineOptions(speculation="on"))
    params = SamplingParams(
        max_tokens=12, temperature=0.8, seed=1, logprobs=2, prompt_logprobs=1, ignore_eos=True
    )
    prompts = random_tokens(model.config, 3, 20, seed=5).tolist()
    requests = [engine.add(prompt, params) for prompt in prompts]
    while not all(request.finished for request in requests):
        engine.step()
    return [(r.result().outputs, r.result().prompt_logprobs) for r in requests]


@pytest.mark.parametrize("form", ["bf16", "fp8", "int8", "int4"])
@pytest.mark.parametrize("lazy", [False, True])
def test_codes_answer_as_the_numbers_they_mean(
    source: Path, tmp_path: Path, kernel_folder: Path, form: str, lazy: bool
) -> None:
    folder = converted(source, tmp_path, form)
    kernels = answering_kernels(kernel_folder)
    loaded = load_in_place(folder, kernels, expert_bytes=ROOM if lazy else None)
    dense = ziphius.load(folder, kernels=kernels).requires_grad_(False)
    assert answers(loaded.model) == answers(dense)
    coded = loaded.model.layers[0].self_attn.o_proj.weight
    assert isinstance(coded, Codes) == (form != "bf16")
    if lazy:
        assert loaded.experts is not None
        assert loaded.experts.bytes <= ROOM
        # INT4 experts all have room; of others some were dropped and read again.
        assert loaded.experts.reads >= 3 * 8
        assert (loaded.experts.reads > 3 * 8) == (form != "int4")
        assert isinstance(loaded.model.layers[1].mlp.places, LazyExperts)
    loaded.close()


@pytest.mark.parametrize("form", ["fp8", "int8", "int4"])
def test_memory_is_about_that_of_the_file(
    source: Path, tmp_path: Path, kernel_folder: Path, form: str
) -> None:
    folder = converted(source, tmp_path, form)
    loaded = load_in_place(folder, answering_kernels(kernel_folder))
    stored = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    assert loaded.weight_bytes <= 1.1 * stored


@pytest.mark.parametrize("group", [24, -1, 128])
def test_groups_that_products_do_not_take_become_numbers(
    source: Path, tmp_path: Path, kernel_folder: Path, group: int
) -> None:
    folder = converted(source, tmp_path, "int4", group)
    kernels = answering_kernels(kernel_folder)
    dense = ziphius.load(folder, kernels=kernels).requires_grad_(False)
    loaded = load_in_place(folder, kernels)
    assert answers(loaded.model) == answers(dense)
    coded = isinstance(loaded.model.layers[0].self_attn.o_proj.weight, Codes)
    assert coded == (group != 24)


def test_torch_kernels_take_codes_too(source: Path, tmp_path: Path) -> None:
    folder = converted(source, tmp_path, "int8")
    loaded = load_in_place(folder, answering_kernels(None), expert_bytes=30_000)
    dense = ziphius.load(folder, kernels=answering_kernels(None)).requires_grad_(False)
    assert answers(loaded.model) == answers(dense)


LIMITED = """
import resource, sys, torch
from pathlib import Path
from ziphius.inference.llm import LLM
from ziphius.inference.params import SamplingParams
torch.set_num_threads(1)
folder, kernels, room, lazy = sys.argv[1:]
def held():
    return int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (held() + int(room), held() + int(room)))
llm = LLM(folder, kernel_cache=kernels, verify=False, cache_tokens=64,
          expert_bytes=int(room) // 4 if lazy == "lazy" else None)
out = llm.generate([[1, 5, 9, 4]], SamplingParams(temperature=0, max_tokens=8, ignore_eos=True))
print(out[0].outputs[0].token_ids)
"""


def test_a_checkpoint_twice_the_memory_answers(tmp_path: Path, kernel_folder: Path) -> None:
    """Lazy experts answer under a limit of half the checkpoint, where all of it does not fit."""
    config = tiny_config(
        **{**WIDE, "hidden_size": 256, "moe_intermediate_size": 512}, n_routed_experts=64
    )
    model = random_model(config, precision=Precision.for_inference(torch.bfloat16), seed=3)
    ziphius.save(model, tmp_path / "model", max_shard_bytes=20_000_000)
    size = sum(file.stat().st_size for file in (tmp_path / "model").glob("*.safetensors"))
    assert size > 140_000_000
    answering_kernels(kernel_folder)

    def run(how: str) -> subprocess.CompletedProcess[str]:
        arguments = [str(tmp_path / "model"), str(kernel_folder), str(size // 2), how]
        command = [sys.executable, "-c", LIMITED, *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=200)

    lazy = run("lazy")
    assert lazy.returncode == 0, lazy.stderr[-2000:]
    assert lazy.stdout.startswith("(")
    assert run("whole").returncode != 0
