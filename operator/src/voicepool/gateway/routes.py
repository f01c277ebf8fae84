"""The routes of the session API. They read requests and write answers; what is done in between is `Sessions`."""

from __future__ import annotations

import asyncio
import re
import uuid
from collections.abc import Coroutine
from typing import Annotated, Any, Literal, TypeVar

from fastapi import APIRouter, Depends, Header, Query, Request, Response
from fastapi.security import APIKeyHeader, HTTPAuthorizationCredentials, HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel, ConfigDict, Field

from voicepool.gateway import advice, records
from voicepool.gateway.auth import ANONYMOUS, Caller
from voicepool.gateway.errors import BadRequest, NotSynced, PoolNotFound, SessionNotFound
from voicepool.gateway.livekit import caller_token
from voicepool.gateway.requests import Started, StartRequest
from voicepool.gateway.services import Services
from voicepool.gateway.tracing import Span
from voicepool.gateway.view import PoolKey, is_live
from voicepool.model import PodFact

T = TypeVar("T")

SESSION_ID_PATTERN = r"^[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?$"
"""What Kubernetes takes as the value of a label."""
_KEYED_SESSIONS = uuid.UUID("6b0f4c0a-9d3d-5c6a-8f5b-0c6d3d1f5a11")
"""Namespace of the session ids that are derived from an Idempotency-Key; any constant would do."""
_WAIT = re.compile(r"(?:^|[,;\s])wait\s*=\s*(\d{1,4})(?:$|[,;\s])")

probes = APIRouter(tags=["operation"])
router = APIRouter(tags=["sessions"])

_bearer = HTTPBearer(auto_error=False, description="An API key.")
_api_key = APIKeyHeader(name="X-API-Key", auto_error=False, description="An API key.")


class StartBody(BaseModel):
    """What a caller sends to start a session. Fields of other systems' clients are accepted and ignored."""

    model_config = ConfigDict(extra="ignore")

    pool: str | None = Field(None, max_length=317)
    """The pool, as `name` or `namespace.name`."""
    agentName: str | None = Field(None, max_length=317)  # noqa: N815 -- as Pipecat Cloud's clients send it
    transport: Literal["livekit"] | None = None
    sessionId: str | None = Field(None, pattern=SESSION_ID_PATTERN)  # noqa: N815 -- the wire's spelling
    """Chosen by the caller; the same one again gets the same agent."""
    waitFor: Literal["accepted", "joined"] | None = None  # noqa: N815 -- the wire's spelling
    body: Any = None
    """Handed to the bot as it is."""


class StartAnswer(BaseModel):
    """Where the caller finds its agent."""

    sessionId: str  # noqa: N815 -- the wire's spelling
    url: str
    token: str
    roomName: str  # noqa: N815 -- the wire's spelling
    state: str
    coldStart: bool  # noqa: N815 -- the wire's spelling
    botStartSeconds: float  # noqa: N815 -- the wire's spelling
    agent: dict[str, str]


class SessionList(BaseModel):
    """The sessions of a pool."""

    total_count: int
    sessions: list[dict[str, Any]]


class Terminated(BaseModel):
    """A session that ends or has ended."""

    status: Literal["terminated", "draining"]
    session_id: str


def services_of(request: Request) -> Services:
    """What the application was made with."""
    services: Services = request.app.state.services
    return services


Injected = Annotated[Services, Depends(services_of)]


def authenticated(
    services: Injected,
    bearer: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)],
    api_key: Annotated[str | None, Depends(_api_key)],
) -> Caller:
    """Who calls."""
    if not services.options.authentication:
        return ANONYMOUS
    return services.keys.authenticate(api_key or (bearer.credentials if bearer else None))


Authenticated = Annotated[Caller, Depends(authenticated)]


@router.post("/start")
async def start(
    request: Request,
    services: Injected,
    caller: Authenticated,
    body: StartBody | None = None,
    pool: Annotated[str | None, Query(max_length=317)] = None,
    idempotency_key: Annotated[str | None, Header(max_length=255)] = None,
    prefer: Annotated[str | None, Header(max_length=255)] = None,
    traceparent: Annotated[str | None, Header(max_length=255)] = None,
) -> StartAnswer:
    """Start a session with a warm agent of a pool: the one that is named, the default one, or the only one."""
    body = body or StartBody()
    key = _chosen_pool(services, caller, body.pool or body.agentName or pool)
    return await _start(request, services, caller, key, body, idempotency_key, prefer, traceparent)


