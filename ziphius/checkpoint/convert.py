"""A checkpoint in another form, tensor by tensor: memory stays at one shard."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from torch import Tensor

from ziphius.checkpoint.config_json import raw_config, read_config, stored_form
from ziphius.checkpoint.files import check_manifest, is_weight_file, replace_directory
from ziphius.checkpoint.folder import CONFIG_FILE, checkpoint_folder
from ziphius.checkpoint.forms import RECORD, Form, Quantizer, form_of
from ziphius.checkpoint.huggingface import (
    WeightReader,
    check_vocabulary,
    write_json,
)
from ziphius.checkpoint.keys import Comparison, layer_of
from ziphius.checkpoint.shards import ShardReader, write_shards
from ziphius.config.errors import BadInput
from ziphius.kernels.integers import GROUP_SIZE

# A shard is in memory about twice while it is written: smaller ones than a model's own let a laptop
# convert what it could not load.
SHARD_BYTES = 2**30


def convert(
    source: str | Path,
    target: str | Path,
    to: str = "bf16",
    *,
    mtp: bool = True,
    group_size: int = GROUP_SIZE,
    quantizer: Quantizer | None = None,
    head: bool = False,
    max_shard_bytes: int = SHARD_BYTES,
    on_tensor: Callable[[int, int], None] | None = None,
) -> Comparison:
    """Write the checkpoint ``source`` as ``target`` with weights stored as ``to``.

    ``to`` is bf16, fp32, fp8 (the published blocks), int8 or int4 (``compressed-tensors``, with a
    scale every ``group_size`` inputs, -1 for one a row). Integers are rounded to unless a
    ``quantizer`` finds them; with ``head`` the output head is in eight bits too. Quantised sources
    are dequantised. Tokenizer and other files come along; the config keeps what it says beyond the
    network. ``on_tensor`` gets (tensors done, tensors in all). Returns how the source's tensors
    compared with its config. Raises BadInput as ``load`` does, and when the target holds anything
    already.
    """
    form = form_of(to, group_size, quantizer, head=head)
    folder, target = checkpoint_folder(Path(source)), Path(target)
    if target.is_dir() and any(target.iterdir()):
        raise BadInput(f"{target}: is not empty: remove it or name another target")
    raw, config = raw_config(folder), read_config(folder, mtp=mtp)
    check_vocabulary(folder, config)
    with ShardReader(folder) as reader, replace_directory(target) as writing:
        check_manifest(folder, only=reader.files())
        weights = WeightReader(reader, config, stored_form(raw))
        comparison = weights.require_complete(skip_mtp=not mtp)
        _copy_other_files(folder, writing)
        names = sorted(weights.wanted(), key=lambda name: (layer_of(name), name))
        tensors = _converted(weights, names, form, on_tensor)
        write_shards(writing, tensors, max_shard_bytes=max_shard_bytes)
        converted = _converted_config(raw, config.num_nextn_predict_layers, form)
        write_json(writing / CONFIG_FILE, converted)
    return comparison


def _converted(
    weights: WeightReader,
    names: list[str],
    form: Form,
    on_tensor: Callable[[int, int], None] | None,
) -> Iterator[tuple[str, Tensor]]:
    """Yield the target's tensors layer after layer, which is the order that calibration needs."""
    for done, name in enumerate(names):
        if on_tensor is not None:
            on_tensor(done, len(names))
        yield from form.tensors(weights, name)
    if on_tensor is not None:
        on_tensor(len(names), len(names))


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
