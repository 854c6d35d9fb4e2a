"""Training in FP8: what is kept of a step, when weights are quantised, and runs that go on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.support import random_batch, random_model, step_settings, tiny_config
from tests.training.support import Silent, assert_same_run, breaking_off
from tests.training.support import recipe as small_recipe
from ziphius.config.errors import BadInput
from ziphius.config.pretrain import PretrainConfig
from ziphius.inference.llm import LLM
from ziphius.inference.params import SamplingParams
from ziphius.kernels.quantize import TorchQuantize
from ziphius.kernels.select import Kernels, compiled_kernels, has_compiler
from ziphius.model.experts import RoutedExperts
from ziphius.model.ffn import MixtureOfExperts, SwiGLU
from ziphius.model.init import initialise
from ziphius.model.layers import Linear
from ziphius.model.mla import MLA
from ziphius.model.precision import Precision
from ziphius.model.transformer import Transformer
from ziphius.model.weights import named_weights
from ziphius.parallel.recompute import apply_recompute
from ziphius.training.folder import RunFolder
from ziphius.training.optimizer import AdamW
from ziphius.training.run import pretrain, resolve
from ziphius.training.step import train_step

FP8 = Precision.for_fp8_training()
BF16 = Precision.for_training(torch.bfloat16)
SETTINGS = PretrainConfig(
    steps=10,
    batch_size=8,
    micro_batch_size=4,
    sequence_length=20,
    learning_rate=1e-2,
    final_learning_rate=1e-3,
)


@pytest.fixture(params=["torch", pytest.param("compiled", marks=pytest.mark.skipif(
    not has_compiler(), reason="there is no C++ compiler"))])  # fmt: skip
def kernels(request: pytest.FixtureRequest) -> Kernels:
    if request.param == "torch":
        return Kernels()
    return compiled_kernels(Path("~/.cache/ziphius").expanduser())


def build(
    precision: Precision = FP8, kernels: Kernels | None = None, **changes: Any
) -> Transformer:
    model = Transformer(tiny_config(**changes), precision, kernels=kernels)
    initialise(model, 0)
    return model


def step(model: Transformer, optimizer: AdamW, seed: int = 0) -> Any:
    batch = random_batch(model.config, 8, 21, seed=seed)
    return train_step(model, optimizer, batch, SETTINGS, step_settings(SETTINGS, 1e-2))


# --- a step ---------------------------------------------------------------------------------------


def test_the_loss_of_a_repeated_batch_falls_as_in_bf16(kernels: Kernels) -> None:
    falls = {}
    for name, precision in (("fp8", FP8), ("bf16", BF16)):
        model = build(precision, kernels)
        optimizer = AdamW(model.parameters(), SETTINGS, kernels)
        losses = [step(model, optimizer).loss for _ in range(20)]
        falls[name] = losses[0] - losses[-1]
    assert falls["bf16"] > 2
    assert falls["fp8"] == pytest.approx(falls["bf16"], rel=0.02)


@pytest.mark.parametrize("how", ["selective", "full"])
def test_recomputation_changes_no_bit(how: Any, kernels: Kernels) -> None:
    results = []
    for chosen in ("none", how):
        model = build(kernels=kernels)
        apply_recompute(model, chosen)
        optimizer = AdamW(model.parameters(), SETTINGS, kernels)
        results.append([step(model, optimizer, seed=n) for n in range(2)])
        results[-1].append({n: w.clone() for n, w in named_weights(model)})  # type: ignore[arg-type]
    (*plain, weights), (*again, again_weights) = results
    assert plain == again
    assert all(torch.equal(weights[n], again_weights[n]) for n in weights)


def test_weights_are_quantised_once_a_step_whatever_the_micro_batches(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[torch.Size] = []

    def blocks(self: TorchQuantize, weight: Tensor, **how: Any) -> Any:
        made.append(weight.shape)
        return original(self, weight, **how)

    original = TorchQuantize.blocks
    monkeypatch.setattr(TorchQuantize, "blocks", blocks)
    model = build()
    optimizer = AdamW(model.parameters(), SETTINGS)
    layers = [m for m in model.modules() if isinstance(m, Linear) and m.fp8 is not None]
    stacks = [m for m in model.modules() if isinstance(m, RoutedExperts)]
    expected = len(layers) + 2 * len(stacks)
    for _ in range(3):
        made.clear()
        step(model, optimizer)
        assert len(made) == expected


@pytest.mark.parametrize("change", ["optimizer", "view", "load"])
def test_a_changed_weight_is_quantised_again(change: str, kernels: Kernels) -> None:
    model = build(kernels=kernels)
    layer = model.layers[0].self_attn.o_proj
    before = layer.in_fp8()
    assert layer.in_fp8() is before
    if change == "optimizer":
        optimizer = AdamW(model.parameters(), SETTINGS, kernels)
        step(model, optimizer)
    elif change == "view":
        weights = dict(named_weights(model))
        weights["model.layers.0.self_attn.o_proj.weight"].mul_(2)
    else:
        model.load_state_dict(build(kernels=kernels).state_dict())
    after = layer.in_fp8()
    assert after is not before
    fresh = build(kernels=kernels).layers[0].self_attn.o_proj
    fresh.load_state_dict(layer.state_dict())
    for ours, theirs in zip(after, fresh.in_fp8(), strict=True):
        assert torch.equal(ours.codes.float(), theirs.codes.float())
        assert torch.equal(ours.scales, theirs.scales)


def test_a_step_with_a_number_that_is_not_finite_changes_nothing(kernels: Kernels) -> None:
    """Nothing saturates: the loss is NaN, and the guard's least rule refuses the update."""
    model = build(kernels=kernels)
    with torch.no_grad():
        model.layers[1].self_attn.kv_b_proj.weight[0, 0] = float("nan")
    before = {n: w.clone() for n, w in named_weights(model)}
    result = step(model, AdamW(model.parameters(), SETTINGS, kernels))
    assert result.skipped is not None
    assert "not finite" in result.skipped
    after = dict(named_weights(model))
    assert all(torch.equal(before[n], after[n]) or before[n].isnan().any() for n in before)


