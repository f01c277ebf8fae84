"""What was true, and until when: the pools, whether a budget could go, and who held the Lease. Reads the server's log; changes nothing.

An invariant that speaks of "now" would be wrong for a process that acts on what it saw a moment ago. It speaks of the last while instead, and asks here.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import cached_property

from voicepool.kube.api import BUDGETS, LEASES, PODS, POOLS, Json
from voicepool.kube.convert import pod_from_json, pool_from_json
from voicepool.model import LABEL_POOL, BindState, Disruption, PodFact, PoolFact
from voicepool.podspec import PodSettings, template_hash

from .server import Change, Key, Server


@dataclass(frozen=True)
class Era:
    """A time in which a pool did not change."""

    since: datetime
    pool: PoolFact | None
    """None: it was not there."""
    settings: PodSettings

    @cached_property
    def template(self) -> str | None:
        """The hash of its pods."""
        return template_hash(self.pool, self.settings) if self.pool else None


class History:
    """See the module.

    Args:
        server: what is stored.
        now: true time.
        settings: what every agent pod gets.
    """

    def __init__(self, server: Server, now: Callable[[], datetime], settings: PodSettings) -> None:
        self.holder: str | None = None
        """The process that has the Lease; None where there is no Lease."""
        self._server = server
        self._now = now
        self._settings = settings
        self._eras: defaultdict[Key, list[Era]] = defaultdict(list)
        self._budget_may_go: dict[Key, tuple[bool, datetime]] = {}
        """Whether it may, and the last moment at which it might."""
        self._held_until: dict[str, datetime] = {}
        server.observers.append(self._changed)

    def eras(self, key: Key, seconds: float) -> Iterator[tuple[Era, datetime]]:
        """The times of a pool, each with its end, that reach into the last so many seconds."""
        begins = self._now() - timedelta(seconds=seconds)
        eras = self._eras[key]
        for number, era in enumerate(eras):
            ends = eras[number + 1].since if number + 1 < len(eras) else self._now()
            if ends >= begins:
                yield era, ends

    def gone_seconds(self, key: Key, seconds: float = 0.0) -> float:
        """How long the pool was not there without a break, at its longest within the last so many seconds."""
        return max(
            ((ends - era.since).total_seconds() for era, ends in self.eras(key, seconds) if era.pool is None),
            default=0.0,
        )

    def could_budget_go(self, key: Key, seconds: float) -> bool:
        """Whether within the last so many seconds the pool wanted no budget, or was gone with all its calls."""
        may, at = self._budget_may_go.get(key, (True, self._now()))
        return may or (self._now() - at).total_seconds() <= seconds

    def held_lease(self, process: str, seconds: float) -> bool:
        """Whether a process had the Lease within the last so many seconds; without a Lease everybody leads."""
        if self.holder in (None, process):
            return True
        until = self._held_until.get(process)
        return until is not None and (self._now() - until).total_seconds() <= seconds

    def calls(self, key: Key) -> list[PodFact]:
        """The pods of a pool that have a session which has not ended, as they are stored."""
        facts = filter(None, map(pod_from_json, self._server.all(PODS)))
        return [
            fact
            for fact in facts
            if (fact.namespace, fact.pool) == key and fact.state is BindState.BOUND and not fact.finished
        ]

    def _changed(self, change: Change) -> None:
        if change.resource == POOLS:
            self._pool_changed(change)
            self._look_at_budget(key_of(change.new))
        elif change.resource in (PODS, BUDGETS):
            metadata = change.new["metadata"]
            self._look_at_budget((metadata["namespace"], metadata["labels"][LABEL_POOL]))
        elif change.resource == LEASES:
            holder = change.new["spec"]["holderIdentity"].partition("/")[0]
            if self.holder and self.holder != holder:
                self._held_until[self.holder] = self._now()
            self.holder = holder

    def _pool_changed(self, change: Change) -> None:
        eras = self._eras[key_of(change.new)]
        pool = None if change.kind == "DELETED" else pool_from_json(change.new)
        before = eras[-1].pool if eras else None
        if not eras or (pool and (pool.uid, pool.generation)) != (before and (before.uid, before.generation)):
            eras.append(Era(self._now(), pool, self._settings))

    def _look_at_budget(self, key: Key) -> None:
        eras = self._eras[key]
        pool = eras[-1].pool if eras else None
        may = pool.spec.disruption is not Disruption.NEVER if pool else not self.calls(key)
        before, at = self._budget_may_go.get(key, (True, self._now()))
        self._budget_may_go[key] = (may, self._now() if may or before else at)


def key_of(obj: Json) -> Key:
    """Namespace and name of an object."""
    return obj["metadata"]["namespace"], obj["metadata"]["name"]
