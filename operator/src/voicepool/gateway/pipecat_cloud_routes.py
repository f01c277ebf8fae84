"""What Pipecat Cloud's own client (the package ``pipecatcloud`` and its command line) asks for, where it differs from the routes of ``session_routes``.

Its organization is a namespace here, and its agent (or service) a pool. Deploying, secrets and builds have no counterpart: Kubernetes does that.
"""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query
from pydantic import BaseModel

from voicepool.gateway import session_routes
from voicepool.gateway.auth import Caller
from voicepool.gateway.choice import require_possible
from voicepool.gateway.document import OF_A_POOL, OF_A_SESSION, OF_AN_END, OF_POOLS
from voicepool.gateway.errors import BadRequest
from voicepool.gateway.routes import Authenticated, Injected, KeyFirst
from voicepool.gateway.services import Services
from voicepool.gateway.session_logs import MAX_LINES
from voicepool.gateway.session_routes import ListQuery, carrier
from voicepool.gateway.view import PoolKey
from voicepool.model import AGENT_CONTAINER, BindState, PoolFact, conditions_of
from voicepool.session_api import Log, SessionList, SessionRecord, Terminated

router = APIRouter(
    prefix="/v1/organizations/{namespace}/services", tags=["Pipecat Cloud's client"], route_class=KeyFirst
)


class ListedPool(BaseModel):
    """A pool in a list."""

    name: str
    id: str
    region: str
    """The namespace."""
    activeDeploymentId: str | None  # noqa: N815 -- the wire's spelling
    """The hash of the pool's template."""
    # Kubernetes knows when the object was made, but nobody here keeps it; the client wants these keys.
    createdAt: None = None  # noqa: N815 -- the wire's spelling
    updatedAt: None = None  # noqa: N815 -- the wire's spelling


class PoolList(BaseModel):
    """The pools of a namespace that the caller may use."""

    services: list[ListedPool]


class AutoScaling(BaseModel):
    """Between how many pods a pool has."""

    minReplicas: int  # noqa: N815 -- the wire's spelling
    maxReplicas: int  # noqa: N815 -- the wire's spelling


class DeploymentSpec(BaseModel):
    """Of a pool's template and rules, what the client shows."""

    image: str | None
    maxSessionDurationSeconds: int  # noqa: N815 -- the wire's spelling


class Manifest(BaseModel):
    """See `DeploymentSpec`."""

    spec: DeploymentSpec


class Deployment(BaseModel):
    """See `DeploymentSpec`."""

    manifest: Manifest


class Problem(BaseModel):
    """Why a pool is not Ready."""

    code: str | None
    message: str | None


class PoolStatus(BaseModel):
    """How a pool is."""

    name: str
    id: str
    ready: bool
    available: bool
    activeSessionCount: int  # noqa: N815 -- the wire's spelling
    activeDeploymentId: str | None  # noqa: N815 -- the wire's spelling
    autoScaling: AutoScaling  # noqa: N815 -- the wire's spelling
    deployment: Deployment
    errors: list[Problem]


class PoolAnswer(BaseModel):
    """See `PoolStatus`."""

    body: PoolStatus


async def _key(caller: Caller, namespace: str, pool: str) -> PoolKey:
    require_possible((namespace, pool))
    await caller.require(namespace, pool)
    return (namespace, pool)


@router.get("", responses=OF_POOLS)
async def list_pools(services: Injected, caller: Authenticated, namespace: str) -> PoolList:
    """The pools of a namespace."""
    services.require_synced()
    keys = await caller.usable(key for key in sorted(services.view.pools) if key[0] == namespace)
    # One may be gone since it was asked about.
    pools = (services.view.pools.get(key) for key in keys)
    return PoolList(services=[_listed(pool) for pool in pools if pool is not None])


@router.get("/{pool}", responses=OF_A_POOL)
async def get_pool(services: Injected, caller: Authenticated, namespace: str, pool: str) -> PoolAnswer:
    """How a pool is."""
    key = await _key(caller, namespace, pool)
    services.require_synced()
    return PoolAnswer(body=_status(services, services.sessions.pool(key)))


@router.get("/{pool}/sessions", responses=OF_A_POOL)
async def list_sessions(
    services: Injected, caller: Authenticated, namespace: str, pool: str, wanted: Annotated[ListQuery, Query()]
) -> SessionList:
    """The sessions of a pool."""
    return session_routes.sessions_of(services, await _key(caller, namespace, pool), wanted)


@router.get("/{pool}/sessions/{session_id}", responses=OF_A_SESSION)
async def get_session(
    services: Injected, caller: Authenticated, namespace: str, pool: str, session_id: str
) -> SessionRecord:
    """One session."""
    return await session_routes.record_of(services, await _key(caller, namespace, pool), session_id)


@router.delete("/{pool}/sessions/{session_id}", responses=OF_AN_END)
async def end_session(
    services: Injected, caller: Authenticated, namespace: str, pool: str, session_id: str
) -> Terminated:
    """End a session now."""
    return await session_routes.end(services, await _key(caller, namespace, pool), session_id)


@router.get("/{pool}/logs", responses=OF_A_SESSION)
async def logs(
    services: Injected,
    caller: Authenticated,
    namespace: str,
    pool: str,
    session_id: Annotated[str | None, Query(alias="sessionId", max_length=63)] = None,
    limit: Annotated[int, Query(ge=1, le=MAX_LINES)] = 100,
) -> Log:
    """What the agent of a session has written."""
    key = await _key(caller, namespace, pool)
    if session_id is None:
        raise BadRequest(
            "Name the session whose log you want as 'sessionId'; the logs of a whole pool are 'kubectl logs --selector voicepool.dev/pool=...'."
        )
    return Log(logs=await services.logs.tail(await carrier(services, key, session_id), limit))


def _listed(pool: PoolFact) -> ListedPool:
    return ListedPool(
        name=pool.name, id=pool.uid, region=pool.namespace, activeDeploymentId=pool.status.get("templateHash")
    )


def _status(services: Services, pool: PoolFact) -> PoolStatus:
    conditions = conditions_of(pool.status)
    ready = conditions.get("Ready", {})
    bad = [ready] if ready.get("status") == "False" else []
    containers = pool.spec.template.get("spec", {}).get("containers", ())
    image = next((one.get("image") for one in containers if one.get("name") == AGENT_CONTAINER), None)
    spec = DeploymentSpec(image=image, maxSessionDurationSeconds=pool.spec.session.max_duration_seconds)
    pods = services.view.pods((pool.namespace, pool.name))
    return PoolStatus(
        name=pool.name,
        id=pool.uid,
        ready=ready.get("status") == "True",
        available=ready.get("status") == "True",
        activeSessionCount=sum(pod.state is BindState.BOUND and not pod.finished for pod in pods),
        activeDeploymentId=pool.status.get("templateHash"),
        autoScaling=AutoScaling(minReplicas=pool.spec.replicas, maxReplicas=pool.spec.max_pods),
        deployment=Deployment(manifest=Manifest(spec=spec)),
        errors=[Problem(code=one.get("reason"), message=one.get("message")) for one in bad],
    )
