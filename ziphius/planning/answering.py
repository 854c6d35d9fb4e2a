"""What ``LLM`` will hold of a checkpoint, item by item, and how long loading it takes.

Weights are counted as ``checkpoint/in_place.py`` holds them: codes as the file has them, with FP32
scales, everything else in the dtype of the answers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from ziphius.checkpoint import keys
from ziphius.checkpoint.arena import block_bytes
from ziphius.checkpoint.compressed import is_packed
from ziphius.checkpoint.config_json import raw_config, read_config, stored_dtype, stored_form
from ziphius.checkpoint.files import MANIFEST
from ziphius.checkpoint.folder import checkpoint_folder
from ziphius.checkpoint.fp8 import is_quantized
from ziphius.checkpoint.huggingface import as_dtype
from ziphius.checkpoint.in_place import held_bytes, product_group
from ziphius.checkpoint.shards import ShardReader
from ziphius.config.errors import BadInput
from ziphius.config.model import ModelConfig
from ziphius.planning import memory
from ziphius.planning.machine import Free, Rates, free_memory, measure_rates
from ziphius.planning.memory import ITEMS, ROUTED, item_of, shown

GIVEN = "as given"
# Of what is free, experts may take this much: the working memory is an estimate.
EXPERTS_SHARE = 0.9
TENSOR_SECONDS = 2e-4  # what reading a tensor takes, however small it is


class Row(NamedTuple):
    """A line of the table."""

    name: str
    value: str
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What the engine is asked for: room in tokens, and the limits of a step."""

    cache_tokens: int
    step_tokens: int
    rows: int  # that choose a token in a step, drafts included
    kept_bytes: int = 0  # at most, of small steps that are kept to be repeated
    kept_tokens: int = 0  # of the largest of them


@dataclass(frozen=True, kw_only=True)
class AnsweringPlan:
    """Bytes that a checkpoint takes while it answers, and what is free for them.

    ``weights`` has a place for each of ``ITEMS``; of lazy experts it has what is kept of them, and
    ``routed_bytes`` what all would take. ``absorbed`` is what attention over the latent cache
    derives from ``kv_b_proj``, ``blocks`` the unused ends of memory blocks, ``working`` an upper
    estimate of what a step or loading takes besides, ``kept`` one of the results of small steps
    that are kept to be repeated. ``free`` is None where nobody says.
    """

    path: Path
    form: str
    dtype: str
    weights: dict[str, int]
    routed_bytes: int
    least_experts: int
    lazy: bool
    blocks: int
    absorbed: int
    rotary: int
    cache_token_bytes: int
    cache_tokens: int
    working: int
    kept: int
    free: Free | None
    read_bytes: int
    tensors: int
    checked: bool
    rates: Rates | None

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights in memory."""
        return sum(self.weights.values())

    @property
    def cache_bytes(self) -> int:
        """Bytes of the latent cache that is asked for."""
        return self.cache_tokens * self.cache_token_bytes

    @property
    def fixed_bytes(self) -> int:
        """Bytes of everything but the cache."""
        derived = self.absorbed + self.rotary
        return self.weight_bytes + self.blocks + derived + self.working + self.kept

    @property
    def total_bytes(self) -> int:
        """Bytes of everything."""
        return self.fixed_bytes + self.cache_bytes

    @property
    def fits(self) -> bool:
        """Whether everything fits in what is free; true where nobody says."""
        return self.free is None or self.total_bytes <= self.free.bytes

    @property
    def most_cache_tokens(self) -> int | None:
        """Tokens of cache that fit beside the rest."""
        if self.free is None:
            return None
        return max(0, self.free.bytes - self.fixed_bytes) // self.cache_token_bytes

    @property
    def expert_room(self) -> int:
        """Bytes that lazy experts may take. Raises BadInput where one layer's do not fit."""
        if self.free is None:
            raise BadInput("this system does not say how much memory is free: give experts a size")
        others = self.total_bytes - self.weights[ROUTED]
        room = int(EXPERTS_SHARE * (self.free.bytes - others))
        if room < self.least_experts:
            raise BadInput(
                f"{self.path}: without routed experts it takes {shown(others)}, and of "
                f"{shown(self.free.bytes)} {self.free.basis} not enough is left for those of one "
                f"layer, {shown(self.least_experts)}: ask for fewer cache tokens"
            )
        return min(room, self.routed_bytes)

    @property
    def load_seconds(self) -> float | None:
        """How long loading takes by the measured rates; lazy experts are not read for it.

        With checksums every file is read, then the weights once more from the system's cache.
        """
        if self.rates is None:
            return None
        kept = self.weight_bytes - (self.weights[ROUTED] if self.lazy else 0)
        part = kept / (kept + self.routed_bytes) if self.lazy else 1.0
        placing = kept / self.rates.copied + part * self.tensors * TENSOR_SECONDS
        if self.checked:
            each_byte = 1 / self.rates.read + 1 / self.rates.hashed
            return self.read_bytes * each_byte + kept / self.rates.copied + placing
        return part * self.read_bytes / self.rates.read + placing

    def rows(self) -> Iterator[Row]:
        """Yield the lines of a table: weights, what comes to them, and what follows."""
        for name, size in self.weights.items():
            if size:
                lazily = self.lazy and name == ROUTED
                note = f"of {shown(self.routed_bytes)}, read when chosen" * lazily
                yield Row(name, shown(size), note)
        yield Row("weights", shown(self.weight_bytes), self._as_held())
        yield Row("ends of memory blocks", shown(self.blocks))
        yield Row("absorbed projections", shown(self.absorbed), "of attention over the cache")
        yield Row("rotary tables", shown(self.rotary))
        tokens = f"{self.cache_tokens:,} tokens of {self.cache_token_bytes:,} B"
        yield Row("latent cache", shown(self.cache_bytes), tokens)
        yield Row("working memory", shown(self.working), "at most, by estimate")
        if self.kept:
            yield Row("repeated steps", shown(self.kept), "at most, by estimate")
        yield Row("together", shown(self.total_bytes), self._verdict())
        if self.free is not None:
            yield Row("memory", shown(self.free.bytes), self.free.basis)
            yield Row("cache tokens that fit", f"{self.most_cache_tokens:,}")
        yield Row("bytes to read", shown(self.read_bytes), "checksums too" * self.checked)
        if self.load_seconds is not None and self.rates is not None:
            basis = f"estimate: a sample came at {shown(int(self.rates.read))}/s"
            yield Row("load time", f"{self.load_seconds:,.1f} s", basis)

    def table(self) -> str:
        """Return the plan as lines of text."""
        rows = list(self.rows())
        first, second = (max(len(row[i]) for row in rows) for i in (0, 1))
        lines = [f"  {name:{first}}  {value:>{second}}  {note}" for name, value, note in rows]
        return "\n".join([str(self.path), *(line.rstrip() for line in lines)])

    def _as_held(self) -> str:
        return self.dtype if self.form == "plain" else f"{self.form}, the rest {self.dtype}"

    def _verdict(self) -> str:
        if self.free is None:
            return ""
        if self.fits:
            return "fits"
        return f"does not fit: {shown(self.total_bytes - self.free.bytes)} more are needed"


