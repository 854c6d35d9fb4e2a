"""Samplers in other processes: the answers of this one, weights that are checked, and deaths."""

from __future__ import annotations

import os
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from tests.alignment.support import REINFORCED, later, reinforce
from tests.training.support import metrics
from ziphius.alignment.answerers import InProcess
from ziphius.alignment.questions import Prompter
from ziphius.alignment.rollout import Answered, Asked
from ziphius.alignment.samplers import RaySamplers
from ziphius.alignment.tasks.find import find_task
from ziphius.alignment.tasks.problem import problem_at
from ziphius.config.errors import BadInput, ZiphiusError
from ziphius.model.transformer import Transformer
from ziphius.training.run import build_model
from ziphius.training.start import Start, open_start

ray = pytest.importorskip("ray", reason="needs ray: pip install 'ziphius[ray]'")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.*")
SEEDS = [11, 12, 13, 14, 15]


@pytest.fixture(scope="module")
def begun(start: Path) -> Start:
    return open_start(start)


@pytest.fixture(scope="module")
def model(words: Path, begun: Start) -> Transformer:
    torch.set_num_threads(1)
    return build_model(begun.into(later(words, *REINFORCED)))


@pytest.fixture(scope="module")
def asked(begun: Start) -> list[Asked]:
    prompter, task = Prompter(begun.tokenizer, "v3"), find_task("remainders")
    return [prompter.ask(problem_at(task, 0, "train", n)) for n in range(len(SEEDS))]


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """One Ray for all tests: starting it takes seconds."""
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=80 * 2**20,
    )
    yield
    ray.shutdown()


Make = Callable[..., RaySamplers]


@pytest.fixture
def make(words: Path, begun: Start, model: Transformer, cluster: None) -> Iterator[Make]:
    made: list[RaySamplers] = []

    def samplers(say: Callable[[str], None] = print, **how: float) -> RaySamplers:
        config = begun.into(later(words, *REINFORCED)).grpo
        assert config is not None
        options = {"count": 2, "deadline": 60.0, **how}
        made.append(
            RaySamplers(model, begun.tokenizer, config, say=say, kernels="torch", **options)
        )
        return made[-1]

    yield samplers
    for one in made:
        one.close()


def here(words: Path, begun: Start, model: Transformer, asked: list[Asked]) -> list[list[Answered]]:
    config = begun.into(later(words, *REINFORCED)).grpo
    assert config is not None
    return InProcess(model, begun.tokenizer, config, kernels="torch").answer(asked, SEEDS)


def same(ours: list[list[Answered]], theirs: list[list[Answered]]) -> None:
    for group, other in zip(ours, theirs, strict=True):
        for one, two in zip(group, other, strict=True):
            assert (one.tokens, one.log_probs) == (two.tokens, two.log_probs)
            assert one.experts is not None
            assert two.experts is not None
            assert (one.experts == two.experts).all()


def process_of(samplers: RaySamplers, place: int) -> int:
    return int(ray.get(samplers.workers[place].ready.remote()))


def test_answers_are_those_of_this_process_bit_for_bit(
    make: Make, words: Path, begun: Start, model: Transformer, asked: list[Asked]
) -> None:
    samplers = make()
    same(samplers.collect(samplers.begin(asked, SEEDS)), here(words, begun, model, asked))
    with torch.no_grad():
        model.norm.weight.mul_(-1)
    try:
        expected = here(words, begun, model, asked)
        same(samplers.collect(samplers.begin(asked, SEEDS)), expected)
    finally:
        with torch.no_grad():
            model.norm.weight.mul_(-1)


def test_answers_are_by_the_weights_at_which_they_were_asked_for(
    make: Make, words: Path, begun: Start, model: Transformer, asked: list[Asked]
) -> None:
    expected, samplers = here(words, begun, model, asked), make(count=1)
    ticket = samplers.begin(asked, SEEDS)
    with torch.no_grad():
        model.norm.weight.mul_(-1)
    try:
        same(samplers.collect(ticket), expected)
    finally:
        with torch.no_grad():
            model.norm.weight.mul_(-1)


