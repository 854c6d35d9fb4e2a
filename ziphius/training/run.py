"""A run of one stage: data in, a checkpoint out, a line of metrics for every step between."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ziphius.config.errors import BadInput
from ziphius.config.pretrain import TrainingConfig
from ziphius.config.recipe import Recipe, dump_recipe, read_recipe
from ziphius.kernels.select import (
    Kernels,
    compiled_kernels,
    has_compiler,
    has_triton,
    require_interpreter,
    triton_kernels,
    widening_pays,
)
from ziphius.model.precision import DTYPES, Precision
from ziphius.model.transformer import Transformer
from ziphius.parallel.agree import gather_json
from ziphius.parallel.apply import Arithmetic, apply_parallel, held, shard
from ziphius.parallel.arrivals import worst_arrivals
from ziphius.parallel.fsdp import apply_fsdp
from ziphius.parallel.layout import Layout
from ziphius.parallel.mesh import CONTROL, Mesh, make_mesh
from ziphius.parallel.passes import InOne, Passes
from ziphius.training.ema import WeightAverage
from ziphius.training.folder import Onlooker, RunFolder
from ziphius.training.fully_sharded import FullyShardedAdamW
from ziphius.training.guard import Guard
from ziphius.training.loop import Loop, Stopping, never_stopping
from ziphius.training.machine import free_bytes, peak_flops, peak_memory_gib, usable_threads
from ziphius.training.optimizer import AdamW, Optimizer
from ziphius.training.saving import Saver
from ziphius.training.sharded import ShardedAdamW
from ziphius.training.stage import Stage, pretraining
from ziphius.training.start import Start
from ziphius.training.state import Progress, TrainingState
from ziphius.training.text import Text, prepare_text
from ziphius.training.together import by_first
from ziphius.training.watch import Nobody, Watch

FLOPS_FORMULA = "MFU = tokens/s * training FLOPs a token / peak FLOP/s"


@dataclass(frozen=True)
class Trained:
    """What a run leaves in memory for whoever goes on with it.

    ``model`` is there where it is whole in this process.
    """

    model: Transformer | None
    stage: Stage
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
        # Attention of a row's later queries is torch's.
        compiles = on_processor and has_compiler() and recipe.parallel.cp == 1
        compiled = "compiled" if compiles else "torch"
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
        # Rows travel to experts while products run.
        return triton_kernels(recipe.parallel.comm_sms if recipe.parallel.ep > 1 else 0)
    return Kernels(linear=run.products)


def precision_of(recipe: Recipe) -> Precision:
    """Return the arithmetic of a recipe."""
    precision = recipe.precision
    if precision.compute == "fp8":
        return Precision.for_fp8_training(power_of_two=precision.scales == "ue8m0")
    return Precision.for_training(DTYPES[precision.compute])


def build_model(recipe: Recipe) -> Transformer:
    """Lay out and initialise the recipe's network, whole, with master weights for training."""
    passes = build(recipe, make_mesh(Layout()))
    assert isinstance(passes, InOne), "a process that is alone holds all of it"
    return passes.model


def build(
    recipe: Recipe,
    mesh: Mesh,
    config: TrainingConfig | None = None,
    document_mask: bool | None = None,
) -> Passes:
    """Lay out and initialise what this rank holds of the recipe's network.

    ``config`` and ``document_mask`` are those of the stage, by default pre-training's.
    """
    masked = recipe.data.document_mask if document_mask is None else document_mask
    how = Arithmetic(precision_of(recipe), kernels_of(recipe), recipe.run.device)
    return apply_parallel(
        recipe.model,
        recipe.parallel,
        mesh,
        how,
        seed=recipe.run.seed,
        micro_batch_size=(config or recipe.pretrain).micro_batch_size,
        document_mask=masked,
    )


def make_optimizer(
    recipe: Recipe, passes: Passes, config: TrainingConfig | None = None
) -> Optimizer:
    """Return AdamW for a model that is whole here, and its sharded form for one that is spread."""
    config, mesh = config or recipe.pretrain, passes.mesh
    kernels = passes.models[0].kernels
    if mesh.layout.world == 1:
        return AdamW(passes.models[0].parameters(), config, kernels)
    if recipe.parallel.sharding != "zero1":
        return FullyShardedAdamW(apply_fsdp(passes.models[0], mesh), config, kernels)
    return ShardedAdamW(shard(passes), mesh["world"], config, kernels)


