"""All that a run must keep to go on as if it had never stopped, written and read as a whole.

A checkpoint is a Hugging Face directory with ``state/`` in it: moments and averaged weights by
their Hugging Face names, whatever the layout of the run that wrote them, and the numbers of the
loader, the guard and the clock. ``saving.py`` writes and reads it, over any number of ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from ziphius.checkpoint.files import MANIFEST, check_manifest, manifest_sizes
from ziphius.checkpoint.state import read_numbers
from ziphius.config.errors import BadInput
from ziphius.parallel.agree import gather_json, share_json
from ziphius.parallel.collectives import Axis, alone
from ziphius.parallel.passes import Passes
from ziphius.training.ema import WeightAverage
from ziphius.training.folder import RunFolder
from ziphius.training.guard import Guard
from ziphius.training.optimizer import Optimizer
from ziphius.training.saving import Saver
from ziphius.training.stage import Batches
from ziphius.training.watch import Watch

# A newer layout of state/ gets a new number, so that it is refused rather than misread.
_FORMAT = 2
# Format 1 had all tensors in one file, whole.
_READ_FORMATS = (1, 2)


@dataclass
class Progress:
    """How far a run is. ``seconds`` are those of training, over all attempts.

    ``before`` is what the stage measured of held-out data before its first step.
    """

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    resumed: int = 0
    heldout_bpb_before: float | None = None
    before: dict[str, float] | None = None


@dataclass
class TrainingState:
    """Everything that changes during a run, or this rank's part of it.

    ``passes`` hold the weights, which ``saver`` writes and reads.
    """

    passes: Passes
    optimizer: Optimizer
    average: WeightAverage | None
    loader: Batches
    guard: Guard
    progress: Progress
    saver: Saver
    identity: str = ""  # of the data that is trained on

    def write(self, target: Path, tokenizer: Tokenizer, log_sizes: dict[str, int]) -> None:
        """Write a checkpoint, whole or not at all. Raises BadInput when the disk refuses."""
        self.begin_to_write(target, tokenizer, log_sizes)
        self.saver.wait()

    def begin_to_write(self, target: Path, tokenizer: Tokenizer, log_sizes: dict[str, int]) -> None:
        """Copy everything, and let a thread write it: see ``Saver.save``."""
        numbers: dict[str, Any] = {
            "format": _FORMAT,
            "progress": vars(self.progress),
            "optimizer_steps": self.optimizer.steps,
            "loader": self.loader.state(),
            "guard": self.guard.state(),
            "identity": self.identity,
            "log_sizes": log_sizes,
        }
        if self.average is not None:
            numbers["average_updates"] = self.average.updates
        self.saver.wait()
        self.saver.axis.traffic.step = self.progress.step
        self.saver.save(target, self.optimizer, self.average, numbers, tokenizer)

    def newest(
        self, folder: RunFolder, watch: Watch, every: int = 1
    ) -> tuple[Saved | None, dict[Path, str]]:
        """Do what ``newest_usable`` does, on all ranks, when no save is under way any more."""
        self.saver.wait()
        return newest_usable(folder, watch, every, self.saver.axis)

    def take(self, saved: Saved) -> None:
        """Continue from a checkpoint as if the run had never stopped.

        Raises BadInput, before anything changes, for the checkpoint of another text.
        """
        self.loader.load_state(saved.numbers["loader"])
        if saved.numbers.get("identity", self.identity) != self.identity:
            raise BadInput(
                f"{saved.folder}: was written by a run of other data or another teacher: resume "
                "with those that it began with"
            )
        self.take_weights(saved)
        self.guard.load_state(saved.numbers["guard"])
        self.progress = Progress(**saved.numbers["progress"])

    def take_weights(self, saved: Saved) -> None:
        """Go back to a checkpoint's weights, averages and place in the schedule.

        Loader, guard and clock stay where they are: the run goes on with newer text.
        """
        self.saver.load(saved.folder, self.optimizer, self.average, saved.numbers)
        self.progress.step = saved.numbers["progress"]["step"]
        self.progress.tokens = saved.numbers["progress"]["tokens"]


@dataclass(frozen=True)
class Saved:
    """A checkpoint that has been found whole."""

    folder: Path
    numbers: dict[str, Any]


def open_checkpoint(folder: Path, axis: Axis | None = None) -> Saved:
    """Compare every file of a checkpoint with its checksum and read its numbers.

    The ranks of an axis do this together, each with some of the files. Raises BadInput, on all of
    them, that names what is damaged or missing.
    """
    axis = axis or alone()
    problem, numbers = None, dict[str, Any]()
    try:
        _check_share(folder, axis)
        if axis.place == 0:
            numbers = read_numbers(folder)
            _require_format(folder, numbers)
    except BadInput as error:
        problem = str(error)
    problems = [told for told in gather_json(axis, problem) if told]
    if problems:
        raise BadInput("; ".join(dict.fromkeys(problems)))
    return Saved(folder, share_json(axis, numbers))


def _check_share(folder: Path, axis: Axis) -> None:
    """Check the files whose turn it is on this rank: all have about as many bytes to read."""
    if not (folder / MANIFEST).is_file():
        raise BadInput(f"{folder}: {MANIFEST} is missing")
    sizes = manifest_sizes(folder)
    loads, own = [0] * axis.size, []
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        place = loads.index(min(loads))
        loads[place] += sizes[name]
        if place == axis.place:
            own.append(name)
    check_manifest(folder, only=own)


def _require_format(folder: Path, numbers: dict[str, Any]) -> None:
    found = numbers.get("format")
    if found not in _READ_FORMATS:
        raise BadInput(
            f"{folder}: its state has format {found}, this version reads "
            f"{' and '.join(map(str, _READ_FORMATS))}: resume with the version that wrote it"
        )


def newest_usable(
    folder: RunFolder, watch: Watch, every: int = 1, axis: Axis | None = None
) -> tuple[Saved | None, dict[Path, str]]:
    """Return the newest whole checkpoint of a run, and what is wrong with each that is newer.

    With ``every`` only multiples of so many steps count. A run goes back to one of these: others
    were saved because somebody stopped it, and a run that nobody stopped has none. The ranks of an
    axis do this together, and agree; a save must not be under way.
    """
    axis = axis or alone()
    damaged: dict[Path, str] = {}
    seen = [str(path) for path in folder.checkpoints(every)] if axis.place == 0 else None
    for checkpoint in map(Path, share_json(axis, seen)):
        try:
            return open_checkpoint(checkpoint, axis), damaged
        except BadInput as error:
            damaged[checkpoint] = str(error)
            if axis.place == 0:
                watch.say(f"damaged, so the checkpoint before it is used: {error}")
    return None, damaged
