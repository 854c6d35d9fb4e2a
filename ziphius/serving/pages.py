"""The pages for a browser: the chat at ``/`` and the description of the routes at ``/docs``."""

from __future__ import annotations

from importlib import resources

from fastapi import FastAPI
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException
from starlette.responses import FileResponse, Response
from starlette.types import Scope

# What a page may load: files of this server, and nothing written into the page itself.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def add_pages(app: FastAPI, *, chat: bool) -> None:
    """Serve ``/docs``, with ``chat`` also ``/``, and the files that they load."""
    folder = str(resources.files("ziphius.serving") / "page")

    def add(path: str, file: str) -> None:
        async def page() -> Response:
            headers = {"content-security-policy": _POLICY, "cache-control": "no-cache"}
            return FileResponse(f"{folder}/{file}", headers=headers)

        app.api_route(path, methods=["GET", "HEAD"], include_in_schema=False)(page)

    add("/docs", "docs.html")
    if chat:
        add("/", "index.html")
    app.mount("/page", _Parts(directory=folder), name="page")


class _Parts(StaticFiles):
    """What the pages load. The pages themselves are only at their own paths, under the policy."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        if path.lower().endswith(".html"):
            raise HTTPException(404)
        response = await super().get_response(path, scope)
        # After an update a page must not run with the parts of the last one.
        response.headers["cache-control"] = "no-cache"
        return response
