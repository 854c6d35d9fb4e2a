"""A server for the chat page that says what its visitor asks it to say.

The last user message picks the answer: see ``SCRIPTS``. It can be started by hand to look at the
page: ``python -m tests.serving.page.mock --port 8012 --thinking optional``.
"""

import argparse
import asyncio
import contextlib
import json
import math
import random
import re
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse

import ziphius
from tests.serving.page.texts import ATTACK, CODE, FIBONACCI, LONG, SAMPLE

PAGE = Path(ziphius.__file__).parent / "serving" / "page"
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'"
)
# What a message asks for. "thoughts" needs a model that thinks; "busy" refuses once.
SCRIPTS = ("sample", "code", "attack", "long", "slow", "cut", "break", "busy", "tool", "limit")


@dataclass
class Mock:
    """What the server pretends to be, and what it has seen."""

    chat: bool = True
    thinking: str = "optional"
    tools: bool = True
    key: str | None = None
    rate: float = 400.0
    seen: list[dict[str, Any]] = field(default_factory=list)
    aborted: int = 0
    refused: int = 0


def split(text: str) -> list[str]:
    """Cut a text into pieces about the size of tokens; together they are the text again."""
    return re.findall(r" ?[A-Za-z]{1,7}|\d{1,3}|\n+| +|[^\sA-Za-z\d]{1,2}", text)


def guess(token: str, place: int) -> dict[str, Any]:
    """Return made-up log-probabilities of a token, the same for the same token and place."""
    draw = random.Random(f"{token}{place}")
    share = min(0.9999, max(0.01, 1 - abs(draw.gauss(0, 0.25)))) if draw.random() > 0.1 else 0.06
    others = draw.sample([" the", " deep", "\n", " a", " water", " it", ".", " sound", "ing"], 4)
    rest, top = 1 - share, [(token, share)]
    for other in others:
        rest, part = rest * 0.4, rest * 0.6
        top.append((other, part))
    top.sort(key=lambda pair: -pair[1])
    return {
        "token": token, "bytes": list(token.encode()), "logprob": math.log(share),
        "top_logprobs": [
            {"token": t, "bytes": list(t.encode()), "logprob": math.log(max(p, 1e-6))}
            for t, p in top
        ],
    }  # fmt: skip


def event(value: object) -> str:
    """Return a server-sent event."""
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


def error(status: int, message: str, kind: str, **headers: str) -> JSONResponse:
    """Return a refusal in OpenAI's shape."""
    body = {"error": {"message": message, "type": kind, "param": None, "code": None}}
    return JSONResponse(body, status_code=status, headers=headers)


def answer_for(text: str, number: int) -> str:
    """Return what is said to ``text``; ``number`` counts the requests, so answers differ."""
    if "sample" in text:
        return SAMPLE
    if "attack" in text:
        return ATTACK
    if "code" in text:
        return CODE
    if "long" in text or "slow" in text:
        return LONG
    return (
        f"Answer {number}: you said “{text.strip()}”. The whale goes **down** and comes up again."
    )


def create(mock: Mock) -> FastAPI:
    """Return the application."""
    app = FastAPI()

    @app.middleware("http")
    async def policy(request: Request, call_next: Any) -> Response:
        response: Response = await call_next(request)
        response.headers["Content-Security-Policy"] = POLICY
        response.headers["X-Content-Type-Options"] = "nosniff"
        return response

    @app.get("/")
    async def index() -> Response:
        return FileResponse(PAGE / "index.html", headers={"Cache-Control": "no-cache"})

    @app.get("/page/{name}")
    async def asset(name: str) -> Response:
        if name not in {path.name for path in PAGE.iterdir()}:
            return error(404, f"no file {name}", "not_found_error")
        return FileResponse(PAGE / name, headers={"Cache-Control": "no-cache"})

    @app.get("/v1/models")
    async def models(request: Request) -> Response:
        if mock.key and request.headers.get("authorization") != f"Bearer {mock.key}":
            return error(401, "The API key is missing or wrong.", "authentication_error")
        own = {
            "chat": mock.chat, "thinking": mock.thinking, "tools": mock.tools, "speculation": True,
            "defaults": {"temperature": 0.6, "top_p": 0.95, "max_tokens": 2048},
        }  # fmt: skip
        card = {
            "id": "ziphius-tiny", "object": "model", "created": 1, "owned_by": "ziphius",
            "max_model_len": 4096, "ziphius": own,
        }  # fmt: skip
        return JSONResponse({"object": "list", "data": [card]})

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        body = await request.json()
        mock.seen.append(body)
        said = [m["content"] for m in body["messages"] if m["role"] == "user"][-1]
        if "busy" in said and mock.refused == 0:
            mock.refused += 1
            return error(
                429, "All 32 places are taken.", "rate_limit_error", **{"Retry-After": "2"}
            )
        if "refuse" in said:
            return error(400, "The prompt has 5000 tokens; 4096 fit.", "invalid_request_error")
        return sse(chat_events(mock, body, said))

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        body = await request.json()
        mock.seen.append(body)
        return sse(completion_events(mock, body))

    return app


def sse(events: AsyncIterator[str]) -> StreamingResponse:
    """Return a stream of events."""
    return StreamingResponse(events, media_type="text/event-stream")


