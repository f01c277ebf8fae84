"""What can be asked of the sessions of a pool, and the end of one: list, one, end."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query
from pydantic import BaseModel

from voicepool.gateway import records
from voicepool.gateway.errors import SessionNotFound
from voicepool.gateway.routes import SESSION_ID_PATTERN, Authenticated, Injected, known_pool
from voicepool.gateway.services import Services
from voicepool.gateway.view import PoolKey, is_live
from voicepool.model import PodFact

router = APIRouter(tags=["sessions"])


class SessionList(BaseModel):
    """The sessions of a pool."""

    total_count: int
    sessions: list[dict[str, Any]]


class Terminated(BaseModel):
    """A session that ends or has ended."""

    status: Literal["terminated", "draining"]
    session_id: str


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
