"""Recomputation: what is still in memory between forward and backward, and after both.

Every tensor that an operation of the forward pass makes is watched through a weak reference to its
memory. Nothing here knows how recomputation works inside.
"""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.support import F32, random_batch, random_model, random_tokens
from ziphius.config.pretrain import PretrainConfig
from ziphius.model.experts import RoutedExperts
from ziphius.model.ffn import MixtureOfExperts, SwiGLU
from ziphius.model.layers import RMSNorm
from ziphius.model.mla import MLA
from ziphius.model.precision import Precision
from ziphius.model.router import Router
from ziphius.model.transformer import Transformer
from ziphius.parallel.recompute import apply_recompute
from ziphius.training.objective import Losses, losses

BF16 = Precision.for_training(torch.bfloat16)
B, T = 4, 20
SETTINGS = PretrainConfig(
    steps=10,
    batch_size=B,
    micro_batch_size=B,
    sequence_length=T,
    learning_rate=1e-2,
    final_learning_rate=1e-3,
)


@dataclass
class Memory:
    """One piece of memory: how large, and which part of the model made it."""

    storage: StorageWeakRef
    nbytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    makers: tuple[str, ...]

    def __str__(self) -> str:
        return f"{'/'.join(self.makers)}: {self.dtype} {list(self.shape)}"


@dataclass
class Watch(TorchDispatchMode):
    """Notes all memory that operations take while it is on."""

    seen: list[Memory] = field(default_factory=list)
    makers: list[str] = field(default_factory=list)
    own: set[int] = field(default_factory=set)
    last: dict[int, Memory] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.note(tensor)
        return out

    def note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        known = self.last.get(storage._cdata)
        if storage.data_ptr() in self.own or (known and not known.storage.expired()):
            return
        memory = Memory(
            StorageWeakRef(storage),
            storage.nbytes(),
            tensor.dtype,
            tuple(tensor.shape),
            tuple(self.makers),
        )
        self.last[storage._cdata] = memory
        self.seen.append(memory)

    def alive(self, maker: str = "") -> list[Memory]:
        """What is still in memory of that which ``maker`` made (everything, without one)."""
        gc.collect()
        return [
            m for m in self.seen if not m.storage.expired() and (not maker or maker in m.makers)
        ]


