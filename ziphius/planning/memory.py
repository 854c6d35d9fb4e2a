"""What a checkpoint will need before it is loaded: bytes by item, room for the cache, time to read.

Everything comes from ``config.json`` and the headers of the weight files.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from ziphius.checkpoint import keys
from ziphius.checkpoint.compressed import packed_parts
from ziphius.checkpoint.config_json import raw_config, read_config, stored_form
from ziphius.checkpoint.folder import checkpoint_folder
from ziphius.checkpoint.fp8 import SCALE_SUFFIX
from ziphius.checkpoint.huggingface import as_dtype, stored_as
from ziphius.checkpoint.shards import ShardReader
from ziphius.config.errors import BadInput
from ziphius.config.model import ModelConfig

STORED = "stored"
EMBEDDING, HEAD, ATTENTION, DENSE = "embedding", "output head", "attention", "dense feed-forward"
SHARED, ROUTED, MTP, REST = "shared experts", "routed experts", "MTP modules", "norms and routers"
ITEMS = (EMBEDDING, HEAD, ATTENTION, DENSE, SHARED, ROUTED, MTP, REST)


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes in memory by item, and what follows from them.

    ``items`` has a place for each of ``ITEMS``. ``cache_token_bytes`` is a token's part of the
    latent cache. ``cache_tokens`` is how many fit beside the weights in ``memory_bytes``, and
    ``load_seconds`` what reading ``read_bytes`` takes; both are ``None`` where no limit or
    bandwidth was given.
    """

    path: Path
    weights: str
    items: dict[str, int]
    read_bytes: int
    cache_token_bytes: int
    memory_bytes: int | None
    cache_tokens: int | None
    load_seconds: float | None

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights in memory."""
        return sum(self.items.values())

    @property
    def fits(self) -> bool:
        """Whether the weights and at least one token of cache fit in the limit, if there is one."""
        return self.cache_tokens is None or self.cache_tokens > 0

    def table(self) -> str:
        """Return the plan as lines of text."""
        lines = [(name, shown(size)) for name, size in self.items.items() if size]
        lines.append((f"weights, {self.weights}", shown(self.weight_bytes)))
        lines.append(("cache, a token", f"{self.cache_token_bytes:,} B"))
        if self.memory_bytes is not None:
            lines.append(("memory limit", shown(self.memory_bytes)))
            lines.append(("cache tokens that fit", f"{self.cache_tokens:,}"))
        lines.append(("bytes to read", shown(self.read_bytes)))
        if self.load_seconds is not None:
            lines.append(("expected load time", f"{self.load_seconds:,.1f} s"))
        first, second = (max(len(line[i]) for line in lines) for i in (0, 1))
        rows = [f"  {name:{first}}  {value:>{second}}" for name, value in lines]
        if self.memory_bytes is not None and not self.fits:
            missing = self.weight_bytes + self.cache_token_bytes - self.memory_bytes
            rows.append(f"  does not fit: {shown(missing)} more are needed for the first token")
        return "\n".join([str(self.path), *rows])


def plan(
    path: str | Path,
    *,
    weights: torch.dtype | str = STORED,
    cache: torch.dtype | str = torch.bfloat16,
    memory_bytes: int | None = None,
    read_bandwidth: float | None = None,
    mtp: bool = True,
) -> MemoryPlan:
    """Plan the memory of a checkpoint folder, whatever form its weights have.

    ``weights`` is ``stored``, for engines that compute on codes as the file has them, or the dtype
    that everything is turned into. ``cache`` is the dtype of the latent cache, which covers main
    layers and MTP modules. ``memory_bytes`` limits weights and cache together; ``read_bandwidth``
    is a measured one, in bytes a second. ``mtp=False`` leaves MTP modules out.

    Raises BadInput for a folder that is no complete checkpoint, and for impossible numbers.
    """
    if memory_bytes is not None and memory_bytes < 0:
        raise BadInput(f"memory limit = {memory_bytes}: use 0 or more bytes")
    if read_bandwidth is not None and not read_bandwidth > 0:
        raise BadInput(f"read bandwidth = {read_bandwidth}: use more than 0 bytes a second")
    dtype = None if weights == STORED else as_dtype(weights)
    folder = checkpoint_folder(Path(path))
    config = read_config(folder, mtp=mtp)
    stored_form(raw_config(folder))
    items, read = _weigh(folder, config, dtype, skip_mtp=not mtp)
    layers = config.num_hidden_layers + config.num_nextn_predict_layers
    width = config.kv_lora_rank + config.qk_rope_head_dim
    token = width * layers * as_dtype(cache).itemsize
    room = None if memory_bytes is None else max(0, memory_bytes - sum(items.values()))
    return MemoryPlan(
        folder,
        STORED if dtype is None else str(dtype).removeprefix("torch."),
        items,
        read,
        token,
        memory_bytes,
        None if room is None else room // token,
        None if read_bandwidth is None else read / read_bandwidth,
    )


def _weigh(
    folder: Path, config: ModelConfig, dtype: torch.dtype | None, *, skip_mtp: bool
) -> tuple[dict[str, int], int]:
    """Return the bytes in memory of every item, and the bytes to read for them.

    The copies beside MTP modules are read, to see that they are copies, and not kept.
    """
    items, read = dict.fromkeys(ITEMS, 0), 0
    with ShardReader(folder) as reader:
        names = {n for n in reader.names() if not (skip_mtp and keys.is_mtp(n, config))}
        comparison = keys.compare(names, config)
        keys.require_complete(comparison, config, str(folder))
        copies = keys.shared_copies(config)
        for name in comparison.used:
            size = reader.shape(name).numel() * reader.dtype(name).itemsize
            read += size
            weight = packed_parts(names, name) or name.removesuffix(SCALE_SUFFIX)
            if dtype is None and weight not in copies:
                items[item_of(weight, config)] += size
    if dtype is not None:
        for name, shape in keys.expected_shapes(config).items():
            size = torch.Size(shape).numel() * stored_as(name, dtype).itemsize
            items[item_of(name, config)] += size
    return items, read


def item_of(name: str, config: ModelConfig) -> str:
    """Return which of ``ITEMS`` a weight belongs to."""
    if keys.is_mtp(name, config):
        return MTP
    if not name.endswith(("proj.weight", "kv_a_proj_with_mqa.weight")):
        return {"model.embed_tokens.weight": EMBEDDING, "lm_head.weight": HEAD}.get(name, REST)
    for part, item in (
        (".self_attn.", ATTENTION),
        (".mlp.experts.", ROUTED),
        (".mlp.shared_experts.", SHARED),
    ):
        if part in name:
            return item
    return DENSE


def shown(size: int) -> str:
    """Show bytes in the largest unit of which there is at least one."""
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if size >= unit:
            return f"{size / unit:,.2f} {name}"
    return f"{size:,} B"
