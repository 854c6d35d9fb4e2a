"""Checkpoints of a run on any number of ranks, written while it goes on.

``Saver.save`` copies what this rank answers for and returns; a thread writes it. A checkpoint is a
Hugging Face directory of whole tensors, and ``state/`` beside them: moments and averaged weights
as the rectangles that ranks hold, so that a run may go on in any other layout. It is there when
all ranks have written their files, or not at all.
"""

from __future__ import annotations

import errno
import json
import os
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from torch import Tensor

from ziphius.checkpoint.files import flush, replace_directory, sha256_of
from ziphius.checkpoint.huggingface import stored_as, write_settings
from ziphius.checkpoint.shards import MAX_SHARD_BYTES, weight_files, write_index
from ziphius.checkpoint.state import STATE_FOLDER, write_numbers
from ziphius.config.errors import BadInput, ZiphiusError, in_one_line
from ziphius.data.tokenizer import save_tokenizer
from ziphius.model.transformer import Transformer
from ziphius.parallel.agree import gather_json, share_json
from ziphius.parallel.collectives import Lost
from ziphius.parallel.export import Attempt, Export, Sums, require_wanted
from ziphius.parallel.layout import Layout
from ziphius.parallel.mesh import SAVING, Mesh, make_mesh
from ziphius.parallel.owners import Owners, owned
from ziphius.parallel.rectangles import Rectangle, SplitOf, place_of, unsplit
from ziphius.parallel.spread import held_weights
from ziphius.parallel.storage import (
    FILE_BYTES,
    INDEX,
    read_index,
    read_rectangles,
    write_rectangles,
)
from ziphius.training.ema import WeightAverage
from ziphius.training.optimizer import Optimizer

# What ``replace_directory`` turns into advice.
_OF_THE_DISK = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO),
    *(errno.EACCES, errno.EPERM, errno.EROFS),
)
# A process that ends waits so long for its thread to clear up.
_STOP_SECONDS = 10.0


@dataclass
class _Copies:
    """What one rank is to write, in memory that training does not touch."""

    target: Path
    weights: dict[str, Tensor]
    state: list[Rectangle]
    numbers: Mapping[str, Any]
    tokenizer: Tokenizer
    given_up: threading.Event


