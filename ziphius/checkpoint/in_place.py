"""A model whose weights stay as the checkpoint stores them: codes are multiplied where they lie."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ziphius.checkpoint.arena import Arena
from ziphius.checkpoint.compressed import Packed, is_packed
from ziphius.checkpoint.config_json import raw_config, read_config, stored_dtype, stored_form
from ziphius.checkpoint.expert_stores import (
    ExpertCache,
    Fp8Experts,
    LazyExperts,
    StoredExperts,
)
from ziphius.checkpoint.files import check_manifest
from ziphius.checkpoint.folder import checkpoint_folder
from ziphius.checkpoint.fp8 import is_quantized
from ziphius.checkpoint.huggingface import (
    Fp8Weight,
    WeightReader,
    as_dtype,
    check_vocabulary,
)
from ziphius.checkpoint.shards import ShardReader
from ziphius.config.errors import BadInput
from ziphius.kernels import fp8
from ziphius.kernels.integers import QuantizedWeight, group_width, groups
from ziphius.kernels.mixture import Expert
from ziphius.kernels.quantize import E4M3, TILE, Fp8, tile_count
from ziphius.kernels.select import TRITON, Kernels
from ziphius.kernels.stored import Codes, Weight
from ziphius.model.experts import ExpertStore, StackedExperts
from ziphius.model.ffn import MixtureOfExperts
from ziphius.model.layers import Linear
from ziphius.model.precision import Precision
from ziphius.model.transformer import Transformer
from ziphius.model.weights import ROUTING_BIAS

FORMS = {8: "int8", 4: "int4"}
STEP = 32  # columns that products take at a time: groups are whole ones
ON_GPU = (torch.bfloat16, torch.float32)
Form = tuple[int, int] | Packed  # the block of FP8, or packed integers


@dataclass
class Loaded:
    """A model that answers, and what it took. ``close`` frees the files of lazy experts."""

    model: Transformer
    weight_bytes: int
    experts: ExpertCache | None
    reader: ShardReader
    notes: list[str] = field(default_factory=list)  # of weights that are held otherwise

    def close(self) -> None:
        """Close the checkpoint's files; experts that are not in memory can't be read any more."""
        self.reader.close()


def load_in_place(
    path: str | Path,
    kernels: Kernels,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str = "cpu",
    *,
    mtp: bool = True,
    verify: bool = True,
    expert_bytes: int | None = None,
    in_fp8: bool = False,
) -> Loaded:
    """Read a checkpoint for answering; quantised matrices keep their codes in memory.

    ``dtype`` is what activations are computed in and plain weights are stored in. Weights go to
    ``device`` one by one, as they are read. With ``expert_bytes`` routed experts are read when a
    token first chooses them, and at most so many bytes of them are kept (those of one layer's step
    always are). ``kernels`` compute in place. ``in_fp8`` multiplies a checkpoint in FP8 as it was
    trained: activations are quantised too.

    Raises BadInput as ``load`` does, and for ``expert_bytes`` where no kernel takes experts in
    place.
    """
    folder = checkpoint_folder(Path(path))
    raw, config = raw_config(folder), read_config(folder, mtp=mtp)
    check_vocabulary(folder, config)
    chosen = as_dtype(dtype) if dtype else stored_dtype(raw)
    form = stored_form(raw)
    precision = Precision.for_inference(chosen)
    if in_fp8 and isinstance(form, tuple):
        whole = raw["quantization_config"].get("scale_fmt") == "ue8m0"
        precision = replace(precision, fp8=True, power_of_two=whole)
    if kernels.latent == TRITON and chosen not in ON_GPU:
        name = str(chosen).removeprefix("torch.")
        raise BadInput(f"dtype = {name}: GPUs' kernels compute in bfloat16 or float32: say which")
    if expert_bytes is not None and kernels.function("mixture") is None:
        raise BadInput(
            "experts that are read when they are chosen need kernels that take them in place: "
            "leave expert_bytes (--lazy-experts) out, or answer on processors in exact mode"
        )
    reader = ShardReader(folder)
    try:
        check_manifest(folder, checksums=verify, only=reader.files())
        weights = WeightReader(reader, config, form)
        weights.require_complete(skip_mtp=not mtp)
        model = Transformer(config, precision, kernels=kernels, device="meta").eval()
        source = Source(weights, chosen, torch.device(device))
        for name, module, attribute in _places(model):
            _put(module, attribute, source.read(name))
        cache = None
        if expert_bytes is not None:
            # Experts come and go: each has memory of its own.
            cache, source.arena = ExpertCache(expert_bytes), None
        notes = _put_experts(model, source, cache)
    except BaseException:
        reader.close()
        raise
    if cache is None:
        reader.close()
    return Loaded(model.requires_grad_(False), source.bytes, cache, reader, notes)


class Source:
    """Weights as products take them: tensors of one dtype, or codes; in an arena, on processors."""

    def __init__(self, weights: WeightReader, dtype: torch.dtype, device: torch.device) -> None:
        self.weights, self.dtype, self.device = weights, dtype, device
        self.arena = Arena() if device.type == "cpu" else None
        self.bytes = 0  # held so far

    def read(self, name: str) -> Weight:
        """Return one weight. Codes of a shape that products can't take become numbers."""
        weight = self.weight(name)
        self.bytes += weight.nbytes
        if self.arena is None:
            return weight.to(self.device)
        if isinstance(weight, Codes):
            return replace(weight, data=self.arena.place(weight.data))
        return self.arena.place(weight)

    def weight(self, name: str) -> Weight:
        """Return one weight where it was read."""
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


