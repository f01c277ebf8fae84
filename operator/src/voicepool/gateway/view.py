"""What the gateway knows of the cluster: the pools and pods that its informers last saw.

Invariants: changed by the informers only (and by the answer to a bind of our own, which is newer); holds facts, decides nothing; every change of a
pod is told to one listener, so that nobody polls.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping

from voicepool.binding import is_candidate
from voicepool.model import BindState, PodFact, PoolFact

PoolKey = tuple[str, str]
"""Namespace and name."""


class ClusterView:
    """Pools and pods as last seen."""

    def __init__(self) -> None:
        self.pools: dict[PoolKey, PoolFact] = {}
        self.spawned = 0
        """Agent pods seen since this gateway started, those that it found included."""
        self.assigned = 0
        """Of them, those that were seen bound."""
        self._pods: dict[PoolKey, dict[str, PodFact]] = {}
        self._warm: dict[PoolKey, dict[str, PodFact]] = {}
        self._bound_on_node: dict[PoolKey, Counter[str]] = {}
        self._sessions_of: dict[str, Counter[tuple[str, str]]] = {}
        self._in_room: dict[str, dict[str, PodFact]] = {}
        self._names: dict[tuple[str, str], tuple[PoolKey, str]] = {}
        self._listener: Callable[[PoolKey, str, PodFact | None], None] = lambda _key, _uid, _pod: None

    def listen(self, listener: Callable[[PoolKey, str, PodFact | None], None]) -> None:
        """Have a function called after every change of a pod, with its pool, its uid and what is known of it now (None: it is gone)."""
        self._listener = listener

    def pool_seen(self, pool: PoolFact) -> None:
        """A pool is there, or has changed."""
        self.pools[pool.namespace, pool.name] = pool

    def pool_gone(self, namespace: str, name: str) -> None:
        """A pool is no longer there."""
        self.pools.pop((namespace, name), None)

    def pod_seen(self, pod: PodFact) -> None:
        """A pod is there, or has changed."""
        key = (pod.namespace, pod.pool)
        known = self._names.get((pod.namespace, pod.name))
        if known is not None and known != (key, pod.uid):
            # The name was used again, and the end of its first owner was not seen.
            self.pod_gone(pod.namespace, pod.name)
        before = self._pods.get(key, {}).get(pod.uid)
        self.spawned += before is None
        self.assigned += pod.state is BindState.BOUND and (before is None or before.state is not BindState.BOUND)
        self._count_call(before, -1)
        self._count_call(pod, 1)
        self._leaves_room(before)
        if pod.room:
            self._in_room.setdefault(pod.room, {})[pod.uid] = pod
        self._names[pod.namespace, pod.name] = (key, pod.uid)
        self._pods.setdefault(key, {})[pod.uid] = pod
        if is_candidate(pod):
            self._warm.setdefault(key, {})[pod.uid] = pod
        else:
            self._warm.get(key, {}).pop(pod.uid, None)
        self._listener(key, pod.uid, pod)

    def pod_gone(self, namespace: str, name: str) -> None:
        """A pod is no longer there."""
        known = self._names.pop((namespace, name), None)
        if known is None:
            return
        key, uid = known
        before = self._pods[key].pop(uid, None)
        self._count_call(before, -1)
        self._leaves_room(before)
        self._warm.get(key, {}).pop(uid, None)
        self._listener(key, uid, None)

    def pools_with_pods(self) -> list[PoolKey]:
        """The pools that are there, and those that are gone while pods of theirs are not: a call outlives its pool."""
        return list(dict.fromkeys([*self.pools, *(key for key, pods in self._pods.items() if pods)]))

    def pods(self, key: PoolKey) -> Iterable[PodFact]:
        """All pods of a pool."""
        return self._pods.get(key, {}).values()

    def pods_in_room(self, room: str) -> Iterable[PodFact]:
        """All pods that were bound for a session in this room."""
        return self._in_room.get(room, {}).values()

    def warm(self, key: PoolKey) -> Mapping[str, PodFact]:
        """The candidates of a pool by uid."""
        return self._warm.get(key, {})

    def bound_on_node(self, key: PoolKey) -> Mapping[str, int]:
        """How many calls of a pool each node has; a node that is not there has none."""
        return self._bound_on_node.get(key, {})

    def sessions_of(self, caller: str) -> Mapping[tuple[str, str], int]:
        """The sessions of a caller, by namespace and session id, that are going on in pods as last seen; with how many pods each has."""
        return self._sessions_of.get(caller, {})

    def _leaves_room(self, pod: PodFact | None) -> None:
        if pod is not None and pod.room and (pods := self._in_room.get(pod.room)):
            pods.pop(pod.uid, None)
            if not pods:
                del self._in_room[pod.room]

    def _count_call(self, pod: PodFact | None, step: int) -> None:
        if pod is None or pod.state is not BindState.BOUND or pod.finished:
            return
        key = (pod.namespace, pod.pool)
        counts = self._bound_on_node.setdefault(key, Counter())
        counts[pod.node or ""] += step
        if not counts[pod.node or ""]:
            del counts[pod.node or ""]
            if not counts:
                del self._bound_on_node[key]
        if pod.caller is None:
            return
        sessions = self._sessions_of.setdefault(pod.caller, Counter())
        session = (pod.namespace, pod.session or "")
        sessions[session] += step
        if not sessions[session]:
            del sessions[session]
            if not sessions:
                del self._sessions_of[pod.caller]

    def template_hash(self, key: PoolKey) -> str | None:
        """The pool's current template, if its status says."""
        pool = self.pools.get(key)
        value = pool.status.get("templateHash") if pool else None
        return value if isinstance(value, str) and value else None


def is_live(pod: PodFact) -> bool:
    """Whether the pod's process runs or will run: what ``maxPods`` counts."""
    return pod.phase not in ("Succeeded", "Failed")
