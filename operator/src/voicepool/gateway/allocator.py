"""Which session is given which warm pod, inside this gateway: reservations, and one queue per pool.

Invariants: a pod is reserved before it is patched, so this gateway never races with itself; a pod whose patch lost is not put back, it returns only
when the informer has shown it in another state (or after a while, should that event have been lost); callers of one pool are served first come,
first served; a waiter is woken by the informer, nobody polls. No I/O.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field

from voicepool.binding import choose
from voicepool.gateway.view import ClusterView, PoolKey
from voicepool.model import Placement, PodFact

LOST_SECONDS = 30.0
"""How long a pod whose patch lost is left alone when no event says more."""


@dataclass(slots=True)
class _Waiter:
    session_id: str
    only_uid: str | None
    since: float
    future: asyncio.Future[PodFact] = field(repr=False)


class Allocator:
    """Gives warm pods to sessions.

    Args:
        view: what is known of the cluster; the allocator becomes its listener.
        monotonic: seconds that never go back.
        on_waiters: told the length of a pool's queue whenever it changes.
    """

    def __init__(
        self,
        view: ClusterView,
        *,
        monotonic: Callable[[], float],
        on_waiters: Callable[[PoolKey, int], None] = lambda _key, _count: None,
    ) -> None:
        self._view = view
        self._monotonic = monotonic
        self._on_waiters = on_waiters
        self._reserved: set[str] = set()
        self._lost: dict[str, float] = {}
        self._queues: dict[PoolKey, deque[_Waiter]] = {}
        view.listen(self._changed)

    def waiting(self, key: PoolKey) -> int:
        """Callers who wait for any pod of this pool; who waits for a pod of his own is not counted."""
        return sum(waiter.only_uid is None for waiter in self._queues.get(key, ()))

    def take(self, key: PoolKey, session_id: str) -> PodFact | None:
        """Reserve the best free pod for a session; None when there is none, or others wait already."""
        if any(waiter.only_uid is None for waiter in self._queues.get(key, ())):
            return None
        return self._reserve(key, session_id, None)

    async def wait(
        self, key: PoolKey, session_id: str, *, only_uid: str | None = None, since: float | None = None
    ) -> PodFact:
        """Wait in the pool's queue until a pod is reserved for this session; the caller sets the time limit.

        Args:
            key: the pool.
            session_id: who waits.
            only_uid: wait for this very pod.
            since: when the caller came, by the clock of this allocator; default: now. Who came first is served first, also after a lost race.
        """
        future: asyncio.Future[PodFact] = asyncio.get_running_loop().create_future()
        waiter = _Waiter(session_id, only_uid, self._monotonic() if since is None else since, future)
        queue = self._queues.setdefault(key, deque())
        queue.insert(sum(other.since <= waiter.since for other in queue), waiter)
        self._on_waiters(key, len(queue))
        self._serve(key)
        try:
            return await future
        except asyncio.CancelledError:
            if waiter in queue:
                queue.remove(waiter)
                self._forget_empty(key)
            elif future.done() and not future.cancelled():
                # The pod came in the same moment in which the caller gave up.
                self.release(future.result())
            raise

    def release(self, pod: PodFact) -> None:
        """Put a reserved pod back: nothing was sent to the API server for it."""
        self._reserved.discard(pod.uid)
        self._serve((pod.namespace, pod.pool))

    def lost(self, pod: PodFact) -> None:
        """Do not offer a pod again until the informer has shown it in another state: its patch was refused."""
        self._reserved.discard(pod.uid)
        self._lost[pod.uid] = self._monotonic() + LOST_SECONDS

    def _reserve(self, key: PoolKey, session_id: str, only_uid: str | None) -> PodFact | None:
        free: list[PodFact] = []
        under_way: list[PodFact] = []
        reserved, some_lost = self._reserved, bool(self._lost)
        # Over all warm pods of the pool in each bind: what is seldom true is asked last.
        for pod in self._view.warm(key).values():
            if pod.uid in reserved:
                under_way.append(pod)
            elif (
                (pod.cold_start is None or pod.cold_start == session_id)
                and (only_uid is None or pod.uid == only_uid)
                and not (some_lost and self._is_lost(pod.uid))
            ):
                free.append(pod)
        if not free:
            return None
        taken_on_node = self._view.bound_on_node(key)
        if under_way:
            taken_on_node = Counter(taken_on_node)
            taken_on_node.update(pod.node or "" for pod in under_way)
        pool = self._view.pools.get(key)
        pod = choose(
            free,
            session_id,
            template_hash=self._view.template_hash(key),
            placement=pool.spec.placement if pool else Placement.PACKED,
            taken_on_node=taken_on_node,
            in_flight=len(under_way),
        )
        self._reserved.add(pod.uid)
        return pod

    def _is_lost(self, uid: str) -> bool:
        until = self._lost.get(uid)
        if until is not None and self._monotonic() >= until:
            del self._lost[uid]
            return False
        return until is not None

    def _changed(self, key: PoolKey, uid: str, _pod: PodFact | None) -> None:
        if uid not in self._view.warm(key):
            # Bound, dying, not Ready, or gone: what was remembered about it has come true.
            self._lost.pop(uid, None)
            self._reserved.discard(uid)
        elif uid not in self._reserved:
            self._serve(key)

    def _serve(self, key: PoolKey) -> None:
        queue = self._queues.get(key)
        if not queue:
            return
        # One that waits for its own cold start does not hold up those behind it.
        for waiter in list(queue):
            if waiter.future.done():
                # Its caller has given up in this very moment, and has not run since to leave the queue.
                queue.remove(waiter)
                continue
            pod = self._reserve(key, waiter.session_id, waiter.only_uid)
            if pod is not None:
                queue.remove(waiter)
                waiter.future.set_result(pod)
            elif waiter.only_uid is None:
                break
        self._forget_empty(key)

    def _forget_empty(self, key: PoolKey) -> None:
        queue = self._queues.get(key)
        if queue is not None:
            self._on_waiters(key, len(queue))
            if not queue:
                del self._queues[key]
