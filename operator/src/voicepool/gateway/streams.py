"""Streams of server-sent events that stay open for as long as there is news.

Invariants: nothing is kept for a client that reads slowly: the source is asked for the next event when the last one has gone out, and a client that takes
nothing for :attr:`~voicepool.gateway.options.GatewayOptions.stream_stalled_seconds` loses its stream; a client that hangs up ends the source at once; one
whose credential is withdrawn loses its stream at the next look, within :attr:`~voicepool.gateway.options.GatewayOptions.heartbeat_seconds`; the gateway's own
end waits for no stream; one gateway has a limited number of streams, so that they can never take what starts need.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

from fastapi.sse import EventSourceResponse, format_sse_event
from pydantic import BaseModel
from starlette.types import Message, Receive, Scope, Send

from voicepool.gateway.errors import TooManyStreams
from voicepool.gateway.options import GatewayOptions

log = logging.getLogger("voicepool.gateway")

HEARTBEAT = format_sse_event(comment="")
"""A comment: clients do not see it, and what lies between sees that the stream lives."""

StillMay = Callable[[], Awaitable[bool]]
"""Whether the client of a stream may still have it."""


def event(name: str, data: BaseModel, id: str | None = None) -> bytes:
    """One event with JSON in it."""
    return format_sse_event(event=name, data_str=data.model_dump_json(by_alias=True), id=id)


class Streams:
    """The open streams of one gateway.

    Args:
        options: how many, how often they show that they live, how long a client may read nothing.
    """

    def __init__(self, options: GatewayOptions) -> None:
        self._options = options
        self._open = 0
        self._stopped = asyncio.Event()

    def stop(self) -> None:
        """End all streams, and those to come: the gateway ends. Their clients come back, to another one."""
        self._stopped.set()

    def enter(self, stack: AsyncExitStack) -> None:
        """Take a place for one more stream; it is given back when the stack is closed.

        Raises:
            TooManyStreams: there is none.
        """
        if self._open >= self._options.max_streams:
            raise TooManyStreams(
                f"This gateway has {self._options.max_streams} open streams and takes no more; close one, or ask again later.",
                retry_after_seconds=5,
            )
        self._open += 1
        stack.callback(self._leave)

    def response(self, events: AsyncGenerator[bytes], stack: AsyncExitStack, still_may: StillMay) -> EventStream:
        """An answer that sends the events as they come; at its end, whatever that is, the source and the stack are closed."""
        return EventStream(events, stack, self._options, self._stopped, still_may)

    def _leave(self) -> None:
        self._open -= 1


class EventStream(EventSourceResponse):
    """See :meth:`Streams.response`."""

    def __init__(
        self,
        events: AsyncGenerator[bytes],
        stack: AsyncExitStack,
        options: GatewayOptions,
        stopped: asyncio.Event,
        still_may: StillMay,
    ) -> None:
        self._source = with_heartbeats(events, options.heartbeat_seconds, stopped, still_may)
        self._stack = stack
        self._stalled_seconds = options.stream_stalled_seconds
        # The second header is nginx's: what it buffers comes late.
        super().__init__(self._source, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send until one of the two sides ends it."""

        async def send_in_time(message: Message) -> None:
            async with asyncio.timeout(self._stalled_seconds):
                await send(message)

        try:
            await super().__call__(scope, receive, send_in_time)
        except TimeoutError:
            log.info("a client has stopped reading its stream, which is closed", extra={"path": scope["path"]})
        finally:
            await self._source.aclose()
            await self._stack.aclose()


async def with_heartbeats(
    events: AsyncGenerator[bytes], seconds: float, stopped: asyncio.Event, still_may: StillMay
) -> AsyncGenerator[bytes]:
    """The events, and a comment whenever nothing came for so long; until there are no more, it is stopped, or its client may no longer have it."""
    waiting: asyncio.Future[bytes] | None = None
    ends: set[asyncio.Future[Any]] = {
        asyncio.ensure_future(stopped.wait()),
        asyncio.ensure_future(_refused(still_may, seconds)),
    }
    try:
        while True:
            waiting = waiting or asyncio.ensure_future(anext(events))
            await asyncio.wait({waiting, *ends}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            if any(end.done() for end in ends):
                return
            if not waiting.done():
                yield HEARTBEAT
                continue
            try:
                part = waiting.result()
            except StopAsyncIteration:
                return
            waiting = None
            yield part
    finally:
        for end in ends:
            end.cancel()
        if waiting is not None:
            waiting.cancel()
            await asyncio.wait({waiting})
        await events.aclose()


async def _refused(still_may: StillMay, seconds: float) -> None:
    """Return when the client may no longer have its stream. Not only in a silence: a stream that has much to say would never be asked about."""
    while True:
        await asyncio.sleep(seconds)
        if not await still_may():
            log.info("the client of a stream may no longer have it; it is closed")
            return
