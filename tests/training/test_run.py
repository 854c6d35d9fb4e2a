"""What a run decides before it begins, and that nothing is left when it cannot."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.training.support import Silent, recipe
from ziphius.config.errors import BadInput
from ziphius.kernels.cpu import library
from ziphius.training import run
from ziphius.training.folder import RunFolder
from ziphius.training.run import pretrain, resolve


@pytest.mark.parametrize("compiler", ["false", "no-such-compiler"])
def test_kernels_that_cannot_be_compiled_leave_no_folder_in_the_way(
    compiler: str, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "COMPILER", compiler)
    out, cache = tmp_path / "run", f"run.cache={tmp_path / 'cache'}"
    settings = ("pretrain.steps=2", cache)
    with pytest.raises(BadInput, match=r"compiled kernels.*set run\.kernels=torch"):
        pretrain(recipe(words, *settings, "run.kernels=compiled"), RunFolder(out), Silent())
    assert not out.exists()
    pretrain(recipe(words, *settings, "run.kernels=torch"), RunFolder(out), Silent())


def test_what_is_left_to_the_machine_is_written_down(
    words: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "has_compiler", lambda: True)
    monkeypatch.setattr(run, "widening_pays", lambda: True)
    left = ("run.threads=0", "run.products=auto")
    resolved = resolve(recipe(words, *left, "precision.compute=bfloat16")).run
    assert (resolved.kernels, resolved.products) == ("compiled", "widened")
    assert resolved.threads > 0
    monkeypatch.setattr(run, "has_compiler", lambda: False)
    plain = resolve(recipe(words, "run.products=auto", "precision.compute=float32")).run
    assert (plain.kernels, plain.products) == ("torch", "native"), "FP32 has nothing to widen"
