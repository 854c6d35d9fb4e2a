"""A pre-training run: text in, a checkpoint out, a line of metrics for every step between."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ziphius.config.errors import BadInput
from ziphius.config.recipe import Recipe
from ziphius.kernels.select import (
    Kernels,
    compiled_kernels,
    has_compiler,
    has_triton,
    require_interpreter,
    triton_kernels,
    widening_pays,
)
from ziphius.model.init import initialise
from ziphius.model.precision import DTYPES, Precision
from ziphius.model.transformer import Transformer
from ziphius.parallel.recompute import apply_recompute
from ziphius.training.ema import WeightAverage
from ziphius.training.folder import RunFolder
from ziphius.training.guard import Guard
from ziphius.training.loop import Loop, Stopping, never_stopping
from ziphius.training.machine import peak_flops, peak_memory_gib, usable_threads
from ziphius.training.optimizer import AdamW
from ziphius.training.state import Progress, TrainingState, newest_usable
from ziphius.training.text import Text, prepare_text
from ziphius.training.validate import validate
from ziphius.training.watch import Watch

FLOPS_FORMULA = "MFU = tokens/s * training FLOPs a token / peak FLOP/s"


@dataclass(frozen=True)
class Trained:
    """What a run leaves in memory for whoever goes on with it."""

    model: Transformer
    text: Text
    summary: dict[str, Any]


def resolve(recipe: Recipe) -> Recipe:
    """Write down what a recipe leaves to the machine: threads, kernels, and products.

    Raises BadInput for a device that cannot be had, and for kernels that it cannot run.
    """
    try:
        torch.empty(0, device=recipe.run.device)
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        first_line = str(error).splitlines()[0]
        raise BadInput(f"run.device = '{recipe.run.device}': {first_line}") from None
    run = recipe.run
    device = torch.device(run.device).type
    on_processor = device == "cpu"
    chosen: dict[str, Any] = {
        "threads": run.threads or usable_threads(),
        "kernels": run.kernels,
        "products": run.products,
    }
    if run.kernels == "auto":
        compiled = "compiled" if on_processor and has_compiler() else "torch"
        chosen["kernels"] = "triton" if device == "cuda" and has_triton() else compiled
    if run.products == "auto":
        in_bf16 = on_processor and recipe.precision.compute in ("bfloat16", "fp8")
        chosen["products"] = "widened" if in_bf16 and widening_pays() else "native"
    if on_processor and chosen["kernels"] == "triton":
        require_interpreter()
    return recipe.model_copy(update={"run": run.model_copy(update=chosen)})


def kernels_of(recipe: Recipe) -> Kernels:
    """Return the kernels of a resolved recipe, compiled first if they have to be.

    Raises BadInput when they cannot be compiled.
    """
    run = recipe.run
    if run.kernels == "compiled":
        return compiled_kernels(Path(run.cache).expanduser(), run.products)
    if run.kernels == "triton":
        return triton_kernels()
    return Kernels(linear=run.products)


def precision_of(recipe: Recipe) -> Precision:
    """Return the arithmetic of a recipe."""
    precision = recipe.precision
    if precision.compute == "fp8":
        return Precision.for_fp8_training(power_of_two=precision.scales == "ue8m0")
    return Precision.for_training(DTYPES[precision.compute])


def build_model(recipe: Recipe) -> Transformer:
    """Lay out and initialise the recipe's network with master weights for training."""
    model = Transformer(
        recipe.model, precision_of(recipe), kernels=kernels_of(recipe), device=recipe.run.device
    )
    initialise(model, recipe.run.seed)
    apply_recompute(model, recipe.parallel.recompute)
    return model


def pretrain(
    recipe: Recipe,
    folder: RunFolder,
    watch: Watch,
    *,
    text: Text | None = None,
    seconds: float = math.inf,
    stopping: Stopping = never_stopping,
) -> Trained:
    """Run the recipe's pre-training into a run folder, or go on with the run that is there.

    ``text`` is what ``prepare_text`` made of the same recipe, if the caller has it already.
    ``seconds`` bounds the training; the folder's recipe then gets the steps that were made.
    Nothing is written before text and kernels are known to be usable. Raises what ``Loop.run``
    does.
    """
    folder.require_room()
    recipe = resolve(folder.agreed(recipe, watch))
    torch.set_num_threads(recipe.run.threads)
    text = text or prepare_text(recipe, watch)
    state = _begin(recipe, text)
    with folder.claimed(recipe):
        _go_on(state, folder, watch)
        folder.drop_old(recipe.run.keep_checkpoints, recipe.run.checkpoint_every)
        loop = Loop(recipe, state, text, folder, watch, _peak(recipe))
        if state.progress.heldout_bpb_before is None:
            watch.say(f"bits per byte of the untrained model; kernels: {state.model.kernels}")
            before = validate(state.model, text.heldout)
            state.progress.heldout_bpb_before = before.bits_per_byte
        watch.say(f"training {loop.steps} steps")
        loop.run(seconds, stopping)
        return _finish(recipe, loop, early=seconds < math.inf)


