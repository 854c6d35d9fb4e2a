"""A checkpoint in another form: weights go from file to file some rows at a time.

All names, shapes and dtypes of the result are known before the first number is read, so that shards
have their names and places from the beginning and memory holds a piece of one weight. What an
interruption leaves is ``unfinished.py``.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from ziphius import __version__
from ziphius.checkpoint.config_json import raw_config, read_config, scale_format, stored_form
from ziphius.checkpoint.files import check_manifest, is_weight_file, replace_directory
from ziphius.checkpoint.folder import CONFIG_FILE, checkpoint_folder
from ziphius.checkpoint.forms import RECORD, Form, Piece, Quantizer, form_of
from ziphius.checkpoint.huggingface import (
    WeightReader,
    check_vocabulary,
    row_ranges,
    write_json,
)
from ziphius.checkpoint.keys import Comparison, layer_of
from ziphius.checkpoint.memory import numbers_at_a_time
from ziphius.checkpoint.pieces import Kind, PieceWriter
from ziphius.checkpoint.shards import (
    MAX_SHARD_BYTES,
    TORCH_METADATA,
    ShardReader,
    shard_files,
    write_index,
)
from ziphius.checkpoint.unfinished import Unfinished
from ziphius.config.errors import BadInput
from ziphius.kernels.integers import GROUP_SIZE

# Gets a phase, how much of it is done, and of how much.
Progress = Callable[[str, int, int], None]


def convert(
    source: str | Path,
    target: str | Path,
    to: str = "bf16",
    *,
    mtp: bool = True,
    group_size: int = GROUP_SIZE,
    quantizer: Quantizer | None = None,
    head: bool = False,
    scales: str | None = None,
    memory: int | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    on_progress: Progress | None = None,
) -> Comparison:
    """Write the checkpoint ``source`` as ``target`` with weights stored as ``to``.

    ``to`` is bf16, fp32, fp8 (the published blocks), int8 or int4 (``compressed-tensors``, with a
    scale every ``group_size`` inputs, -1 for one a row). Integers are rounded to unless a
    ``quantizer`` finds them; with ``head`` the output head is in eight bits too. ``scales`` is the
    format of FP8 scales, float32 or ue8m0, by default that of an FP8 source, else float32.
    Quantised sources are dequantised. Tokenizer and other files come along; the config keeps what
    it says beyond the network.

    The process holds at most ``memory`` bytes, whatever the size of the checkpoint; by default what
    it held before and about 256 MiB. With a ``quantizer`` there is no limit.

    If it is interrupted the next call goes on behind the last finished shard, provided that source
    and options are the same; a ``quantizer`` begins anew. ``on_progress`` gets a phase and how many
    bytes of how many are done. Returns how the source's tensors compared with its config.

    Raises BadInput as ``load`` does; when the target holds anything already, or what another
    conversion left; when memory or disk are too small.
    """
    tell = on_progress or _silent
    if quantizer is not None and memory is not None:
        raise BadInput("--memory does not bound GPTQ, which holds a layer: leave it out")
    folder, target = checkpoint_folder(Path(source)), Path(os.path.realpath(target))
    raw, config = raw_config(folder), read_config(folder, mtp=mtp)
    form = form_of(
        to, group_size, quantizer, head=head, scales=scales, source_scales=scale_format(raw)
    )
    options = {"to": to, "mtp": mtp, "group size": group_size, "head": head, "scales": scales}
    options |= {"quantizer": quantizer is not None, "shard bytes": max_shard_bytes}
    with ShardReader(folder) as reader:
        work = Unfinished(target, options, _identity(reader), resumable=quantizer is None)
        weights = WeightReader(reader, config, stored_form(raw))
        if target.is_dir() and any(target.iterdir()):
            work.require_end_of(target)
            return weights.require_complete(skip_mtp=not mtp)
        check_vocabulary(folder, config)
        shards = _plan(form, weights, max_shard_bytes)
        shapes = {name: weights.shape(name) for shard in shards for name in shard.weights}
        numbers = None if form.whole else numbers_at_a_time(shapes, memory)
        with work.claimed():
            if not work.checked:
                _check_source(reader, tell)
                work.source_is_sound()
            comparison = weights.require_complete(skip_mtp=not mtp)
            _write_shards(shards, _Pieces(form, weights, shapes, numbers), work, tell)
            work.complete = True
            checksums = {file: entry["sha256"] for file, entry in work.shards.items()}
            with replace_directory(target, checksums=checksums) as writing:
                _copy_other_files(folder, writing)
                placed = {name: shard.file for shard in shards for name in shard.kinds}
                write_index(writing, placed, sum(shard.nbytes for shard in shards))
                converted = _converted_config(raw, config.num_nextn_predict_layers, form)
                write_json(writing / CONFIG_FILE, converted)
                work.hand_over(writing)
    return comparison


def _silent(phase: str, done: int, total: int) -> None:
    pass


def _identity(reader: ShardReader) -> dict[str, Any]:
    """Return what says that a source is as it was: its files as the disk has them, its headers."""
    files = [CONFIG_FILE, *reader.files()]
    status = {file: (reader.folder / file).stat() for file in files}
    headers = hashlib.sha256()
    for name in sorted(reader.names()):
        headers.update(f"{name} {reader.dtype(name)} {list(reader.shape(name))}\n".encode())
    return {
        "folder": str(reader.folder.resolve()),
        "files": {file: [s.st_size, s.st_mtime_ns] for file, s in status.items()},
        "headers": headers.hexdigest(),
        "version": __version__,
    }


def _check_source(reader: ShardReader, tell: Progress) -> None:
    """Compare the source's files with their checksums, if it has any."""
    files = reader.files()
    sizes = [(reader.folder / file).stat().st_size for file in files]
    for number, file in enumerate(files):
        tell("checking the source", sum(sizes[:number]), sum(sizes))
        check_manifest(reader.folder, only=[file])
    tell("checking the source", sum(sizes), sum(sizes))


