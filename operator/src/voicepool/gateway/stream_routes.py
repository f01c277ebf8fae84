"""What goes on in sessions and pools: logs, and states as they change."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Request, Response

from voicepool.gateway.changes import FellBehind, Follower
from voicepool.gateway.document import OF_A_POOL, OF_A_SESSION, STREAM, events, merged
from voicepool.gateway.errors import BadRequest, ClusterUnavailable, SessionNotFound
from voicepool.gateway.live import TOLD, pool_news, states
from voicepool.gateway.routes import Authenticated, Injected, KeyFirst, known_pool, still_may_use
from voicepool.gateway.services import Services
from voicepool.gateway.session_logs import MAX_LINES, is_time
from voicepool.gateway.session_routes import carrier
from voicepool.gateway.streams import event
from voicepool.model import PodFact
from voicepool.session_api import EndOfLog, Log, LogLine

log = logging.getLogger("voicepool.gateway")

router = APIRouter(tags=["sessions"], route_class=KeyFirst)

Follow = Annotated[bool, Query(description="Go on with what is written later, as server-sent events.")]
Tail = Annotated[int, Query(ge=0, le=MAX_LINES, description="How many of the last lines.")]
LastEventId = Annotated[str | None, Header(max_length=64)]
OF_A_LOG = merged(OF_A_SESSION, STREAM, events("log", "end"))


@router.get("/v1/agents/{pool}/sessions/{session_id}/logs", response_model=Log, responses=OF_A_LOG)
async def session_logs(
    request: Request,
    services: Injected,
    caller: Authenticated,
    pool: str,
    session_id: str,
    follow: Follow = False,
    tail: Tail = 100,
    last_event_id: LastEventId = None,
) -> Log | Response:
    """What a session's agent has written, also for a while after its end. With `follow`, server-sent events `log`, and `end` at its end."""
    pod = await carrier(services, await known_pool(services, caller, pool), session_id)
    if follow:
        return await followed_log(request, services, pod, tail, last_event_id)
    return Log(logs=await services.logs.tail(pod, tail))


@router.get(
    "/v1/agents/{pool}/sessions/{session_id}/events",
    response_class=Response,
    responses=merged(OF_A_SESSION, STREAM, events("session")),
)
async def session_events(
    request: Request, services: Injected, caller: Authenticated, pool: str, session_id: str
) -> Response:
    """A session's record whenever its state goes on (server-sent events `session`), until it has ended."""
    key = await known_pool(services, caller, pool)
    known = await carrier(services, key, session_id)
    async with contextlib.AsyncExitStack() as stack:
        services.streams.enter(stack)
        follower = stack.enter_context(services.changes.follow(lambda pod: pod.uid == known.uid))
        # Looked at again: what has happened since the first look is not told to a follower that was not there yet.
        pod = _as_seen(services, known)
        states_of_session = _events_of_session(services, pod, follower)
        return services.streams.response(states_of_session, stack.pop_all(), still_may_use(request, key))


@router.get(
    "/v1/agents/{pool}/events",
    response_class=Response,
    responses=merged(OF_A_POOL, STREAM, events("pool", *dict.fromkeys(TOLD.values()))),
)
async def pool_events(request: Request, services: Injected, caller: Authenticated, pool: str) -> Response:
    """A pool's counts whenever they change (`pool`), and its sessions: `session.started`, `session.ended`, `session.dropped`."""
    key = await known_pool(services, caller, pool)
    services.require_synced()
    services.sessions.pool(key)
    async with contextlib.AsyncExitStack() as stack:
        services.streams.enter(stack)
        follower = stack.enter_context(services.changes.follow(lambda pod: (pod.namespace, pod.pool) == key))

        async def news_of_pool() -> AsyncGenerator[bytes]:
            async with contextlib.aclosing(pool_news(key, lambda: services.view.pods(key), follower)) as news:
                with contextlib.suppress(FellBehind):
                    async for name, data in news:
                        yield event(name, data)

        return services.streams.response(news_of_pool(), stack.pop_all(), still_may_use(request, key))


async def followed_log(request: Request, services: Services, pod: PodFact, tail: int, since: str | None) -> Response:
    """A log as a stream of events.

    Args:
        request: of somebody who may use the pod's pool.
        services: the parts of the gateway.
        pod: carries the session.
        tail: how many of the lines that there are.
        since: the time of the last line that the client has; only what comes after it.

    Raises:
        BadRequest: it is no time.
        TooManyStreams: there are as many as there may be.
        ClusterUnavailable: the log cannot be read.
    """
    if since is not None and not is_time(since):
        raise BadRequest("The header Last-Event-ID is not the id of a line of this log; leave it out.")
    async with contextlib.AsyncExitStack() as stack:
        services.streams.enter(stack)
        follower = stack.enter_context(services.changes.follow(lambda other: other.uid == pod.uid))
        over = _as_seen(services, pod).finished
        lines = await stack.enter_async_context(services.logs.follow(pod, tail, since))
        log_of_session = _events_of_log(services, pod, lines, follower, over=over)
        still_may = still_may_use(request, (pod.namespace, pod.pool))
        return services.streams.response(log_of_session, stack.pop_all(), still_may)


async def _events_of_log(
    services: Services, pod: PodFact, lines: AsyncIterator[LogLine], follower: Follower, *, over: bool
) -> AsyncGenerator[bytes]:
    ended = asyncio.ensure_future(_over(follower, over=over))
    line: asyncio.Future[LogLine] | None = None
    try:
        while True:
            line = line or asyncio.ensure_future(anext(lines))
            if ended.done():
                # What the container has written at its end is still on its way.
                await asyncio.wait({line}, timeout=services.options.log_settle_seconds)
                if not line.done():
                    break
            else:
                either: set[asyncio.Future[Any]] = {line, ended}
                await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
                if not line.done():
                    continue
            try:
                told = line.result()
            except StopAsyncIteration:
                break
            line = None
            yield event("log", told, told.timestamp or None)
        yield event("end", EndOfLog(session_id=pod.session or ""))
    except (ClusterUnavailable, SessionNotFound) as error:
        # Without the event "end" the client knows that there is more, and comes back with the time of the last line.
        log.info("a log that is followed broke", extra={"session": pod.session, "error": error.detail})
    finally:
        for waiting in (line, ended):
            if waiting is not None:
                waiting.cancel()
                await asyncio.wait({waiting})


async def _over(follower: Follower, *, over: bool) -> None:
    """Return when the session is over."""
    with contextlib.suppress(FellBehind):
        while not over:
            _, new = await follower.next()
            over = new is None or new.finished


async def _events_of_session(services: Services, pod: PodFact, follower: Follower) -> AsyncGenerator[bytes]:
    seen = states(pod, follower, services.sessions.joined_status, services.options)
    async with contextlib.aclosing(seen):
        with contextlib.suppress(FellBehind):
            async for record in seen:
                yield event("session", record)


def _as_seen(services: Services, pod: PodFact) -> PodFact:
    """The pod as the informer last saw it, or, where that has not seen it yet, as it was read."""
    seen = next((one for one in services.view.pods((pod.namespace, pod.pool)) if one.uid == pod.uid), None)
    return seen if seen is not None and seen.session == pod.session else pod
