"""Integer weights of a checkpoint, in the ``pack-quantized`` layout of ``compressed-tensors``.

``X.weight`` is stored as ``X.weight_packed`` (int32 words along the inputs, see
``kernels/integers.py``), ``X.weight_scale`` ``[out, groups]`` and ``X.weight_shape`` (int64
``[out, in]``, because words may hold more than a row has).
"""

from __future__ import annotations

import json
import re
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor

from ziphius.config.errors import BadInput
from ziphius.kernels.integers import (
    BITS,
    WHOLE_ROW,
    Codes,
    QuantizedWeight,
    group_width,
    groups,
    pack,
    stored_bytes,
)

METHOD = "compressed-tensors"
FORMAT = "pack-quantized"
PACKED, SCALE, SHAPE = SUFFIXES = ("_packed", "_scale", "_shape")

# The output head, and its copies in the MTP modules of a file.
_HEAD = (r"lm_head$", r".*shared_head\.head$")

# Modules that no form quantises, FP8 included, and why. The published FP8 weights keep the same
# ones (facts 1.9). kv_b_proj is not among them, although decoding multiplies by its transpose: it
# is FP8 in the published weights, a tenth of what attention reads at short contexts, and every
# engine dequantises it when it absorbs it.
HIGH_PRECISION: Mapping[str, str] = MappingProxyType(
    {
        r".*embed_tokens$": "rows are looked up, not multiplied",
        "|".join(_HEAD): "its error meets no later layer that could mend it",
        r".*norm$": "vectors",
        r"score$": "a handful of rows, read once an answer",
        r".*mlp\.gate$": "an error here sends a token to other experts; holds the routing bias too",
        r".*eh_proj$": "joins hidden state and embedding, whose sizes differ",
    }
)
# ``targets`` of the layout names classes of modules; of those above these are linear layers.
_LINEAR = (*_HEAD, r".*mlp\.gate$", r".*eh_proj$")


class Stored(Protocol):
    """What is asked of a checkpoint's reader."""

    def read(self, name: str) -> Tensor:
        """Read one tensor."""
        ...

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Read the rows from ``start`` up to ``stop`` of one tensor."""
        ...

    def shape(self, name: str) -> torch.Size:
        """Return a tensor's shape from the header."""
        ...

    def dtype(self, name: str) -> torch.dtype:
        """Return a tensor's dtype from the header."""
        ...


@dataclass(frozen=True)
class Packed:
    """How the integers of a checkpoint are stored; ``group_size`` -1 is one scale a row.

    ``head_bits`` are those of the output head, or None where it is not in integers.
    """

    bits: int
    group_size: int
    head_bits: int | None = None

    def of(self, name: str) -> Packed:
        """Return how the weight ``name`` is stored, if it is packed."""
        if self.head_bits is None or not is_head(name):
            return self
        return replace(self, bits=self.head_bits)


def is_quantizable(name: str) -> bool:
    """Say whether forms of fewer bits store the weight ``name`` in them."""
    module, _, kind = name.rpartition(".")
    return kind == "weight" and not any(re.match(pattern, module) for pattern in HIGH_PRECISION)


def is_head(name: str) -> bool:
    """Say whether ``name`` is the output head's weight, or a copy of it."""
    module, _, kind = name.rpartition(".")
    return kind == "weight" and any(re.match(pattern, module) for pattern in _HEAD)


def is_packed(name: str, names: Container[str]) -> bool:
    """Say whether the weight ``name`` is stored in words: whether ``name_packed`` is there."""
    return name + PACKED in names


def packed_parts(names: Container[str], name: str) -> str | None:
    """Return the weight that the tensor ``name`` is a part of, if it is part of a packed one."""
    for suffix in SUFFIXES:
        weight = name.removesuffix(suffix)
        if weight != name and is_packed(weight, names):
            return weight
    return None


# config.json


