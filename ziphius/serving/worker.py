"""The engine's own process: commands in, a report after every step out.

Started by ``engine.py`` as ``python -m ziphius.serving.worker``. A failure here, whatever it is,
does not reach the process that talks to clients.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import msgspec
import zmq

from ziphius.config.errors import BadInput, ZiphiusError, in_one_line
from ziphius.serving.wire import (
    Add,
    Beat,
    Cancel,
    Command,
    End,
    Failed,
    Forget,
    ModelInfo,
    Numbers,
    Part,
    Ready,
    Refused,
    Report,
    Taken,
)

if TYPE_CHECKING:
    from ziphius.inference.engine import Engine
    from ziphius.inference.request import Request

BEAT_SECONDS = 1.0


class Worker:
    """Runs an engine for the peer of a socket, until it is told to stop."""

    def __init__(
        self,
        engine: Engine,
        socket: zmq.Socket[bytes],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.engine, self._socket, self._clock = engine, socket, clock
        self._requests: dict[int, Request] = {}
        self._ids: dict[Request, int] = {}
        self._queued: dict[int, Request] = {}  # of which nothing has been computed
        self._decoder = msgspec.msgpack.Decoder(Command)
        self._encoder = msgspec.msgpack.Encoder()
        self._stopping = False
        self._reported = clock()

    def run(self) -> None:
        """Answer until ``Stop`` comes. Raises what broke the engine."""
        blocks = [block for _, _, block in self.engine.model.blocks()]
        hooks = [block.register_forward_pre_hook(self._show_life) for block in blocks]
        try:
            while True:
                self._listen()
                if self._stopping:
                    return
                if self.engine.idle:
                    self.report(Beat(self._numbers()))
                else:
                    self._step()
        finally:
            for hook in hooks:
                hook.remove()

    def report(self, report: Report) -> None:
        """Send a report. Waits while the peer takes none: then nobody wants the next step."""
        self._socket.send(self._encoder.encode(report))
        self._reported = self._clock()

    def _show_life(self, *_: object) -> None:
        """Report between two layers of a step that takes long: it goes on all the same."""
        if self._clock() - self._reported >= BEAT_SECONDS:
            self.report(Beat(self._numbers()))

    def _listen(self) -> None:
        """Take every command that has come; wait for one where there is nothing else to do."""
        wait = BEAT_SECONDS if self.engine.idle else 0.0
        if not self._socket.poll(round(1000 * wait)):
            return
        while not self._stopping:
            try:
                raw = self._socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            self._obey(self._decoder.decode(raw))

    def _obey(self, command: Command) -> None:
        if isinstance(command, Add):
            self._add(command)
        elif isinstance(command, Cancel):
            request = self._requests.pop(command.id, None)
            self._queued.pop(command.id, None)
            if request is not None:
                del self._ids[request]
                self.engine.cancel(request)
        elif isinstance(command, Forget):
            self.engine.pool.drop_cached()
        else:
            self._stopping = True

    def _add(self, command: Add) -> None:
        from ziphius.inference.params import SamplingParams
        from ziphius.inference.scheduler import FOREVER
        from ziphius.inference.sequence import QueueFull

        deadline = FOREVER if command.seconds is None else self._clock() + command.seconds
        try:
            request = self.engine.add(
                command.prompt_ids,
                SamplingParams(**command.params),
                priority=command.priority,
                salt=command.salt,
                deadline=deadline,
                score_only=command.score_only,
            )
        except QueueFull as error:
            self.report(Refused(command.id, "full", str(error)))
        except BadInput as error:
            self.report(Refused(command.id, "bad_input", str(error)))
        except Exception as error:  # a mistake of ours: one request's, not everybody's
            self.report(
                Refused(command.id, "failure", f"{type(error).__name__}: {in_one_line(error)}")
            )
        else:
            self._requests[command.id] = self._queued[command.id] = request
            self._ids[request] = command.id
            self.report(Taken(command.id))

    def _step(self) -> None:
        began = self._clock()
        touched = [request for request in self.engine.step() if request in self._ids]
        parts, ends = [], []
        for request in touched:
            number = self._ids[request]
            parts += _parts(number, request)
            if request.finished:
                ends.append(_end(number, request))
                del self._ids[request], self._requests[number]
        begun = self._begun()
        self.report(Beat(self._numbers(), parts, ends, begun, self._clock() - began))

    def _begun(self) -> list[int]:
        """Return the requests that have left the queue since the last call."""
        left = [number for number, request in self._queued.items()
                if request.finished or request.sequences[0].cached >= 0]  # fmt: skip
        requests = [(number, self._queued.pop(number)) for number in left]
        return [number for number, request in requests if request.sequences[0].cached >= 0]

    def _numbers(self) -> Numbers:
        engine = self.engine
        stats = engine.stats()
        return Numbers(
            running=stats.running,
            waiting=stats.waiting,
            waiting_tokens=stats.waiting_tokens,
            pages=stats.pages,
            used=stats.used,
            cached=stats.cached,
            prefix_queries=stats.prefix_queries,
            prefix_hits=stats.prefix_hits,
            preemptions=stats.preemptions,
            expired=stats.expired,
            steps=engine.steps,
            tokens=engine.tokens,
            batched=engine.batched,
            judged=list(engine.acceptance.judged),
            accepted=list(engine.acceptance.accepted),
        )


def _parts(number: int, request: Request) -> list[Part]:
    parts = []
    for answer in request.answers:
        delta = answer.pull()
        if delta.token_ids or delta.text or delta.finish_reason:
            parts.append(
                Part(
                    number, delta.index, delta.text, delta.token_ids, delta.offsets,
                    delta.logprobs, delta.finish_reason, delta.stop_reason, delta.error,
                )
            )  # fmt: skip
    return parts


def _end(number: int, request: Request) -> End:
    output = request.result()
    scored = output.prompt_logprobs
    return End(
        id=number,
        cached_tokens=output.num_cached_tokens,
        drafted=output.drafted,
        accepted=output.accepted,
        prompt_logprobs=None if scored is None else list(scored),
    )


def describe(engine: Engine) -> ModelInfo:
    """Say of an engine what the server has to know."""
    from ziphius.inference.choose import device_name
    from ziphius.model.count import count

    config, options = engine.model.config, engine.options
    return ModelInfo(
        vocab_size=config.vocab_size,
        # A cache never holds the last token.
        context=min(config.max_position_embeddings, engine.pool.n_pages * options.page_size + 1),
        bos=config.bos_token_id,
        eos=sorted(engine.end_ids),
        dtype=str(engine.model.precision.compute).removeprefix("torch."),
        device=device_name(engine.model.device),
        kernels=str(engine.model.kernels),
        speculation=engine.pace.mode,
        draft_depth=engine.pace.depth,
        max_running=options.max_running,
        cache_tokens=engine.pool.n_pages * engine.pool.page_size,
        page_size=engine.pool.page_size,
        parameters=count(config).total,
    )


def serve(address: str, checkpoint: str, how: dict[str, Any], threads: int) -> int:
    """Load a checkpoint and answer the peer at ``address``. Returns the exit code."""
    context = zmq.Context()
    socket: zmq.Socket[bytes] = context.socket(zmq.PAIR)
    socket.connect(address)
    encoder = msgspec.msgpack.Encoder()
    began = time.monotonic()
    code = 0
    try:
        import torch

        from ziphius.inference.llm import LLM

        if threads:
            torch.set_num_threads(threads)
        llm = LLM(checkpoint, **how)
        worker = Worker(llm.engine, socket)
        worker.report(Ready(describe(llm.engine), time.monotonic() - began))
        worker.run()
    except ZiphiusError as error:
        code = error.exit_code
        socket.send(encoder.encode(Failed(in_one_line(error), code)))
    except Exception as error:
        code = 1
        socket.send(encoder.encode(Failed(f"{type(error).__name__}: {in_one_line(error)}", code)))
    finally:
        socket.close(linger=2000)
        context.term()
    return code


def end_with_the_parent() -> None:
    """End this process when the server's has: it holds the other end of our standard input."""

    def watch() -> None:
        # Not through sys.stdin: its lock, held at the interpreter's end, would abort the process.
        while os.read(sys.stdin.fileno(), 1024):
            pass
        os._exit(1)

    threading.Thread(target=watch, name="parent", daemon=True).start()


def main() -> None:
    """Read what to do from the standard input's first line, as JSON."""
    # Ctrl-C in a terminal reaches the whole group; the server decides when the engine ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    job = msgspec.json.decode(sys.stdin.buffer.readline())
    end_with_the_parent()
    raise SystemExit(serve(job["address"], job["checkpoint"], job["how"], job["threads"]))


if __name__ == "__main__":
    main()
