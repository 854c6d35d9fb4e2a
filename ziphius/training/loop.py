"""The loop: a batch, a step, a line of metrics, a checkpoint now and then, and the way back."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from ziphius.config.errors import ZiphiusError
from ziphius.config.recipe import Recipe
from ziphius.data.rows import Batch
from ziphius.data.tokenizer import token_bytes
from ziphius.model.count import training_flops
from ziphius.model.ffn import MixtureOfExperts
from ziphius.training.folder import RunFolder, one_line
from ziphius.training.metrics import Events
from ziphius.training.schedule import StepSettings, count_steps, settings_at
from ziphius.training.state import TrainingState, newest_usable
from ziphius.training.step import StepResult, train_step
from ziphius.training.text import Text
from ziphius.training.validate import validate
from ziphius.training.watch import Watch

# The heat map of the experts' loads needs no more columns than this.
_BALANCE_LINES = 200

# Entered while the run may be asked to stop; what it gives returns the signal, or 0.
Stopping = Callable[[], AbstractContextManager[Callable[[], int]]]


@contextmanager
def never_stopping() -> Iterator[Callable[[], int]]:
    """Leave signals alone."""
    yield lambda: 0


class Stopped(ZiphiusError):
    """The run was asked to stop, and has saved: ``--resume`` goes on with it."""

    def __init__(self, signal: int, step: int) -> None:
        super().__init__(f"stopped after step {step}, which is saved")
        self.exit_code = 128 + signal

    def saying(self, advice: str) -> Stopped:
        """Add what to do next."""
        self.args = (f"{self}; {advice}",)
        return self


@dataclass
class Loop:
    """One run's training from wherever ``state`` is to the end of its schedule."""

    recipe: Recipe
    state: TrainingState
    text: Text
    folder: RunFolder
    watch: Watch
    peak_flops: float

    def __post_init__(self) -> None:
        config = self.recipe.pretrain
        self.steps = count_steps(config)
        self.target_bytes = token_bytes(self.text.tokenizer)
        self.flops = training_flops(self.recipe.model, config.sequence_length)
        self.balance_every = max(1, self.steps // _BALANCE_LINES)

    def run(self, seconds: float, stopping: Stopping) -> None:
        """Train to the end of the schedule, or of ``seconds``; the last step is saved.

        Where the clock is ahead of the tokens, the learning rate follows the clock. Raises Stopped
        when the user wants to stop, ZiphiusError when the guard gives up, and BadInput when a file
        cannot be written; the newest checkpoint is whole whatever happens.
        """
        progress, config = self.state.progress, self.recipe.pretrain
        total = config.total_tokens
        with stopping() as asked, closing(self._events()) as events:
            while progress.tokens < total:
                self._step(seconds, events)
                if self.state.guard.must_go_back:
                    self._go_back()
                late = progress.seconds >= seconds
                ended, signal = late or progress.tokens >= total, asked()
                if ended or signal or progress.step % self.recipe.run.checkpoint_every == 0:
                    self.save()
                if ended:
                    return
                if signal:
                    raise Stopped(signal, progress.step)

    def save(self) -> None:
        """Write a checkpoint of this step and drop the oldest."""
        with one_line(self.folder.path):
            sizes = {
                log.path.name: log.size() for log in (self.folder.metrics, self.folder.balance)
            }
        target = self.folder.checkpoint_at(self.state.progress.step)
        self.state.write(target, self.text.tokenizer, sizes)
        run = self.recipe.run
        self.folder.drop_old(run.keep_checkpoints, run.checkpoint_every)

    def _step(self, seconds: float, events: Events | _NoEvents) -> None:
        state, progress, config = self.state, self.state.progress, self.recipe.pretrain
        began = time.perf_counter()
        # Learning rate and clock meet at the end: a machine that is slower than expected still
        # ends with a small one.
        clock = config.total_tokens * progress.seconds / seconds
        settings = settings_at(
            config, progress.step + 1, progress.tokens, max(progress.tokens, clock)
        )
        batch = state.loader.next_batch(settings.batch_size)
        result = train_step(
            state.model,
            state.optimizer,
            batch.to(self.recipe.run.device),
            config,
            settings,
            lambda loss, norm: state.guard.judge(progress.step + 1, loss, norm),
            document_mask=self.recipe.data.document_mask,
        )
        if state.average is not None and result.skipped is None:
            state.average.update(state.model)
        took = time.perf_counter() - began
        tokens = settings.batch_size * config.sequence_length
        progress.step += 1
        progress.tokens += tokens
        progress.seconds += took
        record = self._record(batch, settings, result, tokens / took)
        record |= self._validation()
        self._write(record, result, events)

    def _record(
        self, batch: Batch, settings: StepSettings, result: StepResult, speed: float
    ) -> dict[str, Any]:
        progress = self.state.progress
        bits = result.targets / math.log(2)
        bits_per_nat = bits / max(1, self._bytes(batch))
        return {
            "step": progress.step,
            "tokens": progress.tokens,
            "seconds": round(progress.seconds, 3),
            "loss": _finite(result.loss),
            "mtp_loss": _finite(result.mtp_loss),
            "balance_loss": _finite(result.balance_loss),
            "total_loss": _finite(result.total_loss),
            "bpb": _finite(result.loss * bits_per_nat),
            "mtp_bpb": _finite(result.mtp_loss * bits_per_nat),
            "lr": settings.learning_rate,
            "batch_size": settings.batch_size,
            "gamma": settings.bias_update_speed,
            "mtp_weight": settings.mtp_loss_weight,
            "tokens_per_s": speed,
            "mfu": speed * self.flops / self.peak_flops,
            "grad_norm": _finite(result.grad_norm),
            "max_violation": result.max_violation,
            "skipped": result.skipped,
            "rollbacks": self.state.guard.rollbacks,
        }

    def _bytes(self, batch: Batch) -> int:
        return int(np.take(self.target_bytes, batch.tokens_BS[:, 1:].numpy()).sum())

    def _validation(self) -> dict[str, float]:
        every = self.recipe.run.validate_every
        if not every or self.state.progress.step % every:
            return {}
        return self.validation()

    def validation(self) -> dict[str, float]:
        """Measure the model, and its average if there is one, on the held-out text."""
        model, average = self.state.model, self.state.average
        measured = validate(model, self.text.heldout)
        found = {"heldout_bpb": measured.bits_per_byte}
        if measured.mtp_agreement is not None:
            found["mtp_agreement"] = measured.mtp_agreement
        if average is not None:
            with average.in_place_of(model):
                found["heldout_bpb_ema"] = validate(model, self.text.heldout).bits_per_byte
        return found

    def _write(
        self, record: dict[str, Any], result: StepResult, events: Events | _NoEvents
    ) -> None:
        with one_line(self.folder.path):
            self.folder.metrics.append(record)
            if record["step"] % self.balance_every == 0 or record["step"] == 1:
                self.folder.balance.append(self._balance(result))
        events.write(record)
        self.watch.step(record, self.steps)

    def _balance(self, result: StepResult) -> dict[str, Any]:
        layers = {}
        for layer, _, block in self.state.model.blocks():
            if isinstance(block.mlp, MixtureOfExperts):
                bias_E = block.mlp.gate.e_score_correction_bias
                layers[str(layer)] = {
                    "loads": result.loads[layer],
                    "bias_min": bias_E.min().item(),
                    "bias_mean": bias_E.mean().item(),
                    "bias_max": bias_E.max().item(),
                }
        progress = self.state.progress
        return {"step": progress.step, "tokens": progress.tokens, "layers": layers}

    def _events(self) -> Events | _NoEvents:
        if not self.recipe.run.tensorboard:
            return _NoEvents()
        return Events(self.folder.events, self.state.progress.step + 1)

    def _go_back(self) -> None:
        """Return to the newest usable checkpoint's weights, and go on with the text that follows.

        Raises ZiphiusError when there is none, or when this has happened too often.
        """
        guard, step = self.state.guard, self.state.progress.step
        why = f"the last {guard.in_row} steps up to {step} could not be applied"
        advice = "lower pretrain.learning_rate or lengthen pretrain.warmup_steps"
        if not guard.may_go_back:
            raise ZiphiusError(f"{why} after {guard.rollbacks} returns to a checkpoint: {advice}")
        saved, _ = newest_usable(self.folder, self.watch, self.recipe.run.checkpoint_every)
        if saved is None:
            raise ZiphiusError(f"{why}, and there is no checkpoint to go back to: {advice}")
        self.state.take_weights(saved)
        guard.went_back()
        self.watch.say(f"{why}: going back to {saved.folder.name}, on with newer text")


class _NoEvents:
    """Takes the place of TensorBoard."""

    def write(self, record: Mapping[str, Any]) -> None:
        """Write nothing."""

    def close(self) -> None:
        """Close nothing."""


def _finite(value: float) -> float | None:
    """JSON has no word for what is not finite."""
    return value if math.isfinite(value) else None
