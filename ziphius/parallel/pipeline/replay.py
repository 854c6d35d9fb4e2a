"""How long an overlapped program takes, from how long its parts take: two lines that wait."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from ziphius.parallel.pipeline.overlap import Event, Label, Trace

Seconds = Callable[[Event], float | None]


def measured(trace: Trace) -> Seconds:
    """Return how long everything in a trace has taken."""
    found = {(e.label, e.moment): e.stop - e.start for e in trace}
    return lambda event: found.get((event.label, event.moment))


def replay(events: Iterable[Event], seconds: Seconds) -> Trace:
    """Return what a rank's program does if each part takes its ``seconds``; they begin at 0.

    Events are those of a trace, of which only the order counts. A computation takes its time on the
    rank's own line. What is begun is carried on the lane, when all before it has been, and an end
    waits for it; for ``carry`` of what no lane carries ``seconds`` is None.
    """
    now = free = 0.0
    carried: dict[Label, float] = {}
    found = []
    for event in events:
        begun = now
        if event.moment == "carry":
            continue
        if event.moment == "compute":
            now += seconds(event) or 0.0
        elif event.moment == "end":
            now = max(now, carried.pop(event.label, now))
        else:
            carry = event._replace(moment="carry")
            taken = seconds(carry)
            if taken is not None:
                start, free = max(now, free), max(now, free) + taken
                carried[event.label] = free
                found.append(carry._replace(start=start, stop=free))
        found.append(event._replace(start=begun, stop=now))
    return found


def total(trace: Trace) -> float:
    """Return the seconds from the first event to the end of the last."""
    return max(e.stop for e in trace) - min(e.start for e in trace)


def work(trace: Trace) -> tuple[float, float]:
    """Return the seconds that were computed and those that were communicated."""
    parts = [(e.moment, e.stop - e.start) for e in trace]
    computed, carried = (sum(s for m, s in parts if m == what) for what in ("compute", "carry"))
    return computed, carried


def hidden(trace: Trace) -> float:
    """Return the share of communication that nobody has waited for."""
    _, carried = work(trace)
    waited = sum(
        e.stop - e.start for e in trace if e.moment == "end" and e.stage in ("dispatch", "combine")
    )
    return 1 - waited / carried if carried else 1.0
