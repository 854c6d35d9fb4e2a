"""Answers on other machines: Ray actors that get the policy's weights, and others when they die.

Weights leave through ``named_weights`` in chunks, and every actor says what it has taken, by a
SHA-256 of names and bytes. Every wait has a deadline, and what is late is named.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from ziphius.alignment.answerers import InProcess
from ziphius.alignment.rollout import Answered, Asked
from ziphius.config.errors import BadInput, ZiphiusError, in_one_line
from ziphius.config.grpo import GrpoConfig
from ziphius.data.readers import optional
from ziphius.kernels.select import Kernels
from ziphius.model.precision import Precision
from ziphius.model.transformer import Transformer
from ziphius.model.weights import named_weights
from ziphius.parallel.collectives import Axis, alone

_CHUNK_BYTES = 256 * 2**20
# Jobs a sampler, so that one that is fast gets more, and a death costs little.
_JOBS_EACH = 2
# A rollout in which more samplers die than this times their number is given up.
_MOST_DEATHS = 2

_START_SECONDS = 300.0

Chunk = list[tuple[str, Tensor]]


class Sampler:
    """What runs in an actor: a copy of the policy that answers."""

    def __init__(
        self,
        model: Any,
        precision: Precision,
        tokenizer: str,
        config: GrpoConfig,
        kernels: str,
        kernel_cache: str | None,
        threads: int,
    ) -> None:
        torch.set_num_threads(threads)
        self.copy = Transformer(model, precision, kernels=Kernels())
        self.inner = InProcess(
            self.copy,
            Tokenizer.from_str(tokenizer),
            config,
            kernels=kernels,
            kernel_cache=kernel_cache,
        )
        self.version = -1

    def ready(self) -> int:
        """Answer when this has begun, which takes seconds, by the number of its process."""
        return os.getpid()

    @torch.no_grad()
    def load(self, version: int, *chunks: Chunk) -> str:
        """Take the weights of a version; return the SHA-256 of what has been taken."""
        targets, digest = dict(named_weights(self.copy)), hashlib.sha256()
        for chunk in chunks:
            for name, tensor in chunk:
                targets[name].copy_(tensor)
                _add(digest, name, targets[name])
        self.version = version
        return digest.hexdigest()

    def answer(
        self, version: int, asked: Sequence[Asked], seeds: Sequence[int]
    ) -> list[list[Answered]]:
        """Answer by the weights of a version. Raises ValueError where they are others."""
        if version != self.version:
            raise ValueError(f"has weights {self.version}, asked for {version}")
        return self.inner.answer(asked, seeds)


@dataclass
class _Job:
    places: range
    reference: Any = None
    worker: int = -1
    began: float = 0.0


@dataclass
class Ticket:
    """Questions that have been asked, and the answers that there are."""

    asked: Sequence[Asked]
    seeds: Sequence[int]
    version: int
    chunks: list[Any]
    expected: str
    waiting: deque[_Job]
    running: list[_Job] = field(default_factory=list)
    answers: dict[int, list[Answered]] = field(default_factory=dict)
    deaths: int = 0


class RaySamplers:
    """``count`` actors answer; the trainer's process asks, waits and replaces.

    ``deadline`` is what loading the weights, or one job, may take, in seconds. ``say`` is told who
    was late or died. ``how`` are the arguments of ``Sampler`` behind the configuration.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        config: GrpoConfig,
        *,
        count: int,
        deadline: float,
        say: Callable[[str], None],
        address: str | None = None,
        kernels: str = "auto",
        kernel_cache: str | None = None,
        threads: int = 1,
    ) -> None:
        """Raises BadInput where Ray is not installed, or there is no cluster at ``address``."""
        self._ray = optional("ray", "ray", "grpo.samplers")
        self.model, self.count, self.deadline, self.say = model, count, deadline, say
        self.axis: Axis = alone()
        self._started = _start(self._ray, address, count * threads)
        self._make = self._ray.remote(num_cpus=threads, max_restarts=0)(Sampler).remote
        self._arguments = (
            *(model.config, model.precision, tokenizer.to_str(), config),
            *(kernels, kernel_cache, threads),
        )
        self._jobs_each = 1 if config.ahead else _JOBS_EACH  # nobody gives the next one meanwhile
        self.workers: list[Any] = [self._make(*self._arguments) for _ in range(count)]
        self._version = 0
        try:
            for place in range(count):
                self._await(place)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the actors, and Ray if it was begun here."""
        for worker in self.workers:
            self._ray.kill(worker)
        self.workers = []
        if self._started:
            self._ray.shutdown()

    def begin(self, asked: Sequence[Asked], seeds: Sequence[int]) -> Ticket:
        """Give every actor the weights of this moment, and ask; answers come later."""
        self._version += 1
        chunks, expected = self._put()
        size = max(1, -(-len(asked) // (self.count * self._jobs_each)))
        jobs = deque(
            _Job(range(first, min(len(asked), first + size)))
            for first in range(0, len(asked), size)
        )
        ticket = Ticket(asked, seeds, self._version, chunks, expected, jobs)
        loading = [worker.load.remote(ticket.version, *chunks) for worker in self.workers]
        for place, reference in enumerate(loading):
            self._loaded(ticket, place, reference)
        for place in range(self.count):
            self._give(ticket, place)
        return ticket

    def collect(self, ticket: Ticket) -> list[list[Answered]]:
        """Wait for all answers. Raises ZiphiusError where too many actors die."""
        while ticket.running:
            first = min(job.began for job in ticket.running) + self.deadline
            references = [job.reference for job in ticket.running]
            self._ray.wait(references, timeout=max(0.0, first - time.monotonic()))
            # What has ended is not late, whenever somebody looks.
            done, _ = self._ray.wait(references, num_returns=len(references), timeout=0)
            now = time.monotonic()
            for job in list(ticket.running):
                if job.reference in done:
                    self._take(ticket, job)
                elif now - job.began >= self.deadline:
                    late = f"has not answered within {self.deadline:.0f} s"
                    self._replace(ticket, job.worker, late, job)
        return [ticket.answers[place] for place in range(len(ticket.asked))]

    def _take(self, ticket: Ticket, job: _Job) -> None:
        try:
            answers = self._ray.get(job.reference)
        except self._ray.exceptions.RayTaskError as error:
            raise _said(job.worker, error) from None
        except self._ray.exceptions.RayError as error:
            self._replace(ticket, job.worker, f"died: {in_one_line(error)}", job)
            return
        ticket.running.remove(job)
        ticket.answers.update(zip(job.places, answers, strict=True))
        self._give(ticket, job.worker)

    def _give(self, ticket: Ticket, place: int) -> None:
        if not ticket.waiting:
            return
        job = ticket.waiting.popleft()
        some = slice(job.places.start, job.places.stop)
        job.worker, job.began = place, time.monotonic()
        job.reference = self.workers[place].answer.remote(
            ticket.version, list(ticket.asked[some]), list(ticket.seeds[some])
        )
        ticket.running.append(job)

    def _loaded(self, ticket: Ticket, place: int, reference: Any) -> None:
        """Wait until one actor has the weights, and compare what it has taken."""
        while True:
            try:
                taken = self._ray.get(reference, timeout=self.deadline)
            except self._ray.exceptions.GetTimeoutError:
                why = f"has not taken the weights within {self.deadline:.0f} s"
            except self._ray.exceptions.RayTaskError as error:
                raise _said(place, error) from None
            except self._ray.exceptions.RayError as error:
                why = f"died: {in_one_line(error)}"
            else:
                if taken == ticket.expected:
                    return
                raise ZiphiusError(
                    f"sampler {place}: its weights are not those that were sent: SHA-256 "
                    f"{taken[:12]}, sent {ticket.expected[:12]}"
                )
            reference = self._renew(ticket, place, why)

    def _replace(self, ticket: Ticket, place: int, why: str, job: _Job) -> None:
        """Begin an actor anew, and give its job back."""
        ticket.running.remove(job)
        ticket.waiting.appendleft(_Job(job.places))
        self._loaded(ticket, place, self._renew(ticket, place, why))
        self._give(ticket, place)

    def _renew(self, ticket: Ticket, place: int, why: str) -> Any:
        """Begin an actor anew, and give it the weights."""
        ticket.deaths += 1
        if ticket.deaths > _MOST_DEATHS * self.count:
            raise ZiphiusError(
                f"sampler {place} {why}: {ticket.deaths} were lost in one rollout: look at the "
                "machines of the samplers, or give more time by grpo.sampler_seconds"
            )
        self.say(f"sampler {place} {why}: another takes its place")
        self._ray.kill(self.workers[place])
        self.workers[place] = self._make(*self._arguments)
        self._await(place)
        return self.workers[place].load.remote(ticket.version, *ticket.chunks)

    def _await(self, place: int) -> None:
        """Wait until an actor has begun. Raises ZiphiusError where it does not."""
        try:
            self._ray.get(self.workers[place].ready.remote(), timeout=_START_SECONDS)
        except self._ray.exceptions.GetTimeoutError:
            why = f"within {_START_SECONDS:.0f} s: does the cluster have processors for it?"
        except self._ray.exceptions.RayError as error:
            why = f": {in_one_line(error)}"
        else:
            return
        raise ZiphiusError(f"sampler {place} has not begun {why}")

    def _put(self) -> tuple[list[Any], str]:
        """Put the weights of this moment where actors can read them; return their SHA-256 too."""
        digest, references = hashlib.sha256(), []
        for chunk in _chunks(self.model):
            for name, tensor in chunk:
                _add(digest, name, tensor)
            references.append(self._ray.put(chunk))
        return references, digest.hexdigest()


def _said(place: int, error: Any) -> ZiphiusError:
    """Return what an actor has raised itself, in one line."""
    return ZiphiusError(f"sampler {place}: {in_one_line(getattr(error, 'cause', error))}")


def _chunks(model: Transformer) -> Iterator[Chunk]:
    chunk: Chunk = []
    for name, weight in named_weights(model):
        copy = weight.to("cpu", copy=True)
        if chunk and sum(t.nbytes for _, t in chunk) + copy.nbytes > _CHUNK_BYTES:
            yield chunk
            chunk = []
        chunk.append((name, copy))
    yield chunk


def _add(digest: Any, name: str, tensor: Tensor) -> None:
    digest.update(name.encode())
    digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy())


def _start(ray: Any, address: str | None, processors: int) -> bool:
    """Connect to Ray; say whether it was begun here."""
    if ray.is_initialized():
        return False
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address is None:
        ray.init(address="local", num_cpus=processors, include_dashboard=False, **quiet)
        return True
    try:
        ray.init(address=address, **quiet)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise BadInput(
            f"grpo.samplers_address: no cluster to use at {address}: {in_one_line(error)}"
        ) from None
    return True
