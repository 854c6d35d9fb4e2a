"""Which positions of a row are whose, by arithmetic alone.

Context parallelism cuts a row of T inputs into ``2 * cp`` chunks, of which rank r has number r and
number ``2 * cp - 1 - r``: later queries see more keys, so that the work is even. Within that, the
ranks of tensor parallelism have equal shares, neighbouring positions (sequence parallelism). At MTP
depth k everyone has what is left of its positions below T - k.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise

from ziphius.config.errors import BadInput


@dataclass(frozen=True)
class RowSplit:
    """How ``cp * tp`` ranks share a row."""

    cp: int = 1
    tp: int = 1

    def check(self, length: int, depth: int = 0) -> None:
        """Refuse rows of a length that cannot be shared so, at an MTP depth. Raises BadInput."""
        # Every place of cp then has a position, also at that depth.
        least = max(2 * self.cp * self.tp, 2 * depth) if self.cp > 1 else self.tp
        least = -(-least // self.tp) * self.tp
        if length < least:
            raise BadInput(
                f"rows of {length} tokens are too short for parallel.cp = {self.cp} and "
                f"parallel.tp = {self.tp} at MTP depth {depth}: use {least} or more"
            )
        if length % self.tp:
            raise BadInput(
                f"rows of {length} tokens do not divide among parallel.tp = {self.tp}: "
                f"use {length // self.tp * self.tp} or {-(-length // self.tp) * self.tp}"
            )

    def runs(self, length: int, cp: int) -> list[tuple[int, int]]:
        """Return first position and end of the stretches of a row that rank ``cp`` computes."""
        shares = length // self.tp  # every chunk divides among the ranks of tp
        edges = [self.tp * (j * shares // (2 * self.cp)) for j in range(2 * self.cp + 1)]
        chunks = list(pairwise(edges))
        return [chunks[cp], chunks[-1 - cp]]

    def joined_runs(self, length: int, depth: int, cp: int) -> list[tuple[int, int]]:
        """Return what is left of them at a depth."""
        end = length - depth
        found = [(first, min(stop, end)) for first, stop in self.runs(length, cp) if first < end]
        if len(found) == 2 and found[0][1] == found[1][0]:
            return [(found[0][0], found[1][1])]
        return found

    def joined(self, length: int, depth: int, cp: int) -> list[int]:
        """Return the positions of all ranks of tp at one place of cp, ascending."""
        return [p for run in self.joined_runs(length, depth, cp) for p in range(*run)]

    def own(self, length: int, depth: int, cp: int, tp: int) -> list[int]:
        """Return the positions of one rank, ascending."""
        whole = self.joined(length, 0, cp)
        share = len(whole) // self.tp
        return [p for p in whole[tp * share : (tp + 1) * share] if p < length - depth]


def spread(counts: list[int], room: int) -> list[int] | None:
    """Say where rows lie that come in parts, each with ``room``; None: one behind the other."""
    if all(count == room for count in counts):
        return None
    starts = accumulate([room] * (len(counts) - 1), initial=0)
    return [start + i for start, count in zip(starts, counts, strict=True) for i in range(count)]
