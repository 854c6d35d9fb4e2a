"""A checkpoint in another form, tensor by tensor: memory stays at one shard."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ziphius.checkpoint.config_json import CONFIG_FILE, quantization_block, raw_config, read_config
from ziphius.checkpoint.files import check_manifest, is_weight_file, replace_directory
from ziphius.checkpoint.huggingface import (
    WeightReader,
    check_vocabulary,
    checkpoint_folder,
    stored_as,
    write_json,
)
from ziphius.checkpoint.keys import Comparison
from ziphius.checkpoint.shards import MAX_SHARD_BYTES, ShardReader, write_shards
from ziphius.config.errors import BadInput
from ziphius.config.table import nearest

FORMS = {"bf16": torch.bfloat16, "fp32": torch.float32}


def convert(
    source: str | Path,
    target: str | Path,
    to: str = "bf16",
    *,
    mtp: bool = True,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    on_tensor: Callable[[int, int], None] | None = None,
) -> Comparison:
    """Write the checkpoint ``source`` as ``target`` with weights stored as ``to``: bf16 or fp32.

    FP8 sources are dequantised. Tokenizer and other files come along; the config keeps what it says
    beyond the network. ``on_tensor`` gets (tensors done, tensors in all). Returns how the source's
    tensors compared with its config. Raises BadInput as ``load`` does, and when the target holds
    anything already.
    """
    if to not in FORMS:
        raise BadInput(f"--to {to}: not a form this version writes{nearest(to, FORMS)}")
    folder, target = checkpoint_folder(Path(source)), Path(target)
    if target.is_dir() and any(target.iterdir()):
        raise BadInput(f"{target}: is not empty: remove it or name another target")
    raw, config, dtype = raw_config(folder), read_config(folder), FORMS[to]
    if not mtp:
        config = config.model_copy(update={"num_nextn_predict_layers": 0})
    check_vocabulary(folder, config)
    with ShardReader(folder) as reader, replace_directory(target) as writing:
        check_manifest(folder, only=reader.files())
        weights = WeightReader(reader, config, quantization_block(raw))
        comparison = weights.require_complete(skip_mtp=not mtp)
        _copy_other_files(folder, writing)
        write_json(
            writing / CONFIG_FILE, _converted_config(raw, config.num_nextn_predict_layers, to)
        )
        tensors = _converted(weights, sorted(weights.wanted()), dtype, on_tensor)
        write_shards(writing, tensors, max_shard_bytes=max_shard_bytes)
    return comparison


def _converted(
    weights: WeightReader,
    names: list[str],
    dtype: torch.dtype,
    on_tensor: Callable[[int, int], None] | None,
) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    for done, name in enumerate(names):
        if on_tensor is not None:
            on_tensor(done, len(names))
        stored = stored_as(name, dtype)
        yield name, partial(_read_as, weights, name, stored)
    if on_tensor is not None:
        on_tensor(len(names), len(names))


def _read_as(weights: WeightReader, name: str, dtype: torch.dtype) -> Tensor:
    return weights.read(name, dtype).to(dtype)


def _converted_config(raw: dict[str, object], mtp_layers: int, to: str) -> dict[str, object]:
    name = str(FORMS[to]).removeprefix("torch.")
    kept = {key: value for key, value in raw.items() if key != "quantization_config"}
    kept.pop("num_mtp_layers", None)
    kept |= {"torch_dtype": name, "dtype": name, "num_nextn_predict_layers": mtp_layers}
    return kept


def _copy_other_files(source: Path, target: Path) -> None:
    """Copy what is no weight: tokenizer, chat template, licence. Run state does not come along."""
    for path in sorted(source.iterdir()):
        if path.is_file() and path.name != CONFIG_FILE and not is_weight_file(path.name):
            shutil.copy2(path, target / path.name)
