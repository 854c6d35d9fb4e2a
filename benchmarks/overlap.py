"""A step of DualPipeV with and without overlap, where rows take as long to travel as to compute.

First what a step computes is measured, then every dispatch and combine is made to take its equal
share of the same time: by a transport that waits, or, with ``--throttle``, by a bucket (``tc tbf``)
on a pair of virtual network cards between two processes' network namespaces, for which it must be
root. Then steps with and without overlap alternate. What has been predicted from the parts stands
beside what is measured. The last line is one JSON object.

    python benchmarks/overlap.py --picture docs/images/overlap-timeline.svg

With ``--ranks 1`` rows go over the slow transport and stay in the process, so that a processor that
is shared with others makes no rank wait for another.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from support import report

from ziphius.parallel.pipeline.overlap import Event
from ziphius.parallel.pipeline.replay import hidden, total
from ziphius.report.overlap import Program, Span, draw_overlap

NAMES = {"attend": "ATTN", "experts": "MLP", "dispatch": "DISPATCH", "combine": "COMBINE"}
PACKET = 64 * 1024  # what a bucket lets through at once


class Process:
    """One rank; in a network namespace of its own if asked."""

    def __init__(self, rank: int, ranks: int, folder: str, *, throttle: bool) -> None:
        script = Path(__file__).parent / "support" / "overlapped.py"
        command = [sys.executable, str(script), "--rank", str(rank), "--ranks", str(ranks)]
        command += ["--store", f"{folder}/store"]
        if throttle:
            command = ["unshare", "-n", *command]
        else:
            command.append("--delay")
        paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
        card = f"card{rank}" if throttle else "lo"
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(p for p in paths if p),
            "GLOO_SOCKET_IFNAME": card,
            "OMP_NUM_THREADS": "1",
        }
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def tell(self, line: str) -> None:
        """Say something; there is one answer to each but the first."""
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def answer(self) -> Any:
        """Wait for it."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("a process has ended early: see what it wrote above")
        return json.loads(line)


@contextlib.contextmanager
def started(ranks: int, *, throttle: bool) -> Iterator[list[Process]]:
    """Start all processes, and end them."""
    with tempfile.TemporaryDirectory() as folder:
        processes = [Process(rank, ranks, folder, throttle=throttle) for rank in range(ranks)]
        try:
            if throttle:
                connect(processes)
            yield processes
        finally:
            for one in processes:
                one.process.kill()
                one.process.wait()


def connect(processes: Sequence[Process]) -> None:
    """Lay a cable between the namespaces of both processes."""
    time.sleep(1)  # until they have entered them
    pids = [str(one.process.pid) for one in processes]
    ends = ["netns", pids[0], "type", "veth", "peer", "name", "card1", "netns", pids[1]]
    call("ip", "link", "add", "card0", *ends)
    for rank, pid in enumerate(pids):
        inside = ["nsenter", "-t", pid, "-n", "ip"]
        call(*inside, "address", "add", f"10.77.0.{rank + 1}/24", "dev", f"card{rank}")
        call(*inside, "link", "set", f"card{rank}", "up")
        call(*inside, "link", "set", "lo", "up")


def narrow(processes: Sequence[Process], bits: int) -> None:
    """Let so many bits a second through the cable, each way."""
    for rank, one in enumerate(processes):
        rule = ["tbf", "rate", f"{bits}bit", "burst", str(PACKET), "latency", "400ms"]
        inside = ["nsenter", "-t", str(one.process.pid), "-n", "tc", "qdisc", "add"]
        call(*inside, "dev", f"card{rank}", "root", *rule)


def call(*command: str) -> None:
    subprocess.run(command, check=True)


def ask(processes: Sequence[Process], line: str) -> list[Any]:
    """Tell all the same; return what each answers."""
    for one in processes:
        one.tell(line)
    return [one.answer() for one in processes]


def program(name: str, trace: Sequence[Event], first: float, last: float) -> Program:
    """Return a stretch of a trace as the picture has it."""
    spans = []
    for e in trace:
        inside = first <= e.start and e.stop <= last
        if inside and e.stage in NAMES and e.moment in ("compute", "carry"):
            text = f"{NAMES[e.stage]}({e.direction})"
            line = int(e.moment == "carry")
            spans.append(Span(line, e.direction, text, e.start - first, e.stop - first))
    return Program(name, spans)


def stretches(trace: Sequence[Event]) -> Iterator[list[Event]]:
    """Yield all pairs of a trace: a backward enters, a forward next, and then another pass."""
    enters = [e for e in trace if e.stage == "enter"]
    for one, two, after in zip(enters, enters[1:], enters[2:], strict=False):
        if (one.direction, two.direction) == ("B", "F"):
            yield [e for e in trace if one.start <= e.start and e.stop <= after.start]


