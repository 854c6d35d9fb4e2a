"""All that a run must keep to go on as if it had never stopped, written and read as a whole.

A checkpoint is a Hugging Face directory with ``state/`` in it: moments and averaged weights by
their Hugging Face names, whatever the layout of the run that wrote them, and the numbers of the
loader, the guard and the clock.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from ziphius.checkpoint.files import MANIFEST, check_manifest, replace_directory
from ziphius.checkpoint.huggingface import read_weights, write_model
from ziphius.checkpoint.state import read_state, write_state
from ziphius.config.errors import BadInput
from ziphius.data.loader import Loader
from ziphius.data.tokenizer import save_tokenizer
from ziphius.model.transformer import Transformer
from ziphius.model.weights import named_weights
from ziphius.training.ema import WeightAverage
from ziphius.training.folder import RunFolder
from ziphius.training.guard import Guard
from ziphius.training.optimizer import AdamW
from ziphius.training.watch import Watch

# A newer layout of state/ gets a new number, so that it is refused rather than misread.
_FORMAT = 1


@dataclass
class Progress:
    """How far a run is. ``seconds`` are those of training, over all attempts."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    resumed: int = 0
    heldout_bpb_before: float | None = None


@dataclass
class TrainingState:
    """Everything that changes during a run."""

    model: Transformer
    optimizer: AdamW
    average: WeightAverage | None
    loader: Loader
    guard: Guard
    progress: Progress

    def write(self, target: Path, tokenizer: Tokenizer, log_sizes: dict[str, int]) -> None:
        """Write a checkpoint, whole or not at all. Raises BadInput when the disk refuses."""
        tensors = dict(_named_moments(self.model, self.optimizer))
        numbers: dict[str, Any] = {
            "format": _FORMAT,
            "progress": vars(self.progress),
            "optimizer_steps": self.optimizer.steps,
            "loader": self.loader.state(),
            "guard": self.guard.state(),
            "log_sizes": log_sizes,
        }
        if self.average is not None:
            self.average.wait()
            tensors |= {f"average.{name}": t for name, t in self.average.average.items()}
            numbers["average_updates"] = self.average.updates
        with replace_directory(target, keep_unknown=False) as folder:
            write_model(self.model, folder, self.model.precision.storage)
            save_tokenizer(tokenizer, folder)
            write_state(folder, tensors, numbers)

    def take(self, saved: Saved) -> None:
        """Continue from a checkpoint as if the run had never stopped.

        Raises BadInput, before anything changes, for the checkpoint of another text.
        """
        self.loader.load_state(saved.numbers["loader"])
        self.take_weights(saved)
        self.guard.load_state(saved.numbers["guard"])
        self.progress = Progress(**saved.numbers["progress"])

    def take_weights(self, saved: Saved) -> None:
        """Go back to a checkpoint's weights, averages and place in the schedule.

        Loader, guard and clock stay where they are: the run goes on with newer text.
        """
        read_weights(self.model, saved.folder)
        with torch.no_grad():
            for name, moment in _named_moments(self.model, self.optimizer):
                moment.copy_(saved.tensor(name))
        self.optimizer.steps = saved.numbers["optimizer_steps"]
        if self.average is not None:
            average = {name: saved.tensor(f"average.{name}") for name in self.average.average}
            self.average.load(average, saved.numbers["average_updates"])
        self.progress.step = saved.numbers["progress"]["step"]
        self.progress.tokens = saved.numbers["progress"]["tokens"]


@dataclass(frozen=True)
class Saved:
    """A checkpoint that has been found whole."""

    folder: Path
    tensors: dict[str, Tensor]
    numbers: dict[str, Any]

    def tensor(self, name: str) -> Tensor:
        """Return one tensor of its state. Raises BadInput when there is none of that name."""
        if name not in self.tensors:
            raise BadInput(
                f"{self.folder}: no {name} in its state: it was written by another recipe"
            )
        return self.tensors[name]


def open_checkpoint(folder: Path) -> Saved:
    """Compare every file of a checkpoint with its checksum and read its state.

    Raises BadInput that names what is damaged or missing.
    """
    if not (folder / MANIFEST).is_file():
        raise BadInput(f"{folder}: {MANIFEST} is missing")
    check_manifest(folder)
    tensors, numbers = read_state(folder)
    if numbers.get("format") != _FORMAT:
        raise BadInput(
            f"{folder}: its state has format {numbers.get('format')}, this version reads "
            f"{_FORMAT}: resume with the version that wrote it"
        )
    return Saved(folder, tensors, numbers)


def newest_usable(
    folder: RunFolder, watch: Watch, every: int = 1
) -> tuple[Saved | None, dict[Path, str]]:
    """Return the newest whole checkpoint of a run, and what is wrong with each that is newer.

    With ``every`` only multiples of so many steps count. A run goes back to one of these: others
    were saved because somebody stopped it, and a run that nobody stopped has none.
    """
    damaged: dict[Path, str] = {}
    for checkpoint in folder.checkpoints(every):
        try:
            return open_checkpoint(checkpoint), damaged
        except BadInput as error:
            damaged[checkpoint] = str(error)
            watch.say(f"damaged, so the checkpoint before it is used: {error}")
    return None, damaged


def _named_moments(model: Transformer, optimizer: AdamW) -> Iterator[tuple[str, Tensor]]:
    """Yield (``first.`` or ``second.`` and the Hugging Face name, view of the moment)."""
    weights = dict(named_weights(model))
    for kind, moments in (("first", optimizer.first), ("second", optimizer.second)):
        for name, moment in _views(weights, optimizer.parameters, moments):
            yield f"{kind}.{name}", moment


def _views(
    weights: dict[str, Tensor], parameters: Sequence[Tensor], moments: Sequence[Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Cut every weight's part out of the moment of the parameter that the weight is a view of."""
    owners = {
        parameter.untyped_storage().data_ptr(): moment
        for parameter, moment in zip(parameters, moments, strict=True)
    }
    for name, weight in weights.items():
        moment = owners.get(weight.untyped_storage().data_ptr())
        if moment is not None:  # a routing bias has none
            yield name, moment.as_strided(weight.shape, weight.stride(), weight.storage_offset())
