"""The plan of a checkpoint that answers, against what ``LLM`` really holds of it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import ziphius
from tests.checkpoint.limited import WIDE
from tests.support import random_model, tiny_config
from ziphius.checkpoint.convert import convert
from ziphius.checkpoint.shards import ShardReader
from ziphius.config.errors import BadInput
from ziphius.inference.llm import LLM
from ziphius.inference.params import SamplingParams
from ziphius.inference.repeat import MOST_BYTES
from ziphius.model.precision import Precision
from ziphius.planning.memory import EMBEDDING, MTP, ROUTED

# Groups that products take, one group a row, and groups that become numbers.
FORMS = {"bf16": None, "fp8": None, "int8": 32, "int4": 32, "int4-rows": -1, "int4-odd": 24}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One model in every form."""
    folder = tmp_path_factory.mktemp("answering")
    precision = Precision.for_inference(torch.bfloat16)
    ziphius.save(random_model(tiny_config(**WIDE), precision=precision, seed=3), folder / "bf16")
    for name, group in FORMS.items():
        if name != "bf16":
            to = name.partition("-")[0]
            convert(folder / "bf16", folder / name, to=to, group_size=group or 128)
    return folder


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("how", [{}, {"mtp": False}, {"dtype": "float32"}], ids=str)
def test_planned_bytes_are_those_that_are_held(
    folders: Path, kernel_folder: Path, form: str, how: dict[str, Any]
) -> None:
    how = {**how, "kernel_cache": kernel_folder, "cache_tokens": 100}
    plan = LLM.plan(folders / form, **how)
    llm = LLM(folders / form, **how)
    assert llm.loaded is not None
    assert plan.weight_bytes == llm.loaded.weight_bytes
    assert plan.cache_bytes == llm.engine.cache.nbytes
    assert plan.rotary == sum(table.nbytes for table in llm.engine.cache._rope)
    assert plan.absorbed == sum(
        derived_bytes(block.self_attn) for _, _, block in llm.model.blocks()
    )
    assert plan.routed_bytes == plan.weights[ROUTED]
    assert (plan.weights[MTP] == 0) == (how.get("mtp") is False)


def derived_bytes(attention: Any) -> int:
    """Bytes of an attention's absorbed form that are not those of its weight."""
    keys, values = attention.absorbed
    weight = attention.kv_b_proj.weight
    storage = values.untyped_storage()
    shared = torch.is_tensor(weight) and storage.data_ptr() == weight.untyped_storage().data_ptr()
    return int(keys.nbytes + (0 if shared else storage.nbytes()))


HELD = """
import sys, torch
from ziphius.inference.llm import LLM
torch.set_num_threads(1)
folder, kernels = sys.argv[1:]
def held():
    (line,) = (line for line in open("/proc/self/status") if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024
# What is made once is there before anything counts.
LLM(folder + "/small", kernel_cache=kernels, cache_tokens=32)
before = held()
llm = LLM(folder + "/" + "FORM", kernel_cache=kernels, cache_tokens=32)
taken = held() - before
plan = LLM.plan(folder + "/" + "FORM", cache_tokens=32)
print(taken, plan.weight_bytes, plan.blocks, plan.absorbed)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose weights are large beside everything else."""
    folder = tmp_path_factory.mktemp("large")
    precision = Precision.for_inference(torch.bfloat16)
    changes: dict[str, Any] = {**WIDE, "hidden_size": 256, "moe_intermediate_size": 512}
    config = tiny_config(**changes, n_routed_experts=64, vocab_size=4096)
    ziphius.save(random_model(config, precision=precision), folder / "bf16")
    ziphius.save(random_model(tiny_config(**WIDE), precision=precision), folder / "small")
    for to in ("int8", "int4"):
        convert(folder / "bf16", folder / to, to=to, group_size=128)
    return folder