def plan_answering(
    path: str | Path,
    work: Work,
    *,
    dtype: torch.dtype | str | None = None,
    mtp: bool = True,
    verify: bool = True,
    expert_bytes: int | None = None,
    memory_bytes: int | None = None,
) -> AnsweringPlan:
    """Plan the memory of a checkpoint that answers, from its headers and a sample of its bytes.

    Arguments are those of ``load_in_place``; ``memory_bytes`` takes the place of what is free here.
    Raises BadInput for a folder that is no complete checkpoint, and for impossible numbers.
    """
    stored = memory.plan(path, memory_bytes=memory_bytes, mtp=mtp)
    folder = checkpoint_folder(Path(path))
    raw, config = raw_config(folder), read_config(folder, mtp=mtp)
    chosen = as_dtype(dtype) if dtype else stored_dtype(raw)
    lazy = expert_bytes is not None
    held = _Held(folder, config, chosen, lazy=lazy)
    weights = held.items()
    routed = weights[ROUTED]
    # All experts of a layer may be met in one step.
    layers = config.num_hidden_layers + config.num_nextn_predict_layers
    least = routed // max(1, layers - config.first_k_dense_replace)
    if expert_bytes is not None:
        weights[ROUTED] = min(routed, max(expert_bytes, least))
    free = free_memory() if memory_bytes is None else Free(memory_bytes, GIVEN)
    return AnsweringPlan(
        path=folder,
        form=held.form,
        dtype=str(chosen).removeprefix("torch."),
        weights=weights,
        routed_bytes=routed,
        least_experts=least,
        lazy=lazy,
        blocks=held.unused(),
        absorbed=held.absorbed() * layers,
        rotary=config.max_position_embeddings * config.qk_rope_head_dim
        * torch.promote_types(chosen, torch.float32).itemsize,
        cache_token_bytes=layers * (config.kv_lora_rank + config.qk_rope_head_dim)
        * chosen.itemsize,
        cache_tokens=work.cache_tokens,
        working=max(_step_bytes(config, chosen, work), 2 * held.largest),
        kept=0 if lazy else _kept_bytes(config, chosen, work) * layers,
        free=free,
        read_bytes=stored.read_bytes,
        tensors=held.tensors,
        checked=verify and (folder / MANIFEST).is_file(),
        rates=measure_rates(folder / name for name in held.files),
    )  # fmt: skip


