"""What Prometheus reads: it parses, and its counters move as they should."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.serving.clients import LONG, connected, read_until, request
from tests.serving.support import NAME, TestServer, make_engine, running
from ziphius.model.transformer import Transformer
from ziphius.serving.metrics import ALIASES
from ziphius.serving.options import Limits

Read = dict[tuple[str, tuple[tuple[str, str], ...]], float]
LIMITS = Limits(max_waiting=2, request_seconds=5.0, drain_seconds=2.0)
ASK = {"prompt": [5] * 70, "max_tokens": 4, "ignore_eos": True}


@pytest.fixture
def server(whale: Transformer) -> Iterator[TestServer]:
    """A server that has answered nothing."""
    with running(lambda: make_engine(whale), limits=LIMITS) as started:
        yield started
        started.until_idle()


def read(server: TestServer) -> Read:
    """Return every sample by its name and labels, the model's name left out."""
    with server.client() as client:
        answer = client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    found: Read = {}
    for family in text_string_to_metric_families(answer.text):
        assert family.documentation
        for sample in family.samples:
            labels = {k: v for k, v in sample.labels.items() if k != "model_name"}
            key = (sample.name, tuple(sorted(labels.items())))
            assert key not in found, f"{key} is there twice"
            assert sample.labels.get("model_name", NAME) == NAME
            found[key] = sample.value
    return found


def value(found: Read, name: str, **labels: str) -> float:
    return found.get((name, tuple(sorted(labels.items()))), 0.0)


def ask(server: TestServer, **more: Any) -> Any:
    with server.client() as client:
        return client.post("/v1/completions", json={**ASK, **more})


def test_answers_are_counted(server: TestServer) -> None:
    for _ in range(2):
        assert ask(server).is_success
    assert ask(server, n=3).is_success
    assert ask(server, prompt=["a", "b"], stream=True).is_success
    assert ask(server, stop_token_ids=list(range(420)), n=2, ignore_eos=False).is_success
    server.until_idle()
    found = read(server)
    tokens = 2 * 4 + 3 * 4 + 2 * 4 + 2
    assert value(found, "ziphius_generation_tokens_total") == tokens
    assert value(found, "ziphius_answers_total", finished_reason="length") == 2 + 3 + 2
    assert value(found, "ziphius_answers_total", finished_reason="stop") == 2
    requests = 2 + 1 + 2 + 1
    for histogram in ("ttft_seconds", "request_seconds", "request_prompt_tokens"):
        assert value(found, f"ziphius_{histogram}_count") == requests, histogram
    assert value(found, "ziphius_request_generation_tokens_sum") == tokens
    prompts = value(found, "ziphius_request_prompt_tokens_sum")
    assert value(found, "ziphius_prompt_tokens_total") == prompts
    # The second request of the same 70 tokens finds two pages of 32.
    assert value(found, "ziphius_prompt_tokens_cached_total") >= 64
    assert value(found, "ziphius_prefix_hit_tokens_total") >= 64
    path = "/v1/completions"
    assert value(found, "ziphius_http_requests_total", route=path, status="200") == 5
    assert value(found, "ziphius_ready") == 1


def test_cached_pages_that_nobody_holds_are_free(server: TestServer) -> None:
    assert ask(server).is_success
    server.until_idle()
    server.until(lambda: value(read(server), "ziphius_cache_pages_used") == 0)
    found = read(server)
    assert value(found, "ziphius_cache_use_ratio") == 0
    assert value(found, "ziphius_cache_pages_cached") == 2
    with connected(server.url) as raw:
        raw.sendall(request({**LONG, **ASK, "max_tokens": 400}))
        read_until(raw, b"data: ")
        found = read(server)
        used, pages = (value(found, f"ziphius_cache_pages{of}") for of in ("_used", ""))
        assert 3 <= used < pages
        assert value(found, "ziphius_cache_use_ratio") == pytest.approx(used / pages)
        assert value(found, "ziphius_requests_running") == 1


def test_aborts_refusals_and_late_ones_are_counted(server: TestServer) -> None:
    with connected(server.url) as raw:
        raw.sendall(request({**LONG, "n": 6}))
        read_until(raw, b"data: ")
        assert ask(server).status_code == 503
        found = read(server)
        assert value(found, "ziphius_rejections_total", status="503") == 1
        assert value(found, "ziphius_requests_waiting") == 2
    server.until_idle()
    found = read(server)
    assert value(found, "ziphius_answers_total", finished_reason="abort") == 6
    assert value(found, "ziphius_request_seconds_count") == 0
    assert not server.application.engine.link.open  # type: ignore[union-attr]


