"""Every table that a name gives can be executed; what cannot work is refused with what can."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from itertools import accumulate

import pytest

from tests.parallel.pipeline.tables import ONE_WAY, allowed, many, runs
from ziphius.config.errors import BadInput
from ziphius.parallel.pipeline.actions import Action, Message, Schedule
from ziphius.parallel.pipeline.check import check
from ziphius.parallel.pipeline.families import NAMES, schedule


@pytest.mark.parametrize("name", NAMES)
def test_tables_are_valid_for_2_to_16_ranks_and_many_micro_batches(name: str) -> None:
    tables = list(many(name))
    assert len(tables) > 25
    for table in tables:
        assert check(table) == [], (table.ranks, table.micro_batches)
        assert runs(table)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_sent_is_received_once_and_in_order(name: str) -> None:
    """Of one kind and stage, messages leave and are needed in the same order."""
    for table in list(many(name))[::8]:
        sent = Counter(m for steps in table.steps for step in steps for m in table.sends(step))
        needed = Counter(m for steps in table.steps for s in steps for m in table.receives(s))
        assert sent == needed
        assert set(sent.values()) == {1}
        assert len(sent) == 2 * (table.stages - 1) * table.micro_batches
        for source in range(table.ranks):
            for target in range(table.ranks):
                assert by_stage(table.channel(source, target)) == by_stage(
                    m
                    for step in table.steps[target]
                    for m in table.receives(step)
                    if m.source == source
                )


def by_stage(messages: Iterable[Message]) -> dict[tuple[str, int], list[int]]:
    lanes: dict[tuple[str, int], list[int]] = {}
    for message in messages:
        kind, stage, micro_batch = message.result
        lanes.setdefault((kind, stage), []).append(micro_batch)
    return lanes


@pytest.mark.parametrize("name", NAMES)
def test_a_message_comes_at_most_one_place_before_its_turn(name: str) -> None:
    """A rank that receives in the order of sending keeps at most one of a neighbour for later."""
    spare = 0
    for table in list(many(name))[::8]:
        for rank, steps in enumerate(table.steps):
            for neighbour in {(rank - 1) % table.ranks, (rank + 1) % table.ranks} - {rank}:
                place = {m: i for i, m in enumerate(table.channel(neighbour, rank))}
                taken = [
                    place[m] for step in steps for m in table.receives(step)
                    if m.source == neighbour
                ]  # fmt: skip
                latest = accumulate(taken, max)
                spare = max(spare, *(late - count for count, late in enumerate(latest)), 0)
    assert spare == (0 if name in ("1f1b", "zb1p") else 1)


@pytest.mark.parametrize("name", ONE_WAY)
def test_one_direction_begins_at_rank_0(name: str) -> None:
    table = schedule(name, 4, 8)
    assert {table.rank_of(0, m) for m in range(8)} == {0}
    assert {table.direction(m) for m in range(8)} == {0}
    assert all(len(table.holders(stage)) == 1 for stage in range(table.stages))
    assert sum(len(table.chunks(rank)) for rank in range(4)) == table.stages


def test_interleaved_stages_go_round() -> None:
    table = schedule("interleaved", 3, 6, 9)
    assert [table.rank_of(stage, 0) for stage in range(9)] == [0, 1, 2] * 3
    # Groups of three micro-batches: each goes through the rank's first stage, then its second.
    first = [step for step in table.steps[2] if step.actions[0].kind == "F"]
    assert " ".join(map(str, first[:9])) == "2F0 2F1 2F2 5F0 5F1 5F2 8F0 8F1 8F2"


def test_messages_say_what_goes_where() -> None:
    table = schedule("dualpipe", 4, 8)
    # Micro-batch 5 enters at rank 3.
    assert table.receives(Action("F", 1, 5)) == (Message(Action("F", 0, 5), 3, 2),)
    assert table.sends(Action("F", 1, 5)) == (Message(Action("F", 1, 5), 2, 1),)
    assert table.receives(Action("B", 1, 5)) == (Message(Action("I", 2, 5), 1, 2),)
    assert table.sends(Action("B", 1, 5)) == (Message(Action("I", 1, 5), 2, 3),)
    assert table.sends(Action("I", 0, 5)) == table.receives(Action("F", 0, 5)) == ()
    assert table.sends(Action("W", 1, 5)) == table.receives(Action("W", 1, 5)) == ()
    assert table.receives(Action("B", 3, 5)) == ()


@pytest.mark.parametrize("name", NAMES)
def test_what_cannot_work_is_refused_and_the_advice_can(name: str) -> None:
    for ranks in range(-1, 7):
        for micro_batches in range(-1, 16):
            works = min(ranks, micro_batches) > 0 and allowed(name, ranks, micro_batches)
            table, refusals = follow(name, ranks, micro_batches)
            assert works == (refusals == 0)
            if works:
                assert (table.ranks, table.micro_batches) == (ranks, micro_batches)


def follow(name: str, ranks: int, micro_batches: int) -> tuple[Schedule, int]:
    """Do what refusals say until a size is taken; count them."""
    for refusals in range(5):
        try:
            return schedule(name, ranks, micro_batches), refusals
        except BadInput as error:
            (number,) = re.findall(r"use (\d+)", str(error))
            if re.match(r"schedule \w+: -?\d+ ranks: ", str(error)):
                ranks = int(number)
            else:
                micro_batches = int(number)
    raise AssertionError(f"{name}: advice leads nowhere: {ranks} ranks, {micro_batches}")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("dualpip", 4, 8), "did you mean 'dualpipe'"),
        (("gpipe", 4, 8), "unknown"),
        (("dualpipe", 3, 8), "use 2 or 4 ranks, or 'dualpipev'"),
        (("dualpipe", 4, 7), "use 8, or '1f1b' or 'zb1p'"),
        (("dualpipe", 4, 9), "use 8 or 10"),
        (("dualpipev", 4, 7), "use 8, or"),
        (("zbv", 4, 7, 6), "use 8 stages or 'interleaved'"),
        (("interleaved", 4, 7, 4), "2 or more; use 8"),
        (("interleaved", 4, 7, 15), "use 16"),
        (("1f1b", 0, 3), "0 ranks"),
    ],
)
def test_refusals(arguments: tuple, words: str) -> None:
    with pytest.raises(BadInput, match=re.escape(words)):
        schedule(*arguments)


def test_a_table_is_a_value() -> None:
    first, second = schedule("dualpipe", 4, 8), schedule("dualpipe", 4, 8)
    assert first == second
    assert hash(first) == hash(second)
    with pytest.raises(AttributeError):
        first.name = "another"  # type: ignore[misc]
    assert "rank 3: " in str(first)
    assert " 3F5 0F3&3B5 3F6&0B0 3B6 " in str(first)
