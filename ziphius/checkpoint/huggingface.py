"""A model from a Hugging Face directory, and a Hugging Face directory from a model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ziphius.checkpoint import keys
from ziphius.checkpoint.compressed import (
    SHAPE,
    Packed,
    is_packed,
    read_packed,
    require_layout,
)
from ziphius.checkpoint.config_json import (
    config_json,
    raw_config,
    read_config,
    stored_dtype,
    stored_form,
)
from ziphius.checkpoint.files import check_manifest, replace_directory
from ziphius.checkpoint.folder import CONFIG_FILE, TOKENIZER_FILE, checkpoint_folder
from ziphius.checkpoint.fp8 import (
    SCALE_SUFFIX,
    dequantize_blocks,
    is_quantized,
    require_scales,
)
from ziphius.checkpoint.shards import MAX_SHARD_BYTES, ShardReader, write_shards
from ziphius.config.errors import BadInput
from ziphius.config.model import ModelConfig
from ziphius.config.table import nearest
from ziphius.kernels.integers import QuantizedWeight
from ziphius.kernels.quantize import TILE
from ziphius.kernels.select import Kernels
from ziphius.model.precision import DTYPES, Precision
from ziphius.model.transformer import Transformer
from ziphius.model.weights import ROUTING_BIAS, named_weights


def load(
    path: str | Path,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str = "cpu",
    *,
    mtp: bool = True,
    verify: bool = True,
    kernels: Kernels | None = None,
) -> Transformer:
    """Read a checkpoint as a module in evaluation mode: token ids ``[B, T]`` to ``[B, T, V]``.

    ``path`` is a Hugging Face folder or a run folder. ``dtype`` is what weights are stored and
    computed in, by default what the config says; routing biases are FP32 all the same. Quantised
    weights (FP8 blocks, packed integers) are dequantised. ``mtp=False`` leaves MTP modules out,
    present or not. ``verify`` compares the weights with their checksums, where there is a manifest.
    ``kernels`` are torch's own unless others are given.

    Raises BadInput for a checkpoint of another architecture, missing, unused or misshapen tensors,
    and damaged files.
    """
    folder = checkpoint_folder(Path(path))
    raw, config = raw_config(folder), read_config(folder, mtp=mtp)
    check_vocabulary(folder, config)
    precision = Precision.for_inference(as_dtype(dtype) if dtype else stored_dtype(raw))
    with ShardReader(folder) as reader:
        # Of the other files a user may have changed some on purpose.
        check_manifest(folder, checksums=verify, only=reader.files())
        reading = WeightReader(reader, config, stored_form(raw))
        reading.require_complete(skip_mtp=not mtp)
        model = Transformer(config, precision, kernels=kernels, device="meta").to_empty(
            device=device
        )
        reading.read_into(model)
    return model.eval()


def read_weights(model: Transformer, folder: Path) -> None:
    """Set every weight of a model from a Hugging Face folder of the same configuration.

    Raises BadInput, before anything is set, for missing, unused or misshapen tensors.
    """
    with ShardReader(folder) as reader:
        reading = WeightReader(reader, model.config, stored_form(raw_config(folder)))
        reading.require_complete(skip_mtp=False)
        reading.read_into(model)


def examine(path: str | Path) -> keys.Comparison:
    """Compare a checkpoint's tensors with its config, and its weights with their checksums.

    Missing and unused tensors are in the result; damaged files raise BadInput, as in ``load``.
    """
    folder = checkpoint_folder(Path(path))
    with ShardReader(folder) as reader:
        check_manifest(folder, only=reader.files())
        return keys.compare(reader.names(), read_config(folder))


def save(
    model: Transformer,
    path: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a model as a Hugging Face directory that transformers opens without remote code.

    Weights are written as they are stored, or as ``dtype``; routing biases are FP32 all the same.
    The directory appears whole or not at all. Tokenizer and other files of an older checkpoint in
    its place stay. Raises BadInput when it cannot be written; an older checkpoint is untouched.
    """
    target = as_dtype(dtype) if dtype else model.precision.storage
    with replace_directory(Path(path)) as folder:
        write_model(model, folder, target, max_shard_bytes)