async def chat_events(mock: Mock, body: dict[str, Any], said: str) -> AsyncIterator[str]:
    """Yield the chunks of a chat answer."""
    thinks = (body.get("chat_template_kwargs") or {}).get("thinking") and mock.thinking != "never"
    text = answer_for(said, len(mock.seen))
    if body.get("continue_final_message"):
        text = " And it goes on."
    thoughts = (
        "The reader asks something. Let me *think* about whales.\n\nThen I answer."
        if thinks
        else ""
    )
    rate = 25 if "slow" in said else mock.rate
    made = 0
    await asyncio.sleep(0.05)
    try:
        yield ": ping\n\n"
        for name, part in (("reasoning_content", thoughts), ("content", text)):
            for place, token in enumerate(split(part)):
                if name == "content" and place == 12 and "break" in said:
                    yield event(
                        {
                            "error": {
                                "message": "A logit was not finite.",
                                "type": "server_error",
                                "code": None,
                            }
                        }
                    )
                    return
                if name == "content" and place == 12 and "cut" in said:
                    return
                delta = {name: token} if name == "content" else {name: token, "reasoning": token}
                if made == 0:
                    delta["role"] = "assistant"
                yield event(chunk(delta, [guess(token, place)]))
                made += 1
                await asyncio.sleep(1 / rate)
        finish = "length" if "limit" in said else "stop"
        if "tool" in said and body["messages"][-1]["role"] == "user":
            finish = "tool_calls"
            for piece in tool_pieces():
                yield event(chunk({"tool_calls": [piece]}, []))
        yield event(chunk({}, [], finish))
        yield event({"id": "c", "choices": [], "usage": usage(made, len(split(thoughts)))})
        yield "data: [DONE]\n\n"
    except asyncio.CancelledError:
        mock.aborted += 1
        raise


def tool_pieces() -> list[dict[str, Any]]:
    """Return a call in the pieces in which it streams."""
    first = {
        "index": 0,
        "id": "call_1",
        "type": "function",
        "function": {"name": "depth", "arguments": ""},
    }
    rest = ['{"species": "Ziph', 'ius cavirostris", "un', 'it": "m"}']
    return [first, *({"index": 0, "function": {"arguments": piece}} for piece in rest)]


def chunk(delta: dict[str, Any], tokens: list[Any], finish: str | None = None) -> dict[str, Any]:
    """Return a chat chunk."""
    choice = {
        "index": 0,
        "delta": delta,
        "logprobs": {"content": tokens} if tokens else None,
        "finish_reason": finish,
    }
    return {
        "id": "c",
        "object": "chat.completion.chunk",
        "model": "ziphius-tiny",
        "choices": [choice],
        "usage": None,
    }


def usage(made: int, thought: int) -> dict[str, Any]:
    """Return the usage of a request that made ``made`` tokens, ``thought`` of them thinking."""
    accepted = made * 2 // 5
    return {
        "prompt_tokens": 40, "completion_tokens": made, "total_tokens": 40 + made,
        "prompt_tokens_details": {"cached_tokens": 32},
        "completion_tokens_details": {
            "reasoning_tokens": thought, "accepted_prediction_tokens": accepted,
            "rejected_prediction_tokens": made // 8,
        },
    }  # fmt: skip


async def completion_events(mock: Mock, body: dict[str, Any]) -> AsyncIterator[str]:
    """Yield the chunks of a continuation."""
    prompt = body["prompt"]
    text = FIBONACCI if prompt.endswith("\n") else " and so the whale went down"
    rate = 20 if "slow" in prompt else mock.rate
    made = 0
    for place, token in enumerate(split(text)[: body["max_tokens"]]):
        one = guess(token, place)
        logprobs = {
            "tokens": [token], "token_logprobs": [one["logprob"]], "text_offset": [0],
            "top_logprobs": [{t["token"]: t["logprob"] for t in one["top_logprobs"]}],
        }  # fmt: skip
        yield event(
            {"choices": [{"index": 0, "text": token, "logprobs": logprobs, "finish_reason": None}]}
        )
        made += 1
        await asyncio.sleep(1 / rate)
    yield event({"choices": [{"index": 0, "text": "", "logprobs": None, "finish_reason": "stop"}]})
    yield event({"choices": [], "usage": usage(made, 0)})
    yield "data: [DONE]\n\n"


@contextlib.contextmanager
def served(mock: Mock, port: int = 0) -> Iterator[str]:
    """Serve in a thread; yield the address. Ends the thread on leaving."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", port))
        config = uvicorn.Config(create(mock), log_level="error", timeout_graceful_shutdown=1)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(timeout=5)


def main() -> None:
    """Serve until Ctrl-C."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=8012)
    parser.add_argument("--base", action="store_true", help="a model that cannot chat")
    parser.add_argument("--thinking", default="optional")
    parser.add_argument("--rate", type=float, default=60, help="tokens a second")
    options = parser.parse_args()
    mock = Mock(chat=not options.base, thinking=options.thinking, rate=options.rate)
    with served(mock, options.port) as url, contextlib.suppress(KeyboardInterrupt):
        print(url)
        threading.Event().wait()


if __name__ == "__main__":
    main()
