"""Traces by OpenTelemetry (the extra ``otel``): a span a request, in the caller's trace.

Spans are made when an answer has ended, from the times that were noted, so that nothing is in the
way of the tokens.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ziphius.config.errors import BadInput

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter

    from ziphius.serving.gate import Passing

_SERVICE = "ziphius"


class Tracing:
    """Sends spans to a collector. ``close`` sends what is left."""

    def __init__(self, exporter: SpanExporter, *, batch: bool = True) -> None:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor

        self._provider = TracerProvider(resource=Resource.create({"service.name": _SERVICE}))
        processor = BatchSpanProcessor(exporter) if batch else SimpleSpanProcessor(exporter)
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("ziphius.serving")

    @classmethod
    def to(cls, endpoint: str) -> Tracing:
        """Send to an OTLP collector by HTTP: ``http://HOST:4318/v1/traces``.

        Raises BadInput where the extra is not installed.
        """
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        except ImportError:
            raise BadInput(
                "traces need OpenTelemetry: pip install 'ziphius[otel]', or leave the endpoint out"
            ) from None
        return cls(OTLPSpanExporter(endpoint=endpoint))

    def record(self, request: Passing, route: str) -> None:
        """Make the spans of a request that has been answered."""
        from opentelemetry import trace
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        noted = request.noted
        if noted.prompt_tokens is None:
            return  # nothing was asked of the model
        headers = {name.decode("latin-1"): value.decode("latin-1")
                   for name, value in request.scope["headers"]}  # fmt: skip
        ended = time.time()
        clock = ended - time.monotonic()  # from our clock to the wall's
        span = self._tracer.start_span(
            f"{request.scope['method']} {route}",
            context=TraceContextTextMapPropagator().extract(headers),
            kind=trace.SpanKind.SERVER,
            start_time=_ns(request.began + clock),
            attributes=_attributes(request, route),
        )
        if noted.error is not None:
            span.set_status(trace.Status(trace.StatusCode.ERROR, noted.error))
        inside = trace.set_span_in_context(span)
        for name, begin, end in _parts(noted.times):
            part = self._tracer.start_span(name, context=inside, start_time=_ns(begin + clock))
            part.end(_ns(end + clock))
        span.end(_ns(ended))

    def close(self) -> None:
        """Send what is left."""
        self._provider.shutdown()


def _attributes(request: Passing, route: str) -> dict[str, Any]:
    """Return what the conventions for generative models name."""
    noted = request.noted
    known = {
        "http.request.method": request.scope["method"],
        "http.route": route,
        "http.response.status_code": request.status,
        "gen_ai.operation.name": "text_completion" if route.endswith("/completions")
        and "chat" not in route else "chat",
        "gen_ai.provider.name": _SERVICE,
        "gen_ai.request.model": noted.model,
        "gen_ai.response.id": request.id,
        "gen_ai.response.finish_reasons": [noted.finish] if noted.finish else None,
        "gen_ai.usage.input_tokens": noted.prompt_tokens,
        "gen_ai.usage.output_tokens": noted.completion_tokens,
    }  # fmt: skip
    return {name: value for name, value in known.items() if value is not None}


def _parts(times: Mapping[str, float]) -> list[tuple[str, float, float]]:
    """Return the stages whose times are known: up to the first token, and after it."""
    began, first, last = (times.get(name) for name in ("began", "first", "last"))
    if began is None or first is None or last is None:
        return []
    return [("queue and prefill", began, first), ("decode", first, last)]


def _ns(seconds: float) -> int:
    return int(seconds * 1e9)
