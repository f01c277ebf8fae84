"""What happened to the sessions of pools and is not in their statuses yet. Pure.

Invariant: what is counted comes into the status once, also where the answer to a write of the status is lost. Until it is known whether such a write was
stored, the very same counts are sent again, onto the same version; the pool's next version tells.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from voicepool.model import Key, PoolFact

Count = Literal["started", "hits", "ended", "dropped", "undelivered"]
"""The fields of ``status.sessions`` that count."""


@dataclass(frozen=True, slots=True)
class _Sent:
    """Counts on their way into a pool's status."""

    resource_version: str
    """Of the pool from which they were counted on."""
    counted: Counter[Count]
    told: Mapping[Count, int]
    """What the status says if they came there."""


class SessionCounts:
    """Counts for all pools, kept until the API server has stored them."""

    def __init__(self) -> None:
        self._counted: defaultdict[Key, Counter[Count]] = defaultdict(Counter)
        self._sent: dict[Key, _Sent] = {}

    def count(self, pool: Key, what: Count) -> None:
        """One more."""
        self._counted[pool][what] += 1

    def waits(self, pool: Key) -> bool:
        """Whether anything has happened that is not in the status, as far as is known."""
        return bool(self._counted[pool])

    def to_send(self, pool: PoolFact) -> Counter[Count]:
        """What is to be added to the status of this version of the pool."""
        key = (pool.namespace, pool.name)
        sent = self._sent.get(key)
        if sent is not None and sent.resource_version == pool.resource_version:
            return sent.counted
        if sent is not None:
            del self._sent[key]
            if _told(pool.status) == sent.told:
                self._counted[key] -= sent.counted
        return Counter(self._counted[key])

    def send(self, pool: PoolFact, counted: Counter[Count]) -> Mapping[Count, int]:
        """What the status of the pool says with them, which is on its way from now on."""
        told = {what: count + counted[what] for what, count in _told(pool.status).items()}
        self._sent[(pool.namespace, pool.name)] = _Sent(pool.resource_version, counted, told)
        return told

    def stored(self, pool: Key, counted: Counter[Count]) -> None:
        """They are in the status."""
        self._sent.pop(pool, None)
        self._counted[pool] -= counted

    def forget(self, pool: Key) -> None:
        """The pool is gone."""
        self._sent.pop(pool, None)
        self._counted.pop(pool, None)

    def clear(self) -> None:
        """Somebody else counts now."""
        self._sent.clear()
        self._counted.clear()


def _told(status: Mapping[str, Any]) -> dict[Count, int]:
    sessions = status.get("sessions") or {}
    return {what: sessions.get(what, 0) for what in get_args(Count)}