def write_model(
    model: Transformer, folder: Path, dtype: torch.dtype, max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Write config and weights into a folder that ``replace_directory`` gave."""
    write_settings(folder, model.config, dtype)
    write_shards(folder, exported(model, dtype), max_shard_bytes=max_shard_bytes)


def write_settings(folder: Path, config: ModelConfig, dtype: torch.dtype) -> None:
    """Write what a checkpoint says of a model whose weights are stored in ``dtype``."""
    settings = config_json(config, dtype=dtype)
    write_json(folder / CONFIG_FILE, settings)
    generation = {"_from_model_config": True}
    generation |= {key: settings[key] for key in ("bos_token_id", "eos_token_id")}
    write_json(folder / "generation_config.json", generation)


def exported(model: Transformer, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of the checkpoint under its published name, the MTP copies included."""
    weights = dict(named_weights(model))
    for name, weight in weights.items():
        yield name, weight.to(stored_as(name, dtype)).cpu()
    for copy, original in keys.shared_copies(model.config).items():
        yield copy, weights[original].to(dtype).cpu()


def stored_as(name: str, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of one tensor in a checkpoint of ``dtype`` (facts 1.9, 13.6)."""
    return torch.float32 if name.endswith(ROUTING_BIAS) else dtype


# From which row up to which, within a tensor.
Rows = tuple[int, int]
# Numbers of a weight and its copy that are compared at a time.
_COMPARED = 2**20


class Fp8Weight(NamedTuple):
    """A matrix as an FP8 checkpoint stores it: E4M3 ``[O, I]`` and FP32 scales a block, which
    multiply (facts 4.2).
    """

    codes: Tensor
    scale_inv: Tensor


class WeightReader:
    """A checkpoint's tensors, dequantised and compared with its config.

    ``form`` is what ``stored_form`` says of the config.
    """

    def __init__(
        self, reader: ShardReader, config: ModelConfig, form: tuple[int, int] | Packed | None
    ) -> None:
        self.reader, self.config, self.form = reader, config, form
        self.names = reader.names()
        self.shapes = keys.expected_shapes(config)

    def wanted(self) -> set[str]:
        """Return the names of all weights, the copies beside MTP modules included."""
        return set(self.shapes) | set(keys.shared_copies(self.config))

    def require_complete(self, *, skip_mtp: bool) -> keys.Comparison:
        """Check names, shapes and dtypes, and that copies are equal; return the comparison."""
        found = {n for n in self.names if not (skip_mtp and keys.is_mtp(n, self.config))}
        comparison = keys.compare(found, self.config)
        keys.require_complete(comparison, self.config, str(self.reader.folder))
        for name in self.shapes:
            if is_packed(name, self.names):
                require_layout(name, self.shapes[name], self._packed(name), self.reader, self.names)
            else:
                keys.require_shape(name, self.reader.shape(name), self.shapes)
                self._require_weights(name)
        self._require_equal_copies()
        return comparison

    @torch.no_grad()
    def read_into(self, model: Transformer) -> None:
        """Set every weight of a model, tensor by tensor."""
        for name, weight in named_weights(model):
            weight.copy_(self.read(name, torch.promote_types(weight.dtype, torch.float32)))

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape that the config gives a weight, or a copy beside an MTP module."""
        return self.shapes[keys.shared_copies(self.config).get(name, name)]

    def read(self, name: str, dtype: torch.dtype, rows: Rows | None = None) -> Tensor:
        """Return one weight, dequantised to ``dtype`` if it is quantised, else as it is stored.

        ``rows``: see ``stored``.
        """
        stored = self.stored(name, rows)
        if isinstance(stored, QuantizedWeight):
            return stored.dequantize(dtype)
        if isinstance(stored, Fp8Weight):
            return dequantize_blocks(*stored, dtype, name=name)
        return stored

    def stored(self, name: str, rows: Rows | None = None) -> Tensor | Fp8Weight | QuantizedWeight:
        """Return one weight as the file has it: codes and scales if it is quantised.

        ``rows`` says from which row up to which; the first one must be a multiple of 128.
        """
        if is_packed(name, self.names):
            packed = read_packed(name, self._packed(name), self.reader, rows)
            if name in self.shapes and rows is None:
                said = name + SHAPE
                keys.require_shape(said, packed.shape, {said: self.shapes[name]})
            return packed
        tensor = self._part(name, rows)
        if not is_quantized(name, self.names):
            return tensor
        if not isinstance(self.form, tuple):
            raise BadInput(
                f"{self.reader.folder}: {name} has FP8 scales but config.json has no "
                "quantization_config of FP8: restore the config of the FP8 checkpoint"
            )
        blocks = rows and (rows[0] // TILE, -(-rows[1] // TILE))
        return Fp8Weight(tensor, self._part(name + SCALE_SUFFIX, blocks))

    def _part(self, name: str, rows: Rows | None) -> Tensor:
        return self.reader.read(name) if rows is None else self.reader.read_rows(name, *rows)

    def _packed(self, name: str) -> Packed:
        if not isinstance(self.form, Packed):
            raise BadInput(
                f"{self.reader.folder}: {name} is packed but config.json has no "
                "quantization_config of compressed-tensors: restore the checkpoint's own config"
            )
        return self.form

    def _require_weights(self, name: str) -> None:
        """Check that a tensor's numbers are weights as they stand, or FP8 with scales."""
        dtype = self.reader.dtype(name)
        scaled = dtype == torch.float8_e4m3fn and is_quantized(name, self.names)
        if dtype not in DTYPES.values() and not scaled:
            reason = "without its scales" if dtype == torch.float8_e4m3fn else "in no known form"
            raise BadInput(
                f"{self.reader.folder}: {name} is stored as {dtype} {reason}: supported are "
                f"{', '.join(DTYPES)}, and float8_e4m3fn with {name}{SCALE_SUFFIX}"
            )
        if scaled:
            scales = name + SCALE_SUFFIX
            shape, kind = self.reader.shape(scales), self.reader.dtype(scales)
            require_scales(name, self.shapes[name], shape, kind)

    def _require_equal_copies(self) -> None:
        """Check that the copies beside MTP modules are copies: the network has one of each."""
        for copy, original in keys.shared_copies(self.config).items():
            shape = self.shapes[original]
            if copy in self.names:
                keys.require_shape(copy, self.reader.shape(copy), {copy: shape})
            for rows in row_ranges(shape[0], _COMPARED // shape[1]):
                ours, theirs = (self.read(name, torch.float32, rows) for name in (original, copy))
                keys.require_shape(copy, theirs.shape, {copy: tuple(ours.shape)})
                if ((ours == theirs) | (ours.isnan() & theirs.isnan())).all():
                    continue
                raise BadInput(
                    f"{self.reader.folder}: {copy} differs from {original}, which it should copy: "
                    "load without MTP (--without-mtp, or load(..., mtp=False))"
                )


def row_ranges(rows: int, at_a_time: int) -> Iterator[Rows]:
    """Cut ``rows`` rows into ranges of about so many, whole rows of FP8 blocks each."""
    step = max(1, at_a_time // TILE) * TILE
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def as_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """Return the dtype of a name such as ``bfloat16``; BadInput for others than precision's."""
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise BadInput(f"dtype '{name}' is not supported{nearest(name, DTYPES)}")
    return DTYPES[name]


def write_json(path: Path, value: object) -> None:
    """Write a JSON file the way Hugging Face does: indented, with a newline at the end."""
    path.write_text(json.dumps(value, indent=2) + "\n", "utf-8")


def check_vocabulary(folder: Path, config: ModelConfig) -> None:
    """Raise BadInput when the tokenizer beside a model has ids that the model does not know.

    A model may have more rows than the tokenizer has tokens: the published one is padded.
    """
    path = folder / TOKENIZER_FILE
    if not path.is_file():
        return
    try:
        data = json.loads(path.read_text("utf-8"))
        ids = [*data["model"]["vocab"].values(), *(t["id"] for t in data["added_tokens"])]
        largest = max(ids)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise BadInput(f"{path}: not a tokenizer of the tokenizers library: restore it") from None
    if largest >= config.vocab_size:
        raise BadInput(
            f"{folder}: the tokenizer has token ids up to {largest}, the model's vocab_size is "
            f"{config.vocab_size}: tokenizer and model do not belong together"
        )