@dataclass(frozen=True)
class _Shard:
    """A file of the result: the weights in it, and the tensors that store them."""

    file: str
    weights: list[str]
    kinds: dict[str, Kind]

    @property
    def nbytes(self) -> int:
        return sum(kind.nbytes for kind in self.kinds.values())


def _plan(form: Form, weights: WeightReader, max_shard_bytes: int) -> list[_Shard]:
    """Divide the weights over files, layer after layer, which is the order calibration needs.

    Codes and scales of a weight are in one file; a weight larger than a file has one of its own.
    """
    parts: list[tuple[list[str], dict[str, Kind]]] = []
    room = 0
    for name in sorted(weights.wanted(), key=lambda name: (layer_of(name), name)):
        kinds = form.layout(name, weights.shape(name))
        size = sum(kind.nbytes for kind in kinds.values())
        if not parts or size > room:
            parts.append(([], {}))
            room = max_shard_bytes
        parts[-1][0].append(name)
        parts[-1][1].update(kinds)
        room -= size
    files = shard_files(len(parts))
    return [_Shard(file, *part) for file, part in zip(files, parts, strict=True)]


@dataclass(frozen=True)
class _Pieces:
    """Cuts weights into pieces of so many numbers, or not at all."""

    form: Form
    weights: WeightReader
    shapes: dict[str, tuple[int, ...]]
    numbers: int | None

    def of(self, name: str) -> Iterator[Piece]:
        rows, *inner = self.shapes[name]
        whole = [(0, rows)]
        parts = whole if self.numbers is None else row_ranges(rows, self.numbers // prod(inner))
        for part in parts:
            yield from self.form.pieces(self.weights, name, part)


def _write_shards(shards: list[_Shard], pieces: _Pieces, work: Unfinished, tell: Progress) -> None:
    """Write every shard that is not finished and unchanged."""
    missing = []
    for number, shard in enumerate(shards):
        if work.shards:
            tell("checking finished shards", number, len(shards))
        if not work.verify(shard.file):
            missing.append(shard)
    done, total = 0, sum(shard.nbytes for shard in missing)
    work.require_room(total)
    for shard in missing:
        with PieceWriter(work.folder / shard.file, shard.kinds, TORCH_METADATA) as writer:
            for name in shard.weights:
                tell("converting", done, total)
                for part, first, rows in pieces.of(name):
                    writer.put(part, first, rows)
                    done += rows.nbytes
        work.keep(shard.file)
    tell("converting", total, total)


def _converted_config(raw: dict[str, object], mtp_layers: int, form: Form) -> dict[str, object]:
    name = str(form.dtype).removeprefix("torch.")
    gone = ("quantization_config", "num_mtp_layers", RECORD)
    kept = {key: value for key, value in raw.items() if key not in gone}
    kept |= {"torch_dtype": name, "dtype": name, "num_nextn_predict_layers": mtp_layers}
    return kept | form.config()


def _copy_other_files(source: Path, target: Path) -> None:
    """Copy what is no weight: tokenizer, chat template, licence. Run state does not come along."""
    for path in sorted(source.iterdir()):
        if path.is_file() and path.name != CONFIG_FILE and not is_weight_file(path.name):
            shutil.copy2(path, target / path.name)
