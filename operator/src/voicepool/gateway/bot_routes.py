"""The bots' own routes: passes a request for a session on to the one pod that carries it.

In the shapes of Pipecat's runner (``/sessions/{id}/{path}``) and of Pipecat Cloud's "Session API" (``/v1/public/{pool}/sessions/{id}/{path}``).
"""

from __future__ import annotations

import re

from fastapi import APIRouter, Request, Response

from voicepool.gateway.document import OF_A_BOT
from voicepool.gateway.errors import BadRequest, SessionEnded, SessionNotFound
from voicepool.gateway.route_proxy import safe_path
from voicepool.gateway.routes import Authenticated, Injected, KeyFirst, known_pool
from voicepool.gateway.services import Services
from voicepool.gateway.view import PoolKey, is_live
from voicepool.model import PodFact
from voicepool.session_api import SESSION_ID_PATTERN

METHODS = ("DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT")
"""Those that Pipecat Cloud passes on."""

router = APIRouter(tags=["the bots' own routes"], route_class=KeyFirst)


async def in_session(
    request: Request, services: Injected, caller: Authenticated, session_id: str, path: str
) -> Response:
    """Have the bot of a session answer, whichever pool it is of."""
    keys = await caller.usable(services.view.pools_with_pods())
    return await _pass_on(request, services, keys, session_id, path, segments=3)


async def in_session_of_pool(
    request: Request, services: Injected, caller: Authenticated, pool: str, session_id: str, path: str
) -> Response:
    """Have the bot of a session of this pool answer."""
    return await _pass_on(request, services, [await known_pool(services, caller, pool)], session_id, path, segments=6)


for _method in METHODS:
    router.add_api_route(
        "/sessions/{session_id}/{path:path}",
        in_session,
        methods=[_method],
        response_class=Response,
        responses=OF_A_BOT,
        operation_id=f"{_method.lower()}_in_session",
    )
    router.add_api_route(
        "/v1/public/{pool}/sessions/{session_id}/{path:path}",
        in_session_of_pool,
        methods=[_method],
        response_class=Response,
        responses=OF_A_BOT,
        operation_id=f"{_method.lower()}_in_session_of_pool",
    )


async def _pass_on(
    request: Request, services: Services, keys: list[PoolKey], session_id: str, path: str, *, segments: int
) -> Response:
    """`segments`: how many come before the bot's path."""
    path = safe_path(request.scope["raw_path"], segments, path)
    services.require_synced()
    pod = await _carrier(services, keys, session_id)
    return await services.route_proxy.pass_on(request, pod, session_id, path)


async def _carrier(services: Services, keys: list[PoolKey], session_id: str) -> PodFact:
    """The live pod of a session: by what is known here, or, when it is not, by asking the API server."""
    if not re.fullmatch(SESSION_ID_PATTERN, session_id):
        raise SessionNotFound(f"There is no session {session_id[:64]!r}.")
    found = [pod for key in keys for pod in services.view.pods(key) if pod.session == session_id]
    if not any(map(is_live, found)):
        # Another gateway may have bound it a moment ago.
        for namespace in sorted({namespace for namespace, _ in keys}):
            carriers = await services.sessions.carriers(namespace, session_id)
            found += [pod for pod in carriers if (pod.namespace, pod.pool) in keys]
    live = {pod.uid: pod for pod in found if is_live(pod)}
    if len(live) > 1:
        raise BadRequest(f"Several pools have a session {session_id}; name one: /v1/public/<pool>/sessions/...")
    if not live and found:
        raise SessionEnded(f"The session {session_id} has ended.")
    if not live:
        raise SessionNotFound(f"There is no session {session_id} in the pools that you may use.")
    return next(iter(live.values()))