def _places(model: Transformer) -> Iterator[tuple[str, nn.Module, str]]:
    """Yield (Hugging Face name, module, attribute) of every weight but the routed experts'."""
    yield "model.embed_tokens.weight", model.embed_tokens, "weight"
    yield "model.norm.weight", model.norm, "weight"
    yield "lm_head.weight", model.lm_head, "weight"
    if model.config.num_labels:
        yield "score.weight", model.score, "weight"
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
    if isinstance(module, Linear) and not (isinstance(weight, Codes) and weight.form == "fp8"):
        module.fp8 = None
    if isinstance(weight, Codes):
        delattr(module, attribute)
        setattr(module, attribute, weight)
    elif attribute in module._buffers:
        module._buffers[attribute] = weight
    else:
        setattr(module, attribute, nn.Parameter(weight, requires_grad=False))


def _put_experts(model: Transformer, source: Source, cache: ExpertCache | None) -> list[str]:
    """Set the routed experts of every layer; return what is to be said of them."""
    notes: dict[str, None] = {}
    for index, _, block in model.blocks():
        if not isinstance(block.mlp, MixtureOfExperts):
            continue
        layer = LayerExperts(source, f"model.layers.{index}.mlp.experts", model)
        if cache is not None:
            block.mlp.experts.store = StoredExperts([])
            shared = block.mlp.shared_expert()
            block.mlp.places = LazyExperts(layer.count, [shared], layer.read, cache)
        elif block.mlp.mixture is not None or not (layer.plain or layer.in_fp8):
            experts = [layer.read(expert) for expert in range(layer.count)]
            block.mlp.experts.store = StoredExperts(experts)
        elif layer.in_fp8 and layer.whole_blocks:
            store = layer.coded_stacks()
            block.mlp.experts.store = store
            for form, blocks in (("gate_up", store.gate_up_blocks), ("down", store.down_blocks)):
                weight = fp8.Fp8Weight(blocks, None)
                block.mlp.experts.derived.put(form, blocks.codes, weight)
        else:
            block.mlp.experts.store = layer.stacks()
            block.mlp.experts.fp8 = None
            if not layer.plain:
                notes[layer.note] = None
    return list(notes)


class LayerExperts:
    """The routed experts of one layer in a checkpoint."""

    def __init__(self, source: Source, prefix: str, model: Transformer) -> None:
        self.source, self.prefix = source, prefix
        self.config, self.precision = model.config, model.precision
        self.count = model.config.n_routed_experts
        names = source.weights.names
        every = [name for expert in range(self.count) for name in self.names(expert)]
        coded = [is_packed(name, names) or is_quantized(name, names) for name in every]
        self.plain = not any(coded)
        self.in_fp8 = self.precision.fp8 and all(coded)
        self.whole_blocks = self.config.moe_intermediate_size % TILE == 0

    @property
    def note(self) -> str:
        """What to say where FP8 codes can't be stacked."""
        width = self.config.moe_intermediate_size
        return f"experts are held as numbers: their width {width} is no multiple of {TILE}"

    def names(self, expert: int) -> list[str]:
        """Return the names of an expert's gate, up and down projections."""
        return [f"{self.prefix}.{expert}.{part}_proj.weight" for part in ("gate", "up", "down")]

    def read(self, expert: int) -> Expert:
        """Return an expert as it is stored."""
        return Expert(*map(self.source.read, self.names(expert)))

    def stacks(self) -> StackedExperts:
        """Return all experts as numbers, in stacks."""
        store = StackedExperts(self.config, self.precision, self.source.device)
        store.requires_grad_(False)
        for expert, held in enumerate(store.in_memory()):
            for name, place in zip(self.names(expert), held, strict=True):
                assert isinstance(place, Tensor), "stacks hold numbers"
                weight = self.source.weight(name).to(self.source.device)
                place.copy_(weight.decode(place.dtype) if isinstance(weight, Codes) else weight)
                self.source.bytes += place.nbytes
        return store

    def coded_stacks(self) -> Fp8Experts:
        """Return the FP8 codes of all experts, in stacks."""
        E, F, D = self.count, self.config.moe_intermediate_size, self.config.hidden_size
        store = Fp8Experts(self._room(E, 2 * F, D), self._room(E, D, F))
        for expert, held in enumerate(store.in_memory()):
            for name, place in zip(self.names(expert), held, strict=True):
                weight = self.source.weight(name)
                assert isinstance(weight, Codes), "all of them are"
                assert isinstance(place, Codes), "stacks of codes"
                place.data.copy_(weight.data)
                place.scales.copy_(weight.scales)
                self.source.bytes += weight.nbytes
        return store

    def _room(self, experts: int, rows: int, columns: int) -> Fp8:
        codes = torch.empty(experts, rows, columns, dtype=E4M3, device=self.source.device)
        blocks = (tile_count(rows), tile_count(columns))
        return Fp8(codes, torch.empty(experts, *blocks, device=self.source.device), TILE)
