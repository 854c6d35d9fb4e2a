"""A whole run whose weights are spread over ranks: what it leaves is what one process leaves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.parallel.pool import Pool
from tests.training.support import Silent, metrics
from tests.training.support import recipe as small_recipe
from ziphius.checkpoint.shards import ShardReader
from ziphius.parallel.layout import Layout
from ziphius.parallel.mesh import make_mesh
from ziphius.training.folder import RunFolder
from ziphius.training.run import pretrain

SETTINGS = ("precision.compute=float64", "run.checkpoint_every=2", "pretrain.steps=4")


def run(text: Path, out: Path, *more: str) -> dict[str, Any]:
    recipe = small_recipe(text, *SETTINGS, *more)
    world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    mesh = make_mesh(Layout.of(recipe.parallel, world))
    return pretrain(recipe, RunFolder(out), Silent(), mesh=mesh).summary


@pytest.mark.parametrize(
    ("world", "asked"),
    [(2, ["parallel.sharding=fsdp"]), (4, ["parallel.sharding=hsdp", "parallel.dp_replicate=2"])],
    ids=["fsdp", "hsdp"],
)
def test_a_run_is_that_of_one_process(
    pool: Pool, words: Path, tmp_path: Path, world: int, asked: list[str]
) -> None:
    alone = run(words, tmp_path / "one")
    summary, *_ = pool.run(world, run, words, tmp_path / "many", *asked)
    for key in ("final_loss", "heldout_bpb_after", "heldout_bpb_ema", "mtp_agreement"):
        assert summary[key] == pytest.approx(alone[key], rel=1e-9), key
    for found, expected in zip(metrics(tmp_path / "many"), metrics(tmp_path / "one"), strict=True):
        for key, value in expected.items():
            near = isinstance(value, float)
            assert found[key] == (pytest.approx(value, rel=1e-9) if near else value), key
    folders = (tmp_path / name / "checkpoint" for name in ("one", "many"))
    with ShardReader(next(folders)) as one, ShardReader(next(folders)) as many:
        assert one.names() == many.names()
        for name in one.names():
            torch.testing.assert_close(many.read(name), one.read(name), rtol=1e-9, atol=1e-9)
