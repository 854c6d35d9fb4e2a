"""A combination is trained as a run trains it, and compared with one process, tensor by tensor."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from tests.combos import STEPS, Combo, Refusal, problem_overrides
from tests.support import random_tokens, step_settings
from ziphius.config.errors import BadInput
from ziphius.config.recipe import Recipe, load_recipe
from ziphius.data.rows import Batch
from ziphius.model.ffn import MixtureOfExperts
from ziphius.model.weights import ROUTING_BIAS
from ziphius.parallel.apply import held
from ziphius.parallel.layout import Layout
from ziphius.parallel.mesh import make_mesh
from ziphius.parallel.passes import Passes
from ziphius.parallel.rectangles import Rectangle, place_of
from ziphius.training.objective import PreTraining
from ziphius.training.run import build, make_optimizer
from ziphius.training.saving import Saver
from ziphius.training.step import StepResult, train_step

RATE = 4e-3
HOT, NONE = 5, 2
State = dict[str, Tensor]


def recipe_of(combo: Combo) -> Recipe:
    return load_recipe("tiny", combo.overrides())


@torch.no_grad()
def skew(passes: Passes, *, silent: bool) -> None:
    """Set the routing biases: one expert is hot, one cold, and with ``silent`` half are."""
    for model in passes.models:
        for _, _, block in model.blocks():
            if isinstance(block.mlp, MixtureOfExperts):
                bias_E = block.mlp.gate.e_score_correction_bias
                bias_E[HOT] += 0.3
                bias_E[NONE] -= 30
                if silent:
                    bias_E[len(bias_E) // 2 :] -= 30


def batch_of(recipe: Recipe, step: int) -> Batch:
    """Rows of several documents, and one that is not full."""
    rows, length = recipe.pretrain.batch_size, recipe.pretrain.sequence_length
    tokens_BS = random_tokens(recipe.model, rows, length + 1, seed=step)
    place_S = torch.arange(length + 1)
    documents_BS = torch.stack(
        [(place_S >= 3 + b % 5).int() + (place_S >= length - 2) for b in range(rows)]
    )
    documents_BS[step, -3:] = -1
    return Batch(tokens_BS, documents_BS.to(torch.int32))


class Sums(NamedTuple):
    """Of pieces of tensors: squares of differences, of what is expected, and how many numbers."""

    far: float
    size: float
    count: int

    @property
    def error(self) -> float:
        """How far, in units of the size."""
        return (self.far / self.size) ** 0.5 if self.size else float(self.far > 0)


@dataclass(frozen=True)
class Trained:
    """What a rank tells.

    ``weights`` and ``moments`` are of what is held here, by name, against each of some expected
    states; ``answers`` where no other rank has the same moments. ``owned``: of how many numbers of
    a weight this rank is the owner.
    """

    results: list[StepResult]
    biases: dict[str, list[float]]
    weights: dict[str, list[Sums]]
    moments: dict[str, list[Sums]]
    answers: bool
    owned: dict[str, int]


class Run(NamedTuple):
    saver: Saver
    results: list[StepResult]
    moments: list[Rectangle]
    answers: bool


def train(combo: Combo, silent: bool) -> Run:
    recipe = recipe_of(combo)
    mesh = make_mesh(Layout.of(recipe.parallel, combo.world), deadline=60)
    passes = build(recipe, mesh)
    skew(passes, silent=silent)
    optimizer = make_optimizer(recipe, passes)
    saver = Saver(passes.models, mesh, held(passes))
    settings = step_settings(recipe.pretrain, RATE)
    results = [
        train_step(
            passes,
            optimizer,
            batch_of(recipe, step),
            recipe.pretrain,
            settings,
            document_mask=recipe.data.document_mask,
        )
        for step in range(STEPS)
    ]
    named = list(saver.weights())
    moments = list(optimizer.held_moments(named, saver.split_of))
    return Run(saver, results, moments, optimizer.answers)


def by_one(problem: str, precision: str, silent: bool, file: Path) -> list[StepResult]:
    """Train in this process alone, and leave its state in a file."""
    combo = Combo(1, {}, problem, precision)
    assert combo.overrides() == problem_overrides(problem, precision)
    saver, results, moments, _ = train(combo, silent)
    state = {name: weight.clone() for name, weight in saver.weights()}
    state |= {piece.name: piece.data.clone() for piece in moments}
    torch.save(state, file)
    return results


def by_many(combo: Combo, silent: bool, files: list[Path]) -> Trained:
    """Train with the other ranks of this world, and compare with the states of files."""
    saver, results, moments, answers = train(combo, silent)
    states = [torch.load(file, mmap=True) for file in files]
    weights, biases = [], {}
    for name, weight in saver.weights():
        if name.endswith(ROUTING_BIAS):
            biases[name] = weight.tolist()
        weights.append(Rectangle(name, *place_of(weight.shape, saver.split_of(name)), weight))
    owned = {n: w.numel() for n, w in saver.weights() if saver.owners.owns(n)}
    found = compared(weights, states), compared(moments, states)
    return Trained(results, biases, *found, answers, owned)


def compared(pieces: Iterable[Rectangle], states: list[State]) -> dict[str, list[Sums]]:
    found: dict[str, list[Sums]] = {}
    for piece in pieces:
        new = [_sums(piece, state[piece.name]) for state in states]
        old = found.get(piece.name)
        found[piece.name] = new if old is None else [add(p) for p in zip(old, new, strict=True)]
    return found


def _sums(piece: Rectangle, whole: Tensor) -> Sums:
    assert tuple(whole.shape) == piece.whole, piece.name
    where = [slice(a, a + n) for a, n in zip(piece.offsets, piece.data.shape, strict=True)]
    wanted = whole[tuple(where)].double()
    far = (piece.data.detach().double() - wanted).square().sum().item()
    return Sums(far, wanted.square().sum().item(), wanted.numel())


def add(sums: Iterable[Sums]) -> Sums:
    return Sums(*(sum(numbers) for numbers in zip(*sums, strict=True)))  # type: ignore[arg-type]


def together(told: Iterable[dict[str, list[Sums]]]) -> dict[str, list[Sums]]:
    """Add up what ranks tell of the same tensors."""
    found: dict[str, list[list[Sums]]] = defaultdict(list)
    for one in told:
        for name, sums in one.items():
            found[name].append(sums)
    return {name: [add(s) for s in zip(*sums, strict=True)] for name, sums in found.items()}


def by_kind(sums: dict[str, list[Sums]]) -> dict[str, list[Sums]]:
    """Add up what all layers and experts have of one kind."""
    kinds: dict[str, list[list[Sums]]] = defaultdict(list)
    for name, of in sums.items():
        kinds[re.sub(r"\d+", "*", name)].append(of)
    return {kind: [add(s) for s in zip(*every, strict=True)] for kind, every in kinds.items()}


def refused(refusal: Refusal) -> str:
    """Return the line in which a run is refused, on this rank."""
    try:
        recipe = load_recipe("tiny", refusal.overrides())
        mesh = make_mesh(Layout.of(recipe.parallel, refusal.world), deadline=30)
        passes = build(recipe, mesh)
        optimizer = make_optimizer(recipe, passes)
        settings = step_settings(recipe.pretrain, RATE)
        train_step(passes, optimizer, batch_of(recipe, 0), recipe.pretrain, settings)
    except BadInput as error:
        return str(error)
    return "it is not refused"


class Travelled(NamedTuple):
    """Every layer's choices in a step's micro-batches, and the bytes of two hops: see ``sent``."""

    chosen: list[Tensor]
    bytes: list[int]


def travelled(combo: Combo) -> Travelled:
    """Run a step's passes; tell what this rank chose and what it sent to other nodes and inside."""
    recipe = recipe_of(combo)
    mesh = make_mesh(Layout.of(recipe.parallel, combo.world), deadline=60)
    passes = build(recipe, mesh)
    skew(passes, silent=False)
    chosen: list[Tensor] = []
    for model in passes.models:
        for _, _, block in model.blocks():
            if isinstance(block.mlp, MixtureOfExperts):
                block.mlp.gate.register_forward_hook(lambda *call: chosen.append(call[2].chosen_NK))
    batch = batch_of(recipe, 0)
    objective = PreTraining(
        recipe.pretrain, mtp_loss_weight=0.3, target_count=1, sequence_count=1, document_mask=False
    )
    mesh.traffic.sent.clear()
    passes.run(passes.cut(batch), objective, 1.0)
    sent = dict(mesh.traffic.sent)
    assert {axis for axis, _ in sent} <= {"ep_peers", "ep_node"}, "nothing else travels in a pass"
    return Travelled(
        chosen, [sent.get((axis, "all_to_all"), 0) for axis in ("ep_peers", "ep_node")]
    )
