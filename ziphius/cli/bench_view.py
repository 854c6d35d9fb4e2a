"""What a person sees of a load: a line a level, the requests that are on their way, the figures."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from ziphius.config.errors import ZiphiusError
from ziphius.serving.bench.load import Client
from ziphius.serving.bench.measure import Goal, Spread, Summary
from ziphius.serving.bench.outcome import Outcome
from ziphius.serving.bench.sweep import Level
from ziphius.serving.bench.texts import Texts
from ziphius.serving.bench.units import shown

# A bar that is drawn more often would take the time that is being measured.
_REDRAWN = 2.0
# Above this share the generator may be what is slow.
_BUSY = 0.7
_WIDTHS = (6, 9, 9, 8, 8, 9, 9, 9, 9, 9)
MEASURES = (
    ("ttft", "first token"),
    ("itl", "between tokens"),
    ("per_token", "a token, by request"),
    ("end_to_end", "end to end"),
    ("late", "sent late by"),
)


class View:
    """Follows a sweep; keeps its summaries, and judges it at the end.

    ``greedy`` says that equal prompts must have equal answers.
    """

    def __init__(
        self, levels: Sequence[Level], goal: Goal, *, greedy: bool, console: Console | None = None
    ) -> None:
        self.levels, self.goal, self.greedy = levels, goal, greedy
        self.console = console or Console()
        self.summaries: list[Summary] = []
        self.texts = Texts()
        self._tokens = self._bad = 0
        self._began: float | None = None
        self._bar = Progress(
            TextColumn("{task.description}"), BarColumn(bar_width=None), MofNCompleteColumn(),
            TimeRemainingColumn(), TextColumn("left"),
            console=self.console, transient=True, refresh_per_second=_REDRAWN,
        )  # fmt: skip
        self._task = self._bar.add_task(
            "asking the server", total=sum(lv.requests for lv in levels)
        )

    def __enter__(self) -> View:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    # --- while it runs ----------------------------------------------------------------------------

    def begin(self, client: Client) -> None:
        """Show whom it is about, and the head of the table."""
        asking = client.asking
        self._say(
            f"[bold]{escape(client.model)}[/bold] at {escape(client.url)}: {asking.endpoint}, up "
            f"to {asking.output_tokens} tokens, temperature {asking.temperature:g}"
        )
        open_loop = self.levels[0].rate is not None
        head = ["rate" if open_loop else "at once", "answered", "tokens/s", "req/s", "goodput"]
        head += ["TTFT p50", "p99", "ITL p50", "p99", "end p50"]
        self._row(head, "dim")

    def on_request(self, level: Level, done: int, outcome: Outcome) -> None:
        """Count a request that has ended."""
        self._bad += not outcome.answered
        bad = f", {self._bad} not answered" if self._bad else ""
        where = f"level {len(self.summaries) + 1} of {len(self.levels)}"
        self._bar.update(
            self._task,
            advance=1,
            description=f"{where}, {level.name}: {done}/{level.requests}{bad}",
        )

    def on_level(self, level: Level, summary: Summary) -> None:
        """Show a level that has ended."""
        self.summaries.append(summary)
        s = summary
        has_goal = self.goal != Goal()
        self._row(
            [
                level.name,
                f"{s.answered}/{s.requests}",
                f"{s.output_tokens_per_s:,.1f}",
                f"{s.requests_per_s:.2f}",
                f"{s.goodput:.2f}" if has_goal else "-",
                *(_time(s.ttft, "p50"), _time(s.ttft, "p99")),
                *(_time(s.itl, "p50"), _time(s.itl, "p99")),
                _time(s.end_to_end, "p50"),
            ]
        )
        for kind, count in s.failures.items():
            self._say(f"       [red]{count} {kind}[/red]: {escape(s.examples[kind])}")
        if s.refusals:
            came_again = s.refusals - s.refused
            again = f", {came_again} came again" if came_again else ""
            hint = "" if s.hints == s.refusals else f", {s.refusals - s.hints} without Retry-After"
            self._say(f"       [yellow]{s.refused} refused[/yellow]{again}{hint}")
        if s.busy > _BUSY:
            self._say(
                f"       [yellow]the generator computed {s.busy:.0%} of the time: "
                "times may be its own[/yellow]"
            )

    # --- at the end -------------------------------------------------------------------------------

    def tell(self) -> None:
        """Show every measure in its mean and percentiles, and what was found about the texts."""
        table = Table(box=None, pad_edge=False, header_style="dim")
        for name in ("", "", *Spread._fields):
            table.add_column(name, justify="right" if name else "left")
        for level, summary in zip(self.levels, self.summaries, strict=False):
            for place, (name, label) in enumerate(MEASURES):
                spread: Spread | None = getattr(summary, name)
                if spread is not None:
                    unit = "" if level.rate is not None else " at once"
                    first = f"{level.name}{unit}" if place == 0 else ""
                    table.add_row(first, label, *map(shown, spread))
        self.console.print()
        self.console.print(table)
        self._say(self._tokens_line())
        if self.greedy:
            for line in self._texts_lines():
                self._say(line)

    def judge(self) -> None:
        """Raise ZiphiusError where something is wrong with what the server gave."""
        requests = sum(summary.requests for summary in self.summaries)
        kinds: dict[str, int] = {}
        for summary in self.summaries:
            for kind, count in summary.failures.items():
                kinds[kind] = kinds.get(kind, 0) + count
        wrong = []
        if kinds:
            counted = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
            wrong.append(f"{sum(kinds.values())} of {requests} requests failed ({counted})")
        if self.greedy and self.texts.differing:
            wrong.append(f"{self.texts.differing} of {self.texts.compared} repeated answers differ")
        if not wrong and not any(summary.answered for summary in self.summaries):
            wrong.append(f"all {requests} requests were refused: ask for less, or use --retry")
        if wrong:
            raise ZiphiusError(" and ".join(wrong))

    def _tokens_line(self) -> str:
        tokens = sum(summary.output_tokens for summary in self.summaries)
        prompt = sum(summary.prompt_tokens for summary in self.summaries)
        answered = sum(summary.answered for summary in self.summaries)
        uncounted = answered - sum(summary.usage for summary in self.summaries)
        line = f"\n{prompt:,} tokens in, {tokens:,} out"
        cached = [s.cached_tokens for s in self.summaries if s.cached_tokens is not None]
        if cached and prompt:
            line += f"; {sum(cached) / prompt:.0%} of those in were in the prefix cache"
        if uncounted:
            line += (
                f"; [yellow]{uncounted} answers without usage: a chunk counts as a token[/yellow]"
            )
        return line

    def _texts_lines(self) -> list[str]:
        texts = self.texts
        if not texts.compared:
            return ["texts: none compared: no prompt was answered twice"]
        if not texts.differing:
            return [f"texts: [green]all {texts.compared} repeated answers are equal[/green]"]
        first = texts.first_difference() or {}
        share = texts.differing / texts.compared
        return [
            f"texts: [red]{texts.differing} of {texts.compared} repeated answers differ "
            f"({share:.1%})[/red]; first prompt {first['prompt'] + 1}: {escape(first['text'])}",
            f"  from character {first['at']}: {escape(repr(first['own']))} "
            f"({first['answers']['own']} times)",
            f"  {' ' * len(str(first['at']))}            or: {escape(repr(first['other']))} "
            f"({first['answers']['other']} times)",
        ]

    def _row(self, cells: Sequence[str], style: str = "") -> None:
        line = " ".join(cell.rjust(width) for cell, width in zip(cells, _WIDTHS, strict=True))
        self.console.print(line, style=style, highlight=False, soft_wrap=True)

    def _say(self, line: str) -> None:
        self.console.print(line, highlight=False, soft_wrap=True)


def _time(spread: Spread | None, name: str) -> str:
    return "-" if spread is None else shown(getattr(spread, name))
