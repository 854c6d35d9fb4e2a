"""Context parallelism: long rows shared by several processes, with the numbers of one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.parallel.pool import Pool
from tests.parallel.shared import equals_one_process, rows_of, skewed_model
from ziphius.config.errors import BadInput
from ziphius.config.model import Yarn
from ziphius.kernels.attention import OF_RUNS, VERSIONS
from ziphius.kernels.select import Kernels
from ziphius.model.positions import AllPositions
from ziphius.parallel.layout import Layout
from ziphius.parallel.mesh import make_mesh
from ziphius.parallel.rowsplit import RowSplit, spread
from ziphius.parallel.sequence import apply_sequence

YARN = Yarn(original_max_position_embeddings=8, factor=4.0)

# --- whose positions are whose --------------------------------------------------------------------


@st.composite
def splits(draw: st.DrawFn) -> tuple[RowSplit, int, int]:
    """Draw a split, the length of a row that it can share, and a depth."""
    split = RowSplit(draw(st.integers(1, 4)), draw(st.integers(1, 3)))
    length = split.tp * draw(st.integers(2 * split.cp, 40))
    return split, length, draw(st.integers(0, min(3, length - 1)))


@given(splits())
def test_every_position_is_of_one_rank(drawn: tuple[RowSplit, int, int]) -> None:
    split, length, depth = drawn
    owned = [split.own(length, depth, c, t) for c in range(split.cp) for t in range(split.tp)]
    assert sorted(p for positions in owned for p in positions) == list(range(length - depth))
    if split.cp == 1 or length >= 2 * depth:
        assert all(split.joined(length, depth, c) for c in range(split.cp))
    assert all(positions == sorted(positions) for positions in owned)
    for c in range(split.cp):
        joined = split.joined(length, depth, c)
        assert joined == [p for t in range(split.tp) for p in split.own(length, depth, c, t)]
        runs = split.joined_runs(length, depth, c)
        assert [p for run in runs for p in range(*run)] == joined
        assert len({len(split.own(length, 0, c, t)) for t in range(split.tp)}) == 1


@given(splits())
def test_a_depth_keeps_the_first_of_a_ranks_positions(drawn: tuple[RowSplit, int, int]) -> None:
    split, length, depth = drawn
    for c in range(split.cp):
        for t in range(split.tp):
            rest = split.own(length, depth, c, t)
            assert split.own(length, 0, c, t)[: len(rest)] == rest


@given(st.integers(1, 8), st.integers(1, 50))
def test_the_work_is_even(cp: int, share: int) -> None:
    """Keys that a rank's queries see: equal where chunks are."""
    split, length = RowSplit(cp), 2 * cp * share
    work = [sum(p + 1 for p in split.joined(length, 0, c)) for c in range(cp)]
    assert len(set(work)) == 1


@given(st.lists(st.integers(0, 5), min_size=1, max_size=5))
def test_rows_lie_where_their_parts_begin(counts: list[int]) -> None:
    room = max(counts)
    places = spread(counts, room) or list(range(len(counts) * room))
    assert places == [r * room + i for r, count in enumerate(counts) for i in range(count)]


