"""The engine on its thread: consumers that come and leave, and what happens when it fails."""

from __future__ import annotations

import asyncio
import gc
import random
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support import random_model, tiny_config
from ziphius.config.errors import BadInput, ZiphiusError
from ziphius.inference.asynchronous import AsyncEngine, EngineStopped
from ziphius.inference.engine import Engine, EngineOptions
from ziphius.inference.noise import Noise
from ziphius.inference.outputs import Delta
from ziphius.inference.params import SamplingParams
from ziphius.inference.sampler import Sampler
from ziphius.inference.sequence import QueueFull
from ziphius.kernels.select import Kernels, answering_kernels
from ziphius.model.transformer import Transformer

LONG = SamplingParams(max_tokens=100, ignore_eos=True, temperature=1.0, seed=1)
SHORT = SamplingParams(max_tokens=7, ignore_eos=True, temperature=1.0, seed=1)


@pytest.fixture(scope="module")
def kernels(kernel_folder: Path) -> Kernels:
    return answering_kernels(kernel_folder)


@pytest.fixture
def model(kernels: Kernels) -> Transformer:
    return random_model(tiny_config(), kernels=kernels).requires_grad_(False)


@pytest.fixture
def engine(model: Transformer) -> Engine:
    return Engine(model, options=EngineOptions(cache_tokens=1024, max_running=4))


@pytest.fixture(autouse=True)
def _no_thread_stays() -> Iterator[None]:
    yield
    assert "ziphius-engine" not in {thread.name for thread in threading.enumerate()}


@asynccontextmanager
async def running(engine: Engine) -> AsyncIterator[AsyncEngine]:
    """Run an engine, and see to it that nothing is left in it."""
    served = AsyncEngine(engine)
    try:
        yield served
        if served.stopped is None:
            assert await served.call(lambda e: (e.idle, e.pool.used)) == (True, 0)
    finally:
        served.close()
    assert not engine._requests


def alone(model: Transformer, prompt: list[int], params: SamplingParams) -> list[list[int]]:
    one = Engine(model, options=EngineOptions(cache_tokens=1024))
    request = one.add(prompt, params)
    while not request.finished:
        one.step()
    return [list(answer.output) for answer in request.answers]


async def collect(deltas: AsyncIterator[Delta], answers: int = 1) -> list[list[int]]:
    found: list[list[int]] = [[] for _ in range(answers)]
    async for delta in deltas:
        found[delta.index] += delta.token_ids
    return found


# --- answers --------------------------------------------------------------------------------------


def test_answers_are_those_of_the_engine(engine: Engine, model: Transformer) -> None:
    async def main() -> None:
        async with running(engine) as served:
            jobs = [([i, i + 1], SamplingParams(max_tokens=3 * i, n=1 + i % 2, seed=i))
                    for i in range(1, 9)]  # fmt: skip
            found = await asyncio.gather(
                *(collect(served.generate(prompt, p), p.n) for prompt, p in jobs)
            )
            assert found == [alone(model, prompt, p) for prompt, p in jobs]
            assert served.steps > 0

    asyncio.run(main())


def test_the_end_of_a_stream_is_the_whole_output(engine: Engine) -> None:
    async def main() -> None:
        async with running(engine) as served:
            stream = await served.submit([1, 2], SHORT, request_id="mine", prompt="text")
            deltas = [delta async for delta in stream]
            assert stream.output is not None
            assert stream.output.finished
            assert (stream.output.request_id, stream.output.prompt) == ("mine", "text")
            tokens = [token for delta in deltas for token in delta.token_ids]
            assert tokens == list(stream.output.outputs[0].token_ids)
            assert deltas[-1].finish_reason == "length"
            assert [delta async for delta in stream] == []

    asyncio.run(main())


def test_what_a_slow_consumer_has_not_taken_is_one_delta(engine: Engine) -> None:
    async def main() -> None:
        async with running(engine) as served:
            stream = await served.submit([1, 2], LONG)
            while stream.output is None:
                await asyncio.sleep(0.001)
            (delta,) = [delta async for delta in stream]
            assert delta.token_ids == list(stream.output.outputs[0].token_ids)
            assert delta.finish_reason == "length"

    asyncio.run(main())


