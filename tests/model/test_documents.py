"""The document mask: with it a packed row is its documents, each alone (facts 6.2)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support import F64, random_model, random_tokens
from ziphius.config.model import Yarn
from ziphius.kernels.select import Kernels
from ziphius.model.transformer import Transformer
from ziphius.parallel.recompute import apply_recompute

EXACT = {"rtol": 1e-9, "atol": 1e-9}
# Documents of two rows of 13 tokens: (number, length). Numbers need not be in order; -1 is padding.
ROWS = [[(0, 5), (1, 1), (2, 7)], [(7, 4), (3, 6), (-1, 3)]]
VARIANTS: dict[str, dict[str, Any]] = {
    "sdpa": {},
    "reference": {"kernels": Kernels(attention="reference")},
    "yarn": {"rope_scaling": Yarn(original_max_position_embeddings=8, factor=4.0)},
}


def packed(**changes: Any) -> tuple[Transformer, Tensor, Tensor]:
    """Return a model, two packed rows ``[B, S]`` and the document of every token."""
    model = random_model(precision=F64, num_nextn_predict_layers=2, **changes)
    numbers = [[number for number, length in row for _ in range(length)] for row in ROWS]
    return model, random_tokens(model.config, 2, 13), torch.tensor(numbers)


@pytest.mark.parametrize("how", ["none", "selective", "full"])
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_every_document_is_computed_as_if_it_were_alone(variant: dict[str, Any], how: Any) -> None:
    """Main hidden states and those of both MTP depths; positions do not restart in a row."""
    model, tokens_BS, documents_BS = packed(**variant)
    apply_recompute(model, how)
    together = model.features(tokens_BS, documents_BS)
    for row, documents in enumerate(ROWS):
        start = 0
        for _, length in documents:
            inside = slice(start, start + length)
            start += length
            # Later tokens do not matter; without them the last ones would be targets only.
            alone = model.features(torch.cat((tokens_BS[row, inside], tokens_BS[row, :3]))[None])
            inputs = min(length, 12 - inside.start)
            found_TD = together.hidden_BTD[row, inside][:inputs]
            torch.testing.assert_close(found_TD, alone.hidden_BTD[0, :inputs], **EXACT)
            for k in (1, 2):
                found_TD = together.mtp_hidden[k - 1][row, inside]
                known = max(0, inputs - k)  # the others meet a token of the next document
                torch.testing.assert_close(
                    found_TD[:known], alone.mtp_hidden[k - 1][0, :known], **EXACT
                )


def test_without_documents_a_row_is_one_text() -> None:
    """As in pre-training: whatever tokens stand between, every later position sees the first."""
    model, tokens_BS, _ = packed()
    tokens_BS[:, [4, 5, 9]] = torch.tensor([0, 1, 0])  # the tokens that end and begin documents
    other_BS = tokens_BS.clone()
    other_BS[:, 0] = (other_BS[:, 0] + 1) % model.config.vocab_size
    moved_BTD = model.features(other_BS).hidden_BTD - model.features(tokens_BS).hidden_BTD
    assert (moved_BTD.abs().amax(-1) > 1e-9).all()
    one = torch.zeros_like(tokens_BS)
    with_one, without = model.features(tokens_BS, one), model.features(tokens_BS)
    torch.testing.assert_close(with_one.hidden_BTD, without.hidden_BTD, **EXACT)


def test_padding_does_not_matter_and_is_finite() -> None:
    model, tokens_BS, documents_BS = packed()
    other_BS = tokens_BS.where(documents_BS >= 0, (tokens_BS + 5) % model.config.vocab_size)
    assert not torch.equal(other_BS, tokens_BS)
    before, after = (model.features(tokens, documents_BS) for tokens in (tokens_BS, other_BS))
    real_BT = documents_BS[:, :12] >= 0
    assert torch.equal(before.hidden_BTD[real_BT], after.hidden_BTD[real_BT])
    assert before.hidden_BTD.isfinite().all()


@pytest.mark.parametrize("how", ["selective", "full"])
def test_gradients_with_recomputation_are_those_without(how: Any) -> None:
    found = []
    for choice in ("none", how):
        model, tokens_BS, documents_BS = packed()
        apply_recompute(model, choice)
        features = model.features(tokens_BS, documents_BS)
        rows = [features.hidden_BTD, *features.mtp_hidden]
        sum(x.square().sum() for x in rows).backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[1][name], grad) for name, grad in found[0].items())
