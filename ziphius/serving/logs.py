"""The server's log: lines for people, or JSON for machines. No prompt, answer or key is in it."""

from __future__ import annotations

import logging
import sys
from typing import Any


class PlainFormatter(logging.Formatter):
    """A line a record; what a record carries in ``fields`` follows as name=value."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(message)s", "%H:%M:%S")

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        fields: dict[str, Any] = getattr(record, "fields", {})
        told = " ".join(f"{name}={_shown(value)}" for name, value in fields.items())
        return f"{super().format(record)} {told}".rstrip()


def set_up(*, as_json: bool, level: str = "INFO") -> None:
    """Send our records and uvicorn's to the standard error; of uvicorn's what matters."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_json_formatter() if as_json else PlainFormatter())
    for name, lowest in (("ziphius", level), ("uvicorn", "WARNING")):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.propagate = False
        logger.setLevel(lowest)


def _json_formatter() -> logging.Formatter:
    from pythonjsonlogger.json import JsonFormatter

    class Flat(JsonFormatter):
        """Puts what a record carries in ``fields`` beside the message."""

        def process_log_record(self, log_record: dict[str, Any]) -> dict[str, Any]:
            return super().process_log_record({**log_record, **log_record.pop("fields", {})})

    return Flat(
        "{asctime}{levelname}{name}{message}",
        style="{",
        rename_fields={"asctime": "time", "levelname": "level", "name": "logger"},
    )


def _shown(value: object) -> str:
    text = str(value)
    return repr(text) if " " in text or not text.isprintable() else text