class Saver:
    """Writes checkpoints of ``parts``, what this rank holds of the model; one at a time.

    All ranks make one together, and call ``save``, ``wait`` and ``load`` together. ``split_of``
    says which weights this rank holds a piece of. ``deadline`` is what a save may take, in seconds.
    """

    def __init__(
        self,
        parts: Sequence[Transformer],
        mesh: Mesh | None = None,
        split_of: SplitOf = unsplit,
        *,
        deadline: float = 7200,
        max_shard_bytes: int = MAX_SHARD_BYTES,
        file_bytes: int = FILE_BYTES,
    ) -> None:
        self.parts, self.deadline, self.file_bytes = parts, deadline, file_bytes
        self.axis = (mesh or make_mesh(Layout()))[SAVING]
        self.owners = Owners.agree(self.weights(), self.axis, split_of)
        self.split_of = split_of
        self.config, self.dtype = parts[0].config, parts[0].precision.storage
        self.export = Export(self.owners, self.config, self.dtype, max_shard_bytes)
        # What is kept besides, by kind and Hugging Face name.
        self.kept: Mapping[str, Mapping[str, Tensor]] = {}
        self._thread: _Thread | None = None

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every weight of this rank's parts by its Hugging Face name.

        What several parts share in memory comes once.
        """
        seen: set[tuple[str, int]] = set()
        for part in self.parts:
            for name, weight in held_weights(part):
                if (name, weight.data_ptr()) not in seen:
                    seen.add((name, weight.data_ptr()))
                    yield name, weight

    def held_state(self, optimizer: Optimizer, average: WeightAverage | None) -> list[Rectangle]:
        """Return this rank's moments and averages, where they lie in memory."""
        found = list(optimizer.held_moments(list(self.weights()), self.split_of))
        for name, tensor in (average.average if average is not None else {}).items():
            place = place_of(tensor.shape, self.split_of(name))
            found.append(Rectangle(f"average.{name}", *place, tensor))
        return found + [piece for _, piece in self._kept()]

    def _kept(self) -> Iterator[tuple[str, Rectangle]]:
        """Yield what is kept besides: the weight's name, and the piece, which others may have."""
        for kind, tensors in self.kept.items():
            for name, tensor in tensors.items():
                place = place_of(tensor.shape, self.split_of(name))
                yield name, Rectangle(f"{kind}.{name}", *place, tensor)

    def save(
        self,
        target: Path,
        optimizer: Optimizer,
        average: WeightAverage | None,
        numbers: Mapping[str, Any],
        tokenizer: Tokenizer,
        *,
        at_once: bool = False,
    ) -> None:
        """Copy everything, and begin to write the checkpoint ``target`` with it.

        ``numbers`` and ``tokenizer`` are those of the first rank. Waits for the save before, and
        raises what that one ended with: see ``wait``. With ``at_once`` nothing is copied: the
        checkpoint is there when this returns.
        """
        self.wait()
        if average is not None:
            average.wait()
        copy = not at_once
        weights = {
            name: tensor.to("cpu", stored_as(name, self.dtype), copy=copy).contiguous()
            for name, tensor in owned(self.owners, self.weights())
        }
        held = self.held_state(optimizer, average)
        others = {piece.name for name, piece in self._kept() if not self.owners.owns(name)}
        if not optimizer.answers:
            kinds = ("average.", *(f"{kind}." for kind in self.kept))
            held = [piece for piece in held if piece.name.startswith(kinds)]
        held = [piece for piece in held if piece.name not in others]
        state = [piece._replace(data=piece.data.to("cpu", copy=copy)) for piece in held]
        # Numbers go on changing too.
        kept = json.loads(json.dumps(numbers))
        copies = _Copies(target, weights, state, kept, tokenizer, threading.Event())
        if at_once:
            self._write(copies)
        else:
            self._thread = _Thread(self, copies)

    def wait(self) -> None:
        """Return when the last checkpoint is there. Raises, on all ranks, what it failed with.

        BadInput where a disk refuses, and Lost where a rank is gone; nothing is left of it then.
        """
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.wait(self.deadline)

    def abandon(self) -> None:
        """Give up a save that is under way: its thread stops after the piece it writes."""
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.stop()

    def load(
        self,
        folder: Path,
        optimizer: Optimizer,
        average: WeightAverage | None,
        numbers: Mapping[str, Any],
    ) -> None:
        """Continue with a checkpoint's weights, moments and averages, whatever layout wrote it.

        Every rank reads the pieces that it holds, into where they belong. Waits for a save that is
        under way. Raises BadInput, on all ranks, where something is missing.
        """
        self.wait()
        self._together(lambda: self._read(folder, optimizer, average))
        optimizer.steps = numbers["optimizer_steps"]
        if average is not None:
            average.updates = numbers["average_updates"]

    def load_weights(self, folder: Path, fresh: Collection[str] = ()) -> None:
        """Take a checkpoint's weights alone, and nothing of the run that wrote it.

        Those that are ``fresh`` stay as they are. Raises BadInput, on all ranks, for a checkpoint
        of another network.
        """
        self._together(lambda: self._read_weights(folder, fresh))

    def _together(self, read: Callable[[], None]) -> None:
        """Read something on every rank. Raises BadInput on all of them where one could not."""
        problem = None
        try:
            read()
        except BadInput as error:
            problem = str(error)
        for told in gather_json(self.axis, problem):
            if told:
                raise BadInput(told)

    def _read_weights(self, folder: Path, fresh: Collection[str] = ()) -> None:
        held = ((name, weight) for name, weight in self.weights() if name not in fresh)
        places = ((n, place_of(weight.shape, self.split_of(n)), weight) for n, weight in held)
        weights = [Rectangle(name, *place, weight) for name, place, weight in places]
        read_rectangles(folder, weights, weight_files(folder))

    def _read(self, folder: Path, optimizer: Optimizer, average: WeightAverage | None) -> None:
        self._read_weights(folder)
        if average is not None:
            average.wait()
        state = folder / STATE_FOLDER
        index = read_index(state / INDEX) if (state / INDEX).is_file() else None
        read_rectangles(state, self.held_state(optimizer, average), index)

    def _write(self, copies: _Copies) -> None:
        if self.axis.place:
            self._follow(copies)
        else:
            self._lead(copies)

    def _follow(self, copies: _Copies) -> None:
        begun = share_json(self.axis, None)
        if not begun["failed"]:
            report = self._files(copies, Path(begun["folder"]))
            gather_json(self.axis, report)
            begun = share_json(self.axis, None)
        if begun["failed"]:
            kind = BadInput if begun["bad_input"] else ZiphiusError
            raise kind(begun["failed"])

    def _lead(self, copies: _Copies) -> None:
        sums: Sums = {}
        try:
            with replace_directory(
                copies.target,
                keep_unknown=False,
                checksums=sums,
                before_each=partial(require_wanted, copies.given_up),
            ) as folder:
                (folder / STATE_FOLDER).mkdir()
                share_json(self.axis, {"failed": "", "folder": str(folder)})
                reports = gather_json(self.axis, self._files(copies, folder))
                _require_all(copies.target, folder, reports)
                self._finish(copies, folder, reports)
                for report in reports:
                    sums |= report["sums"]
        except Lost:
            raise
        except Exception as error:
            told = error if isinstance(error, ZiphiusError) else _as_one_line(copies, error)
            bad_input = isinstance(told, BadInput)
            share_json(self.axis, {"failed": str(told), "bad_input": bad_input})
            raise told from error
        share_json(self.axis, {"failed": ""})

    def _files(self, copies: _Copies, folder: Path) -> dict[str, Any]:
        """Write this rank's files, and say what became of it."""
        attempt = Attempt(copies.given_up)
        sums = self.export.write(folder, copies.weights, self.axis, attempt)
        report: dict[str, Any] = {"sums": sums, "index": {}, "numbers": {}, "failed": None}
        attempt(partial(self._state, copies, folder / STATE_FOLDER, report))
        if attempt.error is not None:
            report["failed"] = _described(attempt.error)
        return report

    def _state(self, copies: _Copies, folder: Path, report: dict[str, Any]) -> None:
        written = write_rectangles(folder, copies.state, self.axis.place, self.file_bytes)
        for piece in copies.state:
            counted = report["numbers"].setdefault(piece.name, [0, prod(piece.whole)])
            counted[0] += piece.data.numel()
        copies.state.clear()
        for file, names in written.items():
            flush(folder / file)
            report["sums"][f"{STATE_FOLDER}/{file}"] = sha256_of(folder / file)
            for name in names:
                report["index"].setdefault(name, []).append(file)

    def _finish(self, copies: _Copies, folder: Path, reports: list[dict[str, Any]]) -> None:
        """Write what there is once: indices, settings, tokenizer, numbers."""
        require_wanted(copies.given_up)
        write_settings(folder, self.config, self.dtype)
        write_index(folder, self.export.placed, self.export.total_bytes)
        save_tokenizer(copies.tokenizer, folder)
        index: dict[str, set[str]] = {}
        for report in reports:
            for name, files in report["index"].items():
                index.setdefault(name, set()).update(files)
        listed = {name: sorted(files) for name, files in sorted(index.items())}
        (folder / STATE_FOLDER / INDEX).write_text(json.dumps(listed, indent=1) + "\n", "utf-8")
        write_numbers(folder, copies.numbers)


