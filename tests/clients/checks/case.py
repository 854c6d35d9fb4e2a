"""What checks are given, and how a client's own environment runs them. Standard library only."""

from __future__ import annotations

import importlib.metadata
import json
import sys
import time
import traceback
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Case:
    """Two servers of one checkpoint. ``url`` takes any key, and has room for many requests.

    ``strict_url`` computes one answer at a time and lets two wait, lets a key have two requests
    open, wants one of ``keys``, converses in V3.1's format, and obeys ``admin_key``.
    """

    url: str
    model: str
    strict_url: str
    keys: tuple[str, ...] = ("first-key-of-clients", "second-key-of-clients")
    admin_key: str = "the-key-of-operators"
    # The flags by which ``ziphius serve`` becomes the strict one.
    strict_flags: tuple[str, ...] = field(
        default=("--max-running", "1", "--max-waiting", "2", "--max-per-client", "2",
                 "--chat-format", "v3.1"),
    )  # fmt: skip

    def post(self, path: str, body: Any, *, strict: bool = False, key: str | None = None) -> bytes:
        """Return the body of an answer, without any client's help. Raises HTTPError."""
        base = self.strict_url if strict else self.url
        headers = {"content-type": "application/json"}
        if strict:
            headers["authorization"] = f"Bearer {key or self.keys[0]}"
        request = urllib.request.Request(
            base + path, json.dumps(body).encode(), headers, method="POST"
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return bytes(answer.read())

    def get(self, path: str, *, strict: bool = False) -> Any:
        """Return the JSON of a route that needs no key. Raises HTTPError."""
        base = self.strict_url if strict else self.url
        with urllib.request.urlopen(base + path, timeout=60) as answer:
            return json.load(answer)

    def tokens(self, text: str) -> list[int]:
        """Return a text's token ids, without the first token."""
        body = {"prompt": text, "add_special_tokens": False}
        found: list[int] = json.loads(self.post("/tokenize", body))["tokens"]
        return found

    def end_token(self) -> int:
        """Return the id of the token that ends an answer."""
        (token,) = self.tokens(self.get("/tokenizer_info")["eos_token"])
        return token

    def until_ready(self, *, strict: bool = False, seconds: float = 60.0) -> None:
        """Return when the engine answers. Raises AssertionError when it does not."""
        ends = time.monotonic() + seconds
        while time.monotonic() < ends:
            try:
                self.get("/health", strict=strict)
                return
            except OSError:
                time.sleep(0.1)
        raise AssertionError(f"no answering engine after {seconds} s")


Check = Callable[[Case], None]


def events(raw: bytes) -> Iterator[tuple[str | None, str]]:
    """Yield (name, data) of every event of a stream, held to the letter of how it is written."""
    text = raw.decode()
    assert text.endswith("\n\n"), "an event ends with an empty line"
    assert "\r" not in text
    for block in text[:-2].split("\n\n"):
        name = None
        lines = block.split("\n")
        if lines[0].startswith(":"):
            assert len(lines) == 1, "a comment stands alone"
            continue
        if lines[0].startswith("event: "):
            name = lines.pop(0).removeprefix("event: ")
        assert len(lines) == 1, f"one line of data an event: {block!r}"
        assert lines[0].startswith("data: "), f"'data: ' with a blank: {lines[0]!r}"
        yield name, lines[0].removeprefix("data: ")


def run(checks: Sequence[Check], package: str) -> int:
    """Run checks on the case that the command line has as JSON; print a JSON line for each."""
    case = Case(**{k: tuple(v) if isinstance(v, list) else v for k, v in _given().items()})
    print(json.dumps({"package": package, "version": importlib.metadata.version(package)}))
    failed = 0
    for check in checks:
        detail, began = "", time.monotonic()
        try:
            check(case)
        except Exception as error:
            failed += 1
            place = traceback.extract_tb(error.__traceback__)[-1]
            what = " ".join(str(error).split())[:300] or place.line
            detail = f"{type(error).__name__}: {what} ({place.name}:{place.lineno})"
            traceback.print_exc()
        name = check.__name__.strip("_").replace("_", " ")
        seconds = round(time.monotonic() - began, 2)
        line = {"check": name, "passed": not detail, "detail": detail, "seconds": seconds}
        print(json.dumps(line), flush=True)
    return min(failed, 1)


def _given() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(sys.argv[1])
    return found


def as_argument(case: Case) -> str:
    """Return a case as the command line has it."""
    return json.dumps(asdict(case))
