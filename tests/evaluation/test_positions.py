"""Loss by position, against logits in float64; and the control without YaRN."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

import ziphius
from tests.support import F64, random_model, random_tokens
from ziphius.config.errors import BadInput
from ziphius.config.model import Yarn
from ziphius.data.documents import Document
from ziphius.data.heldout import HeldoutRows
from ziphius.data.tokenizer import save_tokenizer, train_tokenizer
from ziphius.evaluation.long_context import long_context, with_context
from ziphius.evaluation.needle import NeedleTest
from ziphius.evaluation.positions import by_position, doubling_edges

YARN = Yarn(factor=8.0, original_max_position_embeddings=16)


def rows(vocabulary: int, count: int, length: int) -> HeldoutRows:
    config = random_model(vocab_size=vocabulary).config
    tokens_MT = random_tokens(config, count, length)
    targets_MT = random_tokens(config, count, length, seed=1)
    return HeldoutRows(tokens_MT, targets_MT, 100)


def test_equals_the_definition() -> None:
    model, text = random_model(precision=F64), rows(61, 5, 20)
    text.targets_MT[3, 15:] = -100  # ends early: another text
    found = by_position(model, text, (0, 3, 4, 20))
    with torch.no_grad():
        log_p_MTV = model(text.tokens_MT).log_softmax(-1)
    whole = [0, 1, 2, 4]
    for edge, after, nats, tokens in zip(
        found.edges, found.edges[1:], found.nats, found.tokens, strict=False
    ):
        expected = [
            -log_p_MTV[m, t, text.targets_MT[m, t]].item()
            for m in whole
            for t in range(edge, after)
        ]
        assert nats == pytest.approx(sum(expected) / len(expected), rel=1e-10)
        assert tokens == len(expected)


@pytest.mark.parametrize("edges", [(0,), (0, 0), (3, 2), (-1, 5), (0, 21)])
def test_edges_that_do_not_rise_or_go_beyond(edges: tuple[int, ...]) -> None:
    with pytest.raises(BadInput, match="give places that rise, up to 20"):
        by_position(random_model(), rows(61, 2, 20), edges)


def test_too_little_text() -> None:
    text = rows(61, 2, 20)
    text.targets_MT[:, -1] = -100
    with pytest.raises(BadInput, match="none of its rows has 20 tokens"):
        by_position(random_model(), text, (0, 20))


def test_edges_double() -> None:
    assert doubling_edges(512) == (0, 64, 128, 256, 512)
    assert doubling_edges(500, 100) == (0, 100, 200, 400, 500)
    assert doubling_edges(10) == (0, 10)


def test_the_control_has_the_same_weights_and_the_positions_of_before() -> None:
    extended = random_model(rope_scaling=YARN, max_position_embeddings=128)
    plain = random_model(max_position_embeddings=128)  # of the same seed
    tokens_BT = random_tokens(plain.config, 2, 40)
    control = with_context(extended, 64, yarn=False)
    assert control.config.rope_scaling is None
    assert control.config.max_position_embeddings == 64
    with torch.no_grad():
        assert torch.equal(control(tokens_BT), plain(tokens_BT))
        assert torch.equal(with_context(extended, 64)(tokens_BT), extended(tokens_BT))
        assert not torch.allclose(control(tokens_BT), extended(tokens_BT), atol=1e-2)
    assert control.lm_head.weight.data_ptr() == extended.lm_head.weight.data_ptr()


def test_the_whole_measurement(tmp_path: Path) -> None:
    lines = [f"value_{number} = compute({number})\n" for number in range(400)]
    documents = [Document("a/1.py", "".join(lines))]
    tokenizer = train_tokenizer([document.text for document in documents], 320)
    for name, yarn in (("before", None), ("after", YARN)):
        context = 16 if yarn is None else 128
        model = random_model(vocab_size=330, rope_scaling=yarn, max_position_embeddings=context)
        ziphius.save(model, tmp_path / name)
        save_tokenizer(tokenizer, tmp_path / name)
    test = NeedleTest((112, 128), (0.0, 1.0), samples=1, others=0)
    told: list[tuple[str, int, int]] = []
    found = long_context(
        tmp_path / "before", tmp_path / "after", documents, test, trained=(64, 128),
        options={"fast_math": True, "kernels": "torch"},
        on_progress=lambda *progress: told.append(progress),
    )  # fmt: skip
    assert list(found["maps"]) == list(found["positions"]) == ["before", "after", "without YaRN"]
    assert all(cells == [[0, 0], [0, 0]] for cells in found["maps"].values())
    assert found["edges"] == [0, 64, 128]
    curves = found["positions"]
    assert all(len(nats) == 2 and all(map(math.isfinite, nats)) for nats in curves.values())
    # The random weights are the same; before and the control have the same positions.
    assert curves["before"] == curves["without YaRN"] != curves["after"]
    assert found["context_before"] == 16
    assert told[-1] == ("without YaRN", 4, 4)
    with pytest.raises(BadInput, match="no such folder"):
        long_context(tmp_path / "none", tmp_path / "none", documents, test)