def require_room(recipe: Recipe, passes: Passes, config: TrainingConfig | None = None) -> None:
    """Refuse micro-batches that have no room on a rank whose experts every token chooses.

    For after weights and moments have theirs. Ranks of a node share a processor's memory, but not
    the worst case. Raises BadInput, on all ranks in the same words.
    """
    mesh, config, model = passes.mesh, config or recipe.pretrain, passes.models[0]
    if mesh.layout.ep == 1:
        return
    free = gather_json(mesh[CONTROL], free_bytes(recipe.run.device))
    known = [found for found in free if found is not None]
    if known:
        precision = model.precision
        worst_arrivals(
            recipe.model,
            mesh.layout,
            config.micro_batch_size * model.positions.count(config.sequence_length),
            itemsize=precision.compute.itemsize,
            fp8=precision.fp8,
        ).check(min(known))


def pretrain(
    recipe: Recipe,
    folder: RunFolder,
    watch: Watch,
    *,
    mesh: Mesh | None = None,
    text: Text | None = None,
    start: Start | None = None,
    seconds: float = math.inf,
    stopping: Stopping = never_stopping,
) -> Trained:
    """Run the recipe's pre-training: see ``train``.

    ``text`` is what ``prepare_text`` made of the same recipe, if the caller has it already. A
    ``start`` is pre-trained on, with its network and its tokenizer and fresh moments.
    """
    if start is not None:
        recipe = start.into(recipe)

    def prepare(recipe: Recipe, watch: Watch) -> Stage:
        return pretraining(recipe, text or prepare_text(recipe, watch), start)

    return train(recipe, prepare, folder, watch, mesh=mesh, seconds=seconds, stopping=stopping)


def train(
    recipe: Recipe,
    prepare: Callable[[Recipe, Watch], Stage],
    folder: RunFolder,
    watch: Watch,
    *,
    mesh: Mesh | None = None,
    seconds: float = math.inf,
    stopping: Stopping = never_stopping,
) -> Trained:
    """Run a stage of a recipe into a run folder, or go on with the run that is there.

    ``prepare`` makes the stage of the recipe as it is settled. ``mesh`` are the ranks that train
    together, all of which call this; without it there is one. ``seconds`` bounds the training; the
    folder's recipe then gets the tokens that were made. Nothing is written before data and kernels
    are known to be usable. Raises what ``Loop.run`` does.
    """
    mesh = mesh or make_mesh(Layout.of(recipe.parallel, 1), device=recipe.run.device)
    if mesh.rank:
        folder, watch = Onlooker(folder.path, folder.stage.name), Nobody()
    settled = by_first(mesh[CONTROL], lambda: _agreed(recipe, folder, watch))
    recipe = read_recipe(settled, str(folder.path))
    torch.set_num_threads(recipe.run.threads)
    stage = prepare(recipe, watch)
    _require_same(stage, mesh)
    state = _begin(recipe, stage, mesh)
    with ExitStack() as claimed:
        by_first(mesh[CONTROL], lambda: claimed.enter_context(folder.claimed(recipe)))
        claimed.callback(stage.batches.close)
        state.saver.kept = stage.begin(state.passes, state.saver)
        resumed = _go_on(state, folder, watch)
        if not resumed and stage.start is not None:
            state.saver.load_weights(stage.start, fresh=stage.fresh)
        stage.ready(resumed)
        every = stage.save_every(recipe.run.checkpoint_every)
        folder.drop_old(recipe.run.keep_checkpoints, every)
        loop = Loop(recipe, state, stage, folder, watch, _peak(recipe, mesh))
        if state.progress.heldout_bpb_before is None and stage.heldout is not None:
            kernels = state.passes.models[0].kernels
            what = "the untrained model" if stage.start is None else "the model as it begins"
            watch.say(f"bits per byte of {what}; kernels: {kernels}")
            before = loop.validate()
            state.progress.heldout_bpb_before = None if before is None else before.bits_per_byte
        if state.progress.before is None:
            state.progress.before = dict(stage.measure(state.passes))
        watch.say(f"training {loop.steps} steps")
        loop.run(seconds, stopping)
        return _finish(recipe, loop, early=seconds < math.inf)


def _products_dtype(recipe: Recipe) -> str:
    """Name the dtype that MFU is measured by: of the products, or BF16 beside those in FP8."""
    compute = recipe.precision.compute
    if recipe.run.products == "widened":
        return "float32"
    return "bfloat16" if compute == "fp8" else compute


def _peak(recipe: Recipe, mesh: Mesh) -> float:
    """Measure what all ranks could compute in a second, if each can what this one can."""
    one = peak_flops(recipe.run.device, DTYPES[_products_dtype(recipe)])
    return one * mesh.layout.world


def _agreed(recipe: Recipe, folder: RunFolder, watch: Watch) -> str:
    """Settle, on one rank, what a recipe leaves open."""
    folder.require_room()
    return dump_recipe(resolve(folder.agreed(recipe, watch)))


