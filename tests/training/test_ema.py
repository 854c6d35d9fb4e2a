"""The average of the weights: its formula, its exchange with the model, its threads."""

import torch

from tests.support import random_model, randomise
from ziphius.model.weights import named_weights
from ziphius.training.ema import WeightAverage


def test_it_is_the_recurrence_with_a_decay_that_grows() -> None:
    model = random_model(seed=0)
    average = WeightAverage(model, decay=0.5)
    expected = {name: weight.double() for name, weight in named_weights(model)}
    for n in range(1, 12):
        randomise(model, seed=n)
        average.update(model)
        decay = min(0.5, (1 + n) / (10 + n))
        for name, weight in named_weights(model):
            expected[name] = decay * expected[name] + (1 - decay) * weight.double()
    for name, tensor in average.average.items():
        torch.testing.assert_close(tensor.double(), expected[name], rtol=1e-5, atol=1e-6)


def test_it_has_every_weight_and_is_no_view_of_one() -> None:
    model = random_model()
    average = WeightAverage(model, 0.9)
    weights = dict(named_weights(model))
    assert average.average.keys() == weights.keys()
    for name, tensor in average.average.items():
        assert torch.equal(tensor, weights[name])
        assert tensor.data_ptr() != weights[name].data_ptr()


def test_the_model_has_the_average_inside_the_block_and_its_own_weights_after() -> None:
    model = random_model(seed=0)
    average = WeightAverage(model, 0.9)
    randomise(model, seed=1)
    own = {name: weight.clone() for name, weight in named_weights(model)}
    try:
        with average.in_place_of(model):
            for name, weight in named_weights(model):
                assert torch.equal(weight, average.average[name])
            raise RuntimeError("something inside")
    except RuntimeError:
        pass
    for name, weight in named_weights(model):
        assert torch.equal(weight, own[name])


def test_bfloat16_weights_are_averaged_in_float32() -> None:
    model = random_model().to(torch.bfloat16)
    assert {t.dtype for t in WeightAverage(model, 0.9).average.values()} == {torch.float32}


def test_what_was_saved_goes_on_alike() -> None:
    model = random_model()
    whole, again = WeightAverage(model, 0.9), WeightAverage(model, 0.9)
    randomise(model, seed=1)
    whole.update(model)
    again.load({name: t.clone() for name, t in whole.average.items()}, whole.updates)
    randomise(model, seed=2)
    whole.update(model)
    again.update(model)
    assert all(torch.equal(whole.average[name], again.average[name]) for name in whole.average)
