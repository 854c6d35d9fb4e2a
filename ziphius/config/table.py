"""What every table of a recipe has in common: frozen, complete, and strict about its keys."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from ziphius.config.errors import BadInput

T = TypeVar("T", bound="Table")


class Table(BaseModel):
    """One table of a recipe. An unknown key is an error that names the nearest known one."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False, allow_inf_nan=False)


def nearest(key: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the known name nearest to ``key``, else the choices."""
    known = sorted(known)
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else f"; known: {', '.join(known)}"


def build(table: type[T], values: Mapping[str, Any], where: str) -> T:
    """Validate ``values`` as ``table``.

    ``where`` names the source (a file, a preset) and begins the message.
    Raises BadInput with every problem in one line.
    """
    try:
        return table.model_validate(dict(values))
    except ValidationError as error:
        problems = "; ".join(_describe(table, detail) for detail in error.errors())
        raise BadInput(f"{where}: {problems}") from None


def _describe(table: type[BaseModel], detail: Any) -> str:
    location = [str(part) for part in detail["loc"] if isinstance(part, str)]
    name = ".".join(location)
    if detail["type"] == "extra_forbidden":
        owner = _owner(table, location[:-1])
        return f"unknown key '{name}'{nearest(location[-1], owner.model_fields)}"
    message = detail["msg"].removeprefix("Value error, ")
    if detail["type"] == "value_error":
        return f"{name}: {message}" if name else message
    return f"{name} = {detail['input']!r}: {message}"


def _owner(table: type[BaseModel], path: list[str]) -> type[BaseModel]:
    """Walk from ``table`` to the sub-table that ``path`` names."""
    for part in path:
        field = table.model_fields.get(part)
        if field is None:
            continue
        for candidate in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if isinstance(candidate, type) and issubclass(candidate, BaseModel):
                table = candidate
    return table
