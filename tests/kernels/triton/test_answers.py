"""A model that answers by GPUs' kernels gives what the plain ones give, whatever its form.

Under the interpreter, small and in FP32: ``tests/gpu/test_served.py`` does it on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support.gpu.meant import SERVED
from torch import Tensor

import ziphius
from tests.support import random_model, random_tokens, tiny_config
from ziphius.checkpoint.convert import convert
from ziphius.checkpoint.expert_stores import Fp8Experts, StoredExperts
from ziphius.checkpoint.in_place import load_in_place
from ziphius.config.errors import BadInput
from ziphius.inference.engine import Engine, EngineOptions
from ziphius.inference.llm import LLM
from ziphius.inference.paged import Feed
from ziphius.inference.pages import PageTable
from ziphius.inference.params import SamplingParams
from ziphius.kernels.select import Kernels, gpu_answering_kernels
from ziphius.model.experts import StackedExperts
from ziphius.model.precision import Precision
from ziphius.model.transformer import Transformer

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has tests/gpu/test_served.py"),
    # Rows that no expert fills hold anything.
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*"),
]
WIDE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 128,
    "q_lora_rank": 64,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
}
F32 = Precision.for_inference(torch.float32)
FORMS = ("bf16", "fp8", "int8", "int4")
# In units of the logits' spread. A code of FP8 may fall on its other side; others sum in FP32.
BOUND = {"fp8": 3e-2}
# Kernels for longer prompts than an interpreter likes.
LONG = {"merge_kernel", "_decode_codes_kernel"}
PROMPTS = (1, 4, 34)  # tokens: alone, a few, and more than a page


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return checkpoints of one model in each form, in FP32 where it is plain."""
    top = tmp_path_factory.mktemp("served")
    ziphius.save(random_model(tiny_config(**WIDE), precision=F32, seed=3), top / "bf16")

    def folder(form: str) -> Path:
        if not (top / form).is_dir():
            convert(top / "bf16", top / form, form, **({} if form == "fp8" else {"group_size": 32}))
        return top / form

    return folder


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Names of the kernels that run."""
    from triton.runtime.interpreter import InterpretedFunction

    names: set[str] = set()
    run = InterpretedFunction.run

    def noted(self: Any, *args: Any, **how: Any) -> Any:
        names.add(self.fn.__name__)
        return run(self, *args, **how)

    monkeypatch.setattr(InterpretedFunction, "run", noted)
    return names


def opened(folder: Path, kernels: Kernels, *, in_fp8: bool = True) -> Transformer:
    return load_in_place(folder, kernels, torch.float32, in_fp8=in_fp8).model


def engine(model: Transformer, **options: Any) -> Engine:
    how = {"cache_tokens": 512, "exact": False, "speculation": "off", **options}
    return Engine(model, options=EngineOptions(**how))


def prompts(model: Transformer, lengths: Sequence[int] = PROMPTS) -> list[list[int]]:
    return [random_tokens(model.config, 1, n, seed=n)[0].tolist() for n in lengths]


def logits(model: Transformer) -> Iterator[Tensor]:
    """Yield the logits of prompts fed together, of one token behind each, and behind one alone."""
    made = engine(model)
    tables = [PageTable(made.pool) for _ in PROMPTS]
    feeds = []
    for table, prompt in zip(tables, prompts(model), strict=True):
        assert table.extend(len(prompt) + 1)
        feeds.append(Feed(table.pages, 0, prompt, table.slots(0, len(prompt))))
    yield made.forward.logits(made.forward.hidden(feeds))
    feeds = [
        Feed(feed.table, len(feed.tokens), [7], table.slots(len(feed.tokens), len(feed.tokens) + 1))
        for feed, table in zip(feeds, tables, strict=True)
    ]
    yield made.forward.logits(made.forward.hidden(feeds))
    yield made.forward.logits(made.forward.hidden(feeds[1:2]))


@pytest.mark.parametrize("form", FORMS)
def test_logits_are_those_of_the_plain_kernels(
    form: str, folders: Callable[[str], Path], launched: set[str]
) -> None:
    ours = opened(folders(form), gpu_answering_kernels())
    found, expected = (list(logits(m)) for m in (ours, opened(folders(form), Kernels())))
    for got, plain in zip(found, expected, strict=True):
        assert got.dtype == torch.float32
        assert (got - plain).abs().max() <= BOUND.get(form, 1e-4) * plain.std()
    stores = {"bf16": StackedExperts, "fp8": Fp8Experts}
    assert isinstance(ours.layers[1].mlp.experts.store, stores.get(form, StoredExperts))
    # In FP32, and interpreted, attention is plain Triton's.
    meant = {*SERVED[form], "attend_kernel"} - {"hopper_attend_kernel"}
    assert meant - launched <= LONG


def answers(model: Transformer, **options: Any) -> list[tuple[int, ...]]:
    made = engine(model, **options)
    params = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
    requests = [made.add(prompt, params) for prompt in prompts(model, (2, 34))]
    while not all(request.finished for request in requests):
        made.step()
    return [tuple(request.result().outputs[0].token_ids) for request in requests]


@pytest.mark.parametrize("form", ["bf16", "fp8", "int4"])
def test_greedy_answers_are_those_of_the_plain_kernels(
    form: str, folders: Callable[[str], Path]
) -> None:
    ours, plain = (opened(folders(form), k) for k in (gpu_answering_kernels(), Kernels()))
    # Prompts in parts, and drafts that are judged two at a time.
    drafting = {"speculation": "on", "draft_depth": 2, "prefill_chunk": 16}
    assert answers(ours, **drafting) == answers(plain)


def test_a_prefix_is_found_again(folders: Callable[[str], Path]) -> None:
    llm = LLM(
        folders("fp8"), kernels="triton", dtype="float32", fast_math=True, cache_tokens=256,
        speculation="off",
    )  # fmt: skip
    params = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
    prompt = prompts(llm.model, (34,))[0]
    first, second = (llm.generate(prompt, params)[0] for _ in range(2))
    assert second.num_cached_tokens == 32
    assert second.outputs[0].token_ids == first.outputs[0].token_ids


def test_a_model_in_memory(folders: Callable[[str], Path]) -> None:
    """One that learns, in FP32 masters under its own kernels."""
    model = random_model(tiny_config(**WIDE), precision=F32, seed=3)
    llm = LLM.of(model, kernels="triton", fast_math=True, cache_tokens=256)
    assert llm.model.kernels == gpu_answering_kernels()
    assert llm.model.layers[0].self_attn.o_proj.weight.data_ptr() == (
        model.layers[0].self_attn.o_proj.weight.data_ptr()
    )
    assert answers(llm.model) == answers(opened(folders("bf16"), Kernels()))
    with pytest.raises(BadInput, match="open the checkpoint by LLM"):
        LLM.of(opened(folders("fp8"), gpu_answering_kernels()), kernels="torch")


def test_widths_of_no_whole_blocks_become_numbers(tmp_path: Path) -> None:
    model = random_model(tiny_config(**{**WIDE, "moe_intermediate_size": 96}), precision=F32)
    ziphius.save(model, tmp_path / "model")
    convert(tmp_path / "model", tmp_path / "fp8", "fp8")
    kernels = gpu_answering_kernels()
    loaded = load_in_place(tmp_path / "fp8", kernels, torch.float32, in_fp8=True)
    assert loaded.notes == ["experts are held as numbers: their width 96 is no multiple of 128"]
    plain = opened(tmp_path / "fp8", Kernels())
    for got, expected in zip(logits(loaded.model), logits(plain), strict=True):
        assert (got - expected).abs().max() <= BOUND["fp8"] * expected.std()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"dtype": "float16"}, "dtype = float16: GPUs' kernels compute in bfloat16 or float32"),
        ({"page_size": 96}, "page_size = 96: on a GPU use a power of two"),
        ({"expert_bytes": 10**9}, "need kernels that take them in place"),
        ({"device": "cuda"}, "device = 'cuda': torch finds no GPU here"),
        ({"device": "gpu"}, "device = 'gpu': use cpu, cuda or cuda:N"),
        ({"device": "meta"}, "device = 'meta': use cpu, cuda or cuda:N"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(
    folders: Callable[[str], Path], options: dict[str, Any], expected: str
) -> None:
    how: dict[str, Any] = {"kernels": "triton", "fast_math": True, "dtype": "float32", **options}
    with pytest.raises(BadInput, match=expected) as error:
        LLM(folders("bf16"), **how)
    assert "\n" not in str(error.value)
