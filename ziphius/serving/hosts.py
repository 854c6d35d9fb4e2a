"""The names that a server answers to.

A page of anywhere can have its own name lead to 127.0.0.1, and is then no stranger to a server that
listens there: its browser lets it ask and read. Only the name in ``Host`` tells.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Collection, Sequence

from starlette.types import ASGIApp, Receive, Scope, Send

from ziphius.config.errors import BadInput
from ziphius.serving.errors import ApiError

_HERE = ("localhost", "127.0.0.1", "[::1]")
# A name or an address, and perhaps a port.
_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9_.-]+)(?::[0-9]{1,5})?", re.ASCII)


def hosts_for(bound: str, given: Sequence[str]) -> tuple[str, ...]:
    """Return the names to answer to, in small letters; none: any.

    ``bound`` is where the server listens, ``given`` are the operator's own. On an address of this
    machine alone the machine's names are asked for, elsewhere only where names are given. Raises
    BadInput for what is no name.
    """
    here = _is_here(bound)
    if not here and not given:
        return ()
    own = [_shown(bound)] if here else []
    return tuple(dict.fromkeys((*_HERE, *own, *(_name(one) for one in given))))


def answers_to(scope: Scope, allowed: Collection[str]) -> bool:
    """Whether a request is by an allowed name. One without a name, or by several, is by none."""
    if not allowed:
        return True
    hosts = [value for name, value in scope["headers"] if name == b"host"]
    found = _HOST.fullmatch(hosts[0].decode("latin-1").lower()) if len(hosts) == 1 else None
    return found is not None and found[1] in allowed


def check_host(scope: Scope, allowed: Collection[str]) -> None:
    """Raise ApiError for a request by a name that is not allowed."""
    if not answers_to(scope, allowed):
        raise ApiError(
            403,
            "this server does not answer to the name in the Host header: it is started with "
            "--allowed-host NAME for each beside localhost",
            code="host_not_allowed",
        )


class ByHost:
    """Gives requests by an allowed name to one ASGI app, the rest to another.

    What CORS answers by itself never comes to the gate, which refuses other names.
    """

    def __init__(self, allowed: Collection[str], within: ASGIApp, without: ASGIApp) -> None:
        self._allowed, self._within, self._without = allowed, within, without

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        known = scope["type"] != "http" or answers_to(scope, self._allowed)
        await (self._within if known else self._without)(scope, receive, send)


def _is_here(bound: str) -> bool:
    try:
        return ipaddress.ip_address(bound).is_loopback
    except ValueError:
        return bound.lower() == "localhost"


def _name(given: str) -> str:
    found = _HOST.fullmatch(_shown(given.lower()))
    if found is None:
        raise BadInput(f"--allowed-host '{given}' is no name of a host: use one such as box.local")
    return found[1]


def _shown(host: str) -> str:
    """Return an address as it stands in a URL."""
    return f"[{host}]" if host.count(":") > 1 and not host.startswith("[") else host
