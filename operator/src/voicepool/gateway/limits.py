"""Reads a request's body before anything else sees the request, up to a limit in bytes and in time."""

from __future__ import annotations

import asyncio

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from voicepool.gateway.errors import BodyTimeout, BodyTooLarge, GatewayError, error_response


class BodyLimit:
    """ASGI middleware that answers 413 to a body over the limit, as soon as that is known.

    Args:
        app: what comes after.
        max_bytes: the largest body.
        timeout_seconds: how long a body may take to arrive.
    """

    def __init__(self, app: ASGIApp, *, max_bytes: int, timeout_seconds: float) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._timeout_seconds = timeout_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            async with asyncio.timeout(self._timeout_seconds):
                body = await self._body(scope, receive)
        except TimeoutError:
            await self._refuse(
                BodyTimeout(f"The body did not arrive within {self._timeout_seconds:g} s."), scope, receive, send
            )
            return
        except BodyTooLarge as error:
            await self._refuse(error, scope, receive, send)
            return
        if body is None:
            return
        replayed = False

        async def replay() -> Message:
            nonlocal replayed
            if not replayed:
                replayed = True
                return {"type": "http.request", "body": body, "more_body": False}
            return await receive()

        await self._app(scope, replay, send)

    async def _body(self, scope: Scope, receive: Receive) -> bytes | None:
        """The whole body; None when the client went away before it was complete."""
        for name, value in scope["headers"]:
            if name == b"content-length" and value.isdigit() and int(value) > self._max_bytes:
                raise self._too_large()
        chunks: list[bytes] = []
        size = 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            chunks.append(message.get("body", b""))
            size += len(chunks[-1])
            if size > self._max_bytes:
                raise self._too_large()
            if not message.get("more_body", False):
                return b"".join(chunks)

    def _too_large(self) -> BodyTooLarge:
        return BodyTooLarge(f"The body is larger than {self._max_bytes} bytes.")

    async def _refuse(self, error: GatewayError, scope: Scope, receive: Receive, send: Send) -> None:
        response = error_response(error)
        # The rest of the body is not read, so nothing else can come over this connection.
        response.headers["Connection"] = "close"
        await response(scope, receive, send)
