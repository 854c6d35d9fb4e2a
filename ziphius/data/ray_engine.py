"""The operators of data preparation on Ray Data: on one machine or on a cluster.

Every worker must see the sources and the output folder under the same paths. The files are written
by the process that started it all, so they are the same bytes as without Ray.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import numpy as np
from tokenizers import Tokenizer

from ziphius.config.data import DataConfig
from ziphius.config.errors import BadInput, ZiphiusError
from ziphius.data.engine import ENCODE_BYTES, Ids, batched, encode_span_list
from ziphius.data.examine import Examined, examine
from ziphius.data.readers import Piece, Raw, optional, read_piece
from ziphius.data.spool import Span

Row = dict[str, Any]
T = TypeVar("T", Piece, Raw, Examined)

_ROWS_AT_ONCE = 64
_TASKS_A_CORE = 16
# The smallest that Ray takes is 75 MiB; what does not fit goes to the disk.
_STORE_BYTES = 256 * 2**20


class RayEngine:
    """Runs the operators as stages of Ray Data, between entering and leaving its ``with`` block.

    ``address`` names a running cluster; without one, Ray is started on this machine with
    ``workers`` processes, and stopped again. A connection that is there already is used.
    """

    def __init__(self, workers: int = 1, address: str | None = None) -> None:
        """Raises BadInput where Ray is not installed."""
        self._ray = optional("ray", "ray", "--engine ray")
        self._data = optional("ray.data", "ray", "--engine ray")
        self.workers, self.address = workers, address
        self._started = False

    def __enter__(self) -> RayEngine:
        if not self._ray.is_initialized():
            self._start()
            self._started = True
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._started:
            self._ray.shutdown()
            self._started = False

    def examined(self, pieces: Sequence[Piece], config: DataConfig) -> Iterator[Examined]:
        """Read the pieces and examine their texts, both on the workers."""
        rows = (
            self._dataset([_to_row(piece) for piece in pieces])
            .flat_map(_read)
            .map_batches(partial(_examine, config=config), batch_size=_ROWS_AT_ONCE)
        )
        for row in self._results(rows):
            yield _from_row(Examined, row)

    def encoded(self, spool: Path, spans: Sequence[Span], tokenizer: Tokenizer) -> Iterator[Ids]:
        """Encode the texts at these places of a spool, which the workers open themselves."""
        batches = batched(spans, lambda span: span[1] - span[0], ENCODE_BYTES)
        rows = self._dataset([{"spans": _pack(batch)} for batch in batches]).flat_map(
            partial(_encode, spool=str(spool), tokenizer=tokenizer.to_str())
        )
        for row in self._results(rows):
            yield np.frombuffer(row["ids"], dtype=np.int32)

    def _start(self) -> None:
        quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
        if self.address is not None:
            try:
                self._ray.init(address=self.address, **quiet)
            except (ConnectionError, RuntimeError, ValueError) as error:
                reason = (str(error).splitlines() or [""])[0]
                raise BadInput(
                    f"--engine ray: no cluster to use at {self.address}: {reason}: start it, or "
                    "unset RAY_ADDRESS"
                ) from error
            return
        # A Ray of our own sends no usage statistics: only `ray start` and nightly builds do.
        self._ray.init(
            address="local",
            num_cpus=self.workers,
            include_dashboard=False,
            object_store_memory=_STORE_BYTES,
            **quiet,
        )

    def _dataset(self, rows: list[Row]) -> Any:
        tasks = _TASKS_A_CORE * max(1, int(self._ray.cluster_resources().get("CPU", 1)))
        return self._data.from_items(rows, override_num_blocks=min(len(rows), tasks))

    def _results(self, rows: Any) -> Iterator[Row]:
        with self._in_order_and_silence():
            try:
                yield from rows.iter_rows()
            except Exception as error:
                raise _told(error) from error

    @contextmanager
    def _in_order_and_silence(self) -> Iterator[None]:
        context, log = self._data.DataContext.get_current(), logging.getLogger("ray.data")
        options = context.execution_options
        before = options.preserve_order, context.enable_progress_bars, log.level
        options.preserve_order, context.enable_progress_bars = True, False
        log.setLevel(logging.CRITICAL + 1)
        try:
            yield
        finally:
            options.preserve_order, context.enable_progress_bars = before[:2]
            log.setLevel(before[2])


def _read(row: Row) -> Iterator[Row]:
    """Read a piece; one row a text."""
    for raw in read_piece(_from_row(Piece, row)):
        yield _to_row(raw)


def _examine(batch: dict[str, Any], config: DataConfig) -> dict[str, list[Any]]:
    """Examine a batch of texts, given and returned by columns."""
    rows = (dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True))
    results = [_to_row(found) for found in examine((_from_row(Raw, row) for row in rows), config)]
    return {field.name: [row[field.name] for row in results] for field in fields(Examined)}


def _encode(row: Row, spool: str, tokenizer: str) -> Iterator[Row]:
    """Encode a batch of texts; one row a text."""
    spans = _unpack(row["spans"])
    for ids in encode_span_list(spans, Path(spool), Tokenizer.from_str(tokenizer)):
        yield {"ids": ids.tobytes()}


# Rows hold numbers and bytes only: a column of strings could hold no name that is not UTF-8.


def _to_row(value: Piece | Raw | Examined) -> Row:
    values = ((field.name, getattr(value, field.name)) for field in fields(value))
    return {
        name: item.encode("utf-8", "surrogatepass") if isinstance(item, str) else item
        for name, item in values
    }


def _from_row(kind: type[T], row: Row) -> T:
    return kind(
        **{field.name: _CONVERT[str(field.type)](row[field.name]) for field in fields(kind)}
    )


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogatepass")


_CONVERT: dict[str, Callable[[Any], Any]] = {
    "int": int,
    "bool": bool,
    "bytes": bytes,
    "str": _text,
    "Kind": _text,
}


def _pack(spans: Sequence[Span]) -> bytes:
    return np.array(spans, dtype=np.int64).tobytes()


def _unpack(data: bytes) -> list[Span]:
    return [(int(start), int(stop)) for start, stop in np.frombuffer(data, np.int64).reshape(-1, 2)]


def _told(error: Exception) -> ZiphiusError:
    """Return our own error if a worker raised it, else one that tells what happened, in one line.

    Ray wraps a worker's error and adds lines of advice to its text.
    """
    causes, seen = [], [error]
    while seen:
        causes.append(seen.pop())
        links = (getattr(causes[-1], "cause", None), causes[-1].__cause__)
        seen += [link for link in links if isinstance(link, Exception) and link not in causes]
    own = next((cause for cause in causes if isinstance(cause, ZiphiusError)), None)
    first = (str(getattr(own, "cause", own) or causes[-1]).splitlines() or [""])[0]
    if own is not None:
        return BadInput(first) if isinstance(own, BadInput) else ZiphiusError(first)
    return ZiphiusError(f"Ray: {type(causes[-1]).__name__}: {first}: Ray's own log tells more")