def packed_config(form: Packed) -> dict[str, Any]:
    """Return the ``quantization_config`` of a checkpoint of integers."""
    tables, ignored = {"group_0": _group_config(form, ["Linear"])}, list(_LINEAR)
    if form.head_bits is not None:
        # A pattern goes before the name of a class.
        head = Packed(form.head_bits, form.group_size)
        tables["group_1"] = _group_config(head, [f"re:{pattern}" for pattern in _HEAD])
        ignored = [pattern for pattern in _LINEAR if pattern not in _HEAD]
    return {
        "quant_method": METHOD,
        "format": FORMAT,
        "quantization_status": "compressed",
        "config_groups": tables,
        "ignore": [f"re:{pattern}" for pattern in ignored],
        "kv_cache_scheme": None,
    }


def _group_config(form: Packed, targets: list[str]) -> dict[str, Any]:
    whole = form.group_size == WHOLE_ROW
    weights = {
        "num_bits": form.bits,
        "type": "int",
        "symmetric": True,
        "strategy": "channel" if whole else "group",
        "group_size": None if whole else form.group_size,
        "dynamic": False,
        "actorder": None,
    }
    return {
        "targets": targets,
        "weights": weights,
        "input_activations": None,
        "output_activations": None,
        "format": FORMAT,
    }


def read_packed_config(scheme: Mapping[str, Any], where: str) -> Packed:
    """Read a ``quantization_config`` of ``compressed-tensors``.

    One group of symmetric 4 or 8 bit integers in ``pack-quantized`` is read, whatever it targets:
    the tensors themselves say which are packed. A second one may be that of ``lm_head`` alone, in
    groups of the same size. Raises BadInput, which names the key, for every other form; ``where``
    begins the message.
    """
    where = f"{where}: quantization_config"
    _require(scheme, {"format": (FORMAT,), "kv_cache_scheme": (None,)}, where)
    if scheme.get("sparsity_config"):
        raise BadInput(f"{where}.sparsity_config: sparse weights are not supported")
    found = scheme.get("config_groups")
    tables = dict(found) if isinstance(found, dict) else {}
    heads = [name for name, table in tables.items() if len(tables) > 1 and _is_head(table)]
    others = [name for name in tables if name not in heads]
    if len(others) != 1 or len(heads) > 1 or not isinstance(tables[others[0]], dict):
        raise BadInput(
            f"{where}.config_groups: exactly one group of weights is supported, and one of lm_head"
        )
    form = _read_group(tables[others[0]], f"{where}.config_groups.{others[0]}")
    if not heads:
        return form
    at = f"{where}.config_groups.{heads[0]}"
    head = _read_group(tables[heads[0]], at)
    if head.group_size != form.group_size:
        raise BadInput(f"{at}: lm_head needs the group size of the other weights")
    return replace(form, head_bits=head.bits)


def _is_head(table: Any) -> bool:
    targets = table.get("targets") if isinstance(table, dict) else None
    known = {"lm_head", "re:.*lm_head", *(f"re:{pattern}" for pattern in _HEAD)}
    return isinstance(targets, list) and bool(targets) and known.issuperset(map(str, targets))


def _read_group(group: Mapping[str, Any], where: str) -> Packed:
    activations = {"input_activations": (None,), "output_activations": (None,)}
    _require(group, {**activations, "format": (FORMAT, None)}, where)
    weights = group.get("weights")
    if not isinstance(weights, dict):
        raise BadInput(
            f"{where}.weights: {json.dumps(weights)} is not supported: a table is needed"
        )
    supported: dict[str, tuple[Any, ...]] = {
        "type": ("int", None),
        "num_bits": BITS,
        "symmetric": (True, None),
        "dynamic": (False, None),
        "strategy": ("group", "channel"),
        "actorder": (None, False, "weight", "static"),
    }
    _require(weights, supported, f"{where}.weights")
    if weights["strategy"] == "channel":
        return Packed(weights["num_bits"], WHOLE_ROW)
    size = weights.get("group_size")
    if not isinstance(size, int) or size < 1:
        raise BadInput(f"{where}.weights.group_size = {json.dumps(size)}: 1 or more is needed")
    return Packed(weights["num_bits"], size)


