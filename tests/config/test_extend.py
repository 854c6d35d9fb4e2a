"""The [extend] table: published values, one number for all phases, and what is refused."""

from __future__ import annotations

import pytest

from tests.support import tiny_config
from ziphius.config.errors import BadInput
from ziphius.config.extend import ExtendConfig, extended
from ziphius.config.model import Yarn
from ziphius.config.recipe import dump_recipe, load_recipe, read_recipe


def test_the_published_extension() -> None:
    """Facts 7.1, for the preset that says nothing else."""
    recipe = load_recipe("671b")
    config = recipe.extend or ExtendConfig()
    phases = [config.phase(k, recipe.pretrain.ending_rate) for k in range(2)]
    assert [phase.sequence_length for phase in phases] == [32 * 1024, 128 * 1024]
    assert [phase.batch_size for phase in phases] == [1920, 480]
    assert [round(phase.total_tokens / 1e9, 1) for phase in phases] == [62.9, 62.9]
    for phase in phases:
        assert (phase.steps, phase.learning_rate, phase.final_learning_rate) == (
            1000,
            7.3e-6,
            7.3e-6,
        )
        assert phase.last_learning_rate is None
    network = extended(recipe.model, config)
    assert network.rope_scaling == Yarn(
        factor=40, original_max_position_embeddings=4096, beta_fast=32, beta_slow=1, mscale=1,
        mscale_all_dim=1,
    )  # fmt: skip
    assert network.max_position_embeddings == 163_840


@pytest.mark.parametrize(
    ("settings", "rate"),
    [
        (["pretrain.last_learning_rate=null"], 2.2e-5),
        (["pretrain.last_learning_rate=1e-6"], 1e-6),
        (["extend.learning_rate=3e-4"], 3e-4),
        (["extend.learning_rate=0.0"], 0.0),
    ],
)
def test_where_the_learning_rate_comes_from(settings: list[str], rate: float) -> None:
    recipe = load_recipe("671b", [*settings, "extend.warmup_steps=3"])
    assert recipe.extend is not None
    phase = recipe.extend.phase(1, recipe.pretrain.ending_rate)
    assert (phase.learning_rate, phase.final_learning_rate) == (rate, rate)
    assert phase.warmup_steps == 3


def test_one_number_stands_for_all_phases_and_a_recipe_comes_back() -> None:
    lengths = "extend.lengths=[64, 128, 256]"
    recipe = load_recipe("tiny", [lengths, "extend.steps=7", "extend.batch_sizes=2"])
    assert recipe.extend is not None
    assert recipe.extend.steps == (7, 7, 7)
    assert recipe.extend.batch_sizes == (2, 2, 2)
    assert read_recipe(dump_recipe(recipe), "itself") == recipe
    one = ExtendConfig.model_validate({"lengths": 64, "steps": 3, "batch_sizes": 4})
    assert (one.lengths, one.steps, one.batch_sizes) == ((64,), (3,), (4,))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["extend.lengths=[64, 128, 256]"], r"lengths = \[64, 128, 256\] and batch_sizes"),
        (["extend.steps=[1]"], r"and steps = \[1\]: give one of each a phase"),
        (["extend.lengths=[128, 64]"], "every phase is longer than the last"),
        (["extend.lengths=[64, 64]"], "every phase is longer than the last"),
        (["extend.lengths=[1, 64]"], "every phase is longer than the last"),
        (["extend.lengths=[]"], "extend.lengths"),
        (["extend.steps=[0, 1]"], r"steps = \[0, 1\]: give at least 1 a phase"),
        (["extend.micro_batch_size=7"], "1920 is no multiple of micro_batch_size = 7"),
        (["extend.factor=0.5"], "extend.factor = 0.5"),
        (["extend.length=[64, 128]"], "did you mean 'lengths'"),
    ],
)
def test_what_cannot_be(settings: list[str], said: str) -> None:
    with pytest.raises(BadInput, match=said):
        load_recipe("671b", settings)


def test_an_extended_checkpoint_keeps_its_yarn() -> None:
    yarn = Yarn(factor=4.0, original_max_position_embeddings=32)
    model = tiny_config(rope_scaling=yarn, max_position_embeddings=128)
    config = ExtendConfig(lengths=(64, 128), factor=40.0)
    assert extended(model, config) == model


def test_rows_longer_than_yarn_reaches_are_refused() -> None:
    model = tiny_config(max_position_embeddings=32)
    config = ExtendConfig(lengths=(64, 129), factor=4.0)
    with pytest.raises(BadInput, match="129 tokens exceed the 128 positions of YaRN over 32"):
        extended(model, config)
    assert extended(model, config.model_copy(update={"lengths": (64, 128)})).rope_scaling


def test_a_run_that_ended_early_says_how_many_steps_it_had() -> None:
    config = ExtendConfig(lengths=(64, 128), batch_sizes=(4, 2), steps=(10, 10))
    assert config.shortened(1, 3 * 2 * 128).steps == (10, 3)
    assert config.shortened(0, 0).steps == (1, 10)