@pytest.mark.parametrize("form", ["bf16", "int8", "int4"])
def test_planned_bytes_are_those_that_the_process_takes(
    large: Path, kernel_folder: Path, form: str
) -> None:
    script = HELD.replace("FORM", form)
    command = [sys.executable, "-c", script, str(large), str(kernel_folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    taken, weights, blocks, absorbed = map(int, done.stdout.split())
    # Some MB are the allocator's, whatever the model.
    assert weights <= taken <= 1.03 * (weights + blocks + absorbed) + 13e6


def test_lazy_experts_are_counted_as_they_are_kept(folders: Path) -> None:
    whole = LLM.plan(folders / "int8")
    every = whole.routed_bytes // 2 * 3  # two main layers, and the MTP module's
    lazy = LLM.plan(folders / "int8", expert_bytes=every - 1)
    assert lazy.routed_bytes == every
    assert lazy.weights[ROUTED] == every - 1
    assert lazy.weights[MTP] == whole.weights[MTP] - every // 3
    assert lazy.weights[EMBEDDING] == whole.weights[EMBEDDING]
    # Those of one layer always are.
    assert LLM.plan(folders / "int8", expert_bytes=0).weights[ROUTED] == every // 3
    assert LLM.plan(folders / "int8", expert_bytes=10**9).weights[ROUTED] == every


def test_auto_gives_experts_what_is_left(folders: Path) -> None:
    least = LLM.plan(folders / "bf16", expert_bytes=0, cache_tokens=32)
    others = least.total_bytes - least.weights[ROUTED]
    room = 2 * least.least_experts
    how: dict[str, Any] = {"expert_bytes": "auto", "cache_tokens": 32}
    plan = LLM.plan(folders / "bf16", memory_bytes=others + room, **how)
    assert plan.weights[ROUTED] == int(0.9 * room)
    assert plan.fits
    with pytest.raises(BadInput, match=r"without routed experts it takes .* one layer"):
        LLM.plan(folders / "bf16", memory_bytes=others + least.least_experts, **how)


def test_auto_loads_what_fits(folders: Path, kernel_folder: Path) -> None:
    llm = LLM(folders / "int4", expert_bytes="auto", kernel_cache=kernel_folder, cache_tokens=64)
    assert llm.loaded is not None
    assert llm.loaded.experts is not None
    assert llm.loaded.experts.most == LLM.plan(folders / "int4", expert_bytes=0).routed_bytes


def test_what_fits_and_what_does_not(folders: Path) -> None:
    need = LLM.plan(folders / "bf16", cache_tokens=64).total_bytes
    plan = LLM.plan(folders / "bf16", cache_tokens=64, memory_bytes=need)
    assert plan.fits
    assert plan.most_cache_tokens == plan.cache_tokens == 64
    assert "fits" in plan.table()
    plan = LLM.plan(folders / "bf16", cache_tokens=64, memory_bytes=need - 1000)
    assert not plan.fits
    assert "does not fit: 1,000 B more are needed" in plan.table()
    assert LLM.plan(folders / "bf16", cache_tokens=65).cache_tokens == 96  # whole pages


def test_the_table_has_a_line_an_item(folders: Path) -> None:
    table = LLM.plan(folders / "int4", memory_bytes=2**30, expert_bytes=2**20).table()
    for text in (
        "routed experts", "read when chosen", "int4 codes, the rest bfloat16", "1.00 GiB",
        "absorbed projections", "latent cache", "load time", "estimate", "checksums",
    ):  # fmt: skip
        assert text in table
    assert "checksums" not in LLM.plan(folders / "int4", verify=False).table()


def test_the_load_time_counts_what_is_read(folders: Path) -> None:
    def seconds(**how: Any) -> float:
        plan = LLM.plan(folders / "bf16", **how)
        fixed = plan.__class__(**{**vars(plan), "rates": plan.rates.__class__(1e6, 1e6, 1e6, 1)})  # type: ignore[union-attr]
        found = fixed.load_seconds
        assert found is not None
        return found

    assert seconds() > seconds(verify=False) > seconds(verify=False, expert_bytes=0)
    assert seconds() > seconds(expert_bytes=0)


def test_no_tensor_is_read(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: ShardReader, name: str) -> torch.Tensor:
        raise AssertionError(f"{name} was read")

    monkeypatch.setattr(ShardReader, "read", refuse)
    for form in FORMS:
        LLM.plan(folders / form)


def test_bad_input(folders: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no such folder"):
        LLM.plan(tmp_path / "absent")
    with pytest.raises(BadInput, match="did you mean 'cache_tokens'"):
        LLM.plan(folders / "bf16", cache_token=3)
    with pytest.raises(BadInput, match="dtype"):
        LLM.plan(folders / "bf16", dtype="int3")
    with pytest.raises(BadInput, match="memory limit"):
        LLM.plan(folders / "bf16", memory_bytes=-1)
    for option, value in (
        ("kernels", "cuda"), ("expert_bytes", "all"), ("speculation", "no"), ("verification", "no"),
        ("draft_depth", 0),
    ):  # fmt: skip
        with pytest.raises(BadInput, match=str(value)):
            LLM.plan(folders / "bf16", **{option: value})


def test_steps_that_are_kept_are_no_larger_than_planned(folders: Path, kernel_folder: Path) -> None:
    how: dict[str, Any] = {"cache_tokens": 1024, "max_running": 6, "speculation": "on"}
    plan = LLM.plan(folders / "bf16", **how)
    llm = LLM(folders / "bf16", kernels="compiled", kernel_cache=kernel_folder, **how)
    lengths = [[1] * (2 + n) for n in range(6)]
    params = [
        SamplingParams(temperature=0, max_tokens=3 + 4 * n, ignore_eos=True) for n in range(6)
    ]
    llm.generate(lengths, params)
    repeats = llm.engine.forward.repeats
    assert repeats is not None
    programs = [step.program.nbytes for step in repeats.steps.values()]
    assert len(programs) > 6
    assert sum(programs) <= plan.kept <= MOST_BYTES
    assert LLM.plan(folders / "bf16", expert_bytes=0, **how).kept == 0
