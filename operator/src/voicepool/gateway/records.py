"""Sessions and pools as JSON: pure, from pods as last seen (and an agent's own words) to what the routes answer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict
from pydantic_core import from_json

from voicepool.agents import AgentStatus
from voicepool.binding import is_candidate
from voicepool.events import OTHER, UNDELIVERED, Happening, Kind, end_of_session
from voicepool.gateway.view import ClusterView, PoolKey, is_live
from voicepool.model import BindState, PodFact
from voicepool.session_api import RecordedAgent, SessionRecord


class _Answer(BaseModel):
    model_config = ConfigDict(frozen=True)


class HealthSessions(_Answer):
    """Counts of pods, in the first system's words."""

    ready: int
    """Bound."""
    starting: int
    pool: int
    """Warm."""


class HealthStats(_Answer):
    """What this gateway has seen since it began."""

    totalSpawned: int  # noqa: N815 -- the wire's spelling
    totalAssigned: int  # noqa: N815 -- the wire's spelling


class HealthCapacity(_Answer):
    """Live pods, and how many there may be."""

    current: int
    max: int
    available: int


class Health(_Answer):
    """Counts of all pools in the first system's shape."""

    success: bool = True
    status: str = "healthy"
    sessions: HealthSessions
    stats: HealthStats
    capacity: HealthCapacity


def session_state(pod: PodFact, status: AgentStatus | None = None) -> str:
    """bound, accepted, joined, ending or ended: what the pod shows, or what its agent says of itself where that is known."""
    if pod.finished:
        return "ended"
    if status is not None and status.session_id == pod.session and status.state in ("accepted", "joined", "ending"):
        return status.state
    return "ending" if pod.deleting else "bound"


_END_STATES: Mapping[str, str] = {
    "cancelled": "terminated",
    "drained": "terminated",
    "replaced": "terminated",
    "not-joined": "agent_start_timeout",
    "bot-failed": "agent_error",
    "provider-failed": "agent_error",
    "livekit-lost": "agent_error",
    "stuck": "agent_error",
    UNDELIVERED: "agent_start_timeout",
    OTHER: "unknown",
}
"""From the reasons in an agent's summary to Pipecat Cloud's words; whatever is not here is an ordinary end."""
_FAILED = ("agent_start_timeout", "agent_error")


def end_state(pod: PodFact) -> str:
    """``active``, or how the session ended, in the words of Pipecat Cloud's client.

    ``completed``, ``terminated``, ``agent_start_timeout``, ``agent_error`` or ``unknown``.
    """
    return _end_state(end_of_session(pod)) if pod.finished else "active"


def _end_state(end: Happening) -> str:
    return "agent_error" if end.kind is Kind.SESSION_DROPPED else _END_STATES.get(end.reason, "completed")


def session_record(pod: PodFact, status: AgentStatus | None = None) -> SessionRecord:
    """One session, in Pipecat Cloud's words where it has some."""
    end = end_of_session(pod) if pod.finished else None
    return SessionRecord(
        session_id=pod.session or "",
        namespace=pod.namespace,
        pool=pod.pool,
        state=session_state(pod, status),
        room_name=pod.room,
        created_at=pod.bound_at,
        ended_at=pod.finished_at,
        cold_start=pod.cold_start is not None,
        bot_start_seconds=pod.waited_seconds,
        deployment_id=pod.template_hash,
        end_state=_end_state(end) if end else "active",
        completion_status=_completion(pod, end) if end else None,
        reason=end.reason if end else None,
        agent=RecordedAgent(pod=pod.name, node=pod.node, template=pod.template_hash),
        summary=_summary(pod.message) if end else None,
    )


def health(view: ClusterView, keys: Iterable[PoolKey]) -> Health:
    """Counts of some pools."""
    warm = assigned = starting = maximum = 0
    for key in keys:
        pool = view.pools.get(key)
        if pool is None:
            # It is gone since its key was looked up.
            continue
        maximum += pool.spec.max_pods
        for pod in view.pods(key):
            if is_live(pod):
                assigned += pod.state is BindState.BOUND
                warm += is_candidate(pod)
                starting += pod.state is BindState.WARM and not is_candidate(pod)
    current = warm + assigned + starting
    return Health(
        sessions=HealthSessions(ready=assigned, starting=starting, pool=warm),
        stats=HealthStats(totalSpawned=view.spawned, totalAssigned=view.assigned),
        capacity=HealthCapacity(current=current, max=maximum, available=max(0, maximum - current)),
    )


def _completion(pod: PodFact, end: Happening) -> str:
    if end.kind is Kind.SESSION_DROPPED:
        return "dropped"
    if _end_state(end) in _FAILED:
        # The process ended in order; the session did not.
        return "failed"
    # The kubelet tells of the process's end some time before it tells of the pod's.
    succeeded = pod.phase == "Succeeded" if pod.exit_code is None else pod.exit_code == 0
    return "completed" if succeeded else "failed"


def _summary(message: str | None) -> dict[str, Any] | None:
    """The agent's summary from its termination message; what is no summary is kept as words."""
    if not message:
        return None
    try:
        # Refuses what could not be written down again: half a character, numbers that are none, hundreds of levels.
        summary = from_json(message, allow_inf_nan=False)
    except ValueError:
        return {"reason": message}
    return summary if isinstance(summary, dict) else {"reason": message}