class _Thread:
    """One save under way, and what came of it.

    The process may end without it: what it has written then is nobody's, and is cleared away.
    """

    def __init__(self, saver: Saver, copies: _Copies) -> None:
        self._error: BaseException | None = None
        self._target, self._given_up = copies.target, copies.given_up
        # Not a join: one that Ctrl-C interrupts takes the thread for ended (CPython 3.11).
        self._ended = threading.Event()
        arguments = (saver, [copies])
        threading.Thread(target=self._run, args=arguments, name="checkpoint", daemon=True).start()

    def wait(self, deadline: float) -> None:
        try:
            ended = self._ended.wait(deadline)
        except BaseException:  # Ctrl-C
            self.stop()
            raise
        if not ended:
            raise ZiphiusError(
                f"{self._target}: not saved within {deadline:.0f} seconds: is the disk too slow?"
            )
        if self._error is not None:
            raise self._error

    def stop(self) -> None:
        self._given_up.set()
        self._ended.wait(_STOP_SECONDS)

    def _run(self, saver: Saver, copies: list[_Copies]) -> None:
        try:
            saver._write(copies.pop())
        except BaseException as error:
            self._error = error
        finally:
            self._ended.set()


def _described(error: Exception) -> dict[str, Any]:
    """Return an error as other ranks are told of it."""
    number = error.errno if isinstance(error, OSError) else None
    text = str(error) if isinstance(error, ZiphiusError) else in_one_line(error)
    return {
        "errno": number,
        "text": error.strerror if isinstance(error, OSError) and error.strerror else text,
        "file": str(error.filename or "") if isinstance(error, OSError) else "",
        "kind": type(error).__name__,
    }


def _require_all(target: Path, folder: Path, reports: list[dict[str, Any]]) -> None:
    """Raise what the first rank that failed has told, or ZiphiusError if something is missing."""
    for place, report in enumerate(reports):
        failed = report["failed"]
        if failed is None:
            continue
        if failed["errno"] in _OF_THE_DISK:
            text = f"{failed['text']} on rank {place}"
            raise OSError(failed["errno"], text, failed["file"] or str(folder))
        if failed["errno"] == errno.ENOENT:
            raise BadInput(
                f"{target}: rank {place} does not see the folder that rank 0 made there: save on a "
                "disk that all ranks share"
            )
        raise ZiphiusError(f"{target}: rank {place}: {failed['kind']}: {failed['text']}")
    counted: dict[str, list[int]] = {}
    for report in reports:
        for name, (numbers, whole) in report["numbers"].items():
            counted.setdefault(name, [0, whole])[0] += numbers
    wrong = [name for name, (numbers, whole) in counted.items() if numbers != whole]
    if wrong:
        raise ZiphiusError(f"{target}: not every number of {wrong[0]} was written once")


def _as_one_line(copies: _Copies, error: Exception) -> ZiphiusError:
    if isinstance(error, OSError):
        place = os.fspath(error.filename or copies.target)
        return ZiphiusError(f"{copies.target}: not saved: {error.strerror}: {place}")
    return ZiphiusError(f"{copies.target}: not saved: {in_one_line(error)}")
