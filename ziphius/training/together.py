"""What one rank does for all: it decides, the others hear of it, or that it has failed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ziphius.config.errors import ZiphiusError, in_one_line
from ziphius.parallel.agree import gather_json, share_json
from ziphius.parallel.collectives import Axis


class Elsewhere(ZiphiusError):
    """Another rank has failed, and says itself why."""

    told = True


def by_first(axis: Axis, do: Callable[[], Any]) -> Any:
    """Let the first rank of an axis do something; all return what it gives, a value of JSON.

    Where it raises something, the others raise Elsewhere, with the same exit code.
    """
    if axis.place:
        told = share_json(axis, None)
        if told["failed"]:
            raise _elsewhere(axis.ranks[0], told["failed"])
        return told["value"]
    try:
        value = do()
    except Exception as error:
        share_json(axis, {"failed": _described(error)})
        raise
    share_json(axis, {"failed": None, "value": value})
    return value


def from_all(axis: Axis, value: Any, failure: ZiphiusError | None) -> list[Any]:
    """Return the value of every rank of an axis, of JSON, if none has failed.

    Raises this rank's own ``failure``; where another has failed, Elsewhere.
    """
    told = gather_json(axis, [value, failure and _described(failure)])
    if failure is not None:
        raise failure
    for rank, (_, failed) in zip(axis.ranks, told, strict=True):
        if failed is not None:
            raise _elsewhere(rank, failed)
    return [other for other, _ in told]


def _elsewhere(rank: int, failed: dict[str, Any]) -> Elsewhere:
    """Return the failure of another rank as this one raises it."""
    failure = Elsewhere(f"rank {rank} has failed: {failed['text']}")
    failure.exit_code = failed["exit_code"]
    return failure


def _described(error: Exception) -> dict[str, Any]:
    code = error.exit_code if isinstance(error, ZiphiusError) else ZiphiusError.exit_code
    return {"text": in_one_line(error), "exit_code": code}
