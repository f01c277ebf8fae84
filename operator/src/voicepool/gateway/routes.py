"""The routes of the session API. They read requests and write answers; what is done in between is `Sessions`."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Query, Request, Response
from fastapi.security import APIKeyHeader, HTTPAuthorizationCredentials, HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from voicepool.gateway import advice, records
from voicepool.gateway.auth import ANONYMOUS, Caller
from voicepool.gateway.choice import Chooser
from voicepool.gateway.errors import NotSynced
from voicepool.gateway.services import Services
from voicepool.gateway.starting import choose, start_session
from voicepool.gateway.view import PoolKey
from voicepool.session_api import Session, StartBody

probes = APIRouter(tags=["operation"])
router = APIRouter(tags=["sessions"])

_bearer = HTTPBearer(auto_error=False, description="An API key, or a token where the gateway takes tokens.")
_api_key = APIKeyHeader(name="X-API-Key", auto_error=False, description="An API key.")


async def services_of(request: Request) -> Services:
    """What the application was made with."""
    services: Services = request.app.state.services
    return services


Injected = Annotated[Services, Depends(services_of)]


async def authenticated(
    request: Request,
    services: Injected,
    bearer: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)],
    api_key: Annotated[str | None, Depends(_api_key)],
) -> Caller:
    """Who calls."""
    if not services.options.authentication:
        return ANONYMOUS
    return await services.access.authenticate(
        api_key=api_key,
        bearer=bearer.credentials if bearer else None,
        address=request.client.host if request.client else "",
    )


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
) -> Session:
    """Start a session with a warm agent of a pool: the one that is named, the best of several, the default one, or the only one."""
    body = body or StartBody()
    choice = await choose(services, caller, body, body.pool or body.agent_name or pool)
    return await start_session(request, services, caller, choice, body, idempotency_key, prefer, traceparent)


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
) -> Session:
    """Start a session with a warm agent of this pool."""
    body = body or StartBody()
    choice = await choose(services, caller, body, pool)
    return await start_session(request, services, caller, choice, body, idempotency_key, prefer, traceparent)


@router.get("/metrics/v1/namespaces/{namespace}/pools/{name}", tags=["operation"])
async def pool_metrics(services: Injected, caller: Authenticated, namespace: str, name: str) -> dict[str, Any]:
    """How many pods a pool should keep warm, and from what that follows: for KEDA's metrics-api trigger, and for people."""
    await caller.require(namespace, name)
    services.require_synced()
    return advice.as_json(await services.advisor.advise(services.sessions.pool((namespace, name))))


@router.get("/api/health")
async def health(
    request: Request,
    services: Injected,
    bearer: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)],
    api_key: Annotated[str | None, Depends(_api_key)],
) -> dict[str, Any]:
    """Counts of all pools."""
    caller = ANONYMOUS if services.options.health_is_public else await authenticated(request, services, bearer, api_key)
    return records.health(services.view, await caller.usable(services.view.pools))


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


async def known_pool(services: Services, caller: Caller, name: str) -> PoolKey:
    """The pool of that name, which the caller may use; whether it exists is not said."""
    key = Chooser(services.view, services.options).key(name)
    await caller.require(*key)
    return key
