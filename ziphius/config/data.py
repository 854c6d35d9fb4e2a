"""The [data] table: which text, how it is cleaned, and how it becomes rows (facts 6.2)."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from ziphius.config.moment import Moment, moment_tokens
from ziphius.config.table import Table

# A run so long that no two shares of it, as anybody writes them, are the same number of tokens.
_FINE = 10**9


class SourceConfig(Table):
    """One source of a mixture.

    ``path`` is ``stdlib`` (the interpreter's own standard library, without its tests), a file or a
    folder of text, JSON lines (also .gz and .zst) or Parquet, or ``hf:OWNER/NAME``, a dataset of
    the Hugging Face hub; ``hf:OWNER/NAME:CONFIG@SPLIT`` names its parts. A folder that ``ziphius
    prepare`` made is a whole mixture, and can only be the single source. ``weight`` is the source's
    share of the training tokens, relative to the other weights. ``text_field`` names the text in a
    record. Without ``holdout`` all of a source is trained on. Pre-training reads a source from
    ``begin`` to ``end`` of the run, numbers of tokens or shares such as ``"20%"``; weights count
    among those that are read at a time. A longer context is learned on the sources that are read to
    the end.
    """

    path: str = Field(min_length=1)
    weight: float = Field(1.0, gt=0)
    text_field: str = Field("text", min_length=1)
    holdout: bool = True
    begin: Moment = 0
    end: Moment = "100%"

    @model_validator(mode="after")
    def _is_read(self) -> SourceConfig:
        # Tokens and shares can only be compared in a run.
        comparable = isinstance(self.begin, int) == isinstance(self.end, int)
        if comparable and moment_tokens(self.begin, _FINE) >= moment_tokens(self.end, _FINE):
            raise ValueError(
                f"{self.path}: is never read from begin = {self.begin} to end = {self.end}: let it "
                "begin before it ends"
            )
        return self


class _Sources(Table):
    source: str = Field("stdlib", min_length=1)
    sources: tuple[SourceConfig, ...] = ()
    text_field: str = Field("text", min_length=1)
    holdout_every: int = Field(20, ge=2)
    holdout_bytes: int = Field(4_000_000, ge=1)
    tokenizer_bytes: int = Field(100_000_000, ge=1)


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

    Held out for validation, after duplicates are gone, are whole packages of a folder and single
    records, about one in ``holdout_every`` and at most ``holdout_bytes`` of each source, chosen by
    name so that the choice hardly moves. A tokenizer that has to be trained sees
    ``tokenizer_bytes`` of the mixture at most.

    With ``clean``, texts shorter than ``min_characters`` are removed, and those where more than
    ``max_repeated_lines`` of the lines repeat an earlier one. ``near`` removes texts whose sets of
    five-word sequences have an estimated Jaccard similarity of ``near_threshold`` or more.

    ``document_mask`` keeps attention inside documents; the report's pre-training does not.
    ``workers`` are threads that make batches ahead; the batches are the same for any number.
    """

    @property
    def mixture(self) -> tuple[SourceConfig, ...]:
        """The sources, however they were written."""
        if self.sources:
            return self.sources
        return (SourceConfig(path=self.source, text_field=self.text_field),)

    @property
    def preparation(self) -> dict[str, Any]:
        """The settings, as JSON, that prepared text depends on: not those of its rows."""
        return self.model_dump(mode="json", exclude=set(_Rows.model_fields))

    @model_validator(mode="after")
    def _holds_something_out(self) -> DataConfig:
        if not any(source.holdout for source in self.mixture):
            raise ValueError(
                "data.sources: all have holdout = false: hold something out of one, to validate on"
            )
        return self

    @model_validator(mode="after")
    def _one_way_of_naming_sources(self) -> DataConfig:
        if self.sources and (self.source, self.text_field) != ("stdlib", "text"):
            raise ValueError(
                "data.sources is the whole mixture: write data.source and data.text_field into "
                "one of its entries"
            )
        return self
