"""Deletes the room of a session that has ended, so that nobody stays alone in it.

Every gateway sees the end of every pod. The one that bound it deletes the room at once, the others a little later, if it is still there.

Invariants:

* A room is deleted when its session is over, and never because one of several pods that a session was offered to has gone: a summary of the agent's
  proves that it had the session; without one the API server is asked whether another pod carries it now.
* A room that was made again under the same name is left alone, and so is one in which people are talking to each other.
* Nothing waits for this; so many deletions are under way at once, and no more.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable
from datetime import datetime, timedelta

from voicepool.gateway.background import Background
from voicepool.gateway.errors import GatewayError, LiveKitUnavailable
from voicepool.gateway.livekit import LiveKitServer, LiveKitServers, Rooms
from voicepool.gateway.metrics import GatewayMetrics
from voicepool.gateway.options import GatewayOptions
from voicepool.gateway.sessions import Sessions
from voicepool.gateway.view import ClusterView, PoolKey, is_live
from voicepool.model import BindState, PodFact, PoolFact

log = logging.getLogger("voicepool.gateway")

_AT_ONCE = 8
_ATTEMPTS = 3
_PAUSE_SECONDS = 1.0
_OLD_SECONDS = 600.0
"""An end that is longer ago was seen to by a gateway that ran then."""
_CLOCKS_DIFFER_SECONDS = 2.0


class EndedRooms:
    """Watches pods end.

    Args:
        view: what the informers know.
        sessions: what this gateway is doing for whom.
        servers: the LiveKit server of each pool.
        rooms: their rooms.
        options: times.
        metrics: what is counted.
        identity: this gateway, as in ``bound-by``.
        now: the current time, with its zone.
    """

    def __init__(
        self,
        *,
        view: ClusterView,
        sessions: Sessions,
        servers: LiveKitServers,
        rooms: Rooms,
        options: GatewayOptions,
        metrics: GatewayMetrics,
        identity: str,
        now: Callable[[], datetime],
    ) -> None:
        self._view = view
        self._sessions = sessions
        self._servers = servers
        self._rooms = rooms
        self._options = options
        self._metrics = metrics
        self._identity = identity
        self._now = now
        self._background = Background()
        self._slots = asyncio.Semaphore(_AT_ONCE)
        self._gone_pools: dict[PoolKey, PoolFact] = {}
        """Pools that were deleted while calls of theirs went on: their server is needed until the last one has ended."""

    def pool_changed(self, key: PoolKey, old: PoolFact | None, new: PoolFact | None) -> None:
        """A pool has come, changed or gone."""
        if new is not None:
            self._gone_pools.pop(key, None)
        elif old is not None and any(self._view.pods(key)):
            self._gone_pools[key] = old

    def pod_changed(self, old: PodFact | None, new: PodFact | None) -> None:
        """A pod has come, changed or gone; called after the view has seen it."""
        pod = new or old
        if pod is None:
            return
        key = (pod.namespace, pod.pool)
        ended = (new is None or new.finished) and not (old is not None and old.finished)
        pool = self._view.pools.get(key) or self._gone_pools.get(key)
        if new is None and not any(self._view.pods(key)):
            self._gone_pools.pop(key, None)
        if not ended or pod.state is not BindState.BOUND or not pod.room or not pod.session or pool is None:
            return
        ended_at = pod.finished_at or self._now()
        if self._now() - ended_at > timedelta(seconds=_OLD_SECONDS):
            return
        self._background.spawn(self._see_to(pod, pool, ended_at))

    async def _see_to(self, pod: PodFact, pool: PoolFact, ended_at: datetime) -> None:
        certain = had_session(pod)
        ours = pod.bound_by == self._identity
        if not (certain and ours):
            later = self._options.room_uncertain_seconds + pool.spec.on_empty.timeout_seconds
            await asyncio.sleep(self._options.room_left_seconds if certain or ours else later)
        async with self._slots:
            for attempt in range(1, _ATTEMPTS + 1):
                try:
                    outcome = await self._delete(pod, pool, ended_at, certain=certain)
                except GatewayError as error:
                    outcome = "failed"
                    if attempt == _ATTEMPTS or not isinstance(error, LiveKitUnavailable):
                        log.warning("the room of an ended session was not deleted: %s", error.detail, extra=_words(pod))
                        break
                    await asyncio.sleep(_PAUSE_SECONDS * attempt)
                else:
                    break
        self._metrics.rooms.labels(pod.namespace, pod.pool, outcome).inc()

    async def _delete(self, pod: PodFact, pool: PoolFact, ended_at: datetime, *, certain: bool) -> str:
        room, session_id = pod.room or "", pod.session or ""
        server: LiveKitServer = await self._servers.of(pool)
        if not certain and await self._is_elsewhere(pod, session_id):
            return "kept"
        if any(is_live(other) and other.uid != pod.uid for other in self._view.pods_in_room(room)):
            return "kept"
        found = await self._rooms.find(server, room)
        if found is None:
            return "absent"
        if found.created_at > ended_at + timedelta(seconds=_CLOCKS_DIFFER_SECONDS):
            return "kept"
        if await self._rooms.callers(server, room) > 1:
            # The agent brought them together, or they came together: they are not alone.
            return "kept"
        if not await self._rooms.delete(server, room):
            return "absent"
        log.info("the room of an ended session was deleted", extra=_words(pod))
        return "deleted"

    async def _is_elsewhere(self, pod: PodFact, session_id: str) -> bool:
        """Whether the session is, or is about to be, with another pod than this one."""
        if self._sessions.in_flight((pod.namespace, pod.pool), session_id):
            return True
        carriers = await self._sessions.carriers(pod.namespace, session_id)
        return any(is_live(other) and other.uid != pod.uid for other in carriers)

    async def close(self) -> None:
        """Stop. What is left undone the other gateways do."""
        await self._background.close(timeout_seconds=0.0)

    async def settled(self) -> None:
        """Wait until nothing is left to delete."""
        await self._background.settled()


def had_session(pod: PodFact) -> bool:
    """Whether the agent's summary, which it writes at the session's end, says that it had the session that the pod was bound for."""
    try:
        summary = json.loads(pod.message or "")
    except ValueError:
        return False
    return isinstance(summary, dict) and summary.get("session") == pod.session


def _words(pod: PodFact) -> dict[str, str | None]:
    return {
        "session": pod.session,
        "namespace": pod.namespace,
        "pool": pod.pool,
        "pod": pod.name,
        "room": pod.room,
    }
