"""What Pipecat Cloud's own client (the package ``pipecatcloud`` and its command line) asks for, where it differs from the routes of ``session_routes``.

Its organization is a namespace here, and its agent (or service) a pool. Deploying, secrets and builds have no counterpart: Kubernetes does that.
"""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query

from voicepool.gateway import session_routes
from voicepool.gateway.auth import Caller
from voicepool.gateway.errors import BadRequest
from voicepool.gateway.routes import Authenticated, Injected
from voicepool.gateway.services import Services
from voicepool.gateway.session_logs import MAX_LINES
from voicepool.gateway.session_routes import ListQuery, carrier
from voicepool.gateway.view import PoolKey
from voicepool.model import AGENT_CONTAINER, BindState, PoolFact
from voicepool.session_api import Log, SessionList, SessionRecord, Terminated

router = APIRouter(prefix="/v1/organizations/{namespace}/services", tags=["Pipecat Cloud's client"])


async def _key(caller: Caller, namespace: str, pool: str) -> PoolKey:
    await caller.require(namespace, pool)
    return (namespace, pool)


@router.get("")
async def list_pools(services: Injected, caller: Authenticated, namespace: str) -> dict[str, Any]:
    """The pools of a namespace."""
    services.require_synced()
    keys = await caller.usable(key for key in sorted(services.view.pools) if key[0] == namespace)
    return {"services": [_listed(services.view.pools[key]) for key in keys]}


@router.get("/{pool}")
async def get_pool(services: Injected, caller: Authenticated, namespace: str, pool: str) -> dict[str, Any]:
    """How a pool is."""
    key = await _key(caller, namespace, pool)
    services.require_synced()
    return {"body": _status(services, services.sessions.pool(key))}


@router.get("/{pool}/sessions")
async def list_sessions(
    services: Injected, caller: Authenticated, namespace: str, pool: str, wanted: Annotated[ListQuery, Query()]
) -> SessionList:
    """The sessions of a pool."""
    return session_routes.sessions_of(services, await _key(caller, namespace, pool), wanted)


@router.get("/{pool}/sessions/{session_id}")
async def get_session(
    services: Injected, caller: Authenticated, namespace: str, pool: str, session_id: str
) -> SessionRecord:
    """One session."""
    return await session_routes.record_of(services, await _key(caller, namespace, pool), session_id)


@router.delete("/{pool}/sessions/{session_id}")
async def end_session(
    services: Injected, caller: Authenticated, namespace: str, pool: str, session_id: str
) -> Terminated:
    """End a session now."""
    return await session_routes.end(services, await _key(caller, namespace, pool), session_id)


@router.get("/{pool}/logs")
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


def _listed(pool: PoolFact) -> dict[str, Any]:
    # Kubernetes knows when the object was made, but nobody here keeps it; the client wants these keys.
    return {
        "name": pool.name,
        "id": pool.uid,
        "region": pool.namespace,
        "activeDeploymentId": pool.status.get("templateHash"),
        "createdAt": None,
        "updatedAt": None,
    }


def _status(services: Services, pool: PoolFact) -> dict[str, Any]:
    conditions = {condition["type"]: condition for condition in pool.status.get("conditions") or ()}
    ready = conditions.get("Ready", {})
    bad = [ready] if ready.get("status") == "False" else []
    containers = pool.spec.template.get("spec", {}).get("containers", ())
    image = next((one.get("image") for one in containers if one.get("name") == AGENT_CONTAINER), None)
    pods = services.view.pods((pool.namespace, pool.name))
    return {
        "name": pool.name,
        "id": pool.uid,
        "ready": ready.get("status") == "True",
        "available": ready.get("status") == "True",
        "activeSessionCount": sum(pod.state is BindState.BOUND and not pod.finished for pod in pods),
        "activeDeploymentId": pool.status.get("templateHash"),
        "autoScaling": {"minReplicas": pool.spec.replicas, "maxReplicas": pool.spec.max_pods},
        "deployment": {
            "manifest": {
                "spec": {"image": image, "maxSessionDurationSeconds": pool.spec.session.max_duration_seconds},
            }
        },
        "errors": [{"code": one.get("reason"), "message": one.get("message")} for one in bad],
    }
