"""The routes of the first system, in its shapes, so that a frontend of its goes on working."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel

from voicepool.gateway import routes
from voicepool.gateway.document import OF_A_START
from voicepool.gateway.errors import BadRequest
from voicepool.gateway.routes import Authenticated, Injected, KeyFirst
from voicepool.gateway.session_routes import carrier_among
from voicepool.gateway.starting import IdempotencyKey
from voicepool.gateway.stream_routes import OF_A_LOG, Follow, LastEventId, Tail, followed_log
from voicepool.session_api import StartBody

router = APIRouter(prefix="/api/session", tags=["the first system's routes"], route_class=KeyFirst)


class FirstSystemStart(BaseModel):
    """Where the caller finds its agent."""

    success: bool = True
    sessionId: str  # noqa: N815 -- the wire's spelling
    url: str
    token: str
    roomName: str  # noqa: N815 -- the wire's spelling


@router.post("/start", responses=OF_A_START)
async def start(
    request: Request,
    body: StartBody | None = None,
    idempotency_key: IdempotencyKey = "",
) -> FirstSystemStart:
    """Start a session with a warm agent, as `POST /start` does."""
    started = await routes.start(request, body, idempotency_key=idempotency_key)
    return FirstSystemStart(
        sessionId=started.session_id, url=started.url, token=started.token, roomName=started.room_name
    )


class FirstSystemLog(BaseModel):
    """The last lines that an agent has written."""

    success: bool = True
    sessionId: str  # noqa: N815 -- the wire's spelling
    logs: list[str]


@router.get("/{session_id}/logs", response_model=FirstSystemLog, responses=OF_A_LOG)
async def session_logs(
    request: Request,
    services: Injected,
    caller: Authenticated,
    session_id: str,
    follow: Follow = False,
    tail: Tail = 100,
    last_event_id: LastEventId = None,
) -> FirstSystemLog | Response:
    """What a session's agent has written, in whichever pool of the caller's it is."""
    services.require_synced()
    keys = await caller.usable(services.view.pools_with_pods())
    pods = await carrier_among(services, keys, session_id)
    if len({(pod.namespace, pod.pool) for pod in pods}) > 1:
        raise BadRequest(f"Several pools have a session {session_id}; name one: /v1/agents/<pool>/sessions/...")
    if follow:
        return await followed_log(request, services, pods[0], tail, last_event_id)
    lines = await services.logs.tail(pods[0], tail)
    return FirstSystemLog(sessionId=session_id, logs=[line.log for line in lines])