def total(memories: list[Memory]) -> int:
    return sum(m.nbytes for m in memories)


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    """A watch that knows which functions of the model memory was made in."""
    watch = Watch()

    def named(owner: type[nn.Module], method: str, maker: str) -> None:
        plain = getattr(owner, method)

        def tagged(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            watch.makers.append(maker)
            try:
                return plain(self, *args, **kwargs)
            finally:
                watch.makers.pop()

        monkeypatch.setattr(owner, method, tagged)

    named(RMSNorm, "forward", "norm")
    named(MLA, "expand", "expand")
    named(MLA, "forward", "attention")
    named(RoutedExperts, "activate", "activate")
    named(RoutedExperts, "forward", "routed experts")
    named(SwiGLU, "activate", "activate")
    named(MixtureOfExperts, "shared", "shared experts")
    named(Router, "forward", "router")
    return watch


def build(how: str, precision: Precision = F32, **changes: Any) -> Transformer:
    model = random_model(precision=precision, **changes)
    apply_recompute(model, how)  # type: ignore[arg-type]
    return model


@contextmanager
def watched(watch: Watch, model: Transformer) -> Iterator[None]:
    watch.own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    with watch:
        yield


def forward(watch: Watch, model: Transformer) -> Losses:
    """A forward pass whose losses alone are kept."""
    batch = random_batch(model.config, B, T + 1)
    with watched(watch, model):
        parts, _ = losses(
            model, batch, SETTINGS, mtp_loss_weight=0.3, target_count=B * T, sequence_count=B
        )
    return parts


# Between forward and backward


def test_each_step_keeps_less(watch: Watch) -> None:
    kept = {}
    for how in ("none", "selective", "full"):
        watch.seen.clear()
        parts = forward(watch, build(how))
        kept[how] = total(watch.alive())
        del parts
    assert kept["selective"] < 0.75 * kept["none"]
    assert kept["full"] < 0.6 * kept["selective"]


@pytest.mark.parametrize("precision", [F32, BF16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("owner", "method"),
    [(RMSNorm, "forward"), (MLA, "expand"), (RoutedExperts, "activate"), (SwiGLU, "activate")],
    ids=["RMSNorm", "queries, keys, values", "SwiGLU of experts", "SwiGLU"],
)
def test_selective_keeps_no_output_of_what_it_computes_again(
    owner: type[nn.Module], method: str, precision: Precision, monkeypatch: pytest.MonkeyPatch
) -> None:
    outputs: list[StorageWeakRef] = []
    plain = getattr(owner, method)

    def spied(self: nn.Module, *args: Any) -> Any:
        result = plain(self, *args)
        outputs.extend(
            StorageWeakRef(t.untyped_storage()) for t in tree_leaves(result) if t.requires_grad
        )
        return result

    monkeypatch.setattr(owner, method, spied)
    counts = {}
    for how in ("none", "selective"):
        outputs.clear()
        model = build(how, precision, num_nextn_predict_layers=0, v_head_dim=11)
        batch = random_batch(model.config, B, T + 1)
        parts, _ = losses(
            model, batch, SETTINGS, mtp_loss_weight=0.3, target_count=B * T, sequence_count=B
        )
        gc.collect()
        assert len(outputs) >= 2
        counts[how] = sum(not output.expired() for output in outputs)
        del parts
    assert counts["none"] >= 2, "the spy sees outputs that are kept"
    assert counts["selective"] == 0


@pytest.mark.parametrize("depth", [0, 2])
@pytest.mark.parametrize("precision", [F32, BF16], ids=["float32", "bfloat16"])
def test_selective_keeps_nothing_that_a_norm_has_made(
    watch: Watch, precision: Precision, depth: int
) -> None:
    """Neither the output, nor the output before its gain, nor a cast of the input."""
    model = build("selective", precision, num_nextn_predict_layers=depth)
    _parts = forward(watch, model)
    norms = sum(isinstance(module, RMSNorm) for module in model.modules())
    one_number_a_row = norms * B * T * 4
    # The trunk's final output is what the first MTP module starts from: an input, and kept.
    final = B * T * model.config.hidden_size * precision.compute.itemsize * (depth > 0)
    kept = watch.alive("norm")
    assert total(kept) <= one_number_a_row + final, [str(m) for m in kept][:12]


@pytest.mark.parametrize("v_head_dim", [5, 11, 13], ids=["narrow", "equal", "wide"])
def test_selective_keeps_no_queries_keys_and_values_in_any_shape(
    watch: Watch, v_head_dim: int
) -> None:
    """Of attention: the inputs of the up-projections, what came out, and one number a query.

    The published values are narrower than keys; a copy with zeros beside them is one all the same.
    """
    model = build("selective", v_head_dim=v_head_dim, num_nextn_predict_layers=0)
    _parts = forward(watch, model)
    c = model.config
    width = max(c.qk_head_dim, v_head_dim)
    a_token = (
        (c.q_lora_rank or 0) + c.kv_lora_rank + c.qk_rope_head_dim  # inputs of the up-projections
        + c.num_attention_heads * (width + v_head_dim + 1)  # output, its transpose, logsumexp
    )  # fmt: skip
    kept = [m for m in watch.alive("attention") if "norm" not in m.makers]
    expected = c.num_hidden_layers * B * T * 4 * a_token
    assert total(kept) <= expected, [str(m) for m in kept][:6]


def test_selective_keeps_no_activation(watch: Watch) -> None:
    _parts = forward(watch, build("selective"))
    assert watch.alive("activate") == []


def test_selective_keeps_no_second_copy_of_the_routers_input(watch: Watch) -> None:
    """In BF16 the router works on an FP32 copy, twice the size of the norm's dropped output."""
    model = build("selective", BF16)
    _parts = forward(watch, model)
    wide = [m for m in watch.alive("router") if m.shape[-1] == model.config.hidden_size]
    weights = [m for m in wide if m.shape[0] == model.config.n_routed_experts]
    assert [str(m) for m in wide if m not in weights] == []


@pytest.mark.parametrize("part", ["routed experts", "shared experts", "attention"])
def test_full_keeps_nothing_inside_its_stages(watch: Watch, part: str) -> None:
    _parts = forward(watch, build("full", num_nextn_predict_layers=2))
    assert [str(m) for m in watch.alive(part)] == []


# After both


@pytest.mark.parametrize("how", ["none", "selective", "full"])
def test_nothing_is_kept_after_backward(watch: Watch, how: str) -> None:
    """The losses are still held, as a loop that prints them later does."""
    model = build(how, num_nextn_predict_layers=2)
    parts = forward(watch, model)
    assert total(watch.alive()) > 100_000
    parts.total.backward()
    large = [m for m in watch.alive() if m.nbytes > 8]
    assert [str(m) for m in large] == []


@pytest.mark.parametrize("how", ["none", "selective", "full"])
def test_nothing_is_kept_when_the_losses_are_dropped(watch: Watch, how: str) -> None:
    """As in a step that fails between forward and backward."""
    model = build(how, num_nextn_predict_layers=2)
    parts = forward(watch, model)
    del parts
    assert [str(m) for m in watch.alive()] == []


@pytest.mark.parametrize("how", ["none", "selective", "full"])
def test_nothing_is_kept_after_a_failed_forward_pass(
    watch: Watch, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(how)

    def fails(*_: Any) -> Tensor:
        raise MemoryError

    monkeypatch.setattr(model.mtp[0].block.mlp.shared_experts, "forward", fails)
    with pytest.raises(MemoryError):
        forward(watch, model)
    assert [str(m) for m in watch.alive()] == []


def _logits(model: Transformer, tokens_BT: Tensor) -> Tensor:
    return model(tokens_BT)


def _features(model: Transformer, tokens_BT: Tensor) -> Tensor:
    return model.features(tokens_BT).hidden_BTD


@pytest.mark.parametrize("run", [_logits, _features], ids=["logits", "features"])
@pytest.mark.parametrize("how", ["none", "selective", "full"])
def test_nothing_is_kept_of_results_that_nobody_uses(
    watch: Watch, how: str, run: Callable[[Transformer, Tensor], Tensor]
) -> None:
    model = build(how)
    with watched(watch, model):
        for seed in range(3):
            run(model, random_tokens(model.config, B, T, seed=seed)).sum().item()
    assert [str(m) for m in watch.alive()] == []


@pytest.mark.parametrize("how", ["selective", "full"])
def test_backward_with_a_retained_graph_frees_what_it_computed_again(
    watch: Watch, how: str
) -> None:
    model = build(how, num_nextn_predict_layers=2)
    parts = forward(watch, model)
    before = total(watch.alive())
    with watched(watch, model):
        parts.total.backward(retain_graph=True)
    gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    assert total(watch.alive()) - gradients <= before