def test_two_loops_share_an_engine(engine: Engine, model: Transformer) -> None:
    served = AsyncEngine(engine)
    found: dict[int, Any] = {}

    def consume(number: int) -> None:
        found[number] = asyncio.run(collect(served.generate([number], SHORT)))

    threads = [threading.Thread(target=consume, args=(number,)) for number in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    served.close()
    assert found == {number: alone(model, [number], SHORT) for number in (1, 2)}


# --- leaving --------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_many_consumers_that_leave_at_random_moments(
    engine: Engine, model: Transformer, seed: int
) -> None:
    """Before they are taken, in the queue, after some tokens, at the end: every page comes back."""
    rng = random.Random(seed)
    expected = {i: alone(model, [i] * i, LONG) for i in range(1, 9)}

    async def consume(served: AsyncEngine, number: int, how: str, patience: int) -> None:
        if how == "break":
            seen = 0
            async for delta in served.generate([number] * number, LONG):
                seen += len(delta.token_ids)
                if seen >= patience:
                    break
        elif how == "close":
            async with await served.submit([number] * number, LONG) as stream:
                await stream.__anext__()
        elif how == "drop":
            await served.submit([number] * number, LONG)
        else:
            found = await collect(served.generate([number] * number, LONG))
            assert found == expected[number]

    async def main() -> None:
        async with running(engine) as served:
            tasks = []
            for _ in range(40):
                how = rng.choice(["break", "close", "drop", "cancel", "stay"])
                arguments = (served, rng.randint(1, 8), how, rng.randint(1, 40))
                task = asyncio.create_task(consume(*arguments))
                tasks.append(task)
                if how == "cancel":
                    asyncio.get_running_loop().call_later(rng.random() * 0.05, task.cancel)
                if rng.random() < 0.3:
                    await asyncio.sleep(rng.random() * 0.01)
            for result in await asyncio.gather(*tasks, return_exceptions=True):
                assert result is None or isinstance(result, asyncio.CancelledError), result
            gc.collect()
            while not await served.call(lambda e: e.idle):
                await asyncio.sleep(0.001)
            assert await served.call(lambda e: e.pool.used) == 0
            await served.call(lambda e: e.pool.check([]))
            assert not served._streams

    asyncio.run(main())


def test_a_loop_that_ends_takes_its_requests_with_it(engine: Engine) -> None:
    served = AsyncEngine(engine)

    async def begin() -> Any:
        return await served.submit([1], SamplingParams(max_tokens=None, ignore_eos=True))

    stream = asyncio.run(begin())
    asyncio.run(_until_idle(served))
    assert engine.pool.used == 0
    assert stream.output is None or not stream.closed
    served.close()


async def _until_idle(served: AsyncEngine) -> None:
    while not await served.call(lambda e: e.idle):
        await asyncio.sleep(0.001)


# --- what fails -----------------------------------------------------------------------------------


def test_refusals_come_at_once(engine: Engine) -> None:
    async def main() -> None:
        async with running(engine) as served:
            with pytest.raises(BadInput, match="the prompt is empty"):
                await served.submit([], SHORT)
            with pytest.raises(BadInput, match="token id 61 is outside"):
                await collect(served.generate([61], SHORT))
            assert len((await collect(served.generate([1], SHORT)))[0]) == 7

    asyncio.run(main())


def test_a_full_queue_is_refused(model: Transformer) -> None:
    engine = Engine(model, options=EngineOptions(cache_tokens=256, max_running=1, max_waiting=2))

    async def main() -> None:
        async with running(engine) as served:
            tasks = [asyncio.create_task(collect(served.generate([1], LONG))) for _ in range(30)]
            results = await asyncio.gather(*tasks, return_exceptions=True)
            refused = [r for r in results if isinstance(r, QueueFull)]
            assert refused
            assert len(refused) < 30
            assert all(isinstance(r, QueueFull) or len(r[0]) == 100 for r in results)

    asyncio.run(main())


