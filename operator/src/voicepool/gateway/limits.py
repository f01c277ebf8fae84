"""Reads a request's body before anything else sees the request, up to a limit in bytes and in time, and of all bodies together in bytes."""

from __future__ import annotations

import asyncio

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from voicepool.gateway.errors import BodyTimeout, BodyTooLarge, GatewayError, TooManyBodies, error_response

_FULL_RETRY_SECONDS = 1.0


class BodyLimit:
    """ASGI middleware that answers 413 to a body over the limit, as soon as that is known, and 503 where all bodies together are too much.

    Args:
        app: what comes after.
        max_bytes: the largest body.
        max_buffered_bytes: of all bodies that have come, in part or whole, and that nothing has asked for yet.
        timeout_seconds: how long a body may take to arrive.
    """

    def __init__(self, app: ASGIApp, *, max_bytes: int, max_buffered_bytes: int, timeout_seconds: float) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._free_bytes = max_buffered_bytes
        self._timeout_seconds = timeout_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        body = bytearray()
        try:
            try:
                async with asyncio.timeout(self._timeout_seconds):
                    complete = await self._collect(scope, receive, body)
            except TimeoutError:
                error = BodyTimeout(f"The body did not arrive within {self._timeout_seconds:g} s.")
                await self._refuse(error, scope, receive, send)
                return
            except (BodyTooLarge, TooManyBodies) as error:
                await self._refuse(error, scope, receive, send)
                return
            if not complete:
                return
            replayed = False

            async def replay() -> Message:
                nonlocal replayed
                if replayed:
                    return await receive()
                replayed = True
                whole = bytes(body)
                self._release(body)
                return {"type": "http.request", "body": whole, "more_body": False}

            await self._app(scope, replay, send)
        finally:
            self._release(body)

    async def _collect(self, scope: Scope, receive: Receive, body: bytearray) -> bool:
        """Put a body together; False when the client went away before it was complete."""
        for name, value in scope["headers"]:
            if name == b"content-length" and value.isdigit() and int(value) > self._max_bytes:
                raise self._too_large()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return False
            chunk = message.get("body", b"")
            if len(body) + len(chunk) > self._max_bytes:
                raise self._too_large()
            if len(chunk) > self._free_bytes:
                raise TooManyBodies(
                    "The gateway holds as many bytes of requests that are on their way as it may; try again in a moment.",
                    retry_after_seconds=_FULL_RETRY_SECONDS,
                )
            self._free_bytes -= len(chunk)
            body += chunk
            if not message.get("more_body", False):
                return True

    def _release(self, body: bytearray) -> None:
        self._free_bytes += len(body)
        body.clear()

    def _too_large(self) -> BodyTooLarge:
        return BodyTooLarge(f"The body is larger than {self._max_bytes} bytes.")

    async def _refuse(self, error: GatewayError, scope: Scope, receive: Receive, send: Send) -> None:
        response = error_response(error)
        # The rest of the body is not read, so nothing else can come over this connection.
        response.headers["Connection"] = "close"
        await response(scope, receive, send)