def _products_dtype(recipe: Recipe) -> str:
    """Name the dtype that MFU is measured by: of the products, or BF16 beside those in FP8."""
    compute = recipe.precision.compute
    if recipe.run.products == "widened":
        return "float32"
    return "bfloat16" if compute == "fp8" else compute


def _peak(recipe: Recipe) -> float:
    return peak_flops(recipe.run.device, DTYPES[_products_dtype(recipe)])


def _begin(recipe: Recipe, text: Text) -> TrainingState:
    model = build_model(recipe)
    decay = recipe.pretrain.ema_decay
    return TrainingState(
        model=model,
        optimizer=AdamW(model.parameters(), recipe.pretrain, model.kernels),
        average=WeightAverage(model, decay) if decay else None,
        loader=text.loader,
        guard=Guard(recipe.guard),
        progress=Progress(),
    )


def _go_on(state: TrainingState, folder: RunFolder, watch: Watch) -> None:
    """Continue from the newest usable checkpoint; without any, from the beginning.

    Logs are cut to where they were then. Raises BadInput when there are checkpoints and none can be
    used, or when they are of another text.
    """
    saved, damaged = newest_usable(folder, watch)
    if saved is not None:
        state.take(saved)
        state.progress.resumed += 1
        watch.say(f"going on after step {state.progress.step}")
    elif damaged:
        raise BadInput(f"{folder.path}: no checkpoint can be used: {'; '.join(damaged.values())}")
    for checkpoint in damaged:
        folder.set_aside(checkpoint)
    for log in (folder.metrics, folder.balance):
        if not log.cut(saved.numbers["log_sizes"][log.path.name] if saved else 0):
            watch.say(f"{log.path}: lines of earlier steps are missing; going on without them")


def _finish(recipe: Recipe, loop: Loop, *, early: bool) -> Trained:
    """Measure the trained model, publish its checkpoint, and write every figure down."""
    folder, state, progress = loop.folder, loop.state, loop.state.progress
    if early:
        made = recipe.pretrain.model_copy(update={"steps": None, "tokens": progress.tokens})
        folder.write_recipe(recipe.model_copy(update={"pretrain": made}))
    folder.publish(folder.checkpoint_at(progress.step))
    loop.watch.say("bits per byte of the trained model")
    measured = loop.validation()
    last = folder.metrics.last()
    summary = {
        **loop.text.describe(),
        "compute": recipe.precision.compute,
        "seed": recipe.run.seed,
        "threads": recipe.run.threads,
        "steps": progress.step,
        "tokens": progress.tokens,
        "train_seconds": progress.seconds,
        "tokens_per_s": progress.tokens / progress.seconds,
        "final_loss": last.get("loss"),
        "final_mtp_loss": last.get("mtp_loss"),
        "final_max_violation": last.get("max_violation"),
        "heldout_bpb_before": progress.heldout_bpb_before,
        "heldout_bpb_after": measured["heldout_bpb"],
        "heldout_bpb_ema": measured.get("heldout_bpb_ema"),
        "mtp_agreement": measured.get("mtp_agreement"),
        "mtp_layers": [layer for layer, depth, _ in state.model.blocks() if depth],
        "training_flops_per_token": loop.flops,
        "flops_formula": FLOPS_FORMULA,
        "peak_flops": loop.peak_flops,
        "peak_source": f"a {_products_dtype(recipe)} matrix product on this machine",
        "mfu": progress.tokens / progress.seconds * loop.flops / loop.peak_flops,
        "skipped_steps": state.guard.skipped,
        "rollbacks": state.guard.rollbacks,
        "largest_spike": state.guard.largest_spike,
        "resumed": progress.resumed,
        "peak_memory_gib": peak_memory_gib(),
        "torch": torch.__version__,
        "kernels": str(state.model.kernels),
    }
    folder.write_summary(summary)
    state.loader.close()
    return Trained(state.model.eval(), loop.text, summary)