@router.post("/v1/public/{pool}/start")
async def start_in_pool(
    request: Request,
    services: Injected,
    caller: Authenticated,
    pool: str,
    body: StartBody | None = None,
    idempotency_key: Annotated[str | None, Header(max_length=255)] = None,
    prefer: Annotated[str | None, Header(max_length=255)] = None,
    traceparent: Annotated[str | None, Header(max_length=255)] = None,
) -> StartAnswer:
    """Start a session with a warm agent of this pool."""
    key = named_pool(services, pool)
    return await _start(request, services, caller, key, body or StartBody(), idempotency_key, prefer, traceparent)


@router.get("/v1/agents/{pool}/sessions")
async def list_sessions(services: Injected, caller: Authenticated, pool: str) -> SessionList:
    """The sessions of a pool that run, and those that ended and are still kept."""
    key = known_pool(services, caller, pool)
    pods = sorted(
        (pod for pod in services.view.pods(key) if pod.session), key=lambda pod: (str(pod.bound_at), pod.name)
    )
    sessions = [records.session_record(pod) for pod in pods]
    return SessionList(total_count=len(sessions), sessions=sessions)


@router.get("/v1/agents/{pool}/sessions/{session_id}")
async def get_session(services: Injected, caller: Authenticated, pool: str, session_id: str) -> dict[str, Any]:
    """One session: what its pod shows and what its agent says."""
    pod = await _carrier(services, known_pool(services, caller, pool), session_id)
    status = await services.sessions.status(pod) if is_live(pod) else None
    return records.session_record(pod, status)


@router.delete("/v1/agents/{pool}/sessions/{session_id}")
async def end_session(
    services: Injected,
    caller: Authenticated,
    pool: str,
    session_id: str,
    mode: Annotated[Literal["drain", "cancel"], Query()] = "cancel",
) -> Terminated:
    """End a session: `drain` lets the agent say goodbye, `cancel` ends it now."""
    pod = await _carrier(services, known_pool(services, caller, pool), session_id)
    if is_live(pod):
        await services.sessions.end(pod, session_id, mode)
    draining = is_live(pod) and mode == "drain"
    return Terminated(status="draining" if draining else "terminated", session_id=session_id)


@router.get("/metrics/v1/namespaces/{namespace}/pools/{name}", tags=["operation"])
async def pool_metrics(services: Injected, caller: Authenticated, namespace: str, name: str) -> dict[str, Any]:
    """How many pods a pool should keep warm, and from what that follows: for KEDA's metrics-api trigger, and for people."""
    caller.require(namespace, name)
    if not services.synced():
        raise NotSynced("The gateway has just started and does not know the cluster yet.", retry_after_seconds=1)
    return advice.as_json(await services.advisor.advise(services.sessions.pool((namespace, name))))


@router.get("/api/health")
async def health(
    services: Injected,
    bearer: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)],
    api_key: Annotated[str | None, Depends(_api_key)],
) -> dict[str, Any]:
    """Counts of all pools."""
    caller = ANONYMOUS if services.options.health_is_public else authenticated(services, bearer, api_key)
    return records.health(services.view, [key for key in services.view.pools if caller.may_use(*key)])


@probes.get("/healthz")
async def healthz() -> dict[str, str]:
    """Whether the process runs."""
    return {"status": "ok"}


@probes.get("/readyz")
async def readyz(services: Injected) -> dict[str, str]:
    """Whether the gateway can bind: it knows the cluster."""
    if not services.synced():
        raise NotSynced("The gateway has not seen the cluster's pools and pods yet.", retry_after_seconds=1)
    return {"status": "ok"}


@probes.get("/metrics/v1/namespaces/{namespace}/pools/{name}/unmet", include_in_schema=False)
async def unmet(services: Injected, namespace: str, name: str) -> dict[str, Any]:
    """Counts of this gateway's own callers who were not bound, for the other gateways; open, like ``/metrics``."""
    found = services.advisor.unmet(services.sessions.pool((namespace, name)))
    return {"waiting": found.waiting, "rejected": found.rejected}


@probes.get("/metrics", response_class=Response)
async def metrics(services: Injected) -> Response:
    """The gateway's metrics for Prometheus."""
    return Response(generate_latest(services.metrics.registry), media_type=CONTENT_TYPE_LATEST)


async def _start(
    request: Request,
    services: Services,
    caller: Caller,
    key: PoolKey,
    body: StartBody,
    idempotency_key: str | None,
    prefer: str | None,
    traceparent: str | None,
) -> StartAnswer:
    with services.tracing.request(request.scope["route"].path, traceparent) as span:
        span.note(pool=f"{key[0]}/{key[1]}")
        return await _start_traced(request, services, caller, key, body, idempotency_key, prefer, span)


