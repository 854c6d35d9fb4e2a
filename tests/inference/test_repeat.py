"""Steps whose kernels are called again without the model: when, for how long, and the same bits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.inference.test_engine import answer, bits, prompt_of
from tests.support import random_model
from ziphius.inference import repeat
from ziphius.inference.engine import Engine, EngineOptions
from ziphius.inference.params import SamplingParams
from ziphius.kernels.select import answering_kernels, torch_products
from ziphius.model.precision import Precision
from ziphius.model.transformer import Transformer

GREEDY = SamplingParams(temperature=0, max_tokens=12, logprobs=2)


def model_of(kernel_folder: Path, *, exact: bool = True) -> Transformer:
    kernels = (answering_kernels if exact else torch_products)(kernel_folder)
    return random_model(precision=Precision.for_inference(torch.bfloat16), kernels=kernels)


def answers(model: Transformer, *, repeats: bool = True, exact: bool = True) -> list[object]:
    engine = Engine(model, options=EngineOptions(speculation="on", draft_depth=2, exact=exact))
    if not repeats:
        engine.forward.repeats = None
    requests = [engine.add(prompt_of(model, n, n), GREEDY) for n in (3, 70, 20)]
    answer(engine, *requests)
    if repeats and exact:
        assert engine.forward.repeats is not None
        assert engine.forward.repeats.why_not is None
        parts = {part.__name__ for part, _, _ in engine.forward.repeats.steps}
        assert parts == {"_main", "_mtp"}
    return [bits(request) for request in requests]


def test_repeated_steps_give_the_same_bits(kernel_folder: Path) -> None:
    model = model_of(kernel_folder)
    assert answers(model) == answers(model, repeats=False)


def test_torchs_products_are_not_repeated(kernel_folder: Path) -> None:
    model = model_of(kernel_folder, exact=False)
    engine = Engine(model, options=EngineOptions(exact=False))
    answer(engine, engine.add([1, 2, 3], GREEDY))
    assert engine.forward.repeats is not None
    assert "is no kernel" in str(engine.forward.repeats.why_not)
    assert not engine.forward.repeats.steps


def test_steps_that_are_too_large_to_keep_are_computed_by_the_model(
    kernel_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(kernel_folder)
    expected = answers(model)
    one = Engine(model, options=EngineOptions(speculation="off"))
    answer(one, one.add([1, 2], GREEDY))
    sizes = {n: step.nbytes for (_, n, _), step in one.forward.repeats.steps.items()}  # type: ignore[union-attr]
    monkeypatch.setattr(repeat, "MOST_BYTES", sizes[1])
    engine = Engine(model, options=EngineOptions(speculation="off"))
    requests = [engine.add(prompt_of(model, n, n), GREEDY) for n in (3, 70, 20)]
    answer(engine, *requests)
    assert [bits(request) for request in requests] == expected
    assert engine.forward.repeats.most_tokens < 3  # type: ignore[union-attr]


@pytest.mark.parametrize("depth", [1, 3])
def test_drafts_reach_the_end_of_the_context(kernel_folder: Path, depth: int) -> None:
    """Where the context fills its last page, a draft has a page more."""
    model = model_of(kernel_folder)
    full = model.config.max_position_embeddings
    prompt = prompt_of(model, full - 6, 1)
    params = SamplingParams(temperature=0, max_tokens=None, logprobs=1, ignore_eos=True)
    found = []
    for speculation in ("off", "on"):
        options = EngineOptions(speculation=speculation, draft_depth=depth, page_size=32)
        engine = Engine(model, options=options)
        request = engine.add(prompt, params)
        answer(engine, request)
        found.append(bits(request))
        assert len(request.result().outputs[0].token_ids) == 6
    assert found[0] == found[1]


def test_what_is_kept_is_bounded(kernel_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(kernel_folder)
    expected = answers(model)
    monkeypatch.setattr(repeat, "MOST_BYTES", 100_000)
    engine = Engine(model, options=EngineOptions(speculation="off"))
    seen = 0
    requests = [engine.add(prompt_of(model, n, n), GREEDY) for n in (3, 70, 20)]
    while not engine.idle:
        engine.step()
        kept = engine.forward.repeats.steps  # type: ignore[union-attr]
        seen = max(seen, len(kept))
        assert len(kept) == 1 or sum(step.nbytes for step in kept.values()) <= 100_000
    assert [bits(request) for request in requests] == expected
    assert seen > 0


def test_other_weights_are_other_programs(kernel_folder: Path) -> None:
    """A weight that has moved, not only changed: its old memory is nobody's."""
    model = model_of(kernel_folder)
    engine = Engine(model)
    answer(engine, engine.add([1, 2, 3], GREEDY))
    torch.manual_seed(9)
    for module in model.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            moved = torch.nn.Parameter(weight + torch.randn_like(weight) * 0.02, False)
            setattr(module, name, moved)
    engine.forward.prepare()
    engine.pool.forget()
    ours = engine.add([1, 2, 3], GREEDY)
    answer(engine, ours)
    fresh = Engine(model)
    theirs = fresh.add([1, 2, 3], GREEDY)
    answer(fresh, theirs)
    assert bits(ours) == bits(theirs)
