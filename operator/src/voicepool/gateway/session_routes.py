"""What can be asked of the sessions of a pool, and the end of one: list, one, end."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Annotated, Literal

from fastapi import APIRouter, Query
from pydantic import AwareDatetime, BaseModel, BeforeValidator, ConfigDict, Field

from voicepool.gateway import records
from voicepool.gateway.document import OF_A_POOL, OF_A_SESSION, OF_AN_END
from voicepool.gateway.errors import SessionNotFound
from voicepool.gateway.listing import Filter, State, page_of
from voicepool.gateway.routes import Authenticated, Injected, KeyFirst, known_pool
from voicepool.gateway.services import Services
from voicepool.gateway.view import PoolKey, is_live
from voicepool.model import PodFact
from voicepool.session_api import SESSION_ID_PATTERN, SessionList, SessionRecord, Terminated

router = APIRouter(tags=["sessions"], route_class=KeyFirst)

_RFC_3339 = re.compile(r"\d{4}-\d\d-\d\d[Tt ]\d\d:\d\d:\d\d(\.\d+)?([Zz]|[+-]\d\d:\d\d)", re.ASCII)


def _require_rfc_3339(value: object) -> object:
    if isinstance(value, str) and not _RFC_3339.fullmatch(value):
        # Pydantic would take numbers too, as seconds or as milliseconds.
        raise ValueError("must be a time as in RFC 3339, with its zone")
    return value


Time = Annotated[AwareDatetime, BeforeValidator(_require_rfc_3339)]


class ListQuery(BaseModel):
    """Which sessions, and which page of them. Misspelt names are refused, or a filter would silently let everything through."""

    model_config = ConfigDict(extra="forbid")

    state: State | None = None
    """``active`` is every state but ``ended``."""
    endState: Annotated[str | None, Field(pattern=r"^[a-z][a-z0-9_]{0,63}$")] = None  # noqa: N815 -- the wire's spelling
    """How it ended, in the words of Pipecat Cloud's client."""
    createdAfter: Time | None = None  # noqa: N815 -- the wire's spelling
    createdBefore: Time | None = None  # noqa: N815 -- the wire's spelling
    deploymentId: Annotated[str | None, Field(max_length=63)] = None  # noqa: N815 -- the wire's spelling
    """The hash of the pool's template from which the agent was made."""
    limit: Annotated[int, Field(ge=1, le=1000)] = 100
    offset: Annotated[int, Field(ge=0)] = 0
    """How many to leave out. Pages by ``cursor`` stay the same while sessions begin, those by ``offset`` do not."""
    cursor: Annotated[str | None, Field(max_length=255)] = None
    """``nextCursor`` of the page before."""


Wanted = Annotated[ListQuery, Query()]


@router.get("/v1/agents/{pool}/sessions", responses=OF_A_POOL)
async def list_sessions(services: Injected, caller: Authenticated, pool: str, wanted: Wanted) -> SessionList:
    """The sessions of a pool that run, and those that ended and are still kept; the newest first."""
    return sessions_of(services, await known_pool(services, caller, pool), wanted)


@router.get("/v1/agents/{pool}/sessions/{session_id}", responses=OF_A_SESSION)
async def get_session(services: Injected, caller: Authenticated, pool: str, session_id: str) -> SessionRecord:
    """One session: what its pod shows and what its agent says; of one that has ended, its agent's summary."""
    return await record_of(services, await known_pool(services, caller, pool), session_id)


@router.delete("/v1/agents/{pool}/sessions/{session_id}", responses=OF_AN_END)
async def end_session(
    services: Injected,
    caller: Authenticated,
    pool: str,
    session_id: str,
    mode: Annotated[Literal["drain", "cancel"], Query()] = "cancel",
) -> Terminated:
    """End a session: `drain` lets the agent say goodbye, `cancel` ends it now."""
    return await end(services, await known_pool(services, caller, pool), session_id, mode)


def sessions_of(services: Services, key: PoolKey, wanted: ListQuery) -> SessionList:
    """A page of the sessions of a pool.

    Raises:
        NotSynced: they are not known yet.
        BadRequest: the cursor is none of ours.
    """
    services.require_synced()
    page = page_of(
        services.view.pods(key),
        Filter(
            state=wanted.state,
            end_state=wanted.endState,
            created_after=wanted.createdAfter,
            created_before=wanted.createdBefore,
            template=wanted.deploymentId,
        ),
        limit=wanted.limit,
        offset=wanted.offset,
        cursor=wanted.cursor,
    )
    sessions = [records.session_record(pod) for pod in page.pods]
    return SessionList(total_count=page.total, sessions=sessions, next_cursor=page.cursor)


async def record_of(services: Services, key: PoolKey, session_id: str) -> SessionRecord:
    """One session of a pool.

    Raises:
        SessionNotFound: no pod carries it.
    """
    pod = await carrier(services, key, session_id)
    status = await services.sessions.status(pod) if is_live(pod) else None
    return records.session_record(pod, status)


async def end(
    services: Services, key: PoolKey, session_id: str, mode: Literal["drain", "cancel"] = "cancel"
) -> Terminated:
    """End a session of a pool.

    Raises:
        SessionNotFound: no pod carries it.
        AgentUnreachable: it could not be ended.
    """
    pod = await carrier(services, key, session_id)
    if is_live(pod):
        await services.sessions.end(pod, session_id, mode)
    draining = is_live(pod) and mode == "drain"
    return Terminated(status="draining" if draining else "terminated", session_id=session_id)


async def carrier(services: Services, key: PoolKey, session_id: str) -> PodFact:
    """The pod of a session; a live one before an ended one.

    Raises:
        SessionNotFound: no pod carries it.
        ClusterUnavailable: the API server does not say.
    """
    return (await carrier_among(services, [key], session_id))[0]


async def carrier_among(services: Services, keys: Collection[PoolKey], session_id: str) -> list[PodFact]:
    """The pods that carry a session in some pools; live ones before ended ones, and at least one.

    Raises:
        SessionNotFound: no pod carries it.
        ClusterUnavailable: the API server does not say.
    """
    if not re.fullmatch(SESSION_ID_PATTERN, session_id):
        raise SessionNotFound(f"There is no session {session_id[:64]!r}.")
    pods: list[PodFact] = []
    for namespace in sorted({namespace for namespace, _ in keys}):
        carriers = await services.sessions.carriers(namespace, session_id)
        pods += [pod for pod in carriers if (pod.namespace, pod.pool) in keys]
    if not pods:
        where = "the pool " + "/".join(*keys) if len(keys) == 1 else "the pools that you may use"
        raise SessionNotFound(
            f"There is no session {session_id} in {where}, or it ended longer ago than the pool keeps it."
        )
    return sorted(pods, key=lambda pod: (not is_live(pod), pod.deleting, pod.name))