async def _start_traced(
    request: Request,
    services: Services,
    caller: Caller,
    key: PoolKey,
    body: StartBody,
    idempotency_key: str | None,
    prefer: str | None,
    span: Span,
) -> StartAnswer:
    wanted = StartRequest(
        namespace=key[0],
        pool=key[1],
        session_id=body.sessionId or session_id_of(caller, key, idempotency_key),
        keyed=bool(body.sessionId or idempotency_key),
        body=body.body,
        span=span,
    )
    started = await begin(request, services, caller, wanted)
    state = "accepted"
    wait_seconds = _wait_seconds(services, body, prefer)
    if wait_seconds:
        with span.child("joined") as waited:
            waiting = services.sessions.wait_joined(started, wait_seconds, required=body.waitFor == "joined")
            state = await _while_connected(request, waiting)
            waited.note(state=state)
    token = caller_token(
        started.server,
        room=started.room,
        identity=f"caller-{uuid.uuid4()}",
        ttl_seconds=services.options.caller_token_seconds,
    )
    return StartAnswer(
        sessionId=started.session_id,
        url=started.server.caller_url,
        token=token,
        roomName=started.room,
        state=state,
        coldStart=started.cold_start,
        botStartSeconds=round(started.seconds, 4),
        agent={"pod": started.pod.name, "namespace": started.pod.namespace},
    )


async def begin(request: Request, services: Services, caller: Caller, wanted: StartRequest) -> Started:
    """Have a session started for a caller who stays connected."""
    caller.require(*wanted.key)
    if not services.synced():
        raise NotSynced("The gateway has just started and does not know the cluster yet.", retry_after_seconds=1)
    services.sessions.pool(wanted.key)
    wanted.span.note(session=wanted.session_id)
    started = await _while_connected(request, services.sessions.start(wanted))
    wanted.span.note(pod=started.pod.name, cold_start=started.cold_start)
    return started


async def _while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Do the work, but cancel it when the client hangs up."""
    task = asyncio.create_task(work)
    gone = asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            task.cancel()
            # The answer goes nowhere; it only has to be one.
            await asyncio.wait({task})
        if task.cancelled():
            raise BadRequest("The caller has gone.", status=499, code="CALLER_GONE")
        return task.result()
    finally:
        gone.cancel()
        if not task.done():
            task.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def session_id_of(caller: Caller, key: PoolKey, idempotency_key: str | None) -> str:
    """A new session's id, or the one that belongs to a caller's ``Idempotency-Key``."""
    if idempotency_key is None:
        return str(uuid.uuid4())
    # One caller's keys are not another's, and the same key means another session in another pool.
    return str(uuid.uuid5(_KEYED_SESSIONS, "\0".join((caller.name, *key, idempotency_key))))


def _wait_seconds(services: Services, body: StartBody, prefer: str | None) -> float:
    options = services.options
    match = _WAIT.search(prefer or "")
    if match:
        return min(float(match[1]), options.max_joined_wait_seconds)
    return options.joined_wait_seconds if body.waitFor == "joined" else 0.0


def named_pool(services: Services, name: str) -> PoolKey:
    """``name`` in the default namespace, or ``namespace.name``."""
    own = (services.options.default_namespace, name)
    if own in services.view.pools or "." not in name:
        return own
    namespace, _, rest = name.partition(".")
    return (namespace, rest)


def _chosen_pool(services: Services, caller: Caller, name: str | None) -> PoolKey:
    name = name or services.options.default_pool
    if name:
        return named_pool(services, name)
    mine = [key for key in services.view.pools if caller.may_use(*key)]
    if len(mine) == 1:
        return mine[0]
    many = "There are several pools" if mine else "There is no pool yet"
    raise PoolNotFound(f"{many}; name one as 'pool' in the body or the query ('name' or 'namespace.name').")


def known_pool(services: Services, caller: Caller, name: str) -> PoolKey:
    """The pool of that name, which the caller may use; whether it exists is not said."""
    key = named_pool(services, name)
    caller.require(*key)
    return key


async def _carrier(services: Services, key: PoolKey, session_id: str) -> PodFact:
    """The pod of a session; a live one before an ended one."""
    if not re.match(SESSION_ID_PATTERN, session_id):
        raise SessionNotFound(f"There is no session {session_id[:64]!r}.")
    pods = [pod for pod in await services.sessions.carriers(key[0], session_id) if pod.pool == key[1]]
    if not pods:
        raise SessionNotFound(
            f"There is no session {session_id} in the pool {key[0]}/{key[1]}, or it ended longer ago than the pool keeps it."
        )
    return min(pods, key=lambda pod: (not is_live(pod), pod.deleting, pod.name))
