"""What a server is started with: limits that are always there, and what the operator chooses."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any

from ziphius.config.errors import BadInput


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Bounds on everything that a client could make grow. Seconds, requests, bytes and tokens.

    Raises BadInput for one that is not above zero.
    """

    # Requests beyond those that the engine runs at once, and the tokens of their prompts.
    max_waiting: int = 128
    max_waiting_tokens: int = 1_000_000
    # Of one API key, or of one address where there are no keys; beyond it: 429.
    max_per_client: int = 1024
    # Requests of every kind that are open at once, idle chat pages not counted.
    max_open: int = 2048
    max_body_bytes: int = 8 << 20
    # Responses that are kept to be gone on from; the ones used longest ago make room.
    max_stored: int = 1024
    max_stored_bytes: int = 64 << 20
    # Of a request's line and headers.
    max_head_bytes: int = 64 << 10
    # To send the head, and the body; to answer; for a client that takes nothing of its answer.
    head_seconds: float = 15.0
    body_seconds: float = 30.0
    request_seconds: float = 600.0
    write_seconds: float = 60.0
    # A comment is sent where a stream has had nothing to say for so long.
    ping_seconds: float = 15.0
    # SIGTERM lets what runs end within this time.
    drain_seconds: float = 30.0
    # Without a sign of life for so long the engine is unhealthy; then it is started again.
    stall_seconds: float = 10.0
    stall_restart_seconds: float = 60.0
    # Restarts of the engine in a row without an answer between them; then the server gives up.
    max_restarts: int = 5

    def __post_init__(self) -> None:
        for known in fields(self):
            value = getattr(self, known.name)
            if not (value > 0 and math.isfinite(value)):
                raise BadInput(f"{known.name} = {value}: use a number above 0")


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """How the engine's process makes its ``LLM``: the path and the keyword arguments."""

    checkpoint: str
    how: dict[str, Any] = field(default_factory=dict)
    threads: int = 0  # 0: as many as the process may use


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """Everything about a server. No keys: any key is accepted, and there are no admin routes."""

    model_name: str
    engine: EngineSettings
    limits: Limits = Limits()
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    admin_key: str | None = field(default=None, repr=False)
    cors_origins: tuple[str, ...] = ()
    # The names that are answered to, from ``hosts.hosts_for``; none: any.
    allowed_hosts: tuple[str, ...] = ()
    profile: str = "none"
    # V3, R1 or V3.1's format in place of the checkpoint's own template.
    chat_format: str | None = None
    page: bool = True
    # Whether clients may say which of their requests go first; who may say so goes before others.
    priorities: bool = False
    # Where traces go: an OTLP collector's address.
    otlp_endpoint: str | None = None

    def __post_init__(self) -> None:
        for key in (*self.api_keys, *([self.admin_key] if self.admin_key is not None else [])):
            if len(key) < 8 or not key.isascii() or not key.isprintable() or " " in key:
                raise BadInput("an API key has at least 8 visible ASCII characters")
        if self.admin_key is not None and self.admin_key in self.api_keys:
            raise BadInput("the admin key must differ from the API keys")
