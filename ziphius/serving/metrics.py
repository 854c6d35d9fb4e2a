"""What Prometheus reads: under our names, and under those by which routers know vLLM."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import MappingProxyType

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

from ziphius.serving.link import Link, Stream
from ziphius.serving.wire import ModelInfo, Numbers, Part

_TTFT = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 40, 80)
_QUEUE = (0.001, 0.005, 0.02, 0.1, 0.3, 0.5, 1, 2, 5, 10, 20, 40, 80, 160, 320, 600)
_ITL = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.6, 1, 2.5)
_WHOLE = (0.1, 0.3, 0.5, 1, 2, 5, 10, 20, 40, 60, 120, 240, 600)
_TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16_384, 65_536)

# Ours to vLLM's.
ALIASES: Mapping[str, str] = MappingProxyType(
    {
        "ziphius_requests_running": "vllm:num_requests_running",
        "ziphius_requests_waiting": "vllm:num_requests_waiting",
        "ziphius_cache_use_ratio": "vllm:kv_cache_usage_perc",
        "ziphius_prefix_query_tokens": "vllm:prefix_cache_queries",
        "ziphius_prefix_hit_tokens": "vllm:prefix_cache_hits",
        "ziphius_prompt_tokens": "vllm:prompt_tokens",
        "ziphius_prompt_tokens_cached": "vllm:prompt_tokens_cached",
        "ziphius_generation_tokens": "vllm:generation_tokens",
        "ziphius_preemptions": "vllm:num_preemptions",
        "ziphius_ttft_seconds": "vllm:time_to_first_token_seconds",
        "ziphius_inter_token_seconds": "vllm:inter_token_latency_seconds",
        "ziphius_queue_seconds": "vllm:request_queue_time_seconds",
        "ziphius_request_seconds": "vllm:e2e_request_latency_seconds",
        "ziphius_request_prompt_tokens": "vllm:request_prompt_tokens",
        "ziphius_request_generation_tokens": "vllm:request_generation_tokens",
        "ziphius_answers": "vllm:request_success",
        "ziphius_rejections": "vllm:admission_rejections",
        "ziphius_drafts": "vllm:spec_decode_num_drafts",
        "ziphius_draft_tokens": "vllm:spec_decode_num_draft_tokens",
        "ziphius_draft_tokens_accepted": "vllm:spec_decode_num_accepted_tokens",
        "ziphius_draft_tokens_accepted_by_place": "vllm:spec_decode_num_accepted_tokens_per_pos",
        "ziphius_cache_config": "vllm:cache_config",
    }
)


class Metrics:
    """Counts what passes. ``link`` gives the engine of the moment, ``state`` its state."""

    def __init__(
        self,
        model: str,
        link: Callable[[], Link | None],
        state: Callable[[], str],
        restarts: Callable[[], int],
    ) -> None:
        self.model = model
        self._inner = CollectorRegistry(auto_describe=False)
        labels = ["model_name"]

        def histogram(name: str, told: str, buckets: tuple[float, ...]) -> Histogram:
            made = Histogram(f"ziphius_{name}", told, labels, buckets=buckets, registry=self._inner)
            return made.labels(model)

        def counter(name: str, told: str, *extra: str) -> Counter:
            made = Counter(f"ziphius_{name}", told, [*labels, *extra], registry=self._inner)
            return made if extra else made.labels(model)

        self._ttft = histogram("ttft_seconds", "Seconds to the first token.", _TTFT)
        self._queue = histogram("queue_seconds", "Seconds from request to its first step.", _QUEUE)
        self._itl = histogram("inter_token_seconds", "Seconds between tokens of an answer.", _ITL)
        self._whole = histogram("request_seconds", "Seconds from request to its end.", _WHOLE)
        self._prompts = histogram("request_prompt_tokens", "Tokens of a prompt.", _TOKENS)
        self._answers = histogram("request_generation_tokens", "Tokens of the answers.", _TOKENS)
        self._prompt_tokens = counter("prompt_tokens", "Tokens of prompts.")
        self._cached_tokens = counter("prompt_tokens_cached", "Of them found in the cache.")
        self._tokens = counter("generation_tokens", "Tokens of answers.")
        self._ends = counter("answers", "Answers by how they ended.", "finished_reason")
        self._rejections = counter("rejections", "Requests that were refused.", "status")
        self._http = counter("http_requests", "HTTP requests.", "route", "status")
        self._outer = CollectorRegistry(auto_describe=False)
        self._outer.register(_Doubled(self._inner, ALIASES))
        self._inner.register(_Engine(model, link, state, restarts))

    def text(self) -> bytes:
        """Return everything in Prometheus's text format."""
        return generate_latest(self._outer)

    # --- what happens -----------------------------------------------------------------------------

    def watch(self, link: Link) -> None:
        """Count what comes over a link."""
        noted = link.on_end
        link.on_part, link.on_leave, link.on_loss = self._part, self._left, self._lost
        link.on_begin = lambda stream, seconds: self._queue.observe(seconds)

        def ended(stream: Stream) -> None:
            noted(stream)
            self._end(stream)

        link.on_end = ended

    def answered(self, route: str, status: int) -> None:
        """Count an HTTP answer."""
        self._http.labels(self.model, route, str(status)).inc()
        if status in (429, 503):
            self._rejections.labels(self.model, str(status)).inc()

    def _part(self, stream: Stream, part: Part) -> None:
        count = len(part.token_ids)
        if count:
            now = time.monotonic()
            if stream.first is None:
                self._ttft.observe(now - stream.began)
            elif stream.job.params.n == 1:
                for _ in range(count):
                    self._itl.observe((now - stream.last) / count)
            self._tokens.inc(count)
        if part.finish_reason is not None:
            self._ends.labels(self.model, part.finish_reason).inc()

    def _left(self, stream: Stream) -> None:
        self._ends.labels(self.model, "abort").inc(stream.job.params.n - stream.ended)

    def _lost(self, stream: Stream) -> None:
        self._ends.labels(self.model, "error").inc(stream.job.params.n - stream.ended)

    def _end(self, stream: Stream) -> None:
        self._whole.observe(stream.last - stream.began)
        self._prompts.observe(len(stream.job.prompt_ids))
        self._answers.observe(stream.tokens)
        self._prompt_tokens.inc(len(stream.job.prompt_ids))
        if stream.end is not None:
            self._cached_tokens.inc(stream.end.cached_tokens)


