"""The latent cache: what it holds, how much of it, and what happens at its end."""

from __future__ import annotations

import pytest
import torch

from tests.support import F64, random_model, random_tokens
from ziphius.config.errors import BadInput
from ziphius.inference.cache import LatentCache
from ziphius.model.count import cache_bytes
from ziphius.model.precision import Precision


@torch.no_grad()
def test_it_grows_by_what_it_is_fed() -> None:
    model = random_model()
    cache = LatentCache(model, batch=2, capacity=9)
    assert cache.length == 0
    for fed, length in ((4, 4), (1, 5), (3, 8), (1, 9)):
        model(random_tokens(model.config, 2, fed), cache)
        assert cache.length == length


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_its_bytes_a_token_are_those_that_are_counted(dtype: torch.dtype) -> None:
    """Latent and rotary key of every main layer, in the compute dtype, and nothing else."""
    model = random_model(precision=Precision.for_inference(dtype))
    cache = LatentCache(model, batch=1, capacity=7)
    with torch.no_grad():
        model(random_tokens(model.config, 1, 7), cache)
    storages = {}
    for index in range(model.config.num_hidden_layers):
        layer = cache.layer(index)
        for tensor in (layer._latent_BSC, layer._k_rope_BSR):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    assert sum(storages.values()) == 7 * cache_bytes(model.config, dtype)


@torch.no_grad()
def test_it_holds_the_normed_latent_and_the_rotated_key() -> None:
    """Facts 1.5: after the norm, after the rotation."""
    model = random_model(precision=F64)
    tokens_BT = random_tokens(model.config, 2, 6)
    cache = LatentCache(model, batch=2, capacity=6)
    model(tokens_BT, cache)
    block = model.layers[0]
    mla, x_BTD = block.self_attn, block.input_layernorm(model.embed_tokens(tokens_BT))
    latent, k_rope = (x_BTD @ mla.kv_a_proj_with_mqa.weight.T).split((10, 4), -1)
    root = (latent.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    layer = cache.layer(0)
    torch.testing.assert_close(layer._latent_BSC, latent / root * mla.kv_a_layernorm.weight)
    angles = torch.arange(6.0).double()[:, None] * torch.tensor([1.0, 0.01]).double()
    factor = torch.polar(torch.ones_like(angles), angles)
    turned = torch.view_as_complex(k_rope.reshape(2, 6, 2, 2)) * factor
    torch.testing.assert_close(layer._k_rope_BSR, torch.view_as_real(turned).flatten(-2))


@torch.no_grad()
def test_an_empty_cache_is_a_cache() -> None:
    """Also one that Python takes for false, because it has a length and that is zero."""

    class Sized(LatentCache):
        def __len__(self) -> int:
            return self.length

    model = random_model()
    cache = Sized(model, batch=1, capacity=3)
    assert not cache
    model(random_tokens(model.config, 1, 3), cache)
    assert cache.length == 3


@torch.no_grad()
def test_a_full_cache_says_so_and_keeps_what_it_has() -> None:
    model = random_model()
    cache = LatentCache(model, batch=1, capacity=5)
    model(random_tokens(model.config, 1, 4), cache)
    with pytest.raises(BadInput, match="holds 5 positions, 6 are needed"):
        model(random_tokens(model.config, 1, 2), cache)
    assert cache.length == 4
    model(random_tokens(model.config, 1, 1), cache)
    assert cache.length == 5


@torch.no_grad()
def test_positions_of_an_interrupted_forward_are_forgotten(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = random_model(precision=F64)
    tokens_BT = random_tokens(model.config, 1, 8)
    cache = LatentCache(model, batch=1, capacity=8)
    model(tokens_BT[:, :4], cache)
    with monkeypatch.context() as patch:
        patch.setattr(model.layers[2], "attend", lambda *_, **__: (_ for _ in ()).throw(OSError))
        with pytest.raises(OSError):  # noqa: PT011
            model(tokens_BT[:, 4:6], cache)
    assert cache.length == 4
    torch.testing.assert_close(model(tokens_BT[:, 4:], cache), model(tokens_BT)[:, 4:])


def test_a_cache_works_outside_no_grad_and_keeps_no_graph() -> None:
    model = random_model()
    tokens_BT = random_tokens(model.config, 1, 6)
    cache = LatentCache(model, batch=1, capacity=6)
    for part in tokens_BT.split(3, dim=1):
        model(part, cache)
    assert cache.length == 6
    assert not cache.layer(0)._latent_BSC.requires_grad
