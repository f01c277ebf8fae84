"""The bot's own HTTP routes: what it has added to `app` of `pipecatcloud_system`, or of Pipecat's own runner.

A request for `/sessions/{id}/{path}` reaches the bot's application as `{path}`, in this process and on this event loop
(ASGI 3), so that a route can use the pipeline. Invariants: nothing of an application runs unless the bot has made one;
a request for a path that belongs to the host never reaches it; a bot that fails answers 500 without a stack trace.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator, MutableMapping
from typing import Any

from aiohttp import web
from loguru import logger
from multidict import CIMultiDict

from voicepool_agent.pipecat_cloud import SYSTEM

APPLICATIONS = (SYSTEM, "pipecat.runner.run")
"""Modules whose `app` a bot adds its routes to; they count only if the bot has imported them."""

RESERVED = frozenset({"/api/offer", "/bot", "/livez", "/readyz", "/whatsapp", "/ws"})
"""Paths that Pipecat Cloud keeps for itself ("Session API", reserved paths); they are the host's here too."""

FASTAPI_ROUTES = frozenset({"/docs", "/docs/oauth2-redirect", "/openapi.json", "/redoc"})
"""Those that every FastAPI application has."""

ORDER_HEADER = "Voicepool-Order"
"""Carries the gateway's order to let a request through; not for the bot."""

REFUSED_HEADER = "Voicepool-Refused"
"""Tells the gateway that an answer is ours and not the bot's; its value is the code."""

Message = MutableMapping[str, Any]
"""An event of ASGI."""


class BotRoutes:
    """The routes of the bot of this process."""

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        """Keep the lifespans of the bot's applications open, as a server would; to be entered when it is imported."""
        async with contextlib.AsyncExitStack() as stack:
            for application in _applications():
                await stack.enter_async_context(application.router.lifespan_context(application))
            yield

    async def answer(self, request: web.Request, path: str) -> web.StreamResponse | None:
        """Have the bot answer; None when the path is reserved or the bot has no routes.

        Args:
            request: as it came.
            path: of the bot's route, decoded.
        """
        application = next((one for one in _applications() if _has_routes(one)), None)
        if application is None or path.rstrip("/") in RESERVED:
            return None
        exchange = _Exchange(request, await request.read())
        scope = _scope(request, path)
        try:
            await application(scope, exchange.receive, exchange.send)
        except Exception as error:
            if not isinstance(error, ConnectionError):  # the other side has gone
                # The exception's words, and the path, may hold what the caller has sent.
                route = getattr(scope.get("route"), "path", "")
                logger.error(f"the bot's own route {route} failed: {type(error).__name__}")
            if exchange.response is not None and not exchange.over.is_set() and request.transport is not None:
                request.transport.abort()  # half an answer must not look like a whole one
        finally:
            exchange.over.set()
        if exchange.response is None:
            return web.json_response({"error": "the bot's route failed", "code": "BOT_ROUTE_FAILED"}, status=500)
        return exchange.response


def _applications() -> list[Any]:
    """What bots add their routes to, as far as this bot has imported it."""
    found = (getattr(sys.modules.get(name), "app", None) for name in APPLICATIONS)
    return [application for application in found if application is not None]


def _has_routes(application: Any) -> bool:
    return any(getattr(route, "path", "") not in FASTAPI_ROUTES for route in application.routes)


def _scope(request: web.Request, path: str) -> Message:
    peer = request.transport.get_extra_info("peername") if request.transport else None
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": f"{request.version.major}.{request.version.minor}",
        "method": request.method,
        "scheme": "http",
        "path": path,
        "query_string": request.rel_url.raw_query_string.encode(),
        "root_path": "",
        "headers": [
            (name.lower(), value)
            for name, value in request.raw_headers
            if name.lower() != ORDER_HEADER.lower().encode()
        ],
        "client": tuple(peer[:2]) if peer else None,
        "server": None,
        "state": {},
    }


class _Exchange:
    """One request and its answer, between an ASGI application and aiohttp."""

    def __init__(self, request: web.Request, body: bytes) -> None:
        self._request = request
        self._body: bytes | None = body
        self.response: web.StreamResponse | None = None
        self._start: Message | None = None
        self.over = asyncio.Event()

    async def receive(self) -> Message:
        """The body, once; then nothing until the answer is complete."""
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        await self.over.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        """Pass the answer on as it comes."""
        if message["type"] == "http.response.start":
            self._start = message
        elif message["type"] == "http.response.body" and self._start is not None:
            body, more = message.get("body", b""), message.get("more_body", False)
            if self.response is None and not more:
                self.response = web.Response(status=self._start["status"], headers=self._headers(), body=body)
                await self.response.prepare(self._request)
                await self.response.write_eof()
                self.over.set()
                return
            if self.response is None:
                self.response = web.StreamResponse(status=self._start["status"], headers=self._headers())
                await self.response.prepare(self._request)
            if body:
                await self.response.write(body)
            if not more:
                await self.response.write_eof()
                self.over.set()

    def _headers(self) -> CIMultiDict[str]:
        headers: CIMultiDict[str] = CIMultiDict()
        for name, value in (self._start or {}).get("headers", ()):
            key = name.decode("latin-1")
            if key.lower() not in ("content-length", "transfer-encoding", "connection", REFUSED_HEADER.lower()):
                headers.add(key, value.decode("latin-1"))
        return headers
