"""Which session is given which warm pod, inside this gateway: reservations, and one queue per pool.

Invariants: a pod is reserved before it is patched, so this gateway never races with itself; a pod whose patch lost is not put back, it returns only
when the informer has shown it in another state (or after a while, should that event have been lost); callers of one pool take turns by their keys, and
are served first come, first served within a key (`FairQueue`); who waits in several queues leaves all of them in the moment in which he gets a pod or
gives up; a waiter is woken by the informer, nobody polls; a pod that becomes warm is offered to a queue when it is this gateway's turn (`Turns`). No I/O.
"""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from voicepool.gateway.fair_queue import FairQueue
from voicepool.gateway.free_pods import FreePods
from voicepool.gateway.turns import Turns
from voicepool.gateway.view import ClusterView, PoolKey
from voicepool.model import Placement, PodFact

LOST_SECONDS = 30.0
"""How long a pod whose patch lost is left alone when no event says more."""
MOST_WAITING = 1_000
"""Callers in the queue of one pool, unless somebody says otherwise."""


class QueuesFull(Exception):
    """All queues that were named have as many callers as they may have."""


@dataclass(frozen=True, slots=True)
class _Lost:
    key: PoolKey
    until: float


@dataclass(slots=True, eq=False)
class _Waiter:
    session_id: str
    caller: str
    since: float
    future: asyncio.Future[PodFact] = field(repr=False)
    keys: list[PoolKey]
    """The pools in whose queues it is."""


