"""``openai``: what its users do, and what the client makes of the answers."""

from __future__ import annotations

from tests.clients.checks import openai_chats, openai_completions, openai_errors, openai_tools
from tests.clients.checks.case import run

CHECKS = [
    check
    for module in (openai_chats, openai_tools, openai_completions, openai_errors)
    for check in module.CHECKS
]


if __name__ == "__main__":
    raise SystemExit(run(CHECKS, "openai"))
