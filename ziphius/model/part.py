"""What a process holds of a network: all of it, or the stretch of one pipeline stage."""

from __future__ import annotations

from dataclasses import dataclass

from ziphius.config.model import ModelConfig


@dataclass(frozen=True)
class Part:
    """Main blocks ``first`` to ``end - 1``, by global index, and whether the network's ends.

    The part that ``begins`` holds the embedding; the one that ``ends``, the final norm, the head
    and the MTP modules, which need an embedding too.
    """

    first: int
    end: int
    begins: bool
    ends: bool
    embeds: bool

    @classmethod
    def of(cls, config: ModelConfig, first: int, end: int, *, begins: bool, ends: bool) -> Part:
        """Return a stretch of main blocks with what belongs to it."""
        embeds = begins or (ends and config.num_nextn_predict_layers > 0)
        return cls(first, end, begins, ends, embeds)

    @classmethod
    def whole(cls, config: ModelConfig) -> Part:
        """Return everything."""
        return cls.of(config, 0, config.num_hidden_layers, begins=True, ends=True)
