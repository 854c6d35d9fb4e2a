"""The engine's process from inside: signs of life, commands, refusals."""

from __future__ import annotations

from collections import deque
from typing import Any, cast

import msgspec
import pytest
import zmq

from tests.serving.support import make_engine
from ziphius.inference.params import SamplingParams
from ziphius.model.transformer import Transformer
from ziphius.serving.wire import (
    Add,
    Beat,
    Cancel,
    Command,
    Forget,
    Refused,
    Report,
    Stop,
    Taken,
    pack_params,
)
from ziphius.serving.worker import BEAT_SECONDS, Worker, describe


class Line:
    """A socket whose peer is the test: what is to be read, and what was written."""

    def __init__(self, *commands: Command) -> None:
        self.commands = deque(commands)
        self.reports: list[Report] = []
        self._decoder = msgspec.msgpack.Decoder(Report)

    def poll(self, milliseconds: int) -> bool:
        return bool(self.commands)

    def recv(self, flags: int) -> bytes:
        if not self.commands:
            raise zmq.Again
        return msgspec.msgpack.encode(self.commands.popleft())

    def send(self, message: bytes) -> None:
        self.reports.append(self._decoder.decode(message))


class Clock:
    """A clock that the test moves, by so much at every look."""

    def __init__(self, step: float) -> None:
        self.now, self.step = 0.0, step

    def __call__(self) -> float:
        self.now += self.step
        return self.now


def add(number: int, **options: Any) -> Add:
    params = SamplingParams(**{"temperature": 0, "max_tokens": 3, "ignore_eos": True, **options})
    return Add(number, [0, 5, 6], pack_params(params))


def work(model: Transformer, line: Line, *, step: float = 0.0, steps: int = 50) -> Worker:
    """Let a worker run until it is told to stop, or has computed so many steps."""
    engine = make_engine(model, speculation="off")
    worker = Worker(engine, cast("zmq.Socket[bytes]", line), clock=Clock(step))
    computed, inner = 0, engine.step

    def counted() -> Any:
        nonlocal computed
        computed += 1
        if computed == steps:
            line.commands.append(Stop())
        return inner()

    engine.step = counted  # type: ignore[method-assign]
    worker.run()
    # The model may be another worker's next.
    assert not any(block._forward_pre_hooks for _, _, block in model.blocks())
    return worker


@pytest.fixture
def model(whale: Transformer) -> Transformer:
    """The shared model."""
    return whale


def test_a_long_step_gives_signs_of_life_between_its_layers(model: Transformer) -> None:
    """A prompt of a large model takes minutes: it must not pass for a frozen engine."""
    line = Line(add(1))
    work(model, line, step=BEAT_SECONDS, steps=1)
    beats = [report for report in line.reports if isinstance(report, Beat)]
    silent = [beat for beat in beats if not beat.parts]
    assert len(silent) == len(model.layers)


def test_short_steps_report_once(model: Transformer) -> None:
    line = Line(add(1))
    work(model, line, steps=3)
    kinds = [type(report) for report in line.reports]
    assert kinds == [Taken, Beat, Beat, Beat]


def test_parts_and_the_end_of_a_request(model: Transformer) -> None:
    line = Line(add(7))
    work(model, line, steps=3)
    beats = [report for report in line.reports if isinstance(report, Beat)]
    assert [part.id for beat in beats for part in beat.parts] == [7, 7, 7]
    assert sum(len(part.token_ids) for beat in beats for part in beat.parts) == 3
    assert [end.id for beat in beats for end in beat.ends] == [7]
    assert beats[-1].numbers.tokens == 3


def test_a_cancelled_request_is_heard_of_no_more(model: Transformer) -> None:
    line = Line(add(1, max_tokens=100), add(2), Cancel(1), Cancel(99), Forget())
    worker = work(model, line, steps=3)
    beats = [report for report in line.reports if isinstance(report, Beat)]
    assert {part.id for beat in beats for part in beat.parts} == {2}
    assert worker.engine.pool.used == 0


def test_what_cannot_be_taken_is_refused_with_its_kind(model: Transformer) -> None:
    wrong = Add(1, [0] * 600, pack_params(SamplingParams()))
    unknown = Add(2, [0, 5], {"temperatur": 1})
    line = Line(wrong, unknown, add(3))
    work(model, line, steps=3)
    refused = {r.id: r.kind for r in line.reports if isinstance(r, Refused)}
    assert refused == {1: "bad_input", 2: "bad_input"}
    assert [r.id for r in line.reports if isinstance(r, Taken)] == [3]


def test_the_description_is_the_engines(model: Transformer) -> None:
    engine = make_engine(model)
    told = describe(engine)
    assert told.vocab_size == model.config.vocab_size
    assert told.context == model.config.max_position_embeddings
    assert told.cache_tokens == engine.pool.n_pages * engine.pool.page_size
    assert told.parameters == sum(
        weight.numel() for name, weight in named(model) if not is_mtp(name, model)
    )


def named(model: Transformer) -> Any:
    from ziphius.model.weights import named_weights

    return named_weights(model)


def is_mtp(name: str, model: Transformer) -> bool:
    parts = name.split(".")
    return parts[1] == "layers" and int(parts[2]) >= model.config.num_hidden_layers