def test_nothing_is_kept_of_requests_that_were_left(server: TestServer) -> None:
    import gc

    from ziphius.serving.link import Stream

    for _ in range(3):
        with connected(server.url) as raw:
            raw.sendall(request(LONG))
            read_until(raw, b"data: ")
        server.until_idle()
    gc.collect()
    server.until(lambda: not [one for one in gc.get_objects() if type(one) is Stream], 5)


def test_answers_of_an_engine_that_died_are_counted(server: TestServer) -> None:
    with connected(server.url) as raw:
        raw.sendall(request({**LONG, "n": 3}))
        read_until(raw, b"data: ")
        server.runner.kill()
        assert b"engine_unavailable" in read_until(raw, b"engine_unavailable")
    server.until(lambda: server.application.engine.restarts == 1)
    found = read(server)
    assert value(found, "ziphius_answers_total", finished_reason="error") == 3
    assert value(found, "ziphius_answers_total", finished_reason="abort") == 0
    server.until(lambda: server.application.engine.state == "ready")
    assert ask(server).is_success


def test_the_time_in_the_queue(server: TestServer) -> None:
    """From the request to its first step, whatever the steps take, and not to its first token."""
    server.runner.frozen.set()
    server.until(lambda: server.runner.standing.is_set())
    inner = server.engine.step

    def slow() -> Any:
        time.sleep(0.2)
        return inner()

    server.engine.step = slow  # type: ignore[method-assign]
    with connected(server.url) as raw:
        raw.sendall(request({**ASK, "max_tokens": 2, "n": 2}))
        time.sleep(0.5)  # the line is no queue less than the engine's own
        server.runner.frozen.clear()
        read_until(raw, b"}}")
    server.until_idle()
    found = read(server)
    name = "ziphius_queue_seconds"
    assert value(found, f"{name}_count") == 1
    waited, first = value(found, f"{name}_sum"), value(found, "ziphius_ttft_seconds_sum")
    assert waited > 0.4
    assert first - waited > 0.19


def test_who_leaves_the_queue_for_good_has_not_left_it_for_a_step(server: TestServer) -> None:
    with connected(server.url) as raw:
        raw.sendall(request({**LONG, "n": 4}))
        read_until(raw, b"data: ")
        with connected(server.url) as other:
            other.sendall(request(ASK))
            server.until(lambda: len(server.engine._requests) == 5)
        server.until(lambda: len(server.engine._requests) == 4)
    server.until_idle()
    assert value(read(server), "ziphius_queue_seconds_count") == 1
    worker = server.runner.worker
    assert worker is not None
    assert not worker._queued


def test_steps_with_drafts(whale: Transformer) -> None:
    with running(lambda: make_engine(whale, speculation="on", draft_depth=1)) as server:
        assert ask(server, max_tokens=20).is_success
        server.until_idle()
        found, judged = read(server), server.engine.acceptance.judged
        assert value(found, "vllm:spec_decode_num_drafts_total") == judged[0] > 5


def test_the_cache_is_described(server: TestServer) -> None:
    found = read(server)
    pages = str(server.engine.pool.n_pages)
    for name in ("ziphius_cache_config_info", "vllm:cache_config_info"):
        assert value(found, name, block_size="32", num_gpu_blocks=pages) == 1


def test_the_engine_says_where_and_by_what_it_computes(server: TestServer) -> None:
    (labels,) = [dict(labels) for name, labels in read(server) if name == "ziphius_engine_info"]
    assert labels["device"] == "cpu"
    assert labels["kernels"] == str(server.engine.model.kernels)


def test_aliases_are_equal(server: TestServer) -> None:
    assert ask(server).is_success
    server.until_idle()
    found = read(server)
    known = {name for name, _ in found}
    for ours, alias in ALIASES.items():
        mine = {key: v for key, v in found.items() if belongs(key[0], ours)}
        theirs = {(ours + k[0].removeprefix(alias), k[1]): v for k, v in found.items()
                  if belongs(k[0], alias)}  # fmt: skip
        assert mine == theirs, ours
    for needed in (
        "vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc",
        "vllm:prompt_tokens_total", "vllm:generation_tokens_total",
        "vllm:time_to_first_token_seconds_bucket", "vllm:e2e_request_latency_seconds_count",
    ):  # fmt: skip
        assert needed in known, needed


def belongs(sample: str, family: str) -> bool:
    return sample.startswith(family) and sample.removeprefix(family) in (
        "", "_info", "_total", "_bucket", "_count", "_sum", "_created",
    )  # fmt: skip
