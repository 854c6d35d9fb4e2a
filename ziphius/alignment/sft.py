"""Supervised fine-tuning: the cross entropy of what the assistant says (facts 8.1)."""

from __future__ import annotations

import json

from ziphius.alignment.holdout import divided
from ziphius.alignment.lines import sources_of
from ziphius.alignment.packing import PackedSamples, held_out
from ziphius.alignment.records import Record, read_records, samples_of
from ziphius.config.recipe import Recipe
from ziphius.config.sft import SftConfig
from ziphius.inference.chat import TEMPLATE_FILE, ChatTemplate
from ziphius.inference.template import chat_template_of
from ziphius.training.stage import NextTokens, Stage
from ziphius.training.start import Start
from ziphius.training.watch import Watch


def fine_tuning(recipe: Recipe, start: Start, watch: Watch) -> Stage:
    """Return the stage that learns a recipe's conversations, from a checkpoint on.

    The objective is pre-training's over the assistant's tokens: samples of a row don't see one
    another, MTP is kept, and biases move by ``sft.bias_update_speed``. Raises BadInput for records
    that cannot be used.
    """
    config = recipe.sft or SftConfig()
    records, digest = read_records(sources_of(config.source, "sft"))
    return stage_of(records, digest, recipe, config, start, watch)


def stage_of(
    records: list[Record],
    digest: str,
    recipe: Recipe,
    config: SftConfig,
    start: Start,
    watch: Watch,
    table: str = "sft",
) -> Stage:
    """Return the stage that learns some records."""
    template, longest = ChatTemplate(format=config.format), config.sequence_length + 1
    kept, held = divided(records, asked_of, recipe.run.seed, config.holdout_every)
    samples, dropped = samples_of(kept, template, start.tokenizer, longest)
    batches = PackedSamples(samples, sequence_length=config.sequence_length, seed=recipe.run.seed)
    config = config.lasting(batches.rows_per_epoch)
    learned = sum(int(sample.learned.sum()) for sample in samples)
    watch.say(
        f"{len(records):,} conversations, {len(samples):,} samples in {batches.rows_per_epoch:,} "
        f"rows, {learned:,} tokens to learn; left out: {dropped.empty} empty turns, "
        f"{dropped.too_long} longer than a row"
    )
    heldout, _ = samples_of(held, template, start.tokenizer, longest)
    return Stage(
        table=table,
        config=config,
        tokenizer=start.tokenizer,
        batches=batches,
        aim=NextTokens(config, document_mask=True),
        identity=digest,
        document_mask=True,
        heldout=held_out(heldout, start.tokenizer, config.sequence_length) if heldout else None,
        start=start.folder,
        files={TEMPLATE_FILE: chat_template_of(config.format)},
        about={
            **start.about,
            "records": len(records),
            "records_sha256": digest,
            "samples": len(samples),
            "rows": batches.rows_per_epoch,
            "learned_tokens": learned,
            "padding": batches.padding,
            "dropped": dropped.describe(),
        },
    )


def asked_of(record: Record) -> str:
    """Return what a user asks: answers to the same question are all learned, or none is."""
    return json.dumps([m["content"] for m in record.messages if m["role"] == "user"])
