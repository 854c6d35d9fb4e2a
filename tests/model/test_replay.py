"""Routing replay: a forward pass that takes the experts it is told."""

from __future__ import annotations

import pytest
import torch

from tests.support import F64, random_model, random_tokens
from ziphius.parallel.recompute import apply_recompute


def experts_of(model, tokens_BS: torch.Tensor) -> torch.Tensor:
    """Return what the main layers choose by themselves, ``[B, T, layers, K]``."""
    routings = model.features(tokens_BS).routings
    B, T = tokens_BS.shape[0], tokens_BS.shape[1] - 1
    main = [layer for layer in sorted(routings) if layer < model.config.num_hidden_layers]
    return torch.stack([routings[n].chosen_NK.view(B, T, -1) for n in main], dim=2)


def as_told(chosen_BTLK: torch.Tensor) -> torch.Tensor:
    """Add the experts of a row's last token, which nothing attends from."""
    return torch.cat((chosen_BTLK, chosen_BTLK[:, -1:]), dim=1).to(torch.int16)


def test_the_own_choice_told_changes_nothing() -> None:
    model = random_model(precision=F64)
    tokens_BS = random_tokens(model.config, 2, 9)
    expected = model.features(tokens_BS)
    found = model.features(tokens_BS, experts_BSLK=as_told(experts_of(model, tokens_BS)))
    assert torch.equal(found.hidden_BTD, expected.hidden_BTD)
    assert torch.equal(found.mtp_hidden[0], expected.mtp_hidden[0])


@pytest.mark.parametrize("how", ["none", "full"])
def test_another_choice_is_taken_by_every_layer(how: str) -> None:
    model = random_model(precision=F64)
    apply_recompute(model, how)
    tokens_BS = random_tokens(model.config, 2, 9)
    own_BTLK = experts_of(model, tokens_BS)
    other_BTLK = (own_BTLK + 1) % model.config.n_routed_experts
    features = model.features(tokens_BS, experts_BSLK=as_told(other_BTLK))
    for place, layer in enumerate((1, 2)):
        told_NK = other_BTLK[:, :, place].flatten(0, 1)
        assert torch.equal(features.routings[layer].chosen_NK, told_NK)
    assert not torch.equal(features.hidden_BTD, model.features(tokens_BS).hidden_BTD)
    features.hidden_BTD.sum().backward()  # recomputation takes them too, or torch would complain


def test_weights_of_told_experts_are_their_own_affinities() -> None:
    model = random_model(precision=F64)
    tokens_BS = random_tokens(model.config, 1, 6)
    told_BTLK = (experts_of(model, tokens_BS) + 2) % model.config.n_routed_experts
    routing = model.features(tokens_BS, experts_BSLK=as_told(told_BTLK)).routings[1]
    picked_NK = routing.scores_NE.gather(1, routing.chosen_NK)
    expected_NK = picked_NK / (picked_NK.sum(-1, keepdim=True) + 1e-20) * 2.5
    torch.testing.assert_close(routing.weights_NK, expected_NK)