def _require_same(stage: Stage, mesh: Mesh) -> None:
    """Refuse ranks that have read different data, or made another tokenizer of it."""
    tokenizer = hashlib.sha256(stage.tokenizer.to_str().encode()).hexdigest()
    told = gather_json(mesh[CONTROL], [stage.identity, tokenizer])
    others = [rank for rank, seen in enumerate(told) if seen != told[0]]
    if others:
        raise BadInput(f"data: rank {others[0]} reads other text than rank 0: give all the same")


def _begin(recipe: Recipe, stage: Stage, mesh: Mesh) -> TrainingState:
    passes = build(recipe, mesh, stage.config, stage.document_mask)
    optimizer = make_optimizer(recipe, passes, stage.config)
    require_room(recipe, passes, stage.config)
    saver, decay = Saver(passes.models, mesh, held(passes)), stage.config.ema_decay
    return TrainingState(
        passes=passes,
        optimizer=optimizer,
        average=WeightAverage(passes.models, decay, saver.owners.owns) if decay else None,
        loader=stage.batches,
        guard=Guard(recipe.guard),
        progress=Progress(),
        saver=saver,
        identity=stage.identity,
    )


def _go_on(state: TrainingState, folder: RunFolder, watch: Watch) -> bool:
    """Continue from the newest usable checkpoint, and say so; without any, from the beginning.

    Logs are cut to where they were then. Raises BadInput when there are checkpoints and none can be
    used, or when they are of another text.
    """
    saved, damaged = state.newest(folder, watch)
    if saved is not None:
        state.take(saved)
        state.progress.resumed += 1
        watch.say(f"going on after step {state.progress.step}")
    elif damaged:
        raise BadInput(f"{folder.path}: no checkpoint can be used: {'; '.join(damaged.values())}")
    for checkpoint in damaged:
        folder.set_aside(checkpoint)
    for name, log in (("metrics.jsonl", folder.metrics), ("balance.jsonl", folder.balance)):
        if not log.cut(saved.numbers["log_sizes"][name] if saved else 0):
            watch.say(f"{log.path}: lines of earlier steps are missing; going on without them")
    return saved is not None


def _finish(recipe: Recipe, loop: Loop, *, early: bool) -> Trained:
    """Measure the trained model, publish its checkpoint, and write every figure down."""
    folder, state, progress = loop.folder, loop.state, loop.state.progress
    passes, layout = state.passes, state.passes.mesh.layout
    if early:
        folder.write_recipe(loop.stage.recorded(recipe, loop.stage.config.until(progress.tokens)))
    state.saver.wait()
    control = passes.mesh[CONTROL]
    last_saved = folder.checkpoint_at(progress.step)
    by_first(control, lambda: folder.publish(last_saved, loop.stage.files))
    if loop.stage.heldout is not None:
        loop.watch.say("bits per byte of the trained model")
    measured = loop.validation()
    last = folder.metrics.last()
    first_mtp, depths = recipe.model.num_hidden_layers, recipe.model.num_nextn_predict_layers
    summary = {
        **loop.stage.about,
        "compute": recipe.precision.compute,
        "seed": recipe.run.seed,
        "threads": recipe.run.threads,
        "processes": layout.world,
        "steps": progress.step,
        "tokens": progress.tokens,
        "train_seconds": progress.seconds,
        "tokens_per_s": progress.tokens / progress.seconds,
        "final_loss": last.get("loss"),
        "final_mtp_loss": last.get("mtp_loss"),
        "final_max_violation": last.get("max_violation"),
        "heldout_bpb_before": progress.heldout_bpb_before,
        "heldout_bpb_after": measured.get("heldout_bpb"),
        "heldout_bpb_ema": measured.get("heldout_bpb_ema"),
        **{f"{name}_before": value for name, value in (progress.before or {}).items()},
        **{f"{name}_after": measured.get(name) for name in progress.before or {}},
        "mtp_agreement": measured.get("mtp_agreement"),
        "mtp_layers": list(range(first_mtp, first_mtp + depths)),
        "training_flops_per_token": loop.flops,
        "flops_formula": FLOPS_FORMULA,
        "peak_flops": loop.peak_flops,
        "peak_source": f"a {_products_dtype(recipe)} matrix product on this machine",
        "mfu": progress.tokens / progress.seconds * loop.flops / loop.peak_flops,
        "skipped_steps": state.guard.skipped,
        "rollbacks": state.guard.rollbacks,
        "largest_spike": state.guard.largest_spike,
        "resumed": progress.resumed,
        "peak_memory_gib": max(gather_json(control, peak_memory_gib())),
        "torch": torch.__version__,
        "kernels": str(passes.models[0].kernels),
    }
    by_first(control, lambda: folder.write_summary(summary))
    state.loader.close()
    whole = passes.models[0].eval() if layout.world == 1 else None
    return Trained(whole, loop.stage, summary)
