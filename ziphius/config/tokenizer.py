"""The [tokenizer] table."""

from __future__ import annotations

from pydantic import Field

from ziphius.config.table import Table


class TokenizerConfig(Table):
    """A tokenizer to train on the run's own text, or the path of one that exists.

    ``vocab_size`` counts special tokens; 256 of the rest are the bytes themselves.
    """

    vocab_size: int = Field(4096, ge=300)
    path: str | None = None
