"""Routed experts as a checkpoint stores them: one by one, stacked, or read when they are chosen."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ziphius.kernels.mixture import Expert, Experts
from ziphius.kernels.quantize import TILE, Fp8
from ziphius.kernels.stored import Codes, Weight
from ziphius.model.experts import ExpertStore


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

    stacked = False

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
        return _named(self.experts)


class Fp8Experts(ExpertStore):
    """The experts' FP8 codes in stacks, ``[E, 2F, D]`` and ``[E, D, F]``; ``F`` is whole blocks.

    ``gate_up()`` and ``down()`` are the codes: products take them with their scales.
    """

    def __init__(self, gate_up: Fp8, down: Fp8) -> None:
        super().__init__()
        self.gate_up_blocks, self.down_blocks = gate_up, down
        self.n_experts = len(down.codes)
        self.slot_to_expert = tuple(range(self.n_experts))

    def gate_up(self) -> Tensor:
        return self.gate_up_blocks.codes

    def down(self) -> Tensor:
        return self.down_blocks.codes

    def in_memory(self) -> list[Expert]:
        F = self.down_blocks.codes.shape[-1]
        G, found = F // TILE, []
        both, down = self.gate_up_blocks, self.down_blocks
        for expert in range(self.n_experts):
            codes_GD, scales = both.codes[expert], both.scales[expert]
            matrices = (
                (codes_GD[:F], scales[:G]),
                (codes_GD[F:], scales[G:]),
                (down.codes[expert], down.scales[expert]),
            )
            coded = (Codes(c.view(torch.uint8), s, "fp8", TILE, TILE) for c, s in matrices)
            found.append(Expert(*coded))
        return found

    def named_experts(self) -> Iterator[tuple[str, Tensor]]:
        return _named(self.in_memory())


def _named(experts: list[Expert]) -> Iterator[tuple[str, Tensor]]:
    for number, expert in enumerate(experts):
        for name, weight in zip(("gate", "up", "down"), expert, strict=True):
            yield f"{number}.{name}_proj.weight", _dense(weight)


def _dense(weight: Weight) -> Tensor:
    return weight.decode(torch.bfloat16) if isinstance(weight, Codes) else weight
