"""The engine as the server has it: a process that is started, watched, and started again."""

from __future__ import annotations

import asyncio
import logging
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Literal, Protocol

import msgspec
import zmq
import zmq.asyncio

from ziphius.config.errors import BadInput
from ziphius.serving.link import Busy, EngineGone, Job, Link, Stream
from ziphius.serving.options import EngineSettings, Limits

LOG = logging.getLogger("ziphius.serving")

State = Literal["loading", "ready", "stalled", "restarting", "gone"]
# Between two looks at whether the engine still gives signs of life.
_LOOK_SECONDS = 0.5
_LONGEST_PAUSE = 30.0


class Runner(Protocol):
    """What runs a worker: a process, or a thread of a test."""

    async def start(self, address: str) -> None:
        """Start a worker that connects to ``address``."""

    async def wait(self) -> str:
        """Return how the worker ended, once it has."""

    def kill(self) -> None:
        """End it at once. Safe to repeat."""


class Subprocess:
    """Runs the worker in a process of its own, which ends with this one."""

    def __init__(self, settings: EngineSettings) -> None:
        self._settings = settings
        self.process: asyncio.subprocess.Process | None = None

    async def start(self, address: str) -> None:
        """Start it; what to do comes by its standard input, which no list of processes shows."""
        self.process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "ziphius.serving.worker"), stdin=asyncio.subprocess.PIPE
        )
        job = {
            "address": address,
            "checkpoint": self._settings.checkpoint,
            "how": self._settings.how,
            "threads": self._settings.threads,
        }
        assert self.process.stdin is not None
        self.process.stdin.write(msgspec.json.encode(job) + b"\n")

    async def wait(self) -> str:
        """Return how the process ended."""
        if self.process is None:
            return "its process was not started"
        code = await self.process.wait()
        return f"its process ended by signal {-code}" if code < 0 else f"its process ended ({code})"

    def kill(self) -> None:
        """Kill the process."""
        if self.process is not None and self.process.returncode is None:
            with suppress(ProcessLookupError):
                self.process.kill()


