"""What a start is about, in words that all parts of the gateway share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

from voicepool.gateway.livekit import LiveKitServer
from voicepool.gateway.tracing import Span
from voicepool.gateway.view import PoolKey
from voicepool.kube.api import KubeApiError
from voicepool.model import PodFact


@dataclass(frozen=True, slots=True)
class CallersRoom:
    """A room that was there before its session: its caller is in it, and the gateway neither makes it nor makes it again."""

    name: str
    sid: str
    """Which room of that name."""


@dataclass(frozen=True, slots=True)
class StartRequest:
    """Somebody wants an agent."""

    namespace: str
    pool: str
    """The pool, or the best of several."""
    session_id: str
    keyed: bool
    """The caller may send the same session again, here or to another gateway."""
    callers_room: CallersRoom | None = None
    """Where the caller waits; without it the session gets a room of its own."""
    body: Any = field(default=None, repr=False)
    caller: str | None = None
    """The mark of who asks; None: nobody whose sessions are counted. Callers take turns where they wait."""
    span: Span = field(default_factory=Span, repr=False, compare=False)
    """The request in its caller's trace."""
    beside: Callable[[LiveKitServer, str], object] = field(
        default=lambda _server, _room: None, repr=False, compare=False
    )
    """Work for the caller's answer, which is called with the LiveKit server and the room while the pod is being bound; once for each pod, or not at all."""
    others: tuple[str, ...] = ()
    """Pools of the same namespace that will do as well, the better first."""

    @property
    def key(self) -> PoolKey:
        """The pool, or the best of several."""
        return (self.namespace, self.pool)

    @property
    def keys(self) -> tuple[PoolKey, ...]:
        """All pools, the best first."""
        return ((self.namespace, self.pool), *((self.namespace, name) for name in self.others))

    def of(self, pool: str) -> StartRequest:
        """The request when its pool is chosen."""
        return replace(self, pool=pool, others=()) if self.others else self

    @property
    def room(self) -> str:
        """The name of the session's room."""
        if self.callers_room is not None:
            return self.callers_room.name
        return room_name(self.namespace, self.pool, self.session_id)


@dataclass(frozen=True, slots=True)
class Started:
    """A session that an agent has taken."""

    session_id: str
    pod: PodFact
    room: str
    server: LiveKitServer
    cold_start: bool
    seconds: float


@dataclass(slots=True)
class Hold:
    """A pod that was bound for a session whose agent has not accepted yet."""

    pod: PodFact
    sent_until: datetime | None = None
    """The expiry of the last assignment that may have arrived; None: none was sent."""


@dataclass(slots=True)
class Trouble:
    """What the API server last said instead of doing what a start needs; None where it does."""

    last: KubeApiError | None = None


def room_name(namespace: str, pool: str, session_id: str) -> str:
    """The room of a session. Names of namespaces and pools have no underscore, so no two sessions share a room."""
    return f"{namespace}_{pool}_{session_id}"


def words(request: StartRequest, pod: PodFact | None = None) -> dict[str, Any]:
    """The fields of a log line about a start."""
    fields: dict[str, Any] = {"session": request.session_id, "namespace": request.namespace}
    if pod is None:
        fields["pool"] = ",".join(name for _, name in request.keys)
    else:
        fields |= {"pool": pod.pool, "pod": pod.name}
    return fields
