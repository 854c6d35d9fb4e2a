"""A run that goes on in another layout has the numbers of one that was never interrupted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.parallel.pool import Pool
from tests.parallel.sharded import assert_same_results, settings, sharded, train
from tests.support import F64, random_model
from tests.training.spread import tokenizer
from ziphius.model.weights import named_weights
from ziphius.parallel.experts import cut_experts
from ziphius.parallel.layout import Layout
from ziphius.parallel.mesh import make_mesh
from ziphius.training.ema import WeightAverage
from ziphius.training.optimizer import AdamW, Optimizer
from ziphius.training.saving import Saver
from ziphius.training.step import StepResult

STEPS = 6


def run(
    layout: dict[str, int] | None, folder: Path, first: int, last: int, every: int
) -> tuple[list[StepResult], dict[str, torch.Tensor]]:
    """Train from the checkpoint of step ``first`` to ``last``; save without waiting."""
    world = torch.distributed.get_world_size() if layout is not None else 1
    mesh, config = make_mesh(Layout.fill(world, **(layout or {}))), settings()
    model = random_model(precision=F64, seed=first)
    if mesh.layout.ep > 1:
        cut_experts(model, mesh)
    optimizer: Optimizer = AdamW(model.parameters(), config)
    if layout is not None:
        optimizer = sharded(model, mesh, config)
    results: list[StepResult] = []
    saver = Saver([model], mesh)
    average = WeightAverage([model], 0.9, saver.owners.owns)
    if first:
        numbers: dict[str, Any] = {"optimizer_steps": first, "average_updates": first}
        saver.load(folder / f"step-{first}", optimizer, average, numbers)
    for number in range(first, last):
        results += train(model, optimizer, config, mesh, range(number, number + 1))
        average.update([model])
        if (number + 1) % every == 0:
            saver.save(folder / f"step-{number + 1}", optimizer, average, {}, tokenizer())
    saver.wait()
    averages = {name: tensor.clone() for name, tensor in average.average.items()}
    return results, averages | {f"own {n}": w.clone() for n, w in named_weights(model)}


def test_a_run_goes_on_over_other_ranks_as_if_nothing_had_happened(
    pool: Pool, tmp_path: Path
) -> None:
    expected, final = run(None, tmp_path / "whole", 0, STEPS, STEPS)
    begun = pool.run(4, run, {"ep": 2}, tmp_path, 0, 2, 1)
    further = pool.run(3, run, {}, tmp_path, 2, 4, 1)
    last, state = run(None, tmp_path, 4, STEPS, STEPS)
    for results, steps in ((begun, slice(0, 2)), (further, slice(2, 4))):
        for found, _ in results:
            assert_same_results(found, expected[steps])
    assert_same_results(last, expected[4:])
    for name, tensor in final.items():
        torch.testing.assert_close(state[name], tensor, rtol=1e-9, atol=1e-9)