class EngineProcess:
    """Answers requests by a worker that is started again when it fails.

    ``run`` keeps it going and returns when it was stopped or given up; ``fatal`` then says why.
    """

    def __init__(
        self,
        runner: Callable[[], Runner],
        limits: Limits,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._make_runner, self.limits, self._clock = runner, limits, clock
        self.link: Link | None = None
        self.runner: Runner | None = None
        self.restarts = 0
        self.fatal: str | None = None
        self.exit_code = 0
        # The operator's: called with a new link, before anything goes over it.
        self.on_link: Callable[[Link], None] = lambda link: None
        self._in_a_row = 0
        self._was_ready = self._wanted_again = False
        self._stopping = asyncio.Event()
        self._seconds_each = 5.0  # a running mean of what a request takes
        self._context = zmq.asyncio.Context()
        self._folder = tempfile.TemporaryDirectory(prefix="ziphius-")  # 0700: nobody else connects

    # --- requests ---------------------------------------------------------------------------------

    def submit(self, job: Job) -> Stream:
        """Return a request's stream. Raises what ``submit_all`` does."""
        return self.submit_all([job])[0]

    def submit_all(self, jobs: Sequence[Job]) -> list[Stream]:
        """Return the streams of jobs that are taken together, or not at all.

        Raises Busy beyond the limits, EngineGone where nothing is answered now, and BadInput for
        what can never be taken.
        """
        link = self._usable()
        running = link.model.max_running if link.model is not None else 0
        most, wanted = running + self.limits.max_waiting, sum(job.params.n for job in jobs)
        if wanted > most:
            raise BadInput(f"{wanted} answers are asked for: this server takes {most} at a time")
        if link.open + wanted > most:
            raise self._full(f"{link.open} answers run or wait, the limit is {most}")
        waiting, tokens = link.waiting_tokens, sum(len(job.prompt_ids) for job in jobs)
        if waiting and waiting + tokens > self.limits.max_waiting_tokens:
            raise self._full(f"prompts of {waiting} tokens wait")
        streams: list[Stream] = []
        try:
            for job in jobs:
                streams.append(link.submit(job))
        except BaseException:
            for stream in streams:
                stream.close()
            raise
        return streams

    def forget(self) -> None:
        """Drop the cached prefixes that nobody uses."""
        self._usable().forget()

    def restart(self) -> None:
        """Start the worker again, which is no failure of it. Raises EngineGone before its start."""
        if self.runner is None:
            raise EngineGone("the engine has not been started yet: try again later")
        self._wanted_again = True
        self.runner.kill()

    def end_all(self, reason: str) -> None:
        """End every request, with EngineGone."""
        if self.link is not None:
            self.link.end_all(reason)

    def _usable(self) -> Link:
        state = self.state
        if state != "ready" or self.link is None:
            raise EngineGone(f"{self.why(state)}: try again later")
        return self.link

    def _full(self, what: str) -> Busy:
        link = self.link
        running = link.model.max_running if link is not None and link.model is not None else 1
        rounds = (link.open if link is not None else 0) / running
        seconds = min(60, max(1, round(self._seconds_each * rounds)))
        return Busy(f"the server is full: {what}: try again in {seconds} s", seconds)

    # --- health -----------------------------------------------------------------------------------

    @property
    def state(self) -> State:
        """What the engine is doing. ``stalled``: no sign of life for too long."""
        if self.fatal is not None or self._stopping.is_set():
            return "gone"
        if self.link is None or self.link.gone is not None:
            return "restarting" if self._was_ready else "loading"
        if self.link.model is None:
            return "restarting" if self._was_ready else "loading"
        return "stalled" if self.link.silent > self.limits.stall_seconds else "ready"

    def why(self, state: State) -> str:
        """Say a state in words."""
        return {
            "loading": "the model is being loaded",
            "ready": "the engine is ready",
            "stalled": "the engine gives no sign of life",
            "restarting": "the engine is being started again",
            "gone": "the server is shutting down",
        }[state]

    # --- life -------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Start the worker, and again when it ends, until ``stop`` or too many failures."""
        try:
            while not self._stopping.is_set():
                how = await self._live_once()
                if self._stopping.is_set():
                    break
                if self._wanted_again:
                    self._wanted_again, self.restarts = False, self.restarts + 1
                    continue
                failed = self.link.failed if self.link is not None else None
                LOG.error("engine ended: %s", failed.message if failed else how)
                if not self._was_ready:
                    # It has never worked: another try would end the same way.
                    self.exit_code = failed.exit_code if failed else 1
                    self.fatal = failed.message if failed else f"the engine did not start: {how}"
                    break
                self._in_a_row += 1
                if self._in_a_row > self.limits.max_restarts:
                    self.exit_code = 1
                    self.fatal = (
                        f"the engine failed {self._in_a_row} times in a row without an answer: "
                        f"{failed.message if failed else how}"
                    )
                    break
                self.restarts += 1
                pause = min(_LONGEST_PAUSE, 0.25 * 2 ** (self._in_a_row - 1))
                with suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(self._stopping.wait(), pause)
        except Exception as error:  # a mistake of ours: nobody would start the engine again
            LOG.exception("the engine is no longer watched")
            self.exit_code, self.fatal = 1, f"the engine is no longer watched: {error!r}"
        finally:
            self._end_worker("the server is shutting down")
            self._folder.cleanup()
            self._context.term()

    async def _live_once(self) -> str:
        """Run one worker to its end; return how it ended."""
        address = f"ipc://{Path(self._folder.name)}/{self.restarts}"
        socket = self._context.socket(zmq.PAIR)
        socket.bind(address)
        link = Link(socket, clock=self._clock)
        link.on_end = self._note_end
        self.on_link(link)
        self.link, self.runner = link, self._make_runner()
        try:
            await self.runner.start(address)
        except OSError as error:
            self._end_worker("the engine's process could not be started")
            return f"its process could not be started: {error}"
        ended = asyncio.create_task(self.runner.wait())
        watched = asyncio.create_task(self._watch(link))
        await asyncio.wait({ended, watched}, return_when=asyncio.FIRST_COMPLETED)
        how = watched.result() if watched.done() else ended.result()
        if ended.done():  # its last words, if it had any, are on the line
            await asyncio.wait({watched}, timeout=0.2)
        watched.cancel()
        self._end_worker(f"the engine ended: {how}")
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(ended, 10)
        return how

    async def _watch(self, link: Link) -> str:
        """Return when the link is gone, or silent for too long."""
        silent = False
        while link.gone is None:
            self._was_ready = self._was_ready or link.model is not None
            # Twice in a row: where this process stood still, signs of life wait to be read.
            too_long = link.silent > self.limits.stall_restart_seconds
            if silent and too_long:
                return f"no sign of life for {link.silent:.0f} s"
            silent = too_long
            await asyncio.sleep(_LOOK_SECONDS if link.model is not None else 0.05)
        return link.gone

    def _end_worker(self, reason: str) -> None:
        if self.link is not None:
            self.link.close(reason)
        if self.runner is not None:
            self.runner.kill()

    def _note_end(self, stream: Stream) -> None:
        self._in_a_row = 0
        took = stream.last - stream.began
        self._seconds_each += 0.1 * (took - self._seconds_each)

    async def stop(self, seconds: float = 5.0) -> None:
        """Ask the worker to end, then make it."""
        self._stopping.set()
        if self.link is not None:
            self.link.stop()
        if self.runner is not None:
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self.runner.wait(), seconds)
        self._end_worker("the server is shutting down")
