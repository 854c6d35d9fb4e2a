"""Spans of requests, in the caller's trace."""

from __future__ import annotations

import pytest

from tests.serving.support import NAME, TestServer, make_engine, make_tokenizer, running
from ziphius.config.errors import BadInput
from ziphius.model.transformer import Transformer
from ziphius.serving.app import Application
from ziphius.serving.tracing import Tracing

pytest.importorskip("opentelemetry.sdk", reason="needs the extra otel: pip install 'ziphius[otel]'")

from opentelemetry.sdk.trace.export.in_memory_span_exporter import (
    InMemorySpanExporter,
)

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


def test_a_request_is_a_span_of_the_callers_trace(whale: Transformer) -> None:
    exporter = InMemorySpanExporter()

    def trace(application: Application) -> None:
        application._tracing = Tracing(exporter, batch=False)

    tokenizer = make_tokenizer()
    with running(lambda: make_engine(whale, tokenizer), tokenizer=tokenizer, spoil=trace) as served:
        ask(served, max_tokens=5)
        served.until(lambda: len(exporter.get_finished_spans()) == 3)
    prefill, decode, whole = exporter.get_finished_spans()
    assert f"{whole.context.trace_id:032x}" == TRACE
    assert whole.parent is not None
    assert f"{whole.parent.span_id:016x}" == PARENT
    assert whole.attributes is not None
    told = dict(whole.attributes)
    assert told["gen_ai.request.model"] == NAME
    assert told["gen_ai.usage.output_tokens"] == 5
    assert told["http.route"] == "/v1/completions"
    assert told["http.response.status_code"] == 200
    assert (prefill.name, decode.name) == ("queue and prefill", "decode")
    times = [whole.start_time, prefill.start_time, prefill.end_time, decode.end_time]
    assert times == sorted(times, key=lambda time: time or 0)
    assert {span.parent.span_id for span in (prefill, decode) if span.parent} == {
        whole.context.span_id
    }


def ask(served: TestServer, **fields: object) -> None:
    """Ask for a completion within a trace."""
    body = {"prompt": "a whale", "ignore_eos": True, **fields}
    with served.client(headers={"traceparent": f"00-{TRACE}-{PARENT}-01"}) as client:
        assert client.post("/v1/completions", json=body).status_code == 200


def test_without_the_extra_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        __import__("sys").modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None
    )
    with pytest.raises(BadInput, match=r"pip install 'ziphius\[otel\]'"):
        Tracing.to("http://127.0.0.1:4318/v1/traces")