def test_scales_can_all_be_powers_of_two() -> None:
    model = build(Precision.for_fp8_training(power_of_two=True))
    assert step(model, AdamW(model.parameters(), SETTINGS)).skipped is None
    scales = model.layers[0].self_attn.o_proj.in_fp8().blocks.scales
    assert torch.equal(scales.log2(), scales.log2().round())


def test_the_model_that_answers_beside_it_computes_in_bf16() -> None:
    model = random_model(precision=FP8)
    plain = random_model(precision=BF16)
    llms = [LLM.of(m, kernels="torch", fast_math=True) for m in (model, plain)]
    params = SamplingParams(max_tokens=8, temperature=0)
    (a,), (b,) = (llm.generate([[3, 4, 5]], params) for llm in llms)
    assert a.outputs[0].token_ids == b.outputs[0].token_ids


def test_what_is_in_fp8_is_one_table() -> None:
    """Embedding, head, router, norms' gains and MTP's join are not among them (facts 4.1)."""
    model = build()
    names = {n for n, m in model.named_modules() if isinstance(m, Linear) and m.fp8 is not None}
    others = {n for n, m in model.named_modules() if isinstance(m, Linear)} - names
    assert others == {"lm_head", "mtp.0.eh_proj"}
    parts = {n.rsplit(".", 1)[1] for n in names}
    assert parts == {
        *("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"),
        *("gate_proj", "up_proj", "down_proj"),
    }
    assert all(m.fp8 is not None for m in model.modules() if isinstance(m, RoutedExperts))


