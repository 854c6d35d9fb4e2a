"""Bits per byte against its definition, from logits in float64."""

import math

import pytest
import torch
from torch import Tensor

from tests.support import F32, F64, random_model, random_tokens
from ziphius.model.precision import Precision
from ziphius.model.transformer import Transformer
from ziphius.training.validate import bits_per_byte, mtp_agreement


def slow(model: Transformer, tokens_MT: Tensor, targets_MT: Tensor, n_bytes: int) -> float:
    with torch.no_grad():
        log_p_MTV = model(tokens_MT).double().log_softmax(-1)
    bits = 0.0
    for m, row in enumerate(targets_MT.tolist()):
        for t, target in enumerate(row):
            if target != -100:
                bits -= log_p_MTV[m, t, target].item() / math.log(2)
    return bits / n_bytes


@pytest.mark.parametrize(
    ("precision", "tolerance"),
    [(F64, 1e-12), (F32, 1e-5), (Precision.for_inference(torch.bfloat16), 2e-2)],
    ids=["float64", "float32", "bfloat16"],
)
@pytest.mark.parametrize("batch", [1, 3, 16])
def test_equals_the_definition(precision: Precision, tolerance: float, batch: int) -> None:
    model = random_model(precision=precision)
    tokens_MT = random_tokens(model.config, 7, 10)
    targets_MT = random_tokens(model.config, 7, 10, seed=1)
    targets_MT[2, 4:] = -100
    targets_MT[6] = -100
    expected = slow(model, tokens_MT, targets_MT, n_bytes=123)
    found = bits_per_byte(model, tokens_MT, targets_MT, 123, batch=batch)
    assert found == pytest.approx(expected, rel=tolerance)


def test_a_model_that_knows_nothing_needs_the_logarithm_of_the_vocabulary() -> None:
    model = random_model(vocab_size=64)
    torch.nn.init.zeros_(model.lm_head.weight)
    tokens_MT = random_tokens(model.config, 2, 8)
    # 16 targets of log2(64) = 6 bits each over 24 bytes.
    assert bits_per_byte(model, tokens_MT, tokens_MT, 24) == pytest.approx(16 * 6 / 24, rel=1e-6)


def test_leaves_no_gradient_behind() -> None:
    model = random_model()
    tokens_MT = random_tokens(model.config, 2, 8)
    bits_per_byte(model, tokens_MT, tokens_MT, 24)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("batch", [1, 8])
def test_agreement_equals_a_loop_over_positions(batch: int) -> None:
    """The module at position i and the main model at i + 1 predict the same token."""
    model = random_model(precision=F64, vocab_size=12)
    stream_MS = random_tokens(model.config, 5, 15)
    tokens_MT, targets_MT = stream_MS[:, :-1], stream_MS[:, 1:].clone()
    targets_MT[3, 9:] = -100
    agreed = counted = 0
    with torch.no_grad():
        for m in range(5):
            main_TV = model(tokens_MT[m : m + 1])[0]
            draft_TV = model.lm_head(model.features(stream_MS[m : m + 1]).mtp_hidden[0])[0]
            for i in range(len(draft_TV)):
                if targets_MT[m, i + 1] != -100:
                    counted += 1
                    agreed += int(main_TV[i + 1].argmax() == draft_TV[i].argmax())
    assert counted == 5 * 13 - 5
    assert 0 < agreed < counted
    assert mtp_agreement(model, tokens_MT, targets_MT, batch=batch) == agreed / counted


def test_without_mtp_there_is_nothing_to_agree() -> None:
    model = random_model(num_nextn_predict_layers=0)
    tokens_MT = random_tokens(model.config, 2, 8)
    assert mtp_agreement(model, tokens_MT, tokens_MT) is None
