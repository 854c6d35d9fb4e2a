"""A model whose weights stay as the checkpoint stores them: codes are multiplied where they lie."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ziphius.checkpoint.arena import Arena
from ziphius.checkpoint.compressed import Packed
from ziphius.checkpoint.config_json import raw_config, read_config, stored_dtype, stored_form
from ziphius.checkpoint.files import check_manifest
from ziphius.checkpoint.folder import checkpoint_folder
from ziphius.checkpoint.huggingface import (
    Fp8Weight,
    WeightReader,
    as_dtype,
    check_vocabulary,
)
from ziphius.checkpoint.shards import ShardReader
from ziphius.kernels.integers import QuantizedWeight, group_width, groups
from ziphius.kernels.mixture import Expert, Experts
from ziphius.kernels.select import Kernels
from ziphius.kernels.stored import Codes, Weight
from ziphius.model.experts import ExpertStore
from ziphius.model.ffn import MixtureOfExperts
from ziphius.model.precision import Precision
from ziphius.model.transformer import Transformer
from ziphius.model.weights import ROUTING_BIAS

FORMS = {8: "int8", 4: "int4"}
STEP = 32  # columns that products take at a time: groups are whole ones
Form = tuple[int, int] | Packed  # the block of FP8, or packed integers


@dataclass
class Loaded:
    """A model that answers, and what it took. ``close`` frees the files of lazy experts."""

    model: Transformer
    weight_bytes: int
    experts: ExpertCache | None
    reader: ShardReader

    def close(self) -> None:
        """Close the checkpoint's files; experts that are not in memory can't be read any more."""
        self.reader.close()


def load_in_place(
    path: str | Path,
    kernels: Kernels,
    dtype: torch.dtype | str | None = None,
    *,
    mtp: bool = True,
    verify: bool = True,
    expert_bytes: int | None = None,
) -> Loaded:
    """Read a checkpoint for answering; quantised matrices keep their codes in memory.

    ``dtype`` is what activations are computed in and plain weights are stored in. With
    ``expert_bytes`` routed experts are read when a token first chooses them, and at most so many
    bytes of them are kept (those of one layer's step always are). ``kernels`` compute in place.

    Raises BadInput as ``load`` does.
    """
    folder = checkpoint_folder(Path(path))
    raw, config = raw_config(folder), read_config(folder, mtp=mtp)
    check_vocabulary(folder, config)
    chosen = as_dtype(dtype) if dtype else stored_dtype(raw)
    precision = Precision.for_inference(chosen)
    reader = ShardReader(folder)
    try:
        check_manifest(folder, checksums=verify, only=reader.files())
        weights = WeightReader(reader, config, stored_form(raw))
        weights.require_complete(skip_mtp=not mtp)
        model = Transformer(config, precision, kernels=kernels, device="meta").eval()
        source = Source(weights, chosen, Arena())
        for name, module, attribute in _places(model):
            _put(module, attribute, source.read(name))
        cache = None
        if expert_bytes is not None:
            # Experts come and go: each has memory of its own.
            cache, source.arena = ExpertCache(expert_bytes), None
        _put_experts(model, source, cache)
    except BaseException:
        reader.close()
        raise
    if cache is None:
        reader.close()
    return Loaded(model.requires_grad_(False), source.bytes, cache, reader)


class Source:
    """Weights as products take them: tensors of one dtype, or codes."""

    def __init__(self, weights: WeightReader, dtype: torch.dtype, arena: Arena | None) -> None:
        self.weights, self.dtype, self.arena = weights, dtype, arena
        self.bytes = 0  # read so far

    def read(self, name: str) -> Weight:
        """Return one weight. Codes of a shape that products can't take become numbers."""
        weight = self._weight(name)
        self.bytes += weight.nbytes
        if self.arena is None:
            return weight
        if isinstance(weight, Codes):
            return replace(weight, data=self.arena.place(weight.data))
        return self.arena.place(weight)

    def _weight(self, name: str) -> Weight:
        stored = self.weights.stored(name)
        if isinstance(stored, Fp8Weight | QuantizedWeight):
            form = self.weights.form
            assert form is not None, "stored() has checked it"
            if (group := product_group(form, self.weights.shapes[name])) is not None:
                return _codes(stored, form, group)
        held = held_dtype(name, self.dtype)
        return self.weights.read(name, held).to(held)


def _codes(stored: Fp8Weight | QuantizedWeight, form: Form, group: int) -> Codes:
    if isinstance(stored, QuantizedWeight):
        scales = stored.scales.float().contiguous()
        return Codes(stored.codes.contiguous(), scales, FORMS[stored.bits], group=group)
    assert isinstance(form, tuple)
    codes = stored.codes.contiguous().view(torch.uint8)
    scales = stored.scale_inv.float().contiguous()
    return Codes(codes, scales, "fp8", group=group, scale_rows=form[0])


def product_group(form: Form, shape: tuple[int, ...]) -> int | None:
    """Return the columns of a scale as products take them; None where codes become numbers."""
    if not isinstance(form, Packed):
        return form[1] if form[1] % STEP == 0 else None
    width = shape[1]
    group = min(width, group_width(width, form.group_size))
    if (group % STEP and group < width) or (form.bits == 4 and width % 2):
        return None
    return -(-group // STEP) * STEP


def held_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which the numbers of a weight are held, for activations in ``dtype``."""
    return torch.promote_types(dtype, torch.float32) if name.endswith(ROUTING_BIAS) else dtype


def held_bytes(name: str, shape: tuple[int, ...], form: Form | None, dtype: torch.dtype) -> int:
    """Return the bytes of a weight in memory. ``form`` is None for one that is stored plain."""
    size = math.prod(shape)
    if form is None or product_group(form, shape) is None:
        return size * held_dtype(name, dtype).itemsize
    rows, width = shape
    if isinstance(form, Packed):
        return size * form.bits // 8 + 4 * rows * groups(width, form.group_size)
    return size + 4 * -(-rows // form[0]) * -(-width // form[1])


class ExpertCache:
    """Experts in memory, up to ``most`` bytes, the least recently used dropped first."""

    def __init__(self, most: int) -> None:
        self.most, self.bytes, self.reads = most, 0, 0
        self._kept: OrderedDict[tuple[int, int], tuple[LazyExperts, int]] = OrderedDict()

    def touch(self, layer: LazyExperts, expert: int) -> None:
        """Note the use of an expert that is there."""
        self._kept.move_to_end((id(layer), expert))

    def keep(self, layer: LazyExperts, expert: int, size: int, needed: set[int]) -> None:
        """Count an expert that was read, and drop others that the layer's step does not need."""
        self.reads += 1
        self.bytes += size
        self._kept[id(layer), expert] = (layer, size)
        for key, (owner, held) in list(self._kept.items()):
            if self.bytes <= self.most:
                break
            if owner is layer and key[1] in needed:
                continue
            del self._kept[key]
            owner.drop(key[1])
            self.bytes -= held


class LazyExperts(Experts):
    """A layer's routed experts, read when they are first chosen."""

    def __init__(
        self,
        count: int,
        shared: list[Expert],
        read: Callable[[int], Expert],
        cache: ExpertCache,
    ) -> None:
        super().__init__([], shared)
        self._shared_rows = self.table
        self._held: list[Expert | None] = [None] * count
        self._read, self._cache = read, cache
        self.table = torch.cat(
            (torch.zeros(3 * count, self.table.shape[1], dtype=torch.int64), self._shared_rows)
        )

    @property
    def count(self) -> int:
        """Routed experts, in memory or not."""
        return len(self._held)

    def get(self, expert: int) -> Expert:
        held = self._held[expert]
        assert held is not None, "required before it is used"
        return held

    def require(self, chosen_NK: Tensor) -> None:
        needed = set(chosen_NK.unique().tolist())
        for expert in sorted(needed):
            if self._held[expert] is not None:
                self._cache.touch(self, expert)
                continue
            loaded = self._read(expert)
            self._held[expert] = loaded
            self.place(expert, loaded)
            self._cache.keep(self, expert, sum(w.nbytes for w in loaded), needed)

    def drop(self, expert: int) -> None:
        """Forget an expert; it is read again when it is next chosen."""
        self._held[expert] = None
        self.table[3 * expert : 3 * expert + 3] = 0


class StoredExperts(ExpertStore):
    """The experts one by one, each matrix as the checkpoint stores it."""

    def __init__(self, experts: list[Expert]) -> None:
        super().__init__()
        self.experts = experts
        self.n_experts = len(experts)
        self.slot_to_expert = tuple(range(len(experts)))

    def gate_up(self) -> Tensor:
        return torch.stack([torch.cat([_dense(e.gate), _dense(e.up)]) for e in self.experts])

    def down(self) -> Tensor:
        return torch.stack([_dense(e.down) for e in self.experts])

    def in_memory(self) -> list[Expert]:
        return self.experts

    def named_experts(self) -> Iterator[tuple[str, Tensor]]:
        for number, expert in enumerate(self.experts):
            for name, weight in zip(("gate", "up", "down"), expert, strict=True):
                yield f"{number}.{name}_proj.weight", _dense(weight)


def _dense(weight: Weight) -> Tensor:
    return weight.decode(torch.bfloat16) if isinstance(weight, Codes) else weight


def _places(model: Transformer) -> Iterator[tuple[str, nn.Module, str]]:
    """Yield (Hugging Face name, module, attribute) of every weight but the routed experts'."""
    yield "model.embed_tokens.weight", model.embed_tokens, "weight"
    yield "model.norm.weight", model.norm, "weight"
    yield "lm_head.weight", model.lm_head, "weight"
    for index, depth, block in model.blocks():
        prefix = f"model.layers.{index}"
        if depth:
            module = model.mtp[depth - 1]
            for name in ("enorm", "hnorm", "eh_proj"):
                yield f"{prefix}.{name}.weight", getattr(module, name), "weight"
            yield f"{prefix}.shared_head.norm.weight", module.norm, "weight"
        for path, part in block.named_modules():
            if isinstance(part, ExpertStore):
                continue
            for name, _ in (
                *part.named_parameters(recurse=False),
                *part.named_buffers(recurse=False),
            ):
                yield f"{prefix}.{path}.{name}", part, name


def _put(module: nn.Module, attribute: str, weight: Weight) -> None:
    """Set a weight. Codes take the place of the parameter."""
    if isinstance(weight, Codes):
        delattr(module, attribute)
        setattr(module, attribute, weight)
    elif attribute in module._buffers:
        module._buffers[attribute] = weight
    else:
        setattr(module, attribute, nn.Parameter(weight, requires_grad=False))


def _put_experts(model: Transformer, source: Source, cache: ExpertCache | None) -> None:
    for index, _, block in model.blocks():
        if not isinstance(block.mlp, MixtureOfExperts):
            continue
        prefix = f"model.layers.{index}.mlp.experts"

        def read(expert: int, prefix: str = prefix) -> Expert:
            names = (f"{prefix}.{expert}.{part}_proj.weight" for part in ("gate", "up", "down"))
            return Expert(*(source.read(name) for name in names))

        count = model.config.n_routed_experts
        if cache is None:
            block.mlp.experts.store = StoredExperts([read(expert) for expert in range(count)])
        else:
            block.mlp.experts.store = StoredExperts([])
            shared = block.mlp.shared_expert()
            block.mlp.places = LazyExperts(count, [shared], read, cache)
