"""Quantised checkpoints answer from their codes, bit for bit as from the numbers they mean."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import ziphius
from tests.checkpoint.limited import WIDE, large_checkpoint, run_limited
from tests.support import random_model, random_tokens, tiny_config
from ziphius.checkpoint.convert import convert
from ziphius.checkpoint.expert_stores import LazyExperts
from ziphius.checkpoint.in_place import load_in_place
from ziphius.inference.engine import Engine, EngineOptions
from ziphius.inference.params import SamplingParams
from ziphius.kernels.select import answering_kernels
from ziphius.kernels.stored import Codes
from ziphius.model.precision import Precision
from ziphius.model.transformer import Transformer

# Of all experts in BF16, 295 kB, and enough for those of one layer.
ROOM = 100_000


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "model"
    precision = Precision.for_inference(torch.bfloat16)
    ziphius.save(random_model(tiny_config(**WIDE), precision=precision, seed=3), folder)
    return folder


def converted(source: Path, folder: Path, form: str, group: int = 32) -> Path:
    if form == "bf16":
        return source
    to, _, head = form.partition("+")
    convert(source, folder / form, to, group_size=group, head=head == "head")
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


@pytest.mark.parametrize("form", ["bf16", "fp8", "int8", "int4", "int8+head", "int4+head"])
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
    head = loaded.model.lm_head.weight
    assert (head.form if isinstance(head, Codes) else None) == ("int8" if "+" in form else None)
    if lazy:
        assert loaded.experts is not None
        assert loaded.experts.bytes <= ROOM
        # INT4 experts all have room; of others some were dropped and read again.
        assert loaded.experts.reads >= 3 * 8
        assert (loaded.experts.reads > 3 * 8) == (not form.startswith("int4"))
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


ANSWER = """
from ziphius.inference.llm import LLM
from ziphius.inference.params import SamplingParams
limit(int(room))
llm = LLM(folder, kernel_cache=kernels, verify=False, cache_tokens=64,
          expert_bytes=int(room) // 4 if how == "lazy" else None)
out = llm.generate([[1, 5, 9, 4]], SamplingParams(temperature=0, max_tokens=8, ignore_eos=True))
print(out[0].outputs[0].token_ids)
"""


def test_a_checkpoint_twice_the_memory_answers(tmp_path: Path, kernel_folder: Path) -> None:
    """Lazy experts answer under a limit of half the checkpoint, where all of it does not fit."""
    size = large_checkpoint(tmp_path / "model")
    answering_kernels(kernel_folder)
    given = (tmp_path / "model", kernel_folder, size // 2)
    lazy = run_limited(ANSWER, *given, "lazy")
    assert lazy.returncode == 0, lazy.stderr[-2000:]
    assert lazy.stdout.startswith("(")
    assert run_limited(ANSWER, *given, "whole").returncode != 0
