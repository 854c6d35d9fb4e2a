"""``guidellm``: a load generator whose own count of tokens and times is compared."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from tests.clients.drive_lm_eval import tokenizer_folder
from tests.clients.session import Session

REQUESTS, PROMPT, OUTPUT = 40, 64, 16
# What it calls the load, how it asks, and the tokens that the server puts around its text: the
# first one, and in a chat those that say whose turn it is.
LOADS = (
    ("kind=concurrent,streams=4", "/v1/chat/completions", 3),
    ("kind=constant,rate=4", "/v1/completions", 1),
    ("kind=poisson,rate=4", "/v1/chat/completions", 3),
)


def drive(session: Session) -> None:
    """Load the server in every way; each request must succeed, and count as it was asked for."""
    for place, (profile, route, around) in enumerate(LOADS):
        out = session.scratch / f"{place}.json"
        done = session.run(
            _command(session, profile, route, out), log=f"{place}.log", HF_HUB_OFFLINE="1"
        )
        name = f"{profile.replace('kind=', '')} {route}"
        if not out.is_file():
            session.result.add(name, " / ".join((done.stdout + done.stderr).splitlines()[-2:]))
            continue
        session.result.add(f"{name}: every request succeeds", _all_succeed(out))
        session.result.add(f"{name}: its tokens are the server's", _counts(out, PROMPT + around))
        session.result.add(f"{name}: its times are times", _times(out))


def _command(session: Session, profile: str, route: str, out: Path) -> list[str]:
    case = session.case
    target = f"kind=openai_http,target={case.url},model={case.model},request_format={route}"
    folder = tokenizer_folder(session.checkpoint)
    return [
        session.tool("guidellm"), "run", "--backend", target, "--profile", profile,
        "--constraint", f"kind=max_requests,count={REQUESTS}",
        "--tokenizer", f"kind=huggingface_auto,model={folder}",
        "--data", f"kind=synthetic_text,prompt_tokens={PROMPT},output_tokens={OUTPUT}",
        "--output", f"kind=json,path={out}", "--disable-console-interactive",
    ]  # fmt: skip


def _benchmark(out: Path) -> Any:
    (benchmark,) = json.loads(out.read_text("utf-8"))["benchmarks"]
    return benchmark


def _all_succeed(out: Path) -> str:
    counts = {how: len(found or []) for how, found in _benchmark(out)["requests"].items()}
    wanted = {"successful": REQUESTS, "errored": 0, "incomplete": 0}
    wrong = {how: counts.get(how) for how, count in wanted.items() if counts.get(how) != count}
    return f"{wrong} of {REQUESTS} requests" if wrong else ""


def _counts(out: Path, prompt: int) -> str:
    """Compare what it cut its prompts to, by a tokenizer of its own, with the server's usage."""
    for one in _benchmark(out)["requests"]["successful"]:
        counted = (one["prompt_tokens"], one["output_tokens"])
        if counted != (prompt, OUTPUT):
            return f"prompt and output tokens {counted} instead of {(prompt, OUTPUT)}"
    return ""


def _times(out: Path) -> str:
    for one in _benchmark(out)["requests"]["successful"]:
        for name in ("time_to_first_token_ms", "inter_token_latency_ms", "request_latency"):
            value = one[name]
            if not isinstance(value, float) or not math.isfinite(value) or value <= 0:
                return f"{name} = {value}"
        if one["time_to_first_token_ms"] > 1000 * one["request_latency"]:
            return "the first token came after the last"
    return ""
