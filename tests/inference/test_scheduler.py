"""Scheduling: who goes first, who makes room, and that everything ends."""

from __future__ import annotations

from dataclasses import astuple

import pytest

from tests.inference.scheduling import PROMPT, engine, expect_answer, fed, scheduler
from tests.inference.simulation import rows
from ziphius.config.errors import BadInput
from ziphius.inference.sequence import QueueFull, Sequence

# --- order, limits, room --------------------------------------------------------------------------


def test_decode_goes_first_and_prompts_fill_the_step() -> None:
    run = engine(max_running=3, max_step_tokens=8, prefill_chunk=5)
    run.scheduler.add([1, 2, 3, 4], 9)
    assert fed(run.step()) == [(0, 4)]
    run.scheduler.add(PROMPT, 9)
    run.scheduler.add(PROMPT[3:], 9)
    assert fed(run.step()) == [(4, 1), (0, 5), (0, 2)]
    assert fed(run.step()) == [(5, 1), (5, 5), (2, 2)]
    assert fed(run.step()) == [(6, 1), (10, 1), (4, 4)]
    run.drain()


def test_a_chunk_says_what_is_wanted_of_it() -> None:
    run = engine(page_size=4, prefill_chunk=6)
    (sequence,) = run.scheduler.add(PROMPT, 4)
    (chunk,) = run.step().chunks
    pages = sequence.table.pages
    assert chunk.tokens == PROMPT[:6]
    assert chunk.slots == [pages[p // 4] * 4 + p % 4 for p in range(6)]
    assert (chunk.logits, chunk.ends, chunk.drafts, chunk.table) == (0, False, 0, sequence.table)
    (chunk,) = run.step().chunks
    assert (chunk.start, chunk.tokens, chunk.logits, chunk.ends) == (6, PROMPT[6:], 1, True)
    sequence.drafts = [3, 3, 3]
    (chunk,) = run.scheduler.schedule().chunks
    # Of 4 tokens one is chosen and one follows the drafts.
    assert chunk.tokens == [sequence.tokens[-1], 3, 3]
    assert chunk.slots == [
        pages[2] * 4 + 3,
        sequence.table.pages[3] * 4,
        sequence.table.pages[3] * 4 + 1,
    ]
    assert (chunk.logits, chunk.ends, chunk.drafts) == (3, True, 2)


def test_prompt_logprobs_ask_for_every_prompt_position_and_look_nothing_up() -> None:
    run = engine(prefill_chunk=6)
    run.scheduler.add(PROMPT, 2)
    run.drain()
    (sequence,) = run.scheduler.add(PROMPT, 2, prompt_logprobs=True)
    assert [chunk.logits for _ in range(2) for chunk in run.step().chunks] == [6, 5]
    run.drain()
    assert run.scores[sequence] == dict(enumerate(rows(PROMPT)))
    (scored,) = run.scheduler.add(PROMPT, 0, prompt_logprobs=True)
    run.drain()
    assert run.scores[scored] == run.scores[sequence]
    assert scored.output == []


def test_first_come_first_served_and_priority_before() -> None:
    run = engine(max_running=1)
    order: list[Sequence] = []
    requests = [run.scheduler.add([1, 2], 1, priority=p)[0] for p in (0, 0, 2, 1, 2)]
    while not run.scheduler.idle:
        order += [chunk.sequence for chunk in run.step().chunks]
    assert [requests.index(sequence) for sequence in order] == [2, 4, 3, 0, 1]


def test_the_first_in_the_queue_is_not_passed_over() -> None:
    run = engine(n_pages=4, page_size=4)
    run.scheduler.add(PROMPT[:8], 5)
    run.step()
    large, small = run.scheduler.add(PROMPT[2:11], 2)[0], run.scheduler.add([1], 1)[0]
    run.step()
    assert (large.state, small.state) == ("waiting", "waiting")
    run.drain()
    expect_answer(large)


def test_the_latest_arrival_makes_room_and_keeps_its_output() -> None:
    run = engine(n_pages=6, page_size=2)
    first = run.scheduler.add([3, 1, 2], 8)[0]
    second = run.scheduler.add([4, 4, 2], 6)[0]
    step = run.step()
    while first.state == "running" and not step.preempted:
        output = second.output
        step = run.step()
    assert step.preempted == [second]
    assert [chunk.sequence for chunk in step.chunks] == [first]
    assert (second.state, second.output, second.table.pages) == ("waiting", output, [])
    assert len(output) > 0
    run.drain()
    expect_answer(first)
    expect_answer(second)
    assert run.scheduler.stats().preemptions >= 1


def test_a_prompt_waits_for_pages_that_the_others_will_need() -> None:
    run = engine(n_pages=16, page_size=4)
    run.scheduler.add([1] * 20, 4)
    run.scheduler.add([2] * 20, 4)
    run.step()
    (tight,) = run.scheduler.add([3] * 20, 4)
    run.step()
    assert tight.state == "waiting"  # 10 to 12 pages are used, 5 needed, 2 more not to be taken
    run.drain()
    assert run.scheduler.stats().preemptions == 0


def test_preempted_during_prefill() -> None:
    run = engine(n_pages=7, page_size=2, prefill_chunk=2)
    first = run.scheduler.add([3, 2], 12)[0]
    run.step()
    second = run.scheduler.add(PROMPT[:9], 2)[0]
    run.step()
    computed = second.computed
    while first.state == "running" and not run.step().preempted:
        computed = second.computed
    assert 0 < computed < 9
    assert (second.state, second.computed) == ("waiting", 0)
    assert first.state == "running"
    run.drain()
    expect_answer(first)
    expect_answer(second)


def test_drafts_are_dropped_before_anybody_is_preempted() -> None:
    """Five pages of three positions: drafts get what is left of them, for one step."""
    some = scheduler(n_pages=5, page_size=3)
    a, b = some.add([1, 2, 3], 9)[0], some.add([4, 5, 6], 9)[0]
    some.update(some.schedule(), {a: [1], b: [1]})
    a.drafts = b.drafts = [7, 7, 7]
    step = some.schedule()
    assert [chunk.drafts for chunk in step.chunks] == [3, 2]
    assert some.pool.free == 0
    some.update(step, {a: [2], b: [2]})
    assert some.pool.free == 1  # the drafts were wrong
    a.drafts = [7, 7]
    step = some.schedule()
    some.update(step, {a: [7, 7, 1], b: [2]})
    assert some.pool.free == 0  # they were right
    a.drafts = [1, 1]
    step = some.schedule()
    assert [chunk.drafts for chunk in step.chunks] == [1, 0]
    some.update(step, {a: [2], b: [2]})
    assert some.stats().preemptions == 0
    a.drafts = [1]
    step = some.schedule()  # b needs a third page
    assert step.preempted == [b]
    assert fed(step) == [(8, 2)]  # b made room for more than that
    some.check()


def test_a_draft_at_the_border_of_a_page() -> None:
    some = scheduler(n_pages=8, page_size=4)
    (sequence,) = some.add([1, 2, 3], 9)
    some.update(some.schedule(), {sequence: [5]})
    for drafts, new, pages in (([6], [6, 7], 2), ([8, 8, 8], [9], 2), ([1, 1], [1, 1, 2], 3)):
        sequence.drafts = drafts
        step = some.schedule()
        assert step.chunks[0].drafts == len(drafts)
        some.update(step, {sequence: new})
        some.check()
        assert (len(sequence.table.pages), sequence.drafts) == (pages, [])
        assert sequence.computed == len(sequence.tokens) - 1
    assert sequence.table.published == 2


def test_equal_prompts_share_and_those_of_other_tenants_do_not() -> None:
    run = engine(page_size=4, recompute=1)
    first = run.scheduler.add(PROMPT[:9], 1)[0]
    run.drain()
    again, foreign = (
        run.scheduler.add(PROMPT[:9], 3)[0],
        run.scheduler.add(PROMPT[:9], 3, salt=b"b")[0],
    )
    step = run.step()
    assert fed(step) == [(7, 2), (0, 9)]
    assert step.chunks[0].slots[0] == -1
    assert (first.cached, again.cached, foreign.cached) == (0, 8, 0)
    stats = run.scheduler.stats()
    assert (stats.prefix_queries, stats.prefix_hits) == (27, 8)
    run.drain()


def test_a_prompt_of_whole_pages_computes_its_last_page() -> None:
    run = engine(page_size=4)
    run.scheduler.add(PROMPT[:8], 1)
    run.drain()
    run.scheduler.add(PROMPT[:8], 1)
    assert fed(run.step()) == [(4, 4)]
    run.drain()


def test_an_answer_is_found_by_the_next_turn() -> None:
    run = engine(page_size=2)
    (first,) = run.scheduler.add([3, 4, 6], 8)
    run.drain()
    (second,) = run.scheduler.add([*first.tokens, 1, 2], 1)
    run.drain()
    # All but the last token had rows.
    assert second.cached == (len(first.tokens) - 1) // 2 * 2 > 4


# --- n answers ------------------------------------------------------------------------------------


def test_n_answers_compute_the_prompt_once() -> None:
    run = engine(page_size=4, prefill_chunk=6)
    group = run.scheduler.add(PROMPT, 5, n=3)
    assert fed(run.step()) == [(0, 6)]
    assert fed(run.step()) == [(6, 5)]
    step = run.step()
    assert sorted(fed(step)) == [(10, 1), (10, 1), (11, 1)]
    assert [chunk.slots for chunk in step.chunks if chunk.start == 10] == [[-1], [-1]]
    parent = group[0].table.pages[2]
    assert step.copies == [(parent, group[1].table.pages[2]), (parent, group[2].table.pages[2])]
    run.drain()
    for sequence in group:
        expect_answer(sequence)
    assert run.scheduler.stats().forks == 2


@pytest.mark.parametrize("page_size", [1, 4, 11, 16])
@pytest.mark.parametrize("steps", [0, 1, 2, 3])
@pytest.mark.parametrize("in_flight", [False, True])
def test_the_parent_is_cancelled(page_size: int, steps: int, in_flight: bool) -> None:
    """Before, while and after its siblings fork it: they go on, one of them with the prompt."""
    run = engine(page_size=page_size, prefill_chunk=6, recompute=1)
    parent, *others = run.scheduler.add(PROMPT, 5, n=3)
    for _ in range(steps):
        run.step()
    if in_flight:
        step = run.scheduler.schedule()
        results = run.compute(step)
        run.scheduler.cancel(parent)
        run.scheduler.check()
        run.finish_step(step, *results)
    else:
        run.scheduler.cancel(parent)
    run.scheduler.check()
    run.drain()
    for sequence in others:
        expect_answer(sequence)


def test_others_start_while_siblings_wait_for_the_prompt() -> None:
    run = engine(prefill_chunk=3)
    group = run.scheduler.add(PROMPT, 3, n=3)
    (other,) = run.scheduler.add([1, 2], 3)
    run.step()
    assert [sequence.state for sequence in group] == ["running", "waiting", "waiting"]
    assert other.state == "running"
    run.drain()


# --- the end of requests --------------------------------------------------------------------------


def test_cancelled_between_schedule_and_update() -> None:
    """Its pages are written by the step, so they come back with the results."""
    run = engine()
    (sequence,) = run.scheduler.add(PROMPT, 5)
    step = run.scheduler.schedule()
    results = run.compute(step)
    assert run.scheduler.cancel(sequence)
    assert not run.scheduler.cancel(sequence)
    assert run.scheduler.pool.used == 3
    run.finish_step(step, *results)
    assert run.scheduler.pool.used == 0
    assert run.scheduler.pool.cached == 0
    assert sequence.output == []
    assert run.scheduler.idle


def test_late_requests_end() -> None:
    some = scheduler(max_running=1)
    soon, last, waits = (some.add([1, 2], 9, deadline=at)[0] for at in (5.0, 7.0, 6.0))
    some.update(some.schedule(4.9), {soon: [3]})
    step = some.schedule(5.0)
    assert step.expired == [soon]
    assert [chunk.sequence for chunk in step.chunks] == [last]
    some.update(step, {last: [3]})
    for now, expired in ((5.9, []), (6.0, [waits]), (6.9, [])):
        step = some.schedule(now)
        assert step.expired == expired
        some.update(step, {last: [3]})
    assert some.schedule(8.0).expired == [last]
    assert some.idle
    assert some.pool.used == 0
    assert some.stats().expired == 3


def test_an_empty_scheduler_has_an_empty_step() -> None:
    some = scheduler()
    step = some.schedule()
    assert (len(step), step.chunks) == (0, [])
    some.update(step, {})
    some.schedule()
    assert astuple(some.stats()) == (0, 0, 0, 64, 0, 0, 0, 0, 0, 0, 0)


def test_the_queue_is_bounded() -> None:
    some = scheduler(max_waiting=2, max_waiting_tokens=10)
    some.add([1] * 20, 1)  # alone it may be long
    with pytest.raises(
        QueueFull, match="the queue is full: 20 tokens wait, the limit is 10"
    ) as full:
        some.add([1], 1)
    assert (full.value.what, full.value.waiting, full.value.limit) == ("tokens", 20, 10)
    some.schedule()
    some.add([1, 2, 3], 1, n=4)
    with pytest.raises(QueueFull, match="the queue is full: 4 requests wait, the limit is 2"):
        some.add([1], 1)
    assert some.stats().waiting_tokens == 3


def test_what_can_never_run_is_refused() -> None:
    some = scheduler(n_pages=3, page_size=4)
    some.add([1] * 8, 5)  # the last token is never fed
    some.add([1] * 12, 0)
    with pytest.raises(BadInput, match="a prompt of 8 tokens and 6 new ones need 4 pages of the"):
        some.add([1] * 8, 6)
    with pytest.raises(BadInput, match="at least 1, 0 and 1 are needed"):
        some.add([], 1)
    with pytest.raises(BadInput, match="at least 1, 0 and 1 are needed"):
        some.add([1], 1, n=0)
    with pytest.raises(BadInput, match="prefill_chunk = 0: at least 1"):
        scheduler(prefill_chunk=0)
    with pytest.raises(BadInput, match="max_step_tokens = 3: each of 4 running"):
        scheduler(max_step_tokens=3, max_running=4)


def test_results_that_can_not_be_are_errors_and_change_nothing() -> None:
    some = scheduler(prefill_chunk=2)
    (sequence,) = some.add([1, 2, 3], 4)
    step = some.schedule()
    with pytest.raises(ValueError, match="was not updated"):
        some.schedule()
    with pytest.raises(ValueError, match="gets a token before its prompt is computed"):
        some.update(step, {sequence: [4]})
    some.update(step, {})
    with pytest.raises(ValueError, match="not being computed"):
        some.update(step, {})
    step = some.schedule()
    with pytest.raises(ValueError, match="gets no token and isn't finished"):
        some.update(step, {})
    with pytest.raises(ValueError, match="added for 7 tokens and isn't finished at 7"):
        some.update(step, {sequence: [4, 5, 6, 7]})
    some.update(step, {sequence: [4]})
    sequence.drafts = [5, 6]
    step = some.schedule()
    for new in ([5, 7, 8], [6, 7], [5, 6, 7, 8]):
        with pytest.raises(ValueError, match=r"but the last, must be drafts|was added for 7"):
            some.update(step, {sequence: new})
    assert sequence.tokens == [1, 2, 3, 4]
    some.update(step, {sequence: [5, 6, 7]}, {sequence})
    assert sequence.output == [4, 5, 6, 7]
    assert some.pool.used == 0
    some.check()