def _require(table: Mapping[str, Any], supported: Mapping[str, tuple[Any, ...]], at: str) -> None:
    for key, choices in supported.items():
        if table.get(key) not in choices:
            names = " or ".join(json.dumps(choice) for choice in choices)
            shown = json.dumps(table.get(key))
            raise BadInput(f"{at}.{key} = {shown} is not supported: it must be {names}")


# Tensors


def packed_tensors(name: str, codes: Codes, bits: int) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors that store the weight ``name``."""
    yield name + PACKED, pack(codes.codes_OI, bits)
    yield name + SCALE, codes.scales_OG
    yield name + SHAPE, torch.tensor(codes.codes_OI.shape, dtype=torch.int64)


def packed_shapes(shape: Sequence[int], form: Packed) -> dict[str, tuple[int, ...]]:
    """Return the shape of every part of a packed matrix ``[out, in]``."""
    rows, width = shape
    return {
        PACKED: (rows, -(-width * form.bits // 32)),
        SCALE: (rows, groups(width, form.group_size)),
        SHAPE: (2,),
    }


def require_layout(
    name: str, shape: tuple[int, ...], form: Packed, reader: Stored, names: Container[str]
) -> None:
    """Check, from headers alone, that the parts of a packed weight are there and fit ``shape``.

    Raises BadInput, which names the part.
    """
    form = form.of(name)
    for suffix in SUFFIXES:
        if name + suffix not in names:
            raise BadInput(
                f"{name}: packed, but {name}{suffix} is missing: the checkpoint is incomplete"
            )
    if len(shape) != 2:
        raise BadInput(f"{name}: packed, but the config has {list(shape)}: a matrix is needed")
    wanted_shapes = packed_shapes(shape, form)
    expected = {
        PACKED: (list(wanted_shapes[PACKED]), "int32"),
        SCALE: (list(wanted_shapes[SCALE]), "a floating dtype"),
        SHAPE: (list(wanted_shapes[SHAPE]), "integers"),
    }
    for suffix, (wanted, kind) in expected.items():
        found, dtype = list(reader.shape(name + suffix)), reader.dtype(name + suffix)
        right = {
            PACKED: dtype == torch.int32,
            SCALE: dtype.is_floating_point and dtype.itemsize > 1,
            SHAPE: not dtype.is_floating_point,
        }[suffix]
        if found != wanted or not right:
            shown = str(dtype).removeprefix("torch.")
            raise BadInput(
                f"{name}{suffix}: {shown} {found}, but {name} {list(shape)} in {form.bits} bits "
                f"with group size {form.group_size} needs {kind} {wanted}"
            )


def read_packed(
    name: str, form: Packed, reader: Stored, rows: tuple[int, int] | None = None
) -> QuantizedWeight:
    """Read a packed weight as it is stored, or its rows from one up to another.

    Raises BadInput when ``weight_shape`` contradicts the words.
    """
    form = form.of(name)
    height, width = (int(size) for size in reader.read(name + SHAPE))
    stored = list(reader.shape(name + PACKED))
    if [height, -(-width * form.bits // 32)] != stored:
        raise BadInput(
            f"{name}{SHAPE}: [{height}, {width}], which {stored} words of {form.bits} bit codes do "
            "not hold: copy the file again"
        )
    if rows is None:
        words, scales = (reader.read(name + suffix) for suffix in (PACKED, SCALE))
    else:
        words, scales = (reader.read_rows(name + suffix, *rows) for suffix in (PACKED, SCALE))
    codes = stored_bytes(words, form.bits, width)
    size = group_width(width, form.group_size)
    return QuantizedWeight(codes, scales, size, form.bits, (len(words), width))
