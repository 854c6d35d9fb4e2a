"""Tensor parallelism: heads, dense layers and vocabulary cut, with the numbers of one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.parallel.pool import Pool
from tests.parallel.shared import CONFIG, equals_one_process, skewed_model
from tests.support import F64, tiny_config
from ziphius.config.errors import BadInput
from ziphius.kernels.loss import IGNORED, linear_cross_entropy
from ziphius.model.init import initialise
from ziphius.model.transformer import Transformer
from ziphius.model.weights import named_weights
from ziphius.parallel.layout import Layout
from ziphius.parallel.mesh import make_mesh
from ziphius.parallel.rectangles import place_of
from ziphius.parallel.sequence import apply_sequence
from ziphius.parallel.tensor import check_tensor, cut_weights, split_of
from ziphius.parallel.vocabulary import look_up, split_cross_entropy

# --- the table ------------------------------------------------------------------------------------


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("q_lora_rank", [None, 14])
def test_pieces_together_are_the_whole(tp: int, q_lora_rank: int | None) -> None:
    """Every weight of a part is the stretch that the table says, and stretches are everything."""
    config = tiny_config(**{**CONFIG, "q_lora_rank": q_lora_rank})
    whole = Transformer(config, F64)
    initialise(whole, 3)
    expected = dict(named_weights(whole))
    parts = []
    for place in range(tp):
        model = Transformer(config, F64)
        cut_weights(model, tp, place)
        initialise(model, 3, lambda name, p=place: split_of(name, config, tp, p))
        parts.append(dict(named_weights(model)))
    cut = set()
    for name, tensor in expected.items():
        splits = [split_of(name, config, tp, place) for place in range(tp)]
        pieces = [part[name] for part in parts]
        if splits[0] is None:
            assert all(torch.equal(piece, tensor) for piece in pieces)
            continue
        cut.add(name)
        assert torch.equal(torch.cat(pieces, dim=splits[0].dim), tensor)
        for split, piece in zip(splits, pieces, strict=True):
            assert split is not None
            assert torch.equal(split.cut(tensor), piece)
            assert split.whole_shape(piece.shape) == tensor.shape
        for place, piece in enumerate(pieces):
            offsets, shape = place_of(piece.shape, splits[place])
            assert shape == tuple(tensor.shape)
            where = tuple(slice(o, o + n) for o, n in zip(offsets, piece.shape, strict=True))
            assert torch.equal(tensor[where], piece)
    layers, query = range(5), "q_proj" if q_lora_rank is None else "q_b_proj"
    names = [f"model.layers.{i}.self_attn" for i in layers]
    wanted = {f"{n}.{m}.weight" for n in names for m in (query, "kv_b_proj", "o_proj")}
    wanted |= {f"model.layers.0.mlp.{m}_proj.weight" for m in ("gate", "up", "down")}
    wanted |= {"model.embed_tokens.weight", "lm_head.weight"}
    assert cut == (wanted if tp > 1 else set())


def test_cutting_keeps_the_weights_and_happens_once() -> None:
    model, whole = skewed_model(), dict(named_weights(skewed_model()))
    for _ in range(2):
        cut_weights(model, 2, 1)
    for name, tensor in named_weights(model):
        split = split_of(name, model.config, 2, 1)
        assert torch.equal(tensor, whole[name] if split is None else split.cut(whole[name]))


@pytest.mark.parametrize(
    ("tp", "changes", "message"),
    [
        (2, {"num_attention_heads": 3}, "does not divide model.num_attention_heads = 3: use 1"),
        (3, {"num_attention_heads": 4}, "= 4: use 2"),
        (4, {"vocab_size": 3}, "more than model.vocab_size = 3: use 3 or less"),
    ],
)
def test_what_does_not_divide_is_refused(tp: int, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        check_tensor(tiny_config(**{**CONFIG, **changes}), tp)


# --- against one process --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("world", "layout", "length", "choices", "document_mask", "changes"),
    [
        (2, {"tp": 2}, 10, "unbiased", True, {}),
        (2, {"tp": 2}, 2, "real", False, {"num_nextn_predict_layers": 1}),
        (2, {"tp": 2}, 12, "real", False, {"q_lora_rank": None, "first_k_dense_replace": 2}),
        (4, {"tp": 4}, 12, "unbiased", True, {}),
        (4, {"tp": 2, "ep": 2}, 10, "real", False, {}),
    ],
)
def test_equals_one_process(
    pool: Pool,
    world: int,
    layout: dict[str, int],
    length: int,
    choices: str,
    document_mask: bool,
    changes: dict[str, Any],
) -> None:
    args = (layout, length, changes, choices, document_mask)
    pool.run(world, equals_one_process, *args)


# --- the vocabulary -------------------------------------------------------------------------------


def split_loss(V: int, N: int, chunk: int) -> int:
    """Compare with the whole vocabulary, huge logits and ignored rows included."""
    axis = make_mesh(Layout.fill(torch.distributed.get_world_size()))["dp"]
    generator = torch.Generator().manual_seed(V)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    hidden, weight = (draw(N, 6) * 30).requires_grad_(), draw(V, 6).requires_grad_()
    targets = torch.randint(0, V, (N,), generator=generator)
    targets[::3] = IGNORED
    expected = linear_cross_entropy(hidden, weight, targets)
    wanted = torch.autograd.grad(expected, (hidden, weight))
    first, end = (p * V // axis.size for p in (axis.place, axis.place + 1))
    own = weight[first:end].detach().requires_grad_()
    counted = torch.arange(N) % axis.size == axis.place
    found = split_cross_entropy(axis, hidden, own, first, targets, counted, chunk)
    sent = axis.traffic.sent["dp", "all_reduce"]
    dhidden, down = torch.autograd.grad(found, (hidden, own))
    close = {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(axis.all_reduce(found.detach()), expected.detach(), **close)
    torch.testing.assert_close(axis.all_reduce(dhidden), wanted[0], **close)
    torch.testing.assert_close(down, wanted[1][first:end], **close)
    return sent


@pytest.mark.parametrize(
    ("world", "V", "N", "chunk"), [(2, 61, 10, 4), (3, 7, 9, 100), (3, 4, 1, 1)]
)
def test_cross_entropy_of_a_cut_vocabulary(
    pool: Pool, world: int, V: int, N: int, chunk: int
) -> None:
    """Three numbers a row travel, and no logits."""
    rows = [min(chunk, N - start) for start in range(0, N, chunk)]
    wanted = sum(2 * 8 * n * m * (world - 1) // world for n in rows for m in (1, 2))
    assert pool.run(world, split_loss, V, N, chunk) == [wanted] * world


def test_a_stretch_of_the_embedding_knows_its_own_tokens() -> None:
    weight = torch.randn(7, 3)
    tokens = torch.tensor([[0, 3, 6, 2], [5, 4, 1, 0]])
    found = look_up(weight[:3], 0, tokens) + look_up(weight[3:], 3, tokens)
    assert torch.equal(found, weight[tokens])
    weight[3] = float("nan")
    assert look_up(weight[:3], 0, tokens).isfinite().all()
    assert look_up(weight[3:], 3, torch.tensor([[0, 1]])).eq(0).all()


# --- who holds what -------------------------------------------------------------------------------


def no_full_logits() -> list[int]:
    mesh = make_mesh(Layout.fill(2, tp=2))
    model = apply_sequence(skewed_model(), mesh)
    return [len(model.lm_head.weight), len(model.embed_tokens.weight)]


def test_a_rank_has_a_part_of_an_odd_vocabulary(pool: Pool) -> None:
    assert pool.run(2, no_full_logits) == [[30, 30], [31, 31]]