def test_an_exception_of_one_request_does_not_stop_others(
    engine: Engine, model: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = alone(model, [1, 2], SHORT)
    choose, name = Sampler.choose, Noise.name

    def unnamed(self: Noise, position: int) -> Any:
        if self.seed == 13:
            raise ValueError("an unlucky\nnumber")
        return name(self, position)

    def broken(self: Sampler, *arguments: Any, **options: Any) -> Any:
        if self.noise.seed == 13:
            raise ValueError("an unlucky\nnumber")
        return choose(self, *arguments, **options)

    monkeypatch.setattr(Sampler, "choose", broken)
    monkeypatch.setattr(Noise, "name", unnamed)

    async def main() -> None:
        async with running(engine) as served:
            unlucky = SamplingParams(max_tokens=5, seed=13)
            good, bad = await asyncio.gather(
                collect(served.generate([1, 2], SHORT)), _last(served.generate([1, 2], unlucky))
            )
            assert good == expected
            assert bad.finish_reason == "error"
            assert bad.error == "ValueError: an unlucky number"

    asyncio.run(main())


async def _last(deltas: AsyncIterator[Delta]) -> Delta:
    return [delta async for delta in deltas][-1]


def test_a_failure_of_the_engine_ends_all_with_one_clear_error(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = 0
    hidden = engine.forward.hidden

    def broken(feeds: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == 5:
            raise RuntimeError("no\nmemory")
        return hidden(feeds)

    monkeypatch.setattr(engine.forward, "hidden", broken)

    async def main() -> None:
        async with running(engine) as served:
            tasks = [served.generate([i], LONG) for i in range(1, 12)]
            results = await asyncio.gather(*map(collect, tasks), return_exceptions=True)
            said = {str(result) for result in results}
            assert said == {"the engine failed: RuntimeError: no memory: restart it"}
            assert all(isinstance(result, EngineStopped) for result in results)
            assert served.stopped in said
            assert served.stalled == 0
            for _ in range(2):
                with pytest.raises(EngineStopped, match="no memory"):
                    await served.submit([1], SHORT)
            with pytest.raises(EngineStopped, match="no memory"):
                await served.call(lambda e: e.idle)
        assert engine.pool.used == 0

    asyncio.run(main())


def test_an_error_of_a_call_is_the_callers(engine: Engine) -> None:
    async def main() -> None:
        async with running(engine) as served:
            with pytest.raises(ZeroDivisionError):
                await served.call(lambda e: 1 // 0)
            assert (await served.call(Engine.stats)).running == 0

    asyncio.run(main())


# --- the end, and health --------------------------------------------------------------------------


def test_closing_ends_every_request(engine: Engine) -> None:
    async def main() -> None:
        served = AsyncEngine(engine)
        tasks = [asyncio.create_task(collect(served.generate([i], LONG))) for i in range(1, 12)]
        while served.steps < 3:
            await asyncio.sleep(0.001)
        served.close()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert {str(result) for result in results} == {"the engine was closed"}
        with pytest.raises(EngineStopped, match="was closed"):
            await served.submit([1], SHORT)
        served.close()
        assert engine.pool.used == 0

    asyncio.run(main())


def test_a_step_that_does_not_end_shows_and_does_not_hold_up_closing(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered, leave = threading.Event(), threading.Event()
    hidden = engine.forward.hidden

    def slow(feeds: Any) -> Any:
        entered.set()
        assert leave.wait(60)
        return hidden(feeds)

    monkeypatch.setattr(engine.forward, "hidden", slow)

    async def main() -> None:
        served = AsyncEngine(engine)
        await asyncio.sleep(0.02)
        assert served.stalled == 0, "an idle engine is healthy"
        task = asyncio.create_task(collect(served.generate([1], SHORT)))
        while not entered.is_set():
            await asyncio.sleep(0.001)
        before = served.last_progress
        await asyncio.sleep(0.03)
        assert served.stalled >= 0.03
        assert served.last_progress == before
        with pytest.raises(ZiphiusError, match=r"still computing 0\.05 s after"):
            served.close(timeout=0.05)
        leave.set()
        served.close()
        with pytest.raises(EngineStopped):
            await task

    asyncio.run(main())


def test_progress_is_seen(engine: Engine) -> None:
    async def main() -> None:
        async with running(engine) as served:
            began = time.monotonic()
            await collect(served.generate([1], SHORT))
            assert began <= served.last_progress <= time.monotonic()

    asyncio.run(main())
