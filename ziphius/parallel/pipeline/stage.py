"""A model cut into the stages of a pipeline: which blocks are whose, and what ranks share.

A stage is a ``Transformer`` that is a part of the whole, so that its mathematics, its names and its
initial values are those of the whole model.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from ziphius.config.errors import BadInput
from ziphius.config.model import ModelConfig
from ziphius.kernels.later import Later
from ziphius.kernels.select import Kernels
from ziphius.model.experts import RoutedExperts
from ziphius.model.layers import Device, Linear
from ziphius.model.part import Part
from ziphius.model.precision import Precision
from ziphius.model.router import Router
from ziphius.model.transformer import Transformer
from ziphius.parallel.pipeline.actions import Chunk, Schedule

# The versions of products that can leave their weights' gradients for later.
SPLIT_LINEAR = ("native", "widened")
SPLIT_GROUPED = ("loop", "grouped_mm", "cpp", "triton")


def read_layout(layout: str | None, layers: int, stages: int) -> tuple[int, ...]:
    """Return how many main blocks each stage holds: of ``"3|4|4"`` 3, 4 and 4.

    None stands for equal shares. The first stage may be the embedding alone (0), and the last the
    head and the MTP modules. Raises BadInput, with a layout that works, for what does not add up.
    """
    if layers + 2 < stages:
        raise BadInput(
            f"pipeline: {layers} blocks fill {layers + 2} stages at most, of {stages} that the "
            "schedule has: use a smaller parallel.pp, or a schedule of fewer stages a rank"
        )
    if layout is None:
        if layers % stages or layers < stages:
            raise BadInput(
                f"pipeline: {layers} blocks do not lie in equal shares on {stages} stages: set "
                f"parallel.layout, as in '{_nearest(layers, stages)}'"
            )
        return (layers // stages,) * stages
    advice = f"as in '{_nearest(layers, stages)}'"
    words = layout.split("|")
    if not all(word.strip().isdecimal() for word in words):
        raise BadInput(f"parallel.layout = '{layout}': numbers of blocks with | between, {advice}")
    shares = tuple(map(int, words))
    if len(shares) != stages:
        raise BadInput(
            f"parallel.layout = '{layout}' has {len(shares)} stages, and the schedule has {stages}:"
            f" use one number a stage, {advice}"
        )
    if sum(shares) != layers:
        raise BadInput(
            f"parallel.layout = '{layout}' has {sum(shares)} blocks, and the model has {layers}: "
            f"use numbers that add up, {advice}"
        )
    if 0 in shares[1:-1]:
        raise BadInput(
            f"parallel.layout = '{layout}': a stage between the first and the last needs a block, "
            f"{advice}"
        )
    return shares


def _nearest(layers: int, stages: int) -> str:
    """Return shares that are as even as can be; the last stages, which have the head, get fewer."""
    if layers == stages - 2:  # only the ends may have no block
        return "|".join(["0", *["1"] * layers, "0"])
    share, larger = divmod(layers, stages)
    return "|".join(map(str, [share + 1] * larger + [share] * (stages - larger)))


def parts(config: ModelConfig, stages: int, layout: str | None = None) -> tuple[Part, ...]:
    """Cut a network into stages. Raises BadInput."""
    shares = read_layout(layout, config.num_hidden_layers, stages)
    found, first = [], 0
    for stage, share in enumerate(shares):
        ends = stage == stages - 1
        found.append(Part.of(config, first, first + share, begins=stage == 0, ends=ends))
        first += share
    return tuple(found)


def build_stages(
    config: ModelConfig,
    schedule: Schedule,
    rank: int,
    precision: Precision | None = None,
    *,
    layout: str | None = None,
    kernels: Kernels | None = None,
    device: Device = None,
    later: Later | None = None,
) -> dict[Chunk, Transformer]:
    """Build what a rank of a pipeline holds, a model a chunk, with weights still undefined.

    Chunks of one rank that need the embedding share one table, and its gradient. With ``later``
    gradients of weights can be put off, which schedules with I and W need.
    """
    cut = parts(config, schedule.stages, layout)
    models = {
        chunk: Transformer(config, precision, kernels=kernels, device=device, part=cut[chunk.stage])
        for chunk in schedule.chunks(rank)
    }
    tables = [model for model in models.values() if model.part.embeds]
    for model in tables[1:]:
        model.embed_tokens = tables[0].embed_tokens
    for model in models.values():
        if later is not None:
            split_backward(model, later)
    return models


def split_backward(model: Transformer, later: Later) -> None:
    """Let every linear layer, the experts and the routers leave gradients of weights to a queue.

    What comes with the gradient of the input are the gains of norms, the embedding, and the head's,
    whose product is part of the forward pass (``kernels/loss.py``). Raises BadInput for kernels
    that cannot.
    """
    chosen = model.kernels
    if chosen.linear not in SPLIT_LINEAR or chosen.grouped not in SPLIT_GROUPED:
        raise BadInput(
            f"kernels linear={chosen.linear} grouped={chosen.grouped}: a backward in two halves "
            f"needs one of {', '.join(SPLIT_LINEAR)} and one of {', '.join(SPLIT_GROUPED)}"
        )
    for module in model.modules():
        if isinstance(module, Linear | Router):
            module.linear = partial(module.linear, later=later)
        if isinstance(module, RoutedExperts):
            module.grouped = partial(module.grouped, later=later)
        if isinstance(module, Linear | RoutedExperts) and module.fp8 is not None:
            module.fp8 = replace(module.fp8, later=later)