def test_dispatched_rows_have_powers_of_two() -> None:
    """Those of other layers have not, unless the recipe says so (facts 4.1)."""
    model = build()
    seen: dict[str, Tensor] = {}
    block = model.layers[1]

    def note(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            operand = args[0].rows_MD if isinstance(module, RoutedExperts) else args[0]
            seen[name] = operand.scales

        return hook

    assert isinstance(block.mlp, MixtureOfExperts)
    block.mlp.experts.register_forward_pre_hook(note("experts"))
    block.mlp.shared_experts.register_forward_pre_hook(note("shared"))
    block.self_attn.register_forward_pre_hook(note("attention"))
    model.features(random_batch(model.config, 2, 21).tokens_BS)
    for name, scales in seen.items():
        whole = torch.equal(scales.log2(), scales.log2().round())
        assert whole == (name != "attention"), name


def test_the_output_of_attention_is_kept_once() -> None:
    """In E5M6, for attention's own backward and for the output projection's."""
    model = build()
    saved: list[Tensor] = []

    def pack(x: Tensor) -> Tensor:
        saved.append(x)
        return x

    attention = model.layers[0].self_attn
    x_BTD = torch.randn(2, 20, model.config.hidden_size).bfloat16().requires_grad_()
    rope = model.rope(20)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        attention(x_BTD, rope)
    width = attention.heads * attention.v
    kept = [x for x in saved if x.dtype == torch.uint8 and x.shape == (2, 20, -(-width // 2) * 3)]
    assert len(kept) == 2
    assert kept[0].data_ptr() == kept[1].data_ptr()
    assert not any(x.dtype == torch.float8_e4m3fn and x.shape[-1] == width for x in saved)


# --- what linear layers keep ----------------------------------------------------------------------

WIDE = {
    "hidden_size": 256, "intermediate_size": 512, "q_lora_rank": 128, "kv_lora_rank": 128,
    "num_attention_heads": 4, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "v_head_dim": 64,
    "moe_intermediate_size": 128, "num_nextn_predict_layers": 0,
}  # fmt: skip


@contextmanager
def counting(model: Transformer) -> Iterator[dict[int, Tensor]]:
    """Note what autograd saves while layers with matrices run: each storage once, no weights."""
    saved: dict[int, Tensor] = {}
    matrices = [w if w.ndim < 3 else w[0] for w in model.parameters()]
    # Casts of a weight have its shape.
    weights = {w.shape for w in matrices} | {w.mT.shape for w in matrices if w.ndim == 2}
    places = {w.untyped_storage().data_ptr() for w in model.parameters()}

    def pack(x: Tensor) -> Tensor:
        is_weight = x.shape in weights or x.untyped_storage().data_ptr() in places
        if not is_weight and x.numel() > 100:
            saved[x.untyped_storage().data_ptr()] = x
        return x

    def enter(module: nn.Module, _: Any) -> None:
        hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x)
        hooks.__enter__()
        module.open_hooks = hooks  # type: ignore[assignment]

    def leave(module: nn.Module, *_: Any) -> None:
        module.open_hooks.__exit__()  # type: ignore[operator,union-attr]

    layers = [m for m in model.modules() if isinstance(m, SwiGLU | RoutedExperts)]
    inside = {child for layer in layers for child in layer.modules()}
    layers += [m for m in model.modules() if isinstance(m, Linear) and m not in inside]
    handles = []
    for layer in layers:
        handles.append(layer.register_forward_pre_hook(enter))
        handles.append(layer.register_forward_hook(leave))
    yield saved
    for handle in handles:
        handle.remove()


def test_linear_layers_keep_little_more_than_half_of_what_they_do_in_bf16() -> None:
    kept = {}
    for name, precision in (("fp8", FP8), ("bf16", BF16)):
        model = build(precision, **WIDE)
        assert isinstance(model.layers[0].self_attn, MLA)
        batch = random_batch(model.config, 2, 264)  # no weight has 526 rows
        with counting(model) as saved:
            model.features(batch.tokens_BS)
        kept[name] = sum(x.untyped_storage().nbytes() for x in saved.values())
        # Every layer is there: attention, the dense one, the experts and the shared ones.
        assert len(saved) > 20
        if name == "fp8":
            wide = [x for x in saved.values() if x.dtype == torch.bfloat16]
            assert not wide, f"kept in BF16: {[x.shape for x in wide]}"
    assert kept["fp8"] <= 0.55 * kept["bf16"]


# --- runs -----------------------------------------------------------------------------------------


def test_a_run_in_fp8_goes_on_bit_for_bit(words: Path, tmp_path: Path) -> None:
    settings = ("precision.compute=fp8", "pretrain.steps=4", "run.checkpoint_every=2")
    recipe = small_recipe(words, *settings, "parallel.recompute=selective")
    pretrain(recipe, RunFolder(tmp_path / "whole"), Silent())

    with breaking_off(3) as watch:
        pretrain(recipe, RunFolder(tmp_path / "half"), watch)
    pretrain(recipe, RunFolder(tmp_path / "half", resume=True), Silent())
    assert_same_run(tmp_path / "half", tmp_path / "whole")


def test_kernels_for_gpus_are_refused_on_a_processor(
    words: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton", reason="the package triton is not installed")
    from ziphius.kernels.triton import bits

    recipe = small_recipe(words, "run.kernels=triton")
    monkeypatch.setattr(bits, "interpreted", lambda: False)
    with pytest.raises(BadInput, match="kernels = 'triton': processors run them under Triton's"):
        resolve(recipe)
    monkeypatch.setattr(bits, "interpreted", lambda: True)
    assert resolve(recipe).run.kernels == "triton"
