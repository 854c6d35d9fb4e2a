"""A request that a GPU serves runs the kernels that were written for it, and answers as a CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.gpu.meant import SERVED
from support.gpu.profile import kernels_of, lacking
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import ziphius
from tests.support import random_model, random_tokens, tiny_config
from ziphius.checkpoint.convert import convert
from ziphius.checkpoint.in_place import load_in_place
from ziphius.config.errors import BadInput
from ziphius.inference.engine import Engine, EngineOptions
from ziphius.inference.llm import LLM
from ziphius.inference.paged import Feed
from ziphius.inference.pages import PageTable
from ziphius.inference.params import SamplingParams
from ziphius.kernels.select import Kernels, gpu_answering_kernels

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: make test-gpu"),
]
FORMS = ("bf16", "fp8", "int4")
# The published heads over few and narrow layers.
PUBLISHED: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 512,
    "intermediate_size": 512,
    "moe_intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 16,
    "q_lora_rank": 256,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 16,
    "max_position_embeddings": 2048,
}
# Of the norm of a token's logits, the median of tokens, because one whose experts are others is far
# off: BF16 against FP32. A processor in BF16 is off by 0.008, by 0.062 in FP8, where codes fall on
# their other side, and by 0.008.
BOUND = {"bf16": 0.016, "fp8": 0.1, "int4": 0.016}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return checkpoints of one model in each form."""
    top = tmp_path_factory.mktemp("served")
    model = random_model(tiny_config(**PUBLISHED), seed=3)
    for parameter in model.parameters():
        if parameter.dim() > 1:  # N(0, 0.2^2) would make widths like these blow up
            parameter.data *= 0.2
    ziphius.save(model, top / "bf16", dtype=torch.bfloat16)

    def folder(form: str) -> Path:
        if not (top / form).is_dir():
            convert(top / "bf16", top / form, form)
        return top / form

    return folder


@pytest.mark.parametrize("form", FORMS)
def test_a_request_runs_every_kernel_meant_for_it(
    form: str, folders: Callable[[str], Path]
) -> None:
    llm = LLM(folders(form), device="cuda", fast_math=True, cache_tokens=4096, speculation="off")
    params = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
    warm, profiled = random_tokens(llm.model.config, 2, 700, seed=1).tolist()
    llm.generate(warm, params)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        (output,) = llm.generate(profiled, params)
        torch.cuda.synchronize()
    assert len(output.outputs[0].token_ids) == 3
    found = kernels_of(seen)
    assert lacking(SERVED[form], found) == [], sorted(found)


@pytest.mark.parametrize("form", FORMS)
def test_logits_are_those_of_a_processor(form: str, folders: Callable[[str], Path]) -> None:
    kernels, how = gpu_answering_kernels(), {"in_fp8": True}
    served = load_in_place(folders(form), kernels, torch.bfloat16, "cuda", **how).model
    exact = load_in_place(folders(form), Kernels(), torch.float32, **how).model
    for got, expected in zip(logits(served), logits(exact), strict=True):
        assert got.device.type == "cpu"
        assert got.dtype == torch.float32
        off_N = (got - expected).norm(dim=-1) / expected.norm(dim=-1)
        assert off_N.median() < BOUND[form]


@torch.no_grad()
def logits(model: Any) -> list[Tensor]:
    """Return the logits of three prompts together, and of a token behind each."""
    options = EngineOptions(cache_tokens=1024, exact=False, speculation="off")
    engine = Engine(model, options=options)
    prompts = [random_tokens(model.config, 1, n, seed=n)[0].tolist() for n in (2, 33, 200)]
    tables = [PageTable(engine.pool) for _ in prompts]
    feeds, behind = [], []
    for table, prompt in zip(tables, prompts, strict=True):
        end = len(prompt)
        assert table.extend(end + 1)
        feeds.append(Feed(table.pages, 0, prompt, table.slots(0, end)))
        behind.append(Feed(table.pages, end, [7], table.slots(end, end + 1)))
    run = engine.forward
    return [run.logits(run.hidden(step)) for step in (feeds, behind)]


def test_drafts_are_judged(folders: Callable[[str], Path]) -> None:
    """Speculation changes no greedy answer but where two tokens are as likely: most are equal."""
    answers = []
    for speculation in ("off", "on"):
        llm = LLM(
            folders("bf16"), device="cuda", fast_math=True, cache_tokens=4096,
            speculation=speculation,
        )  # fmt: skip
        prompts = random_tokens(llm.model.config, 8, 30, seed=2).tolist()
        params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
        outputs = llm.generate(prompts, params)
        answers.append([output.outputs[0].token_ids for output in outputs])
        judged = sum(llm.engine.acceptance.judged)
        assert (judged > 0) == (speculation == "on")
    assert sum(a == b for a, b in zip(*answers, strict=True)) >= 6


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, r"answers depend on what else is computed: say fast_math=True \(--fast-math\)"),
        ({"fast_math": True, "kernels": "compiled"}, "use triton on a GPU"),
        ({"fast_math": True, "expert_bytes": 10**9}, "all experts lie on cuda:0"),
        ({"fast_math": True, "device": "cuda:99"}, "numbered from 0"),
    ],
)
def test_what_a_gpu_does_not_do(
    folders: Callable[[str], Path], options: dict[str, Any], expected: str
) -> None:
    with pytest.raises(BadInput, match=expected):
        LLM(folders("bf16"), **{"device": "cuda", **options})
    with pytest.raises(BadInput, match="a plan counts processors' memory"):
        LLM.plan(folders("bf16"), device="cuda")
