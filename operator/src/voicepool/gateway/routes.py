"""The routes of the session API. They read requests and write answers; what is done in between is `Sessions`."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Query, Request, Response
from fastapi.routing import APIRoute
from fastapi.security import APIKeyHeader, HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from voicepool.gateway import advice, records
from voicepool.gateway.advice import AdviceAnswer
from voicepool.gateway.auth import ANONYMOUS, Caller
from voicepool.gateway.choice import Chooser, require_possible
from voicepool.gateway.document import OF_A_POOL, OF_A_START, STARTING, WITH_KEY
from voicepool.gateway.errors import GatewayError, NotAllowed, NotSynced, Unauthenticated
from voicepool.gateway.records import Health
from voicepool.gateway.services import Services
from voicepool.gateway.starting import IdempotencyKey, Traceparent, choose, start_session
from voicepool.gateway.streams import StillMay
from voicepool.gateway.view import PoolKey
from voicepool.session_api import Session, StartBody

_bearer = HTTPBearer(auto_error=False, description="An API key, or a token where the gateway takes tokens.")
_api_key = APIKeyHeader(name="X-API-Key", auto_error=False, description="An API key.")
SECURITY_SCHEMES = (_bearer, _api_key)
_SECURITY = [{scheme.scheme_name: list[str]()} for scheme in SECURITY_SCHEMES]


class KeyFirst(APIRoute):
    """A route whose caller is found before its body is looked at: whoever has no key has nothing parsed, and is not told what a request must be like."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        options["openapi_extra"] = {"security": _SECURITY} | (options.get("openapi_extra") or {})
        super().__init__(*arguments, **options)

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """See `fastapi.routing.APIRoute`."""
        handle = super().get_route_handler()

        async def with_caller(request: Request) -> Response:
            request.state.caller = await _caller(request)
            return await handle(request)

        return with_caller


probes = APIRouter(tags=["operation"])
router = APIRouter(tags=["sessions"], route_class=KeyFirst)


async def services_of(request: Request) -> Services:
    """What the application was made with."""
    services: Services = request.app.state.services
    return services


Injected = Annotated[Services, Depends(services_of)]


async def _caller(request: Request, *, may_be_guess: bool = True) -> Caller:
    services = await services_of(request)
    if not services.options.authentication:
        return ANONYMOUS
    bearer = await _bearer(request)
    return await services.access.authenticate(
        api_key=await _api_key(request),
        bearer=bearer.credentials if bearer else None,
        address=request.client.host if request.client else "",
        may_be_guess=may_be_guess,
    )


async def authenticated(request: Request) -> Caller:
    """Who calls a route of the class `KeyFirst`."""
    caller: Caller = request.state.caller
    return caller


Authenticated = Annotated[Caller, Depends(authenticated)]


async def parts_of_start(request: Request) -> tuple[Services, Caller]:
    """What starts a session, and for whom; not as FastAPI's dependencies, which take a tenth of a millisecond for the two while the caller waits."""
    return await services_of(request), await authenticated(request)


@router.post("/start", responses=OF_A_START)
async def start(
    request: Request,
    body: StartBody | None = None,
    pool: Annotated[str, Query(max_length=317)] = "",
    idempotency_key: IdempotencyKey = "",
    prefer: Annotated[str, Header()] = "",
    traceparent: Traceparent = "",
) -> Session:
    """Start a session with a warm agent of a pool: the one that is named, the best of several, the default one, or the only one."""
    services, caller = await parts_of_start(request)
    body = body or StartBody()
    choice = await choose(services, caller, body, body.pool or body.agent_name or pool or None)
    return await start_session(request, services, caller, choice, body, idempotency_key, prefer, traceparent)


@router.post("/v1/public/{pool}/start", responses=OF_A_START)
async def start_in_pool(
    request: Request,
    pool: str,
    body: StartBody | None = None,
    idempotency_key: IdempotencyKey = "",
    prefer: Annotated[str, Header()] = "",
    traceparent: Traceparent = "",
) -> Session:
    """Start a session with a warm agent of this pool."""
    services, caller = await parts_of_start(request)
    body = body or StartBody()
    choice = await choose(services, caller, body, pool)
    return await start_session(request, services, caller, choice, body, idempotency_key, prefer, traceparent)


@router.get("/metrics/v1/namespaces/{namespace}/pools/{name}", tags=["operation"], responses=OF_A_POOL)
async def pool_metrics(services: Injected, caller: Authenticated, namespace: str, name: str) -> AdviceAnswer:
    """How many pods a pool should keep warm, and from what that follows: for KEDA's metrics-api trigger, and for people."""
    require_possible((namespace, name))
    await caller.require(namespace, name)
    services.require_synced()
    return advice.answer(await services.advisor.advise(services.sessions.pool((namespace, name))))


@probes.get("/api/health", responses=WITH_KEY, openapi_extra={"security": [{}, *_SECURITY]})
async def health(request: Request, services: Injected) -> Health:
    """Counts of all pools; needs a key where the gateway is set so."""
    caller = ANONYMOUS if services.options.health_is_public else await _caller(request)
    return records.health(services.view, await caller.usable(services.view.pools))


@probes.get("/healthz")
async def healthz() -> dict[str, str]:
    """Whether the process runs."""
    return {"status": "ok"}


@probes.get("/readyz", responses=STARTING)
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


@probes.get(
    "/metrics", response_class=Response, responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}
)
async def metrics(services: Injected) -> Response:
    """The gateway's metrics for Prometheus."""
    return Response(generate_latest(services.metrics.registry), media_type=CONTENT_TYPE_LATEST)


async def known_pool(services: Services, caller: Caller, name: str) -> PoolKey:
    """The pool of that name, which the caller may use; whether it exists is not said.

    Raises:
        NotAllowed: the caller may not.
        PoolNotFound: nothing can have this name.
    """
    key = Chooser(services.view, services.options).key(name)
    require_possible(key)
    await caller.require(*key)
    return key


def still_may_use(request: Request, key: PoolKey) -> StillMay:
    """What says whether a request's credential is still good for a pool, while the answer goes on."""

    async def still_may() -> bool:
        try:
            await (await _caller(request, may_be_guess=False)).require(*key)
        except (Unauthenticated, NotAllowed):
            return False
        except GatewayError:
            # Whoever knows could not be asked: neither yes nor no.
            return True
        return True

    return still_may
