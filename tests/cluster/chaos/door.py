"""Stands between a process and the API server, so that a test can come in between a request and its answer, or throttle."""

from __future__ import annotations

import contextlib
import ssl
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import yaml
from aiohttp import web
from aiohttp.connector import NEEDS_CLEANUP_CLOSED

_ASKED = ("Authorization", "Content-Type", "Accept", "Accept-Encoding")
_ANSWERED = ("Content-Type", "Content-Encoding", "Retry-After")


@dataclass(frozen=True, slots=True)
class Passing:
    """A request, and what became of it."""

    method: str
    path: str
    body: bytes
    status: int = 0
    """0: it has not been passed on yet."""
    answer: bytes = b""

    @property
    def is_patch_of_a_pod(self) -> bool:
        """As each bind is one."""
        return self.method == "PATCH" and "/pods/" in self.path and not self.path.endswith("/status")


async def let_pass(_passing: Passing) -> None:
    """What happens if nothing is to happen."""


class Door:
    """A proxy on a loopback port. An async context manager.

    Args:
        server: URL of the API server.
        trust: knows its certificate.
    """

    def __init__(self, server: str, trust: ssl.SSLContext) -> None:
        self.before: Callable[[Passing], Awaitable[web.Response | None]] = let_pass
        """Looks at a request; what it answers with, the API server never sees."""
        self.after: Callable[[Passing], Awaitable[None]] = let_pass
        """Looks at what the API server has done; the answer is kept back until it returns."""
        self._server = server
        self._trust = trust

    def open(self) -> None:
        """Let everything pass."""
        self.before = self.after = let_pass

    async def __aenter__(self) -> Door:
        self._http = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, ssl=self._trust, enable_cleanup_closed=NEEDS_CLEANUP_CLOSED),
            timeout=aiohttp.ClientTimeout(total=None),
            auto_decompress=False,
        )
        application = web.Application(client_max_size=64 * 1024 * 1024)
        application.router.add_route("*", "/{path:.*}", self._pass)
        self._runner = web.AppRunner(application, access_log=None, shutdown_timeout=0.1, handler_cancellation=True)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._runner.cleanup()
        await self._http.close()

    def kubeconfig(self, source: Path, target: Path) -> Path:
        """Write a kubeconfig that leads through here, with the credentials of another one."""
        document = yaml.safe_load(source.read_text())
        document["clusters"][0]["cluster"] = {"server": f"http://127.0.0.1:{self._runner.addresses[0][1]}"}
        target.write_text(yaml.safe_dump(document))
        return target

    async def _pass(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        passing = Passing(request.method, request.path, body)
        if (refused := await self.before(passing)) is not None:
            return refused
        headers = {name: request.headers[name] for name in _ASKED if name in request.headers}
        try:
            async with self._http.request(
                request.method, f"{self._server}{request.path_qs}", data=body or None, headers=headers
            ) as answer:
                kept = {name: answer.headers[name] for name in _ANSWERED if name in answer.headers}
                if "watch" in request.query:
                    return await _stream(request, answer, kept)
                whole = await answer.read()
        except (aiohttp.ClientError, OSError):
            # As the API server did: no answer.
            if request.transport is not None:
                request.transport.abort()
            raise web.HTTPBadGateway from None
        await self.after(Passing(request.method, request.path, body, answer.status, whole))
        return web.Response(body=whole, status=answer.status, headers=kept)


async def _stream(
    request: web.Request, answer: aiohttp.ClientResponse, headers: Mapping[str, str]
) -> web.StreamResponse:
    stream = web.StreamResponse(status=answer.status, headers=headers)
    await stream.prepare(request)
    with contextlib.suppress(ConnectionError):
        async for chunk in answer.content.iter_any():
            await stream.write(chunk)
    return stream


def throttled(retry_after_seconds: int) -> web.Response:
    """What an API server answers that has too much to do."""
    status: dict[str, Any] = {
        "kind": "Status",
        "apiVersion": "v1",
        "status": "Failure",
        "message": "too many requests, please try again later",
        "reason": "TooManyRequests",
        "code": 429,
    }
    return web.json_response(status, status=429, headers={"Retry-After": str(retry_after_seconds)})
