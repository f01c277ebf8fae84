"""The free warm pods of one pool, kept so that the one for a session is found without a look at each of them. Pure.

Invariants: which pod a session gets follows from which pods are free, not from the order in which they came, so gateways that see the same choose the
same for one session; for different sessions every free pod that placement allows is as likely as any other.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import TypeVar

from voicepool.model import Placement, PodFact

CHOICE_PER_BIND = 4
"""For each bind under way there are more than so many pods to choose from, if the pool has them: in a burst
of two gateways about every third choice meets the other's, where a strict packing would make all of them meet."""

_NUMBER_BITS = 56

K = TypeVar("K")


class FreePods:
    """Pods that may be given to a session.

    Args:
        pods: with these it begins.
    """

    def __init__(self, pods: Iterable[PodFact] = ()) -> None:
        self._pods: dict[str, PodFact] = {}
        self._for_anybody: dict[tuple[str, str], list[str]] = {}
        """Uids in their order, by template and node."""
        self._for_one: dict[str, list[str]] = {}
        """Uids in their order, by the session that the pod was started for."""
        for pod in pods:
            self.add(pod)

    def __len__(self) -> int:
        return len(self._pods)

    def __iter__(self) -> Iterator[PodFact]:
        return iter(self._pods.values())

    def get(self, uid: str) -> PodFact | None:
        """A free pod by its uid, or None."""
        return self._pods.get(uid)

    def add(self, pod: PodFact) -> None:
        """A pod is free, or has changed while it was."""
        self.discard(pod.uid)
        self._pods[pod.uid] = pod
        if pod.cold_start is None:
            insort(self._for_anybody.setdefault(_group(pod), []), pod.uid)
        else:
            insort(self._for_one.setdefault(pod.cold_start, []), pod.uid)

    def discard(self, uid: str) -> None:
        """A pod is not free any more, if it was."""
        pod = self._pods.pop(uid, None)
        if pod is None:
            return
        if pod.cold_start is None:
            _take_out(self._for_anybody, _group(pod), uid)
        else:
            _take_out(self._for_one, pod.cold_start, uid)

    def choose(
        self,
        session_id: str,
        *,
        template_hash: str | None,
        placement: Placement,
        taken_on_node: Mapping[str, int],
        in_flight: int,
    ) -> PodFact | None:
        """The pod that this session should take: its own cold start, else of the newest template, else any; among those by placement.

        Packed prefers the node with most calls, Spread the nodes with fewest. Within that the session's hash points to one of the pods, so that two
        gateways that serve two sessions at once seldom choose the same. A strict placement would send all gateways to the same few pods in a burst,
        where each patch that loses costs a round trip. So the choice widens node by node with the binds that are under way: one call at a time is
        placed exactly, a burst nearly so. What is under way here is a fair measure of what is under way elsewhere.

        Args:
            session_id: who asks.
            template_hash: the pool's current template; None when it is not known yet, then all templates are equal.
            placement: of the pool.
            taken_on_node: by node, how many pods of the pool have a call, or are about to.
            in_flight: how many binds of the pool are under way in this process.
        """
        if session_id in self._for_one:
            return self._pods[self._for_one[session_id][0]]
        groups = [(node, uids) for (template, node), uids in self._for_anybody.items() if template == template_hash]
        groups = groups or [(node, uids) for (_, node), uids in self._for_anybody.items()]
        choice, count = _by_placement(groups, placement, taken_on_node, at_least=CHOICE_PER_BIND * in_flight + 1)
        place = _number(session_id) * count >> _NUMBER_BITS
        for uids in choice:
            if place < len(uids):
                return self._pods[uids[place]]
            place -= len(uids)
        return None


def _group(pod: PodFact) -> tuple[str, str]:
    return pod.template_hash, pod.node or ""


def _take_out(groups: dict[K, list[str]], key: K, uid: str) -> None:
    uids = groups[key]
    del uids[bisect_left(uids, uid)]
    if not uids:
        del groups[key]


def _by_placement(
    groups: Iterable[tuple[str, list[str]]], placement: Placement, taken_on_node: Mapping[str, int], *, at_least: int
) -> tuple[list[list[str]], int]:
    """The pods of the nodes that are to be filled first, of so many nodes that there are so many pods; and how many that are."""
    by_rank: defaultdict[tuple[int, str], list[list[str]]] = defaultdict(list)
    for node, uids in groups:
        taken = taken_on_node.get(node, 0)
        # Of nodes with equally many, Packed fills one after the other, Spread treats all alike.
        by_rank[(-taken, node) if placement is Placement.PACKED else (taken, "")].append(uids)
    choice: list[list[str]] = []
    count = 0
    for rank in sorted(by_rank):
        choice += sorted(by_rank[rank])
        count += sum(map(len, by_rank[rank]))
        if count >= at_least:
            break
    return choice, count


def _number(session_id: str) -> int:
    """Less than two to the power of ``_NUMBER_BITS``, and the same in every process."""
    return int.from_bytes(hashlib.blake2b(session_id.encode(), digest_size=_NUMBER_BITS // 8).digest())
