"""The responses that were given, so that a later request can go on from one."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from ziphius.serving.errors import ApiError


@dataclass(frozen=True)
class Kept:
    """A response and the conversation with it, both as JSON; ``owner`` is whose key made it."""

    owner: str
    response: bytes
    items: bytes

    @property
    def size(self) -> int:
        """How many bytes it has."""
        return len(self.response) + len(self.items)


class ResponseStore:
    """Keeps the responses that were used last, in memory, within bounds."""

    def __init__(self, most: int, most_bytes: int) -> None:
        self._most, self._most_bytes = most, most_bytes
        self._kept: OrderedDict[str, Kept] = OrderedDict()
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._kept)

    def put(self, response_id: str, kept: Kept) -> None:
        """Keep a response. One that alone is beyond the bounds is not kept."""
        self._drop(response_id)
        if kept.size > self._most_bytes:
            return
        self._kept[response_id] = kept
        self.bytes += kept.size
        while len(self._kept) > self._most or self.bytes > self._most_bytes:
            self._drop(next(iter(self._kept)))

    def get(self, response_id: str, owner: str, *, param: str = "response_id") -> Kept:
        """Return a response. Raises ApiError for one that is not here, or is another's."""
        kept = self._kept.get(response_id)
        if kept is None or kept.owner != owner:
            raise ApiError(
                404,
                f"response '{response_id[:100]}' is not here: it was never stored, or has made "
                "room for newer ones",
                code="previous_response_not_found" if param == "previous_response_id" else None,
                param=param,
            )
        self._kept.move_to_end(response_id)
        return kept

    def delete(self, response_id: str, owner: str) -> None:
        """Forget a response. Raises ApiError as ``get`` does."""
        self.get(response_id, owner)
        self._drop(response_id)

    def _drop(self, response_id: str) -> None:
        kept = self._kept.pop(response_id, None)
        if kept is not None:
            self.bytes -= kept.size
