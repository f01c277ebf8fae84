"""What every way of starting a session has in common, whatever its route's own shape is: who may, how often, and that a caller who hangs up lets go."""

from __future__ import annotations

import asyncio
import functools
import re
import uuid
from collections.abc import Coroutine
from typing import Annotated, Any, TypeVar

from fastapi import Header, Request
from pydantic import AfterValidator

from voicepool.gateway.auth import Caller
from voicepool.gateway.choice import Choice, Chooser
from voicepool.gateway.errors import BadRequest
from voicepool.gateway.livekit import LiveKitServer, caller_token
from voicepool.gateway.requests import Started, StartRequest
from voicepool.gateway.services import Services
from voicepool.session_api import Session, StartBody, StartedAgent

T = TypeVar("T")

_WAIT = re.compile(r"(?:^|[,;\s])wait\s*=\s*(\d{1,4})(?:$|[,;\s])")
_TRACEPARENT = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}[!-~]{0,200}")


def _if_traceparent(value: str) -> str:
    return value if _TRACEPARENT.fullmatch(value) else ""


def _if_any(value: str) -> str:
    return "" if value.isspace() else value


IdempotencyKey = Annotated[str, Header(max_length=255), AfterValidator(_if_any)]
"""Names the session: the same key from the same caller again gets the same agent. An empty one is none, or all who send it would share a session."""
Traceparent = Annotated[str, Header(), AfterValidator(_if_traceparent)]
"""A trace that the caller takes part in (W3C Trace Context). What is none is left out, as that says: it is no reason to refuse anybody."""


async def choose(services: Services, caller: Caller, body: StartBody, name: str | None) -> Choice:
    """The pools that a start is about: those of the body, or the one of that name, or the default.

    Raises:
        GatewayError: the caller may not use them, there are none, or several ways to name them were used at once.
    """
    services.require_synced()
    if sum(way is not None for way in (name, body.pools, body.selector)) > 1:
        raise BadRequest("Name one pool, or 'pools', or a 'selector'; two of them were sent.")
    chooser = Chooser(services.view, services.options)
    if body.pools is not None:
        return await chooser.several(caller, body.pools)
    if body.selector is not None:
        return await chooser.selected(caller, body.selector, body.namespace)
    if name:
        return await chooser.one(caller, chooser.key(name))
    return await chooser.default(caller)


async def start_session(
    request: Request,
    services: Services,
    caller: Caller,
    choice: Choice,
    body: StartBody,
    idempotency_key: str,
    prefer: str,
    traceparent: str,
) -> Session:
    """Give a session of a pool its agent, and its caller a token for the room.

    Raises:
        GatewayError: with the words for the caller.
    """
    with services.tracing.request(request.scope["route"].path, traceparent or None) as span:
        span.note(pool=",".join(f"{choice.namespace}/{name}" for name in choice.pools))

        @functools.cache
        def token(server: LiveKitServer, room: str) -> str:
            identity = f"caller-{uuid.uuid4()}"
            return caller_token(server, room=room, identity=identity, ttl_seconds=services.options.caller_token_seconds)

        wanted = StartRequest(
            namespace=choice.namespace,
            pool=choice.pools[0],
            others=choice.pools[1:],
            session_id=body.session_id or choice.session_id(caller, idempotency_key),
            keyed=bool(body.session_id or idempotency_key),
            body=body.body,
            caller=caller.mark,
            span=span,
            beside=token,
        )
        started = await begin(request, services, caller, wanted)
        state = "accepted"
        if wait_seconds := _wait_seconds(services, body, prefer):
            with span.child("joined") as waited:
                waiting = services.sessions.wait_joined(started, wait_seconds, required=body.wait_for == "joined")
                state = await _while_connected(request, waiting)
                waited.note(state=state)
    return Session(
        session_id=started.session_id,
        url=started.server.caller_url,
        token=token(started.server, started.room),
        room_name=started.room,
        state=state,
        cold_start=started.cold_start,
        bot_start_seconds=round(started.seconds, 4),
        agent=StartedAgent(pod=started.pod.name, namespace=started.pod.namespace, pool=started.pod.pool),
    )


async def begin(request: Request, services: Services, caller: Caller, wanted: StartRequest) -> Started:
    """Have a session started for a caller who stays connected, if he may have one more.

    Raises:
        GatewayError: with the words for the caller.
    """
    if not wanted.others:
        services.sessions.pool(wanted.key)
    wanted.span.note(session=wanted.session_id)
    with services.quota.admitted(caller, wanted.namespace, wanted.session_id):
        started = await _while_connected(request, services.sessions.start(wanted))
    wanted.span.note(pod=started.pod.name, cold_start=started.cold_start)
    return started


async def _while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Do the work, but cancel it when the client hangs up."""
    try:
        async with asyncio.timeout(None) as connected:
            watch = asyncio.create_task(_until_disconnected(request, connected))
            try:
                return await work
            finally:
                watch.cancel()
    except TimeoutError:
        if not connected.expired():
            raise
        # The answer goes nowhere; it only has to be one.
        raise BadRequest("The caller has gone.", status=499, code="CALLER_GONE") from None


async def _until_disconnected(request: Request, connected: asyncio.Timeout) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    connected.reschedule(asyncio.get_running_loop().time())


def _wait_seconds(services: Services, body: StartBody, prefer: str) -> float:
    options = services.options
    match = _WAIT.search(prefer)
    if match:
        return min(float(match[1]), options.max_joined_wait_seconds)
    return options.joined_wait_seconds if body.wait_for == "joined" else 0.0