class _Engine(Collector):
    """The engine's own numbers, as its last report had them."""

    def __init__(
        self,
        model: str,
        link: Callable[[], Link | None],
        state: Callable[[], str],
        restarts: Callable[[], int],
    ) -> None:
        self._model, self._link, self._state, self._restarts = model, link, state, restarts

    def collect(self) -> Iterable[Metric]:
        link = self._link()
        numbers = link.numbers if link is not None else Numbers()
        labels = ["model_name"]

        def gauge(name: str, told: str, value: float) -> Metric:
            family = GaugeMetricFamily(f"ziphius_{name}", told, labels=labels)
            family.add_metric([self._model], value)
            return family

        def counter(name: str, told: str, value: float) -> Metric:
            family = CounterMetricFamily(f"ziphius_{name}", told, labels=labels)
            family.add_metric([self._model], value)
            return family

        n = numbers
        yield gauge("ready", "1 while requests are answered.", self._state() == "ready")
        yield gauge("requests_running", "Answers that are computed.", n.running)
        yield gauge("requests_waiting", "Answers that wait for room.", n.waiting)
        yield gauge("waiting_tokens", "Tokens of those that wait.", n.waiting_tokens)
        # Pages that nobody holds are free, whether or not they hold a known prefix.
        yield gauge("cache_use_ratio", "Share of the cache that is held.", n.used / (n.pages or 1))
        yield gauge("cache_pages", "Pages of the cache.", n.pages)
        yield gauge("cache_pages_used", "Pages that a request holds.", n.used)
        yield gauge("cache_pages_cached", "Free pages that hold a known prefix.", n.cached)
        silent = link.silent if link is not None else 0.0
        yield gauge("engine_silent_seconds", "Since the engine's last sign of life.", silent)
        yield counter("prefix_query_tokens", "Prompt tokens looked up.", n.prefix_queries)
        yield counter("prefix_hit_tokens", "Prompt tokens found.", n.prefix_hits)
        yield counter("preemptions", "Answers that lost their pages.", n.preemptions)
        yield counter("expired", "Requests whose time was up.", n.expired)
        yield counter("engine_steps", "Steps of the engine.", n.steps)
        yield counter("engine_restarts", "Times the engine was started again.", self._restarts())
        # A draft at the first place is judged in every step of a sequence that has any.
        yield counter("drafts", "Times that drafts of a sequence were judged.", sum(n.judged[:1]))
        yield counter("draft_tokens", "Drafts that were judged.", sum(n.judged))
        yield counter("draft_tokens_accepted", "Drafts that stood.", sum(n.accepted))
        yield self._by_place(n)
        if link is not None and link.model is not None:
            yield self._about(link)
            yield self._cache(link.model)

    def _by_place(self, numbers: Numbers) -> Metric:
        family = CounterMetricFamily(
            "ziphius_draft_tokens_accepted_by_place",
            "Drafts that stood, by their place.",
            labels=["model_name", "position"],
        )
        for place, accepted in enumerate(numbers.accepted):
            family.add_metric([self._model, str(place)], accepted)
        return family

    def _cache(self, model: ModelInfo) -> Metric:
        """Say it in vLLM's words, which routers look for."""
        pages = model.cache_tokens // model.page_size
        labels = {"block_size": str(model.page_size), "num_gpu_blocks": str(pages)}
        family = InfoMetricFamily("ziphius_cache_config", "The cache's pages.", labels=[])
        family.add_metric([], {"model_name": self._model, **labels})
        return family

    def _about(self, link: Link) -> Metric:
        assert link.model is not None
        model = link.model
        family = InfoMetricFamily("ziphius_engine", "How the engine was made.", labels=[])
        family.add_metric(
            [],
            {
                "model_name": self._model,
                "dtype": model.dtype,
                "device": model.device,
                "kernels": model.kernels,
                "speculation": model.speculation,
                "context": str(model.context),
                "cache_tokens": str(model.cache_tokens),
                "page_size": str(model.page_size),
            },
        )
        return family


class _Doubled(Collector):
    """Every family of a registry, and those that have an alias once more under it."""

    def __init__(self, inner: CollectorRegistry, aliases: Mapping[str, str]) -> None:
        self._inner, self._aliases = inner, aliases

    def collect(self) -> Iterator[Metric]:
        for family in self._inner.collect():
            yield family
            if (alias := self._aliases.get(family.name)) is not None:
                yield _renamed(family, alias)


def _renamed(family: Metric, name: str) -> Metric:
    """Return a family under another name."""
    other = Metric(family.name, family.documentation, family.type)
    other.name = name
    other.samples = [
        Sample(name + sample.name.removeprefix(family.name), *sample[1:])
        for sample in family.samples
    ]
    return other