@pytest.mark.parametrize(
    ("split", "length", "depth", "message"),
    [
        (RowSplit(2, 1), 3, 0, "parallel.cp = 2 and parallel.tp = 1 at MTP depth 0: use 4 or more"),
        (RowSplit(1, 4), 9, 0, "do not divide among parallel.tp = 4: use 8 or 12"),
        (RowSplit(2, 2), 6, 0, "use 8 or more"),
        (RowSplit(2, 1), 5, 3, "at MTP depth 3: use 6 or more"),
    ],
)
def test_rows_that_cannot_be_shared(split: RowSplit, length: int, depth: int, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        split.check(length, depth)


# --- attention of some positions ------------------------------------------------------------------


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("version", sorted(OF_RUNS))
@pytest.mark.parametrize("runs", [[(0, 11)], [(0, 3), (8, 11)], [(3, 8)], [(4, 5), (5, 6)]])
def test_queries_of_some_positions(
    version: str, runs: list[tuple[int, int]], documents: bool
) -> None:
    """What they get is what they get among all queries, and the gradients are of those alone."""
    generator = torch.Generator().manual_seed(1)
    shapes = ((2, 3, 11, 6), (2, 3, 11, 6), (2, 3, 11, 4))
    q, k, v = (
        torch.randn(s, generator=generator, dtype=torch.float64, requires_grad=True) for s in shapes
    )
    documents_BT = torch.tensor([[0] * 4 + [1] * 5 + [-1] * 2, [0] * 11]) if documents else None
    places = torch.tensor([p for run in runs for p in range(*run)])
    expected = VERSIONS["reference"](q, k, v, 0.4, documents_BT)[:, :, places]
    found = VERSIONS[version](q[:, :, places], k, v, 0.4, documents_BT, runs=runs)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    dout = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    for ours, theirs in zip(
        torch.autograd.grad(found, (q, k, v), dout),
        torch.autograd.grad(expected, (q, k, v), dout),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


# --- against one process --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("world", "layout", "length", "choices", "document_mask", "changes"),
    [
        (2, {"cp": 2}, 11, "unbiased", True, {}),
        (2, {"cp": 2}, 12, "real", False, {"q_lora_rank": None}),
        (2, {"cp": 2}, 26, "unbiased", True, {"rope_scaling": YARN}),
        (2, {"cp": 2, "ep": 2}, 4, "unbiased", False, {}),
        (3, {"cp": 3}, 13, "real", True, {"num_nextn_predict_layers": 0}),
        (4, {"cp": 2, "tp": 2}, 10, "real", True, {}),
        (4, {"cp": 2, "tp": 2, "ep": 2}, 18, "unbiased", True, {"q_lora_rank": None}),
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


@pytest.mark.parametrize("attention", sorted(OF_RUNS))
def test_both_versions_of_attention(pool: Pool, attention: str) -> None:
    pool.run(2, with_attention, attention)


def with_attention(attention: str) -> None:
    kernels = Kernels(attention=attention)
    equals_one_process({"cp": 2}, 9, {"kernels": kernels, "num_hidden_layers": 1})


# --- bytes ----------------------------------------------------------------------------------------


def traffic_of_attention(layout: dict[str, int], length: int, rows: int) -> tuple[Any, int]:
    """Run one forward and backward; return what was sent, and the layers."""
    mesh = make_mesh(Layout.fill(torch.distributed.get_world_size(), **layout))
    model = apply_sequence(skewed_model(num_nextn_predict_layers=0), mesh)
    features = model.features(rows_of(model, rows, length).tokens_BS)
    features.hidden_BTD.sum().backward()
    return dict(mesh.traffic.sent), len(model.layers)


def test_what_travels_is_the_latent_and_the_rotary_key(pool: Pool) -> None:
    """Over cp a rank sends C + R numbers of each of its tokens to every other rank, and not heads.

    Backward brings as many sums back.
    """
    config, length, rows, cp = skewed_model().config, 12, 2, 3
    for sent, layers in pool.run(cp, traffic_of_attention, {"cp": cp}, length, rows):
        row = (config.kv_lora_rank + config.qk_rope_head_dim) * 8
        one_way = layers * row * rows * length // cp * (cp - 1)
        assert {key: n for key, n in sent.items() if n} == {
            ("cp", "all_gather"): one_way,
            ("cp", "reduce_scatter"): one_way,
        }


def test_over_cp_every_token_travels_once_however_many_ranks_tp_has(pool: Pool) -> None:
    config, length, rows = skewed_model().config, 8, 2
    for sent, layers in pool.run(4, traffic_of_attention, {"cp": 2, "tp": 2}, length, rows):
        row = (config.kv_lora_rank + config.qk_rope_head_dim) * 8
        assert sent["cp", "all_gather"] == layers * row * rows * length // 4


# --- what is refused ------------------------------------------------------------------------------


def refusals() -> list[str]:
    mesh = make_mesh(Layout.fill(2, cp=2))
    found = []
    for model, length in (
        (skewed_model(kernels=Kernels(attention="triton")), 8),
        (skewed_model(), 3),
    ):
        try:
            apply_sequence(model, mesh).features(rows_of(model, 1, length).tokens_BS)
        except BadInput as error:
            found.append(str(error))
    return found


def test_what_cannot_be_shared_is_refused(pool: Pool) -> None:
    for kernels, short in pool.run(2, refusals):
        assert "attention=triton" in kernels
        assert "use one of reference, sdpa" in kernels
        assert "rows of 3 tokens are too short" in short


def test_one_process_is_left_as_it_is() -> None:
    model = skewed_model()
    assert apply_sequence(model, make_mesh(Layout())) is model
    assert isinstance(model.positions, AllPositions)