def draw(traces: Sequence[Sequence[Event]], output: Path) -> None:
    """Draw the pair that was disturbed least by whatever else the machine does."""
    best = min((pair for trace in traces for pair in stretches(trace)), key=total)
    first = min(e.start for e in best)
    what = "a forward and a backward of two blocks each"
    name = f"{what}, in the order of the report's figure 4; what is free is waiting"
    title, note = "One rank's overlapped pair", f"{hidden(best):.0%} of its communication is hidden"
    draw_overlap([program(name, best, first, first + total(best))], output, title=title, note=note)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--throttle", action="store_true", help="a real link, made narrow")
    parser.add_argument("--picture", type=Path, help="draw a pair, as .svg or .png")
    parser.add_argument("--record", action="store_true", help="keep the figures in results/")
    parser.add_argument("--ranks", type=int, choices=(1, 2), default=2, help="processes")
    arguments = parser.parse_args()
    if arguments.throttle and arguments.ranks == 1:
        parser.error("--throttle needs a link: use --ranks 2")
    with started(arguments.ranks, throttle=arguments.throttle) as processes:
        for one in processes:
            one.tell("the network is there")
        found = ask(processes, "calibrate 3")
        rate = 0
        if arguments.throttle:
            rate = int(8 * found[0]["bytes"] / found[0]["computed"])
            narrow(processes, rate)
        rounds: dict[str, list[list[Any]]] = {"off": [], "on": []}
        for turn in range(arguments.rounds + 1):
            for name in rounds:
                answers = ask(processes, name)
                if turn:
                    rounds[name].append(answers)
    figures = summary(found, rounds)
    figures["link"] = f"tc tbf, {rate / 1e6:.1f} Mbit/s" if arguments.throttle else "waits"
    show(figures)
    name = "overlap_throttled" if arguments.throttle else "overlap"
    report(name, figures, record=arguments.record)
    if arguments.picture is not None:
        traces = [[Event(*e) for e in answers[0]["trace"]] for answers in rounds["on"]]
        draw(traces, arguments.picture)


def summary(found: Sequence[Any], rounds: dict[str, list[list[Any]]]) -> dict[str, Any]:
    """Return figures of the first rank; a round's seconds are those of both, which wait."""
    seconds = {name: [answers[0]["seconds"] for answers in all_] for name, all_ in rounds.items()}
    ratios = [on / off for on, off in zip(seconds["on"], seconds["off"], strict=True)]
    predicted = found[0]["predicted"]

    def middle(what: str) -> float:
        values = [one[what] for answers in rounds["on"] for one in answers]
        return round(statistics.median(values), 3)

    works = [answers[0]["work"] for answers in rounds["on"]]
    return {
        "ranks": len(found),
        "rounds": len(ratios),
        "seconds": {name: round(statistics.median(s), 3) for name, s in seconds.items()},
        "best_seconds": {name: round(min(s), 3) for name, s in seconds.items()},
        "ratio": round(statistics.median(ratios), 3),
        "ratio_range": [round(min(ratios), 3), round(max(ratios), 3)],
        "predicted_seconds": {name: round(predicted[name], 3) for name in ("off", "on")},
        "ratio_of_best": round(min(seconds["on"]) / min(seconds["off"]), 3),
        "predicted_ratio": round(predicted["on"] / predicted["off"], 3),
        "predicted_hidden": round(predicted["hidden"], 3),
        "predicted_hidden_in_pairs": round(predicted["hidden_in_pairs"], 3),
        "hidden": middle("hidden"),
        "hidden_in_pairs": middle("hidden_in_pairs"),
        "computed_seconds": round(statistics.median(w[0] for w in works), 3),
        "communicated_seconds": round(statistics.median(w[1] for w in works), 3),
        "bytes_a_step": found[0]["bytes"],
        "kinds": {kind: round(s, 5) for kind, s in found[0]["kinds"].items()},
    }


def show(figures: dict[str, Any]) -> None:
    table = Table("step", "seconds, median", "best", "predicted")
    for name in ("off", "on"):
        columns = (figures[key][name] for key in ("seconds", "best_seconds", "predicted_seconds"))
        table.add_row(f"overlap {name}", *(f"{x:.3f}" for x in columns))
    predicted = f"{figures['predicted_ratio']:.3f}"
    measured = f"{figures['ratio']:.3f}", f"{figures['ratio_of_best']:.3f}"
    table.add_row("on by off", *measured, predicted)
    Console().print(table)
    print(
        f"communication hidden: {figures['hidden']:.0%} of a step "
        f"(predicted {figures['predicted_hidden']:.0%}), {figures['hidden_in_pairs']:.0%} of pairs "
        f"(predicted {figures['predicted_hidden_in_pairs']:.0%})"
    )


if __name__ == "__main__":
    main()
