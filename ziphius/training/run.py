"""A pre-training run: text in, a checkpoint out, a line of metrics for every step between."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from tokenizers import Tokenizer

from ziphius.checkpoint.files import replace_directory
from ziphius.checkpoint.huggingface import write_model
from ziphius.checkpoint.state import write_state
from ziphius.config.errors import BadInput
from ziphius.config.recipe import Recipe
from ziphius.data.corpus import Corpus, read_corpus
from ziphius.data.loader import HeldoutRows, Loader, heldout_rows
from ziphius.data.tokenizer import load_tokenizer, save_tokenizer, token_bytes, train_tokenizer
from ziphius.model.init import initialise
from ziphius.model.precision import DTYPES, Precision
from ziphius.model.transformer import Transformer
from ziphius.parallel.recompute import apply_recompute
from ziphius.training.folder import RunFolder
from ziphius.training.machine import peak_memory_gib, usable_threads
from ziphius.training.optimizer import AdamW
from ziphius.training.schedule import bias_update_speed, learning_rate
from ziphius.training.step import train_step
from ziphius.training.validate import bits_per_byte

STAGE = "pretrain"


class Watch(Protocol):
    """Whoever follows a run: it is told, and decides nothing."""

    def say(self, text: str) -> None:
        """Tell about a phase that begins, in one line."""
        ...

    def step(self, record: dict[str, Any], steps: int) -> None:
        """Tell about a finished step, of ``steps``: its line of metrics."""
        ...


@dataclass(frozen=True)
class Text:
    """The run's text in every form it is needed in."""

    corpus: Corpus
    tokenizer: Tokenizer
    loader: Loader
    heldout: HeldoutRows


@dataclass(frozen=True)
class Trained:
    """What a run leaves in memory for whoever goes on with it."""

    model: Transformer
    text: Text
    summary: dict[str, Any]


def resolve(recipe: Recipe) -> Recipe:
    """Write down what a recipe leaves to the machine: the number of threads.

    Raises BadInput for a precision or a device that cannot be had.
    """
    recipe.precision.require_available()
    try:
        torch.empty(0, device=recipe.run.device)
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        first_line = str(error).splitlines()[0]
        raise BadInput(f"run.device = '{recipe.run.device}': {first_line}") from None
    threads = recipe.run.threads or usable_threads()
    return recipe.model_copy(update={"run": recipe.run.model_copy(update={"threads": threads})})


def prepare_text(recipe: Recipe, watch: Watch) -> Text:
    """Read the corpus, train or load the tokenizer, and encode everything."""
    corpus = read_corpus(recipe.data)
    watch.say(
        f"{corpus.description}: {len(corpus.train) + len(corpus.heldout)} files, "
        f"{(corpus.train_bytes + corpus.heldout_bytes) / 1e6:.1f} MB, "
        f"sha256 {corpus.sha256[:12]}, {corpus.skipped} not UTF-8 and skipped"
    )
    if recipe.tokenizer.path is not None:
        tokenizer = load_tokenizer(Path(recipe.tokenizer.path))
    else:
        watch.say(f"training a byte-level BPE tokenizer of {recipe.tokenizer.vocab_size} tokens")
        texts = (document.text for document in corpus.train)
        tokenizer = train_tokenizer(texts, recipe.tokenizer.vocab_size)
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values())
    if largest >= recipe.model.vocab_size:
        raise BadInput(
            f"the tokenizer has token ids up to {largest}, model.vocab_size is "
            f"{recipe.model.vocab_size}: set model.vocab_size to more than that"
        )
    watch.say("encoding the text")
    length = recipe.pretrain.sequence_length
    loader = Loader(
        corpus.train,
        tokenizer,
        sequence_length=length,
        batch_size=recipe.pretrain.batch_size,
        seed=recipe.run.seed,
    )
    heldout = heldout_rows(corpus.heldout, tokenizer, length, recipe.run.validate_bytes)
    return Text(corpus, tokenizer, loader, heldout)


def build_model(recipe: Recipe) -> Transformer:
    """Lay out and initialise the recipe's network with master weights for training."""
    precision = Precision.for_training(DTYPES[recipe.precision.compute])
    model = Transformer(recipe.model, precision, device=recipe.run.device)
    initialise(model, recipe.run.seed)
    apply_recompute(model, recipe.parallel.recompute)
    return model


