"""The [data] table: which text, how it is cleaned, and how it becomes rows (facts 6.2)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ziphius.config.table import Table


class SourceConfig(Table):
    """One source of a mixture.

    ``path`` is ``stdlib`` (the interpreter's own standard library, without its tests), a file or a
    folder of text, JSONL (also .gz and .zst) or Parquet, a folder that ``ziphius prepare`` made, or
    ``hf:OWNER/NAME``, a dataset of the Hugging Face hub. ``weight`` is the source's share of the
    training tokens, relative to the other weights. ``text_field`` names the text in a record.
    """

    path: str
    weight: float = Field(1.0, gt=0)
    text_field: str = "text"


class _Sources(Table):
    source: str = "stdlib"
    sources: tuple[SourceConfig, ...] = ()
    text_field: str = "text"
    holdout_every: int = Field(20, ge=2)


class _Cleaning(Table):
    clean: bool = True
    min_characters: int = Field(1, ge=1)
    max_repeated_lines: float = Field(0.9, gt=0, le=1)
    deduplicate: Literal["none", "exact", "near"] = "near"
    near_threshold: float = Field(0.8, gt=0, le=1)


class _Rows(Table):
    fim_rate: float = Field(0.1, ge=0, le=1)
    token_split_rate: float = Field(0.1, ge=0, le=1)
    document_mask: bool = False
    workers: int = Field(1, ge=0)


class DataConfig(_Sources, _Cleaning, _Rows):
    """``source`` and ``text_field`` are short for one entry of ``sources``, the mixture.

    Whole packages are held out for validation after duplicates are gone, about one in
    ``holdout_every``, chosen by name so that the choice never moves. ``document_mask`` keeps
    attention inside documents; the report's pre-training does not. ``workers`` are threads that
    make batches ahead; the batches are the same for any number.
    """

    @property
    def mixture(self) -> tuple[SourceConfig, ...]:
        """The sources, however they were written."""
        if self.sources:
            return self.sources
        return (SourceConfig(path=self.source, text_field=self.text_field),)
