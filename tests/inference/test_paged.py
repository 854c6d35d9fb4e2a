"""The cache in pages: what it holds, how much of it, and how a step's tokens meet it."""

from __future__ import annotations

import pytest
import torch

from tests.support import F64, Past, random_model, random_tokens
from ziphius.config.errors import BadInput
from ziphius.inference.paged import Batch, Feed, PagedCache
from ziphius.kernels.select import Kernels
from ziphius.model.count import cache_bytes
from ziphius.model.precision import Precision


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mtp", [0, 1])
def test_its_bytes_a_token_are_those_that_are_counted(dtype: torch.dtype, mtp: int) -> None:
    """Latent and rotary key of every layer, in the compute dtype, and nothing else."""
    model = random_model(precision=Precision.for_inference(dtype), num_nextn_predict_layers=mtp)
    cache = PagedCache(model, n_pages=3, page_size=64)
    main = cache_bytes(model.config, dtype)
    assert cache.nbytes == 3 * 64 * main * (3 + mtp) // 3


def test_master_weights_do_not_widen_it() -> None:
    model = random_model(precision=Precision.for_training(torch.bfloat16))
    assert PagedCache(model, n_pages=1, page_size=32).pages.dtype == torch.bfloat16


@torch.no_grad()
def test_it_holds_the_normed_latent_and_the_rotated_key(answering: Kernels) -> None:
    """Facts 1.5: after the norm, after the rotation."""
    model = random_model(precision=F64, kernels=answering)
    tokens_BT = random_tokens(model.config, 2, 6)
    past = Past(model, batch=2, capacity=6)
    past(tokens_BT)
    block = model.layers[0]
    mla, x_BTD = block.self_attn, block.input_layernorm(model.embed_tokens(tokens_BT))
    latent, k_rope = (x_BTD @ mla.kv_a_proj_with_mqa.weight.T).split((10, 4), -1)
    root = (latent.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    rows = torch.stack([past.cache.pages[0, table[0], :6] for table in past.tables])
    torch.testing.assert_close(rows[..., :10], latent / root * mla.kv_a_layernorm.weight)
    angles = torch.arange(6.0).double()[:, None] * torch.tensor([1.0, 0.01]).double()
    factor = torch.polar(torch.ones_like(angles), angles)
    turned = torch.view_as_complex(k_rope.reshape(2, 6, 2, 2)) * factor
    torch.testing.assert_close(rows[..., 10:], torch.view_as_real(turned).flatten(-2))


@torch.no_grad()
def test_sequences_of_a_step_may_differ_in_everything(answering: Kernels) -> None:
    """In length, in how far they are, and in how many pages they have."""
    model = random_model(precision=F64, kernels=answering)
    plain = random_model(precision=F64)
    first, second = (random_tokens(model.config, 1, n, seed=n)[0].tolist() for n in (70, 9))
    cache = PagedCache(model, n_pages=4, page_size=32)
    tables = [3, 0, 2], [1]

    def feed(number: int, tokens: list[int], start: int) -> Feed:
        places = [(tables[number][p // 32], p % 32) for p in range(start, start + len(tokens))]
        return Feed(tables[number], start, tokens, [page * 32 + row for page, row in places])

    steps = [[feed(0, first[:66], 0)], [feed(0, first[66:], 66), feed(1, second, 0)]]
    for feeds in steps:
        batch = Batch(cache, feeds)
        logits_NV = model(batch.tokens_BT, batch)[0]
    torch.testing.assert_close(logits_NV[:4], plain(torch.tensor([first]))[0, 66:])
    torch.testing.assert_close(logits_NV[4:], plain(torch.tensor([second]))[0])


@torch.no_grad()
def test_copied_pages_are_the_same_past() -> None:
    model = random_model(precision=F64)
    past = Past(model, batch=2, capacity=40)
    tokens_BT = random_tokens(model.config, 2, 40)
    past(tokens_BT[:, :35])
    (ours, theirs) = past.tables
    past.cache.copy(list(zip(ours, theirs, strict=True)))
    past.length = 35
    logits_BTV = past(tokens_BT[:1, 35:].expand(2, -1))
    torch.testing.assert_close(logits_BTV[0], logits_BTV[1])


@torch.no_grad()
def test_rows_of_an_interrupted_step_are_written_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(precision=F64)
    tokens_BT = random_tokens(model.config, 1, 8)
    past = Past(model, batch=1, capacity=8)
    past(tokens_BT[:, :4])
    with monkeypatch.context() as patch:
        patch.setattr(model.layers[2], "attend", lambda *_, **__: (_ for _ in ()).throw(OSError))
        with pytest.raises(OSError):  # noqa: PT011
            past(tokens_BT[:, 5:7])
    torch.testing.assert_close(past(tokens_BT[:, 4:]), model(tokens_BT)[:, 4:])


def test_it_works_outside_no_grad_and_keeps_no_graph() -> None:
    model = random_model()
    past = Past(model, batch=1, capacity=6)
    for part_BT in random_tokens(model.config, 1, 6).split(3, dim=1):
        past(part_BT)
    assert not past.cache.pages.requires_grad


@pytest.mark.parametrize("size", [0, -32, 16, 48])
def test_a_page_holds_whole_tiles(size: int) -> None:
    with pytest.raises(BadInput, match=f"page_size = {size}: use a multiple of 32"):
        PagedCache(random_model(), n_pages=2, page_size=size)
