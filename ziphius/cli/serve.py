"""``ziphius serve``"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from ziphius.cli import options
from ziphius.cli.plan import expert_bytes, show_plan

_HERE = ("127.0.0.1", "localhost", "::1")


def serve(
    checkpoint: options.Checkpoint,
    host: Annotated[
        str, typer.Option(help="Where to listen; 0.0.0.0 lets other machines in.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65_535, help="0 takes any free one.")] = 8000,
    model_name: Annotated[
        str | None, typer.Option(help="What clients call the model; by default the folder's name.")
    ] = None,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            help="A key that clients must send; may be repeated. Lists of processes show it: "
            "ZIPHIUS_API_KEY hides it. Without any, every key is accepted."
        ),
    ] = None,
    admin_key: Annotated[
        str | None,
        typer.Option(help="Opens the routes below /admin; also ZIPHIUS_ADMIN_KEY."),
    ] = None,
    profile: options.Profile = "none",
    chat_format: Annotated[
        str | None,
        typer.Option(
            metavar="v3|r1|v3.1", help="A built-in chat format in place of the checkpoint's own."
        ),
    ] = None,
    max_running: Annotated[int, typer.Option(min=1, help="Answers computed at a time.")] = 16,
    max_waiting: Annotated[
        int, typer.Option(min=1, help="Answers that may wait; more are refused: try again later.")
    ] = 128,
    max_waiting_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens of the prompts that may wait.")
    ] = 1_000_000,
    max_per_client: Annotated[
        int, typer.Option(min=1, help="Open requests of one key, or of one address without keys.")
    ] = 1024,
    request_seconds: Annotated[
        float, typer.Option(help="The longest an answer may take, waiting included.")
    ] = 600.0,
    drain_seconds: Annotated[
        float, typer.Option(help="How long answers may go on after SIGTERM.")
    ] = 30.0,
    stall_seconds: Annotated[
        float,
        typer.Option(
            help="Without a sign of life of the engine for so long, /health is red. It gives one "
            "between two layers: only where a layer takes longer is more needed."
        ),
    ] = 10.0,
    priorities: Annotated[
        bool,
        typer.Option(
            "--priorities",
            help="Let clients say which requests go first: they may crowd others out.",
        ),
    ] = False,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(help="Pages of this origin may use the server; may be repeated."),
    ] = None,
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Answer to this name in the Host header; may be repeated. By default, on an "
            "address of this machine alone, only localhost, 127.0.0.1 and [::1], elsewhere any.",
        ),
    ] = None,
    tls_cert: Annotated[Path | None, typer.Option(help="A certificate: HTTPS.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="The certificate's key.")] = None,
    page: Annotated[
        bool, typer.Option("--page/--no-page", help="Whether there is a chat page at /.")
    ] = True,
    json_logs: Annotated[
        bool, typer.Option("--json-logs", help="Log JSON, a line a record.")
    ] = False,
    otlp_endpoint: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Send traces to this OpenTelemetry collector, as http://HOST:4318/v1/traces "
            "(pip install 'ziphius\\[otel]').",
        ),
    ] = None,
    threads: Annotated[int, typer.Option(min=0, help="Threads of the engine; 0: one a core.")] = 0,
    speculation: options.Speculation = "auto",
    draft_depth: options.DraftDepth = 1,
    fast_math: options.FastMath = False,
    kernels: options.KernelChoice = "auto",
    device: options.Device = "cpu",
    cache_tokens: options.CacheTokens = 16_384,
    dtype: options.DType = None,
    without_mtp: options.WithoutMTP = False,
    lazy_experts: options.LazyExperts = None,
    plan: options.Plan = False,
    memory: options.Memory = None,
) -> None:
    """Serve a CHECKPOINT by OpenAI's and Anthropic's routes, with a chat page at /.

    Only this machine reaches it unless --host says otherwise. The queue is bounded; SIGTERM and
    Ctrl-C let answers end.

    On this machine: ziphius serve runs/quickstart

    For others, with a key: ZIPHIUS_API_KEY=... ziphius serve DeepSeek-V3 --host 0.0.0.0

    As R1 was published: ziphius serve DeepSeek-R1 --profile r1
    """
    from ziphius.config.errors import BadInput

    how: dict[str, Any] = {
        "dtype": dtype, "mtp": not without_mtp, "fast_math": fast_math, "kernels": kernels,
        "device": device, "speculation": speculation, "draft_depth": draft_depth,
        "cache_tokens": cache_tokens, "expert_bytes": expert_bytes(lazy_experts),
        "max_running": max_running,
    }  # fmt: skip
    if plan:
        show_plan(checkpoint, memory, how)
        return
    if memory is not None:
        raise BadInput("--memory is for --plan; --cache-tokens and --lazy-experts bound answers")
    if (tls_cert is None) != (tls_key is None):
        raise BadInput("--tls-cert and --tls-key belong together: give both")

    from ziphius.serving.hosts import hosts_for
    from ziphius.serving.logs import set_up
    from ziphius.serving.options import EngineSettings, Limits, ServeOptions
    from ziphius.serving.server import bind
    from ziphius.serving.server import serve as run_server

    keys = tuple(api_key or _listed(os.environ.get("ZIPHIUS_API_KEY")))
    limits = Limits(
        max_waiting=max_waiting,
        max_waiting_tokens=max_waiting_tokens,
        max_per_client=max_per_client,
        request_seconds=request_seconds,
        drain_seconds=drain_seconds,
        stall_seconds=stall_seconds,
        stall_restart_seconds=6 * stall_seconds,
    )
    # The server refuses what is too much; the engine's own queue has room for the rest.
    room = {"max_waiting": max_running + max_waiting, "max_waiting_tokens": 2**62}
    serving = ServeOptions(
        model_name=model_name or checkpoint.resolve().name,
        engine=EngineSettings(checkpoint=str(checkpoint), how={**how, **room}, threads=threads),
        limits=limits,
        api_keys=keys,
        admin_key=admin_key or os.environ.get("ZIPHIUS_ADMIN_KEY") or None,
        cors_origins=tuple(cors_origin or ()),
        allowed_hosts=hosts_for(host, allowed_host or ()),
        profile=profile,
        chat_format=chat_format,
        page=page,
        priorities=priorities,
        otlp_endpoint=otlp_endpoint,
    )
    set_up(as_json=json_logs)
    listening = bind(host, port)
    scheme = "https" if tls_cert else "http"
    shown = f"[{host}]" if ":" in host else host
    url = f"{scheme}://{shown}:{listening.getsockname()[1]}"
    _tell_beginning(serving, url, host)
    run_server(
        serving,
        listening,
        tls=(str(tls_cert), str(tls_key)) if tls_cert and tls_key else None,
        on_ready=lambda application: _tell_ready(application, url),
    )


def _listed(text: str | None) -> list[str]:
    """Return the keys of an environment variable: separated by commas."""
    return [key.strip() for key in (text or "").split(",") if key.strip()]


def _tell_beginning(serving: Any, url: str, host: str) -> None:
    typer.echo(f"loading {serving.engine.checkpoint}", err=True)
    if host not in _HERE and not serving.api_keys:
        typer.echo(
            "warning: other machines can reach this server, and no --api-key is set", err=True
        )


def _whose(kernels: str) -> str:
    if "=triton" in kernels:
        return "Triton"
    return "compiled" if "=cpp" in kernels else "PyTorch's"


def _tell_ready(application: Any, url: str) -> None:
    """Say what is served, and where. Nobody may read it, and the engine may have gone again."""
    link = application.engine.link
    model = link.model if link is not None else None
    if model is None:
        told = f"{application.served.name}: ready"
    else:
        told = (
            f"{application.served.name}: {model.parameters:,} parameters in {model.dtype} on "
            f"{model.device}, loaded in {link.load_seconds:.1f} s, {_whose(model.kernels)} kernels"
        )
    pages = f"chat page {url}/   OpenAI's routes {url}/v1   documentation {url}/docs"
    with suppress(OSError):
        typer.echo(f"{told}\n{pages}", err=True)
