"""A longer context: YaRN, then training on long rows in phases (report section 4.3; facts 7).

Every phase is a run. All but the last lie in ``phase-1/``, ``phase-2/``, .. of the folder, which is
the last one's run folder itself; each begins with the checkpoint of the one before.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from ziphius.config.errors import BadInput
from ziphius.config.extend import ExtendConfig, extended
from ziphius.config.pretrain import TrainingConfig
from ziphius.config.recipe import Recipe
from ziphius.parallel.layout import Layout
from ziphius.parallel.mesh import CONTROL, Mesh, make_mesh
from ziphius.training.folder import RunFolder
from ziphius.training.loop import Stopping, never_stopping
from ziphius.training.run import Trained, train
from ziphius.training.stage import NextTokens, Stage
from ziphius.training.start import Start, open_start
from ziphius.training.text import prepare_long_text
from ziphius.training.together import by_first
from ziphius.training.watch import Watch

STAGE = "extend"


def lengthened(recipe: Recipe, start: Start) -> Recipe:
    """Return a recipe with the network and tokenizer of a checkpoint, and YaRN, and [extend]."""
    config = recipe.extend or ExtendConfig()
    network = extended(start.config, config)
    return start.into(recipe).model_copy(update={"extend": config, "model": network})


def extension(recipe: Recipe, start: Start, watch: Watch, number: int) -> Stage:
    """Return a phase, counted from 0, of a ``lengthened`` recipe, from a checkpoint on.

    The objective is pre-training's. Raises BadInput for text that cannot be used.
    """
    table = recipe.extend
    assert table is not None, "lengthened has set it"
    config = table.phase(number, recipe.pretrain.ending_rate)
    text = prepare_long_text(recipe, config, start.tokenizer, watch)
    yarn = recipe.model.rope_scaling
    assert yarn is not None, "lengthened has set it"
    about = {
        **text.describe(),
        "start": str(start.folder),
        "start_sha256": start.sha256,
        "phase": number + 1,
        "phases": len(table.lengths),
        "sequence_length": config.sequence_length,
        "context": recipe.model.max_position_embeddings,
        "yarn_factor": yarn.factor,
        "yarn_original_context": yarn.original_max_position_embeddings,
    }
    mask = recipe.data.document_mask
    return Stage(
        table=STAGE,
        config=config,
        tokenizer=text.tokenizer,
        batches=text.loader,
        aim=NextTokens(config, mask),
        identity=text.corpus.sha256,
        document_mask=mask,
        heldout=text.heldout,
        start=start.folder,
        about=about,
        record=partial(_shortened, number),
    )


def _shortened(number: int, recipe: Recipe, made: TrainingConfig) -> Recipe:
    assert recipe.extend is not None, "lengthened has set it"
    return recipe.model_copy(update={"extend": recipe.extend.shortened(number, made.total_tokens)})


def phase_folders(
    out: Path, phases: int, *, resume: bool = False, job: str = ""
) -> list[RunFolder]:
    """Return the run folders of all phases; the last one is ``out``."""
    names = [f"phase-{number}" for number in range(1, phases)]
    before = [RunFolder(out / name, STAGE, resume=resume, job=job) for name in names]
    return [*before, RunFolder(out, STAGE, resume=resume, job=job, parts=names)]


def extend(
    recipe: Recipe,
    checkpoint: Path,
    out: Path,
    watch: Watch,
    *,
    mesh: Mesh | None = None,
    resume: bool = False,
    restarted: bool = False,
    job: str = "",
    seconds: Sequence[float] = (),
    stopping: Stopping = never_stopping,
) -> Trained:
    """Extend a checkpoint's context through all phases of a recipe into a run folder.

    ``mesh`` are the ranks that train together, all of which call this. With ``resume`` it goes on
    in whichever phase it is; so does a job that was ``restarted`` with what it began itself.
    ``seconds`` bounds the training of each phase. Raises what ``train`` does, and BadInput for a
    checkpoint that cannot be begun with.
    """
    mesh = mesh or make_mesh(Layout.of(recipe.parallel, 1), device=recipe.run.device)
    phases = len((recipe.extend or ExtendConfig()).lengths)
    if seconds and len(seconds) != phases:
        raise BadInput(f"{len(seconds)} bounds of time for {phases} phases: give one a phase")
    folders = phase_folders(out, phases, resume=resume, job=job)
    again = resume or (restarted and any(folder.is_of(job) for folder in folders))
    if again:
        folders = phase_folders(out, phases, resume=True, job=job)
    else:
        by_first(mesh[CONTROL], RunFolder(out, STAGE).require_room)
    begin, trained = checkpoint, None
    for number, folder in enumerate(folders):
        length = "" if recipe.extend is None else f" of {recipe.extend.lengths[number]:,} tokens"
        watch.say(f"phase {number + 1} of {phases}: rows{length}")
        last = number == phases - 1
        if last or not (again and folder.finished):
            start = open_start(begin, mesh[CONTROL])
            trained = train(
                lengthened(recipe, start),
                partial(_phase, start, number),
                folder,
                watch,
                mesh=mesh,
                seconds=seconds[number] if seconds else math.inf,
                stopping=stopping,
            )
        if not last:
            # What the machine was asked once holds for all phases, or no resumed run was the same.
            recipe, begin = folder.settled(recipe), folder.path
    assert trained is not None, "the last phase has run"
    return trained


def _phase(start: Start, number: int, recipe: Recipe, watch: Watch) -> Stage:
    return extension(recipe, start, watch, number)