class _Held:
    """The weights of a checkpoint as they will lie in memory."""

    def __init__(
        self, folder: Path, config: ModelConfig, dtype: torch.dtype, *, lazy: bool
    ) -> None:
        self.config, self.dtype, self.lazy = config, dtype, lazy
        form = stored_form(raw_config(folder))
        self.sizes: dict[str, int] = {}
        self.coded = False  # the matrix that is absorbed
        with ShardReader(folder) as reader:
            self.files, names = reader.files(), reader.names()
        self.tensors = len(names)
        for name, shape in keys.expected_shapes(config).items():
            own = form if is_packed(name, names) or is_quantized(name, names) else None
            self.sizes[name] = held_bytes(name, shape, own, dtype)
            if name.endswith("kv_b_proj.weight"):
                self.coded = own is not None and product_group(own, shape) is not None
        self.form = "plain"
        if form is not None:
            self.form = "fp8 codes" if isinstance(form, tuple) else f"int{form.bits} codes"

    def items(self) -> dict[str, int]:
        """Return the bytes of each of ``ITEMS``. Lazy experts of MTP modules are routed ones."""
        items = dict.fromkeys(ITEMS, 0)
        for name, size in self.sizes.items():
            lazily = self.lazy and _is_routed(name)
            items[ROUTED if lazily else item_of(name, self.config)] += size
        return items

    def unused(self) -> int:
        """Return the bytes of memory blocks that hold no weight. Lazy experts lie outside."""
        placed = [size for name, size in self.sizes.items() if not _is_routed(name)]
        if not self.lazy:
            placed += [size for name, size in self.sizes.items() if _is_routed(name)]
        return block_bytes(placed) - sum(placed)

    def absorbed(self) -> int:
        """Return the bytes that a layer derives from ``kv_b_proj``: the keys' part turned.

        Codes are decoded for it, and the values' part keeps all of that in memory.
        """
        c = self.config
        widths = c.qk_nope_head_dim + (c.qk_nope_head_dim + c.v_head_dim if self.coded else 0)
        return c.num_attention_heads * c.kv_lora_rank * widths * self.dtype.itemsize

    @property
    def largest(self) -> int:
        """Bytes of the largest weight, which is in memory twice while it is read."""
        return max(self.sizes.values())


def _is_routed(name: str) -> bool:
    return ".mlp.experts." in name


def _step_bytes(c: ModelConfig, dtype: torch.dtype, work: Work) -> int:
    """Estimate what the widest point of a step holds besides weights and cache."""
    H, D, latent = c.num_attention_heads, c.hidden_size, c.kv_lora_rank
    attention = H * (2 * latent + c.qk_rope_head_dim + c.v_head_dim)
    dense = 3 * c.intermediate_size
    places = c.num_experts_per_tok + c.n_shared_experts
    mixture = places * (c.moe_intermediate_size + D)
    high = torch.promote_types(dtype, torch.float32).itemsize
    logits = work.rows * c.vocab_size * (dtype.itemsize + 2 * high)
    return work.step_tokens * (4 * D + max(attention, dense, mixture)) * dtype.itemsize + logits


def _kept_bytes(c: ModelConfig, dtype: torch.dtype, work: Work) -> int:
    """Estimate a layer's part of the steps of all small sizes (``inference/repeat.py``)."""
    H, D, latent = c.num_attention_heads, c.hidden_size, c.kv_lora_rank
    heads = H * (2 * latent + c.qk_head_dim + c.qk_rope_head_dim + c.v_head_dim)
    attention = 2 * (c.q_lora_rank or 0) + latent + c.qk_rope_head_dim + heads
    high = torch.promote_types(dtype, torch.float32).itemsize
    mixture = (D + 2 * c.n_routed_experts) * high + c.num_experts_per_tok * (8 + high)
    dense = 3 * c.intermediate_size * dtype.itemsize
    token = (7 * D + attention) * dtype.itemsize + max(mixture, dense)
    layers = c.num_hidden_layers + c.num_nextn_predict_layers
    sizes = work.kept_tokens * (work.kept_tokens + 1) // 2
    return min(work.kept_bytes // layers, token * sizes)
