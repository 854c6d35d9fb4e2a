"""The [data] table."""

from __future__ import annotations

from pydantic import Field

from ziphius.config.table import Table


class DataConfig(Table):
    """Where the text comes from.

    ``source`` is ``stdlib`` (the interpreter's own standard library, without its tests) or the
    path of a text file or of a folder of them. Whole packages are held out for validation, about
    one in ``holdout_every``, chosen by name so that the choice never moves.
    """

    source: str = "stdlib"
    holdout_every: int = Field(20, ge=2)
