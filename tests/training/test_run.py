"""What a run decides before it begins, and that nothing is left when it cannot."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from tests.parallel.pool import Pool
from tests.training.support import Silent, recipe
from ziphius.config.errors import BadInput
from ziphius.kernels.cpu import library
from ziphius.parallel.layout import Layout
from ziphius.parallel.mesh import make_mesh
from ziphius.training import run
from ziphius.training.folder import RunFolder
from ziphius.training.machine import free_bytes
from ziphius.training.run import kernels_of, pretrain, resolve
from ziphius.training.start import open_start


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


def test_communication_gets_multiprocessors_where_experts_are_elsewhere(words: Path) -> None:
    alone, spread = (
        kernels_of(recipe(words, "run.kernels=triton", f"parallel.ep={ep}")) for ep in (1, 2)
    )
    assert (alone.spared, spread.spared) == (0, 20)
    assert str(spread).endswith(" spared=20")
    set_to = recipe(words, "run.kernels=triton", "parallel.ep=2", "parallel.comm_sms=8")
    assert kernels_of(set_to).spared == 8


def begun(text: Path, out: Path, free: list[int | None], ep: int) -> str:
    """Begin a run whose ranks have so much free memory; return what it is refused with."""
    world = torch.distributed.get_world_size()
    settings = recipe(text, "pretrain.steps=1", f"parallel.ep={ep}", "precision.compute=float32")
    mesh = make_mesh(Layout.of(settings.parallel, world))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "free_bytes", lambda device: free[mesh.rank])
        try:
            pretrain(settings, RunFolder(out), Silent(), mesh=mesh)
        except BadInput as error:
            return str(error)
    return "trained"


def test_the_worst_case_of_experts_has_room_or_is_refused(
    pool: Pool, words: Path, tmp_path: Path
) -> None:
    """Micro-batches of 4 rows of 32 tokens on two ranks; a token's two experts may be on one."""
    found = pool.run(2, begun, words, tmp_path / "none", [2**40, 1000], 2)
    assert found[0] == found[1]
    assert re.fullmatch(
        r"experts: in the worst case 512 rows come to one rank .* and 0\.00 GiB are free: "
        r"make pretrain\.micro_batch_size or parallel\.ep smaller",
        found[0],
    )
    assert not (tmp_path / "none" / "metrics.jsonl").exists()
    for name, free, ep in (("enough", [2**40, None], 2), ("no experts travel", [0, 0], 1)):
        assert pool.run(2, begun, words, tmp_path / name, free, ep) == ["trained"] * 2


def test_free_memory_is_some() -> None:
    free = free_bytes("cpu")
    assert free is None or free > 2**20


def test_pre_training_can_begin_with_a_checkpoint(words: Path, tmp_path: Path) -> None:
    """Its weights, its network and its tokenizer, whatever the recipe says."""
    settings = ("pretrain.steps=2", "pretrain.ema_decay=0.0", "precision.compute=float32")
    pretrain(recipe(words, *settings), RunFolder(tmp_path / "base"), Silent())
    start = open_start(tmp_path / "base")
    more = recipe(words, *settings, "model.hidden_size=64", "run.seed=5")
    trained = pretrain(more, RunFolder(tmp_path / "more"), Silent(), start=start)
    base, on = (json.loads((tmp_path / at / "summary.json").read_text()) for at in ("base", "more"))
    assert on["heldout_bpb_before"] == pytest.approx(base["heldout_bpb_after"], rel=1e-5)
    assert on["heldout_bpb_after"] < on["heldout_bpb_before"]
    assert (on["start"], on["start_sha256"]) == (str(start.folder), start.sha256)
    assert trained.model is not None
    assert trained.model.config == start.config


def test_a_source_may_not_leave_a_run_without_text(words: Path, tmp_path: Path) -> None:
    late = recipe(words, "data.source=stdlib", f'data.sources=[{{path="{words}", begin="50%"}}]')
    with pytest.raises(BadInput, match="none is read 0 tokens into the run"):
        pretrain(late, RunFolder(tmp_path / "run"), Silent())
    assert not (tmp_path / "run").exists()
