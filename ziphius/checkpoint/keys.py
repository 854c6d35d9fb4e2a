"""Which tensors a checkpoint has, derived from the config, and how a file's list compares."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from ziphius.checkpoint.compressed import is_packed, packed_parts
from ziphius.checkpoint.fp8 import SCALE_SUFFIX
from ziphius.config.errors import BadInput
from ziphius.config.model import ModelConfig
from ziphius.model.transformer import Transformer
from ziphius.model.weights import named_weights

# Old exports hold this table of rotary frequencies; it follows from the config.
IGNORED_SUFFIXES = ("rotary_emb.inv_freq",)

# How many names an error lists before it only counts.
_SHOWN = 4


@dataclass(frozen=True)
class Comparison:
    """A file's tensors against the config's: every name is in exactly one of the four."""

    used: frozenset[str]
    missing: frozenset[str]
    unused: frozenset[str]
    ignored: frozenset[str]


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return name and shape of every weight, without the copies of MTP modules."""
    model = Transformer(config, device="meta")
    return {name: tuple(tensor.shape) for name, tensor in named_weights(model)}


def shared_copies(config: ModelConfig) -> dict[str, str]:
    """Return the copies of embedding and head beside each MTP module, and what they copy.

    They are one weight in the network, and several tensors in a published checkpoint (facts 3.2).
    """
    copies = {}
    for depth in range(config.num_nextn_predict_layers):
        prefix = f"model.layers.{config.num_hidden_layers + depth}"
        copies[f"{prefix}.embed_tokens.weight"] = "model.embed_tokens.weight"
        copies[f"{prefix}.shared_head.head.weight"] = "lm_head.weight"
    return copies


def is_mtp(name: str, config: ModelConfig) -> bool:
    """Say whether a tensor belongs to an MTP module: to a layer behind the main ones."""
    return layer_of(name) >= config.num_hidden_layers


def layer_of(name: str) -> int:
    """Return the layer in a tensor's name, -1 outside the layers."""
    parts = name.split(".")
    numbered = parts[:2] == ["model", "layers"] and len(parts) > 2 and parts[2].isdecimal()
    return int(parts[2]) if numbered else -1


def compare(found: Collection[str], config: ModelConfig) -> Comparison:
    """Compare the names in a file with those that the config asks for.

    The scales of FP8 weights and the parts of packed ones are used wherever their weight is.
    """
    wanted = frozenset(expected_shapes(config)) | frozenset(shared_copies(config))
    names = frozenset(found)
    ignored = frozenset(name for name in names if name.endswith(IGNORED_SUFFIXES))
    scales = frozenset(
        name
        for name in names
        if name.endswith(SCALE_SUFFIX) and name.removesuffix(SCALE_SUFFIX) in wanted & names
    )
    packed = frozenset(name for name in wanted if is_packed(name, names))
    parts = frozenset(name for name in names if packed_parts(names, name) in packed)
    return Comparison(
        used=(names & wanted) | scales | parts,
        missing=wanted - names - packed,
        unused=names - wanted - scales - parts - ignored,
        ignored=ignored,
    )


def require_complete(comparison: Comparison, config: ModelConfig, where: str) -> None:
    """Raise BadInput for missing and unused tensors, naming some of each.

    An MTP module that the config declares and the file lacks entirely has a message of its own,
    for transformers writes such checkpoints.
    """
    missing, unused = comparison.missing, comparison.unused
    depth = config.num_nextn_predict_layers
    mtp = {name for name in missing if is_mtp(name, config)}
    present = any(is_mtp(name, config) for name in comparison.used)
    if depth and missing and mtp == missing and not present and not unused:
        raise BadInput(
            f"{where}: config.json declares {depth} MTP module(s) and the file holds none: "
            "load it without them (--without-mtp, or load(..., mtp=False))"
        )
    problems = []
    if missing:
        problems.append(f"{len(missing)} tensor(s) missing: {_some(missing)}")
    if unused:
        problems.append(
            f"{len(unused)} tensor(s) that the config has no place for: {_some(unused)}"
        )
    if unused and all(is_mtp(name, config) for name in unused):
        problems.append("they look like MTP modules: leave them out with --without-mtp (mtp=False)")
    if problems:
        raise BadInput(f"{where}: {'; '.join(problems)}")


def require_shape(
    name: str, found: Collection[int], expected: Mapping[str, tuple[int, ...]]
) -> None:
    """Raise BadInput when a tensor has another shape than the config asks for."""
    if name in expected and tuple(found) != expected[name]:
        raise BadInput(
            f"{name}: shape {list(found)} in the file, {list(expected[name])} by config.json"
        )


def _some(names: Collection[str]) -> str:
    shown = ", ".join(sorted(names)[:_SHOWN])
    return shown + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