class Allocator:
    """Gives warm pods to sessions.

    Args:
        view: what is known of the cluster; the allocator becomes its listener.
        monotonic: seconds that never go back; the event loop's own.
        identity: this gateway, as in ``bound-by``.
        on_waiters: told the length of a pool's queue whenever it changes.
        most_waiting: callers who may wait in the queue of one pool.
    """

    def __init__(
        self,
        view: ClusterView,
        *,
        monotonic: Callable[[], float],
        identity: str,
        on_waiters: Callable[[PoolKey, int], None] = lambda _key, _count: None,
        most_waiting: int = MOST_WAITING,
    ) -> None:
        self._view = view
        self._monotonic = monotonic
        self._on_waiters = on_waiters
        self._most_waiting = most_waiting
        self._turns = Turns(identity, monotonic)
        self._later: dict[PoolKey, asyncio.TimerHandle] = {}
        """When a queue is looked at again, since a pod is another gateway's for a moment."""
        self._free: defaultdict[PoolKey, FreePods] = defaultdict(FreePods)
        """The warm pods that are neither reserved nor lost."""
        self._reserved: defaultdict[PoolKey, dict[str, PodFact]] = defaultdict(dict)
        self._lost: dict[str, _Lost] = {}
        """In the order in which they were lost, so that the first are good again first."""
        self._queues: dict[PoolKey, FairQueue[_Waiter]] = {}
        self._own: dict[PoolKey, dict[str, asyncio.Future[PodFact]]] = {}
        """Who waits for one very pod, by its uid."""
        for key in view.pools_with_pods():
            for uid in view.warm(key):
                self._free_again(key, uid)
        view.listen(self._changed)

    def waiting(self, key: PoolKey) -> int:
        """Callers who wait for any pod of this pool; who waits for a pod of his own is not counted."""
        return len(self._queues.get(key, ()))

    def take(self, key: PoolKey, session_id: str) -> PodFact | None:
        """Reserve the best free pod for a session; None when there is none, or others wait already."""
        return None if key in self._queues else self._reserve(key, session_id)

    async def wait(
        self,
        keys: Collection[PoolKey],
        session_id: str,
        *,
        caller: str = "",
        since: float | None = None,
        again: bool = False,
    ) -> PodFact:
        """Wait in the queues of some pools until a pod of any of them is reserved for this session; the caller sets the time limit.

        A full queue is left out. One that is full of another key's callers makes room instead: the last of the key that has most gives way.

        Args:
            keys: the pools; where several have a free pod, the first of them.
            session_id: who waits.
            caller: whose key it is; keys take turns.
            since: when the caller came, by the clock of this allocator; default: now. Who came first is served first, also after a lost race.
            again: the pod that he was given before was lost.

        Raises:
            QueuesFull: there is no place in any of them, or another key's caller needed it.
        """
        future: asyncio.Future[PodFact] = asyncio.get_running_loop().create_future()
        waiter = _Waiter(session_id, caller, self._monotonic() if since is None else since, future, [])
        for key in keys:
            if self._has_place(key, caller):
                self._queues.setdefault(key, FairQueue()).add(waiter, again=again)
                waiter.keys.append(key)
        if not waiter.keys:
            raise QueuesFull
        for key in list(waiter.keys):
            self._tell(key)
            self._serve(key)
        try:
            return await future
        except asyncio.CancelledError:
            self._leave(waiter)
            self._give_back(future)
            raise

    async def wait_for(self, key: PoolKey, uid: str) -> PodFact:
        """Wait until one very pod can be reserved; nobody else in the queue is held up by that. The caller sets the time limit."""
        future: asyncio.Future[PodFact] = asyncio.get_running_loop().create_future()
        self._own.setdefault(key, {})[uid] = future
        self._tell(key)
        self._serve(key)
        try:
            return await future
        except asyncio.CancelledError:
            self._give_back(future)
            raise
        finally:
            self._own[key].pop(uid)
            if not self._own[key]:
                del self._own[key]
            self._tell(key)

    def release(self, pod: PodFact) -> None:
        """Put a reserved pod back: nothing was sent to the API server for it."""
        key = (pod.namespace, pod.pool)
        self._reserved[key].pop(pod.uid, None)
        self._free_again(key, pod.uid)
        self._serve(key)

    def lost(self, pod: PodFact) -> None:
        """Do not offer a pod again until the informer has shown it in another state: its patch was refused."""
        key = (pod.namespace, pod.pool)
        self._reserved[key].pop(pod.uid, None)
        self._free[key].discard(pod.uid)
        self._lost.pop(pod.uid, None)
        self._lost[pod.uid] = _Lost(key, self._monotonic() + LOST_SECONDS)

    def _reserve(self, key: PoolKey, session_id: str, *, in_turn: bool = False) -> PodFact | None:
        self._forgive()
        free = self._in_turn(key, session_id) if in_turn else self._free[key]
        under_way = self._reserved[key].values()
        taken_on_node = self._view.bound_on_node(key)
        if under_way:
            taken_on_node = Counter(taken_on_node)
            taken_on_node.update(pod.node or "" for pod in under_way)
        pool = self._view.pools.get(key)
        pod = free.choose(
            session_id,
            template_hash=self._view.template_hash(key),
            placement=pool.spec.placement if pool else Placement.PACKED,
            taken_on_node=taken_on_node,
            in_flight=len(under_way),
        )
        if pod is not None:
            self._hold(key, pod)
        return pod

    def _in_turn(self, key: PoolKey, session_id: str) -> FreePods:
        """The free pods that are not another gateway's for a moment. Where there are only such, they are looked at again when that is over."""
        for_session = [pod for pod in self._free[key] if pod.cold_start in (None, session_id)]
        seconds = {pod.uid: self._turns.wait_seconds(pod.uid) for pod in for_session}
        ours = FreePods(pod for pod in for_session if not seconds[pod.uid])
        if seconds and not ours:
            self._look_again(key, min(seconds.values()))
        return ours

    def _hold(self, key: PoolKey, pod: PodFact) -> None:
        self._free[key].discard(pod.uid)
        self._reserved[key][pod.uid] = pod

    def _free_again(self, key: PoolKey, uid: str) -> None:
        pod = self._view.warm(key).get(uid)
        if pod is not None and uid not in self._lost:
            self._free[key].add(pod)

    def _forgive(self) -> None:
        """Let pods whose patch was refused be offered again, of which nothing was heard since."""
        now = self._monotonic()
        while self._lost:
            uid, lost = next(iter(self._lost.items()))
            if now < lost.until:
                return
            del self._lost[uid]
            self._free_again(lost.key, uid)

    def _look_again(self, key: PoolKey, seconds: float) -> None:
        if key not in self._later:
            self._later[key] = asyncio.get_running_loop().call_later(seconds, self._serve_late, key)

    def _serve_late(self, key: PoolKey) -> None:
        del self._later[key]
        self._serve(key)

    def _changed(self, key: PoolKey, uid: str, pod: PodFact | None) -> None:
        warm = uid in self._view.warm(key)
        self._turns.seen(uid, pod, warm=warm)
        if not warm:
            # Bound, dying, not Ready, or gone: what was remembered about it has come true.
            self._lost.pop(uid, None)
            self._reserved[key].pop(uid, None)
            self._free[key].discard(uid)
        elif uid not in self._reserved[key]:
            self._free_again(key, uid)
            self._serve(key)

    def _serve(self, key: PoolKey) -> None:
        self._forgive()
        for uid, future in self._own.get(key, {}).items():
            pod = self._free[key].get(uid)
            if pod is not None and not future.done():
                self._hold(key, pod)
                future.set_result(pod)
        while (queue := self._queues.get(key)) is not None and (waiter := queue.first()) is not None:
            if waiter.future.done():
                # Its caller has given up in this very moment, and has not run since to leave the queue.
                self._leave(waiter)
                continue
            pod = self._reserve(key, waiter.session_id, in_turn=True)
            if pod is None:
                break
            queue.served(waiter)
            self._leave(waiter)
            waiter.future.set_result(pod)

    def _has_place(self, key: PoolKey, caller: str) -> bool:
        queue = self._queues.get(key)
        if queue is None or len(queue) < self._most_waiting:
            return True
        longest = queue.last_of_the_longest()
        if queue.waiting_of(caller) + 1 >= queue.waiting_of(longest.caller):
            return False
        queue.remove(longest)
        longest.keys.remove(key)
        if not longest.keys and not longest.future.done():
            longest.future.set_exception(QueuesFull())
        return True

    def _leave(self, waiter: _Waiter) -> None:
        for key in waiter.keys:
            queue = self._queues[key]
            queue.remove(waiter)
            if not queue:
                del self._queues[key]
            self._tell(key)
        waiter.keys.clear()

    def _give_back(self, future: asyncio.Future[PodFact]) -> None:
        """The pod that came in the same moment in which its caller gave up is for another one."""
        if future.done() and not future.cancelled() and future.exception() is None:
            self.release(future.result())

    def _tell(self, key: PoolKey) -> None:
        self._on_waiters(key, self.waiting(key) + len(self._own.get(key, ())))
