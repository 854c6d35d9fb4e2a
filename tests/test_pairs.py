"""Features of the engine in pairs, and the table of them in the documentation."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.pairs import FEATURES, PAIRS, Pair, World, check, documented, read, table
from ziphius.kernels.select import has_compiler

BY_NAME = {feature.name: feature for feature in FEATURES}


@pytest.fixture(scope="module")
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    kernels: Path | None = None
    if has_compiler():
        kernels = request.getfixturevalue("kernel_folder")
    return World(tmp_path_factory.mktemp("pairs"), kernels)


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: f"{pair[0].name} with {pair[1].name}")
def test_two_features_at_once(pair: Pair, world: World) -> None:
    """What holds is what the documentation says; ``python -m tests.pairs --write`` writes it."""
    a, b = pair
    assert check(world, a, b) == read(documented())[a.name, b.name]


def test_the_table_in_the_docs_has_every_pair_and_no_other() -> None:
    marks = read(documented())
    assert set(marks) == {(a.name, b.name) for a, b in PAIRS}
    assert table(marks) == documented()


@pytest.mark.parametrize("drafts", ["drafts, coupled", "drafts, rejection"])
def test_everything_at_once(drafts: str, world: World) -> None:
    others = ("prefix cache", "chunked prefill", "grammar", "INT8", "preemption", "n > 1")
    names = (*others, "logprobs", drafts)
    assert check(world, *(BY_NAME[name] for name in names)) in ("=", "p")


@pytest.mark.parametrize("name", [n for n in BY_NAME if BY_NAME[n].options])
def test_a_feature_that_does_not_take_place_is_a_failure(name: str, world: World) -> None:
    off = replace(BY_NAME[name], options={})
    with pytest.raises(AssertionError, match=f"{name} did not take place"):
        check(world, off)
