"""What a quickstart reads: in which order, what of it is held out, and who may change it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ziphius.cli.miniature import PRESET, STAGES, Miniature
from ziphius.cli.mixture import Mixture, mixture
from ziphius.config.data import SourceConfig
from ziphius.config.recipe import load_recipe
from ziphius.training.loop import never_stopping


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> Mixture:
    cache = tmp_path_factory.mktemp("cache")
    by_hand = [f"run.cache={cache}", "extend.lengths=[512, 1024]"]
    return mixture(PRESET, by_hand, print)


def sources(settings: Sequence[str]) -> dict[str, SourceConfig]:
    """Return what settings read, by the kind of text."""
    found = load_recipe(PRESET, settings).data.sources
    return {Path(source.path).name.split("-")[0]: source for source in found}


def test_copying_is_learned_alone_and_before_everything_else(generated: Mixture) -> None:
    found = sources(generated.settings)
    first = found.pop("plain")
    assert first.begin == "0%"
    assert {source.begin for source in found.values()} == {first.end}
    to_the_end = {name for name, source in found.items() if source.end == "100%"}
    assert to_the_end == {"stdlib", "tasks", "spread"}
    assert found.keys() - to_the_end == {"copies", "dense"}
    assert sum(source.weight for source in found.values()) == pytest.approx(1)


def test_longer_rows_have_longer_documents(generated: Mixture) -> None:
    found = sources([*generated.settings, *generated.extension])
    assert found.keys() == {"stdlib", "copies", "dense", "spread", "long"}
    assert {source.begin for source in found.values()} == {"0%"}
    sizes = {}
    for name in ("dense", "long"):
        lines = Path(found[name].path).read_text("utf-8").splitlines()
        texts = [json.loads(line)["text"] for line in lines]
        assert len(set(texts)) == len(texts)
        sizes[name] = sum(map(len, texts)) / len(texts)
    assert sizes["long"] > 2 * sizes["dense"]


def test_what_is_generated_is_not_held_out(generated: Mixture) -> None:
    for settings in (generated.settings, [*generated.settings, *generated.extension]):
        held = {name for name, source in sources(settings).items() if source.holdout}
        assert held == {"stdlib"}


def test_what_is_set_by_hand_stands(words: Path, tmp_path: Path) -> None:
    by_hand = ["model.rope_theta=10000", "data.deduplicate=none", "run.validate_bytes=5000"]
    by_hand += [f"run.cache={tmp_path}", "extend.lengths=[512, 1024]"]
    made = mixture(PRESET, by_hand, print)
    for settings in (made.settings, [*made.settings, *made.extension]):
        found = load_recipe(PRESET, settings)
        assert found.model.rope_theta == 10000
        assert found.model.qk_rope_head_dim == 16
        assert found.data.deduplicate == "none"
        assert found.run.validate_bytes == 5000
    by_hand = [f"data.source={words}"]
    assert mixture(PRESET, by_hand, print) == Mixture(tuple(by_hand))


def test_only_the_extension_reads_what_it_alone_needs(generated: Mixture, tmp_path: Path) -> None:
    display: Any = SimpleNamespace(say=print)
    work = Miniature(
        tmp_path, generated.settings, {}, None, display, never_stopping, generated.extension
    )
    for stage in STAGES[1:]:
        recipe = work._recipe(stage)
        longest = any("long-" in source.path for source in recipe.data.sources)
        assert longest == (stage == "extend")
        assert (recipe.run.validate_bytes == 120_000) == (stage == "extend")


def test_its_tokenizer_spells_what_is_generated(generated: Mixture) -> None:
    """And knows nothing of the file that it lies in."""
    path = load_recipe(PRESET, generated.settings).tokenizer.path
    assert path is not None
    vocabulary = json.loads(Path(path).read_text("utf-8"))["model"]["vocab"]
    assert "ĠRemember" in vocabulary or "Remember" in vocabulary
    assert not any('{"' in token and "text" in token for token in vocabulary)
    assert "\\nRemember" not in vocabulary


@pytest.mark.parametrize("by_hand", [["pretrain.sequence_length=2"], ["extend.lengths=[2, 3]"]])
def test_rows_may_be_as_short_as_somebody_likes(
    by_hand: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a folder of any name, too."""
    monkeypatch.setattr("ziphius.cli.mixture._CHARACTERS", 20_000)
    cache = tmp_path / 'a "b" \\ c'
    made = mixture(PRESET, [*by_hand, f"run.cache='{cache}'"], print)
    assert all(Path(s.path).is_file() for s in sources(made.settings).values() if not s.holdout)
