"""Counts, to the parameter, against the worked numbers of facts 1.10 and torch's own counter."""

from __future__ import annotations

import functools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.support import random_model, random_tokens, tiny_config
from ziphius.config.model import ModelConfig
from ziphius.config.recipe import load_recipe
from ziphius.kernels.select import Kernels
from ziphius.model.count import Count, cache_bytes, count, forward_flops

V2 = ModelConfig(  # facts 1.1, with V3's routing in the place of V2's
    vocab_size=102_400,
    hidden_size=5120,
    intermediate_size=12_288,
    num_hidden_layers=60,
    first_k_dense_replace=1,
    num_attention_heads=128,
    q_lora_rank=1536,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    n_routed_experts=160,
    n_shared_experts=2,
    num_experts_per_tok=6,
    moe_intermediate_size=1536,
    n_group=8,
    topk_group=3,
)


@functools.cache
def counted(name: str) -> Count:
    return count(V2 if name == "236b" else load_recipe(name).model)


def test_671b() -> None:
    c = counted("671b")
    assert c.total == 671_026_419_200
    assert c.embedding == c.head == 926_679_040
    assert c.active == 37_552_297_472
    assert c.active_without_embedding == 36_625_618_432
    assert c.active_without_embedding - c.head == 35_698_939_392
    assert c.routing_biases == 59 * 256


def test_671b_prediction_modules_with_and_without_their_copies() -> None:
    """ "14B" includes copies of embedding and head, "11.5B" does not (facts 13.14)."""
    c = counted("671b")
    assert c.mtp_unique == 11_610_068_224
    assert c.mtp_unique + c.mtp_copies == 13_463_426_304
    assert c.checkpoint == 684_489_845_504
    assert c.mtp_active == 688_100_608


def test_the_worked_parts_of_671b() -> None:
    """The table's rows, from the difference of two models that differ in one layer."""
    config = load_recipe("671b").model
    shorter = count(config.model_copy(update={"num_hidden_layers": 60})).total
    assert counted("671b").total - shorter == 11_507_286_272
    one_dense_less = {"num_hidden_layers": 60, "first_k_dense_replace": 2}
    assert counted("671b").total - count(config.model_copy(update=one_dense_less)).total == (
        583_483_392
    )


def test_16b() -> None:
    """V2-Lite has no routing biases; the preset has 26 layers of 64."""
    c = counted("16b")
    assert c.routing_biases == 1_664
    assert c.total - c.routing_biases == 15_706_484_224
    assert c.active_without_embedding - c.routing_biases == pytest.approx(2.45e9, rel=2e-3)
    assert c.mtp_unique == c.mtp_copies == c.mtp_active == 0
    assert c.checkpoint == c.total


def test_mini() -> None:
    """Worked as facts 1.10 works the published model: D 1024, 16 heads, 128 experts of 256."""
    c = counted("mini")
    mla = 1024 * 512 + 512 + 512 * 3072 + 1024 * 576 + 512 + 512 * 4096 + 2048 * 1024
    expert = 3 * 1024 * 256
    router, norms = 128 * 1024 + 128, 2 * 1024
    dense = mla + 3 * 1024 * 2304 + norms
    mixture = mla + 129 * expert + router + norms
    chosen = mla + 9 * expert + router + norms
    ends = 2 * 32768 * 1024 + 1024
    assert c.total == ends + dense + 9 * mixture == 1_057_259_648
    assert c.active == ends + dense + 9 * chosen == 207_913_088
    assert c.mtp_unique == mixture + 1024 * 2048 + 3 * 1024 == 110_565_504
    assert c.mtp_active == chosen + 1024 * 2048 + 3 * 1024
    assert c.routing_biases == 10 * 128


def test_236b() -> None:
    c = counted("236b")
    assert c.total - c.routing_biases == 235_741_434_880
    assert c.routing_biases == 59 * 160
    assert c.active_without_embedding == pytest.approx(20.85e9, rel=1e-3)


def test_counts_equal_the_numbers_of_a_real_model() -> None:
    model = random_model(num_nextn_predict_layers=2)
    c = count(model.config)
    stored = sum(p.numel() for p in model.parameters()) + sum(b.numel() for b in model.buffers())
    assert c.total + c.mtp_unique == stored
    assert c.mtp_copies == 2 * 2 * 61 * 24
    assert c.checkpoint == stored + 2 * 2 * 61 * 24


def test_active_parameters_are_those_with_a_gradient_from_one_token() -> None:
    """The weights that one token's output depends on, counted by autograd."""
    model = random_model(seed=1, num_nextn_predict_layers=0)
    model(torch.tensor([[7]])).sum().backward()
    met = 0
    for name, weight in model.named_parameters():
        if ".store." in name:
            met += sum(w.numel() for w, g in zip(weight, weight.grad, strict=True) if g.any())
        else:
            met += weight.numel()
    c = count(model.config)
    assert c.active == met + c.routing_biases


# --- arithmetic and bytes -------------------------------------------------------------------------


def test_flops_equal_torchs_counter_but_for_what_is_explained() -> None:
    """torch counts products of matrices; the reference attention computes the masked half too."""
    length = 16
    kernels = Kernels(attention="reference", grouped="reference")
    model = random_model(kernels=kernels, num_nextn_predict_layers=0)
    c = model.config
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(random_tokens(c, 1, length))
    by_kind = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
    assert by_kind.keys() == {"aten.mm", "aten.bmm"}
    # All T * T scores and values of the heads, at two operations each.
    heads = c.num_hidden_layers * c.num_attention_heads * (c.qk_head_dim + c.v_head_dim)
    assert by_kind["aten.bmm"] == 2 * heads * length * length
    # A causal one needs T * (T + 1) / 2 of them. Gains and biases are counted as products too.
    vectors = sum(p.numel() for p in [*model.parameters(), *model.buffers()] if p.ndim == 1)
    expected = by_kind["aten.mm"] + heads * length * (length + 1) + 2 * vectors * length
    assert forward_flops(c, length) * length == expected


def test_training_cost_of_the_published_model() -> None:
    """250 GFLOP a token at 4096, forward and backward (facts 1.11)."""
    v3 = load_recipe("671b").model
    assert 3 * forward_flops(v3, 4096, counted("671b")) == pytest.approx(250e9, rel=5e-3)


def test_forward_flops_count_by_themselves_or_with_a_given_count() -> None:
    config = tiny_config()
    assert forward_flops(config, 100) == forward_flops(config, 100, count(config))


def test_cache_bytes() -> None:
    """70,272 bytes a token in BF16 (facts 1.5), without the MTP layer."""
    assert cache_bytes(load_recipe("671b").model, torch.bfloat16) == 70_272
    assert cache_bytes(tiny_config(), torch.float32) == 3 * (10 + 4) * 4
