"""The loop: a batch, a step, a line of metrics, a checkpoint now and then, and the way back."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ziphius.config.errors import BadInput, ZiphiusError
from ziphius.config.recipe import Recipe
from ziphius.data.rows import Batch, row_targets
from ziphius.data.tokenizer import token_bytes
from ziphius.kernels.loss import IGNORED
from ziphius.model.count import training_flops
from ziphius.model.ffn import MixtureOfExperts
from ziphius.parallel.agree import gather_json
from ziphius.parallel.collectives import Lost
from ziphius.parallel.mesh import CONTROL
from ziphius.training.folder import RunFolder, one_line
from ziphius.training.metrics import Events
from ziphius.training.schedule import StepSettings, count_steps, settings_at
from ziphius.training.stage import Stage
from ziphius.training.state import TrainingState
from ziphius.training.step import StepResult, train_step
from ziphius.training.stragglers import Stragglers
from ziphius.training.together import from_all
from ziphius.training.validate import Validation, validate
from ziphius.training.validate_together import validate_together
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


@dataclass
class Loop:
    """One run's training from wherever ``state`` is to the end of its schedule."""

    recipe: Recipe
    state: TrainingState
    stage: Stage
    folder: RunFolder
    watch: Watch
    peak_flops: float

    def __post_init__(self) -> None:
        config = self.stage.config
        self.steps = count_steps(config)
        self.target_bytes = token_bytes(self.stage.tokenizer)
        self.flops = training_flops(self.recipe.model, config.sequence_length)
        self.traffic = self.state.passes.mesh.traffic
        self.stragglers = Stragglers(self.state.passes.mesh.layout.world, self.watch)
        self.every = self.stage.save_every(self.recipe.run.checkpoint_every)
        self.balance_every = max(1, self.steps // _BALANCE_LINES)

    def run(self, seconds: float, stopping: Stopping) -> None:
        """Train to the end of the schedule, or of ``seconds``; the last step is saved.

        Where the clock is ahead of the tokens, the learning rate follows the clock. Raises Stopped
        when the user wants to stop, ZiphiusError when the guard gives up, and BadInput when a file
        cannot be written; the newest checkpoint is whole whatever happens.
        """
        progress, config = self.state.progress, self.stage.config
        total = config.total_tokens
        with stopping() as asked, closing(self._events()) as events, self._saving():
            signal = 0
            while progress.tokens < total:
                failure = self._step(seconds, events)
                signal = max(signal, self._agreed(asked(), failure))
                if self.state.guard.must_go_back:
                    self._go_back()
                ended = progress.seconds >= seconds or progress.tokens >= total
                if not self.state.loader.at_rest:
                    continue
                if ended or signal or progress.step % self.every == 0:
                    self.save()
                if ended or signal:
                    self.finish_saving()
                if ended:
                    return
                if signal:
                    raise Stopped(signal, progress.step)

    def _agreed(self, signal: int, failure: ZiphiusError | None) -> int:
        """Return the signal that has asked any rank to stop, or 0, if none has failed."""
        try:
            return int(max(from_all(self.state.passes.mesh[CONTROL], signal, failure)))
        except Lost:
            raise
        except ZiphiusError:  # all ranks know, and can finish what is being saved
            self.state.saver.wait()
            raise

    @contextmanager
    def _saving(self) -> Iterator[None]:
        """End with every checkpoint written; other ranks are not waited for after a failure."""
        saver = self.state.saver
        try:
            yield
        except Exception:
            if self.state.passes.mesh.layout.world > 1:
                saver.abandon()
            saver.wait()
            raise
        except BaseException:  # Ctrl-C, once more
            saver.abandon()
            raise
        saver.wait()

    def save(self) -> None:
        """Begin to write a checkpoint of this step; the one before is finished first."""
        self.finish_saving()
        with one_line(self.folder.path):
            logs = (("metrics.jsonl", self.folder.metrics), ("balance.jsonl", self.folder.balance))
            sizes = {name: log.size() for name, log in logs}
        target = self.folder.checkpoint_at(self.state.progress.step)
        self.state.begin_to_write(target, self.stage.tokenizer, sizes)

    def finish_saving(self) -> None:
        """Wait for the checkpoint that is being written, and drop the oldest."""
        self.state.saver.wait()
        self.folder.drop_old(self.recipe.run.keep_checkpoints, self.every)

    def _step(self, seconds: float, events: Events | _NoEvents) -> ZiphiusError | None:
        """Make a step; return why it could not be written down, if so."""
        state, progress, config = self.state, self.state.progress, self.stage.config
        state.passes.mesh.begin_step(progress.step + 1)
        began = time.perf_counter()
        # Learning rate and clock meet at the end: a machine that is slower than expected still
        # ends with a small one.
        clock = config.total_tokens * progress.seconds / seconds
        settings = settings_at(
            config, progress.step + 1, progress.tokens, max(progress.tokens, clock)
        )
        state.guard.reading(state.loader.turn)
        batch = state.loader.next_batch(settings.batch_size)
        result = train_step(
            state.passes,
            state.optimizer,
            batch.to(self.recipe.run.device),
            config,
            settings,
            lambda loss, norm: state.guard.judge(progress.step + 1, loss, norm),
            document_mask=self.stage.document_mask,
            aim=self.stage.aim,
        )
        if state.average is not None and result.skipped is None:
            state.average.update(state.passes.models)
        took, waits = self._agree(time.perf_counter() - began)
        tokens = settings.batch_size * config.sequence_length
        progress.step += 1
        progress.tokens += tokens
        progress.seconds += took
        # A stage's batches may have more rows or fewer, and its answers take their own time.
        learned, notes = len(batch) * config.sequence_length, self.stage.notes()
        speed = learned / max(1e-9, took - notes.get("sampling_seconds", 0.0))
        record = self._record(batch, settings, result, speed) | dict(notes)
        record |= waits | self._validation()
        try:
            self._write(record, result, events)
            self.stragglers.step(record, took)
        except BadInput as failure:
            return failure
        return None

    def _agree(self, took: float) -> tuple[float, dict[str, Any]]:
        """Return the seconds of the step, on all ranks the same, and who has waited how long.

        The slowest rank is the one that waits least for the others.
        """
        axis = self.state.passes.mesh[CONTROL]
        if axis.size == 1:
            return took, {}
        own = torch.tensor([[took, self.traffic.waited]], dtype=torch.float64)
        times, waits = axis.all_gather(own).T.tolist()
        slowest = min(range(axis.size), key=waits.__getitem__)
        mean, least = sum(waits) / axis.size, waits[slowest]
        return max(times), {"waited": mean, "waited_least": least, "slowest_rank": slowest}

    def _record(
        self, batch: Batch, settings: StepSettings, result: StepResult, speed: float
    ) -> dict[str, Any]:
        progress = self.state.progress
        per_byte = self._bits_per_nat(batch, result.targets) if self.stage.spells else math.nan
        return {
            "step": progress.step,
            "tokens": progress.tokens,
            "seconds": round(progress.seconds, 3),
            "loss": _finite(result.loss),
            "mtp_loss": _finite(result.mtp_loss),
            "balance_loss": _finite(result.balance_loss),
            "total_loss": _finite(result.total_loss),
            "bpb": _finite(result.loss * per_byte),
            "mtp_bpb": _finite(result.mtp_loss * per_byte),
            "lr": settings.learning_rate,
            "batch_size": settings.batch_size,
            "gamma": settings.bias_update_speed,
            "mtp_weight": settings.mtp_loss_weight,
            "tokens_per_s": speed,
            "mfu": speed * self.flops / self.peak_flops,
            "grad_norm": _finite(result.grad_norm),
            "max_violation": result.max_violation,
            **{name: _finite(value) for name, value in result.extra.items()},
            "skipped": result.skipped,
            "rollbacks": self.state.guard.rollbacks,
        }

    def _bits_per_nat(self, batch: Batch, targets: int) -> float:
        """Return bits a byte of a loss of one nat a target."""
        targets_BT = row_targets(batch, 0, document_mask=self.stage.document_mask).numpy()
        spelt = int(np.take(self.target_bytes, targets_BT[targets_BT != IGNORED]).sum())
        return targets / math.log(2) / max(1, spelt)

    def _validation(self) -> dict[str, float]:
        every = self.recipe.run.validate_every
        if not every or self.state.progress.step % every:
            return {}
        return self.validation()

    def validation(self) -> dict[str, float]:
        """Measure the model, and its average if there is one, on what was held out."""
        average, passes = self.state.average, self.state.passes
        found = dict(self.stage.measure(passes))
        if (measured := self.validate()) is None:
            return found
        found["heldout_bpb"] = measured.bits_per_byte
        if measured.mtp_agreement is not None:
            found["mtp_agreement"] = measured.mtp_agreement
        if average is not None:
            owners, world = self.state.saver.owners, passes.mesh["world"]
            with average.in_place_of(passes.models, owners, world):
                averaged = self.validate()
                assert averaged is not None, "measured a moment ago"
                found["heldout_bpb_ema"] = averaged.bits_per_byte
        return found

    def validate(self) -> Validation | None:
        """Measure the model as it is, wherever its parts lie, if there is held-out text."""
        passes, heldout = self.state.passes, self.stage.heldout
        if heldout is None:
            return None
        if passes.mesh.layout.world == 1:
            return validate(passes.models[0], heldout)
        return validate_together(passes, heldout)

    def _write(
        self, record: dict[str, Any], result: StepResult, events: Events | _NoEvents
    ) -> None:
        due = record["step"] % self.balance_every == 0 or record["step"] == 1
        balance = self._balance(result) if due else None
        with one_line(self.folder.path):
            self.folder.metrics.append(record)
            if balance is not None:
                self.folder.balance.append(balance)
        events.write(record)
        self.watch.step(record, self.steps)

    def _balance(self, result: StepResult) -> dict[str, Any]:
        layers = {}
        passes = self.state.passes
        blocks = [place for model in passes.models for place in model.blocks()]
        for layer, _, block in blocks:
            if isinstance(block.mlp, MixtureOfExperts):
                bias_E = block.mlp.gate.e_score_correction_bias
                layers[str(layer)] = {
                    "loads": result.loads[layer],
                    "bias_min": bias_E.min().item(),
                    "bias_mean": bias_E.mean().item(),
                    "bias_max": bias_E.max().item(),
                }
        progress = self.state.progress
        for others in gather_json(passes.mesh[CONTROL], layers):
            layers |= others
        return {"step": progress.step, "tokens": progress.tokens, "layers": layers}

    def _events(self) -> Events | _NoEvents:
        if not self.recipe.run.tensorboard or self.state.passes.mesh.rank:
            return _NoEvents()
        return Events(self.folder.events, self.state.progress.step + 1)

    def _go_back(self) -> None:
        """Return to the newest usable checkpoint's weights, and go on with the text that follows.

        Raises ZiphiusError when there is none, or when this has happened too often.
        """
        guard, step = self.state.guard, self.state.progress.step
        why = f"the last {guard.in_row} steps up to {step} could not be applied"
        table = self.stage.table
        advice = f"lower {table}.learning_rate or lengthen {table}.warmup_steps"
        if not guard.may_go_back:
            raise ZiphiusError(f"{why} after {guard.rollbacks} returns to a checkpoint: {advice}")
        saved, _ = self.state.newest(self.folder, self.watch, self.every)
        if saved is None:
            raise ZiphiusError(f"{why}, and there is no checkpoint to go back to: {advice}")
        self.state.take_weights(saved)
        self.state.loader.forget()
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
