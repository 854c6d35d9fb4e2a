"""``ziphius bench``"""

from __future__ import annotations

import asyncio
import gc
import json
import math
import re
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from ziphius.config.errors import BadInput

if TYPE_CHECKING:
    from ziphius.cli.bench_view import View
    from ziphius.serving.bench.load import Client, Endpoint
    from ziphius.serving.bench.measure import Goal
    from ziphius.serving.bench.prompts import Prompt
    from ziphius.serving.bench.sweep import Level

Number = TypeVar("Number", int, float)
KEY_VARIABLE = "ZIPHIUS_API_KEY"


def make_bench_app() -> typer.Typer:
    """Build ``ziphius bench`` and its verbs."""
    app = typer.Typer(help="Measure a server.", add_completion=False, rich_markup_mode="rich")
    app.callback()(_bench)
    app.command()(serve)
    return app


def _bench() -> None:
    """Measure a server."""


def serve(
    url: Annotated[str, typer.Argument(metavar="URL", help="Such as http://127.0.0.1:8000.")],
    concurrency: Annotated[
        str, typer.Option(metavar="N,N,...", help="Requests at a time, a level each.")
    ] = "1,4,16",
    rate: Annotated[
        str | None,
        typer.Option(
            metavar="R,R,...",
            help="In place of --concurrency: requests a second that come at random moments, "
            "whatever has become of the others. Their times count from when they were due.",
        ),
    ] = None,
    requests: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Requests a level; by default 4 for each at a time and at least 8, or 20 s.",
        ),
    ] = None,
    endpoint: Annotated[
        str, typer.Option(metavar="chat|completions", help="Which of the two to ask.")
    ] = "chat",
    model: Annotated[str | None, typer.Option(help="By default the server's first.")] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help='A prompt a line: text, or {"prompt": ...} or {"messages": ...}.'),
    ] = None,
    prompt_tokens: Annotated[
        int, typer.Option(min=1, help="Without --prompts: the length of those made up.")
    ] = 64,
    distinct: Annotated[
        int, typer.Option(min=1, help="Without --prompts: how many; they are asked in turn.")
    ] = 8,
    output_tokens: Annotated[int, typer.Option(min=1, help="The most tokens of an answer.")] = 128,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Let every answer have all of them.")
    ] = False,
    temperature: Annotated[
        float, typer.Option(min=0, help="At 0 equal prompts must have equal answers.")
    ] = 0.0,
    cold: Annotated[
        bool,
        typer.Option(
            "--cold", help="Keep the prefix cache out, where the server can (cache_salt)."
        ),
    ] = False,
    body: Annotated[
        str | None, typer.Option(metavar="JSON", help="Added to the body of every request.")
    ] = None,
    warm_up: Annotated[int, typer.Option(min=1, help="Requests before, not counted.")] = 4,
    timeout: Annotated[float, typer.Option(help="Seconds a request may take.")] = 300.0,
    retry: Annotated[
        bool, typer.Option("--retry", help="Come again after 429 and 503, when Retry-After says.")
    ] = False,
    slo_ttft: Annotated[
        str | None,
        typer.Option(metavar="TIME", help="Goodput: the most until the first token, as 500ms."),
    ] = None,
    slo_itl: Annotated[
        str | None,
        typer.Option(metavar="TIME", help="Goodput: the most between tokens, a request's mean."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of arrivals and made-up prompts.")] = 0,
    api_key: Annotated[
        str | None,
        typer.Option(
            help=f"The server's key; else {KEY_VARIABLE}.", envvar=KEY_VARIABLE, show_envvar=False
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write all figures to this JSON file.")] = None,
    chart: Annotated[Path | None, typer.Option(help="Draw them into this PNG file.")] = None,
) -> None:
    """Load any OpenAI-compatible server at URL, and measure what comes back.

    A chunk of k tokens that comes s seconds after the last is k times s/k between tokens.

    429 and 503 are refusals, counted apart; a stream without end, text or right count is a failure.

    Exit code 1: a request failed, greedy answers to one prompt differ, or nothing was answered.

    A chart: ziphius bench serve http://127.0.0.1:8000 --chart load.png --out load.json

    Goodput: ziphius bench serve URL --rate 1,2,4 --slo-ttft 1s --slo-itl 100ms
    """
    from ziphius.cli.bench_view import View
    from ziphius.serving.bench.load import Asking, Client
    from ziphius.serving.bench.measure import Goal

    chosen = _endpoint(endpoint)
    goal = Goal(_seconds("--slo-ttft", slo_ttft), _seconds("--slo-itl", slo_itl))
    asking = Asking(
        endpoint=chosen, model=model, output_tokens=output_tokens, temperature=temperature,
        timeout=timeout, retry=retry, ignore_eos=ignore_eos, cold=cold, extra=_extra(body),
    )  # fmt: skip
    work = Work(
        levels=_levels(concurrency, rate, requests), goal=goal, warm_up=warm_up, seed=seed,
        given=_given(prompts, chosen), distinct=distinct, prompt_tokens=prompt_tokens,
    )  # fmt: skip
    for option, path in (("--out", out), ("--chart", chart)):
        _require_writable(option, path)
    client = Client(url, asking, api_key)
    view = View(work.levels, goal, greedy=temperature == 0)
    try:
        with view, _without_collections():
            asyncio.run(_measure(client, work, view))
    finally:
        # Levels that have ended are worth keeping, whatever ended the others.
        if view.summaries:
            source = f"prompts of {prompt_tokens} tokens" if prompts is None else prompts.name
            settings = asdict(asking) | {
                "prompts": source, "warm_up": warm_up, "seed": seed,
                "slo_ttft": goal.ttft, "slo_itl": goal.itl,
            }  # fmt: skip
            _keep(view, client, settings, out, chart)
    view.tell()
    view.judge()


@dataclass(frozen=True, kw_only=True)
class Work:
    """What to send: levels, and prompts that are ``given`` or made up."""

    levels: list[Level]
    goal: Goal
    warm_up: int
    seed: int
    given: list[Prompt] | None
    distinct: int
    prompt_tokens: int


@contextmanager
def _without_collections() -> Iterator[None]:
    """Collect no garbage: a collection would be measured as the server's latency."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


async def _measure(client: Client, work: Work, view: View) -> None:
    from ziphius.serving.bench.sweep import Level, make_prompts, run_level, sweep

    async with client:
        await client.meet()
        prompts = work.given
        if prompts is None:
            prompts = await make_prompts(client, work.distinct, work.prompt_tokens, work.seed)
        await client.learn_dialect(prompts[0])  # the first of the warm-up
        if work.warm_up > 1:
            most = max(level.concurrency or 1 for level in work.levels)
            await run_level(client, prompts, Level(work.warm_up - 1, min(most, work.warm_up)))
        view.begin(client)
        await sweep(
            client, prompts, work.levels, goal=work.goal, texts=view.texts, seed=work.seed,
            on_request=view.on_request, on_level=view.on_level,
        )  # fmt: skip


def _keep(
    view: View, client: Client, settings: dict[str, Any], out: Path | None, chart: Path | None
) -> None:
    """Write the result file and the picture, if they are wanted."""
    if out is None and chart is None:
        return
    from ziphius.report.files import write_whole
    from ziphius.serving.bench.result import make_result

    result = make_result(
        view.summaries,
        view.texts if view.greedy else None,
        server=client.server,
        command=_command(),
        settings=settings,
        complete=len(view.summaries) == len(view.levels),
    )
    if out is not None:
        write_whole(out, (json.dumps(result, indent=2, ensure_ascii=False) + "\n").encode())
    if chart is not None:
        from ziphius.serving.bench.chart import draw

        write_whole(chart, draw(result), "--chart")


def _command() -> str:
    """Return the command as it was given, without the key."""
    arguments = ["ziphius", *sys.argv[1:]]
    for place, argument in enumerate(arguments):
        if argument == "--api-key" and place + 1 < len(arguments):
            arguments[place + 1] = "KEY"
        elif argument.startswith("--api-key="):
            arguments[place] = "--api-key=KEY"
    return shlex.join(arguments)


# --- options ------------------------------------------------------------------------------------


def _endpoint(name: str) -> Endpoint:
    from ziphius.serving.bench.load import ENDPOINTS

    for known in ENDPOINTS:
        if name == known:
            return known
    raise BadInput(f"--endpoint {name}: use {' or '.join(ENDPOINTS)}")


def _levels(concurrency: str, rate: str | None, requests: int | None) -> list[Level]:
    from ziphius.serving.bench.sweep import Level

    if rate is not None:
        rates = _numbers("--rate", rate, float)
        return [Level(requests or max(16, round(20 * r)), rate=r) for r in rates]
    streams = _numbers("--concurrency", concurrency, int)
    return [Level(requests or max(8, 4 * n), concurrency=n) for n in streams]


def _numbers(option: str, given: str, kind: type[Number]) -> list[Number]:
    try:
        numbers = [kind(part) for part in given.split(",")]
    except ValueError:
        numbers = []
    if not numbers or not all(0 < number < math.inf for number in numbers):
        raise BadInput(f"{option} {given}: give numbers above 0, as 1,4,16")
    return numbers


def _seconds(option: str, given: str | None) -> float | None:
    """Read ``500ms`` or ``1.5s``."""
    if given is None:
        return None
    match = re.fullmatch(r"(\d+\.?\d*|\.\d+) ?(ms|s)", given)
    if match is None or not float(match[1]):
        raise BadInput(f"{option} {given}: give a time with its unit, as 500ms or 1.5s")
    return float(match[1]) * (1e-3 if match[2] == "ms" else 1.0)


def _extra(body: str | None) -> dict[str, Any]:
    try:
        extra = json.loads(body or "{}")
    except ValueError as error:
        raise BadInput(f"--body: is no JSON: {error}") from None
    if not isinstance(extra, dict):
        raise BadInput(f"--body {body}: give a JSON object, as '{{\"top_p\": 0.9}}'")
    return extra


def _given(path: Path | None, endpoint: Endpoint) -> list[Prompt] | None:
    from ziphius.serving.bench.prompts import read_prompts, require_taken

    if path is None:
        return None
    prompts = read_prompts(path)
    require_taken(prompts, endpoint)
    return prompts


def _require_writable(option: str, path: Path | None) -> None:
    """Refuse before the load what could not be written after it."""
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=path.parent):
            pass
        reason = "is a folder" if path.is_dir() else ""
    except OSError as error:
        reason = f"cannot be written: {error.strerror}"
    if reason:
        raise BadInput(f"{option} {path}: {reason}: name another file")