def test_a_sampler_that_is_killed_is_replaced(
    make: Make, words: Path, begun: Start, model: Transformer, asked: list[Asked]
) -> None:
    said: list[str] = []
    samplers = make(said.append)
    victim = process_of(samplers, 0)
    ticket = samplers.begin(asked, SEEDS)
    os.kill(victim, signal.SIGKILL)
    same(samplers.collect(ticket), here(words, begun, model, asked))
    # It may have been done by then: the next rollout finds it dead.
    same(samplers.collect(samplers.begin(asked, SEEDS)), here(words, begun, model, asked))
    assert len(said) == 1
    assert "died" in said[0]
    assert "another takes its place" in said[0]


def test_a_sampler_that_is_frozen_is_named_and_replaced(
    make: Make, words: Path, begun: Start, model: Transformer, asked: list[Asked]
) -> None:
    said: list[str] = []
    samplers = make(said.append)
    began = time.monotonic()
    samplers.collect(samplers.begin(asked, SEEDS))
    # However busy the machine is: many times what a rollout takes on it.
    samplers.deadline = max(8.0, 8 * (time.monotonic() - began))
    frozen = process_of(samplers, 0)
    os.kill(frozen, signal.SIGSTOP)
    try:
        same(samplers.collect(samplers.begin(asked, SEEDS)), here(words, begun, model, asked))
    finally:
        with suppress(ProcessLookupError):
            os.kill(frozen, signal.SIGKILL)
    assert len(said) == 1
    assert said[0].startswith("sampler 0 has not taken the weights within ")


def test_what_has_ended_is_not_late_however_late_somebody_looks(
    make: Make, words: Path, begun: Start, model: Transformer, asked: list[Asked]
) -> None:
    """As with ``ahead``, where a training step lies between the question and the look."""
    said: list[str] = []
    samplers = make(said.append)
    ticket = samplers.begin(asked, SEEDS)
    ray.wait([j.reference for j in ticket.running], num_returns=len(ticket.running), timeout=120)
    samplers.deadline, ticket.waiting = 0.0, deque()
    given = sorted(place for job in ticket.running for place in job.places)
    ticket.asked = [asked[place] for place in given]
    samplers.collect(ticket)
    assert said == []
    assert sorted(ticket.answers) == given


def test_weights_that_are_not_those_sent_are_refused(
    make: Make, asked: list[Asked], monkeypatch: pytest.MonkeyPatch
) -> None:
    samplers = make(count=1)
    references, _ = samplers._put()
    monkeypatch.setattr(samplers, "_put", lambda: (references, "0" * 64))
    with pytest.raises(ZiphiusError, match="sampler 0: its weights are not those that were sent"):
        samplers.begin(asked, SEEDS)


def test_samplers_that_keep_dying_end_the_run(
    make: Make, asked: list[Asked], monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    samplers = make(said.append, count=1)
    samplers.collect(samplers.begin(asked, SEEDS))
    samplers.deadline = 0.0
    with pytest.raises(ZiphiusError, match="were lost in one rollout"):
        samplers.begin(asked, SEEDS)
    assert len(said) == 2


def test_a_run_with_samplers_is_the_run_without(
    words: Path, start: Path, tmp_path: Path, cluster: None
) -> None:
    reinforce(words, start, tmp_path / "here")
    reinforce(words, start, tmp_path / "there", "grpo.samplers=2", "grpo.sampler_seconds=60")
    assert metrics(tmp_path / "here") == metrics(tmp_path / "there")


def test_one_rollout_ahead_learns_from_weights_one_rollout_old(
    words: Path, start: Path, tmp_path: Path, cluster: None
) -> None:
    settings = ("grpo.samplers=1", "grpo.updates=1", "grpo.learning_rate=1e-2")
    reinforce(words, start, tmp_path / "ahead", *settings, "grpo.ahead=1")
    lines = metrics(tmp_path / "ahead")
    assert lines[0]["mismatch"] < 1e-5
    assert all(line["mismatch"] > 1e-4 for line in lines[1:])


def test_nobody_answers_ahead_without_samplers(words: Path) -> None:
    with pytest.raises(BadInput, match="set samplers"):
        later(words, *REINFORCED, "grpo.ahead=1")