def pretrain(
    recipe: Recipe,
    folder: RunFolder,
    watch: Watch,
    *,
    text: Text | None = None,
    seconds: float | None = None,
) -> Trained:
    """Run the recipe's pre-training into a run folder; return the model and every figure.

    ``recipe`` is resolved. ``text`` is what ``prepare_text`` made of the same recipe, if the caller
    has it already. ``seconds`` bounds the training: where the clock is ahead of the steps, the
    schedule follows the clock, and ends with it. The folder's recipe then gets the steps that were
    made. Nothing is written before the text is known to be usable.
    """
    torch.set_num_threads(recipe.run.threads)
    folder.require_room()
    text = text or prepare_text(recipe, watch)
    folder.create(recipe)
    model = build_model(recipe)
    optimizer = AdamW(model.parameters(), recipe.pretrain)
    watch.say(f"bits per byte of the untrained model; kernels: {model.kernels}")
    before = _validate(model, text.heldout)
    watch.say(f"training {recipe.pretrain.steps} steps")
    figures = _train(recipe, model, optimizer, text, folder, watch, seconds or math.inf)
    watch.say("bits per byte of the trained model")
    after = _validate(model, text.heldout)
    _write_checkpoint(recipe, model, optimizer, text, folder)
    summary = {
        **_describe(recipe, text),
        **figures,
        "heldout_bpb_before": before,
        "heldout_bpb_after": after,
        "peak_memory_gib": peak_memory_gib(),
        "torch": torch.__version__,
        "kernels": str(model.kernels),
    }
    folder.write_summary(summary)
    return Trained(model.eval(), text, summary)


def _train(
    recipe: Recipe,
    model: Transformer,
    optimizer: AdamW,
    text: Text,
    folder: RunFolder,
    watch: Watch,
    seconds: float,
) -> dict[str, Any]:
    config, piece_bytes = recipe.pretrain, token_bytes(text.tokenizer)
    batch_tokens = config.batch_size * config.sequence_length
    began = time.perf_counter()
    record: dict[str, Any] = {}
    for step in range(1, config.steps + 1):
        step_began = time.perf_counter()
        clock = config.steps * (step_began - began) / seconds
        rate = learning_rate(config, max(step, clock))
        tokens_BS = text.loader.next_batch()
        speed = bias_update_speed(config, step)
        batch = tokens_BS.to(recipe.run.device)
        result = train_step(model, optimizer, batch, config, rate, speed)
        target_bytes = int(np.take(piece_bytes, tokens_BS[:, 1:].numpy()).sum())
        record = {
            "step": step,
            "tokens": step * batch_tokens,
            "loss": result.loss,
            "mtp_loss": result.mtp_loss,
            "balance_loss": result.balance_loss,
            "total_loss": result.total_loss,
            "bpb": result.loss * batch_tokens / math.log(2) / max(1, target_bytes),
            "lr": rate,
            "tokens_per_s": batch_tokens / (time.perf_counter() - step_began),
            "grad_norm": result.grad_norm,
            "max_violation": result.max_violation,
        }
        folder.append_metrics(record)
        watch.step(record, config.steps)
        if time.perf_counter() - began >= seconds:
            made = recipe.pretrain.model_copy(update={"steps": step})
            folder.write_recipe(recipe.model_copy(update={"pretrain": made}))
            break
    took = time.perf_counter() - began
    return {
        "steps": record["step"],
        "tokens": record["tokens"],
        "train_seconds": took,
        "tokens_per_s": record["tokens"] / took,
        "final_loss": record["loss"],
        "final_mtp_loss": record["mtp_loss"],
        "final_max_violation": record["max_violation"],
    }


def _validate(model: Transformer, rows: HeldoutRows) -> float:
    device = model.lm_head.weight.device
    return bits_per_byte(model, rows.tokens_MT.to(device), rows.targets_MT.to(device), rows.bytes)


def _write_checkpoint(
    recipe: Recipe, model: Transformer, optimizer: AdamW, text: Text, folder: RunFolder
) -> None:
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    state = optimizer.state()
    moments = {
        f"{moment}.{name}": tensor
        for moment in ("first", "second")
        for name, tensor in zip(names, state[moment], strict=True)
    }
    with replace_directory(folder.stage(STAGE)) as checkpoint:
        write_model(model, checkpoint, model.precision.storage)
        save_tokenizer(text.tokenizer, checkpoint)
        numbers = {"optimizer_steps": state["steps"], "loader": text.loader.state()}
        write_state(checkpoint, moments, numbers)
    folder.publish(STAGE)


def _describe(recipe: Recipe, text: Text) -> dict[str, Any]:
    corpus = text.corpus
    return {
        "corpus": corpus.description,
        "corpus_files": len(corpus.train) + len(corpus.heldout),
        "corpus_bytes": corpus.train_bytes + corpus.heldout_bytes,
        "corpus_sha256": corpus.sha256,
        "corpus_skipped": corpus.skipped,
        "heldout_packages": list(corpus.heldout_packages),
        "heldout_bytes": text.heldout.bytes,
        "vocab_size": text.tokenizer.get_vocab_size(),
        "compute": recipe.precision.compute,
        "seed": recipe.run.seed,
        "threads": recipe.run.threads,
    }
