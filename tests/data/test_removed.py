"""What was left out, in numbers and words."""

from __future__ import annotations

from ziphius.data.removed import REASONS, ReasonCount, Removed, count_reasons, tell_reasons

REMOVED = [
    Removed(0, "c", "near duplicate", 30, "a", 0, 0.875),
    *(Removed(0, f"short{number}", "too short", number) for number in range(5)),
    Removed(1, "b", "exact duplicate", 7, "a", 0, 1.0),
]


def test_reasons_are_counted_in_the_order_of_the_steps() -> None:
    counts = count_reasons(REMOVED)
    assert counts == (
        ReasonCount("too short", 5, 10, ("short0", "short1", "short2")),
        ReasonCount("exact duplicate", 1, 7, ("b = a",)),
        ReasonCount("near duplicate", 1, 30, ("c ~ a (0.88)",)),
    )
    assert [count.reason for count in counts] == sorted(
        {removed.reason for removed in REMOVED}, key=REASONS.index
    )


def test_reasons_are_told_in_a_line() -> None:
    assert tell_reasons(count_reasons(REMOVED)) == (
        "5 too short, 1 exact duplicate, 1 near duplicate"
    )
    assert tell_reasons(()) == "nothing removed"
