"""What must hold at every write, and what at the end. Reads the server's log and the agents; changes nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

from voicepool.kube.api import BUDGETS, LEASES, PODS, POOLS, Json
from voicepool.kube.convert import pod_from_json, pool_from_json
from voicepool.model import (
    LABEL_POOL,
    LABEL_SESSION,
    LABEL_STATE,
    LABEL_TEMPLATE,
    BindState,
    Disruption,
    HeadroomSpec,
    PodFact,
    PoolFact,
)

from .cluster import Agent, Cluster
from .evictions import Evictions
from .history import History, key_of
from .server import Change, Key, Server

REMEMBERED_SECONDS = 150.0
"""A process that was frozen, or whose call was committed late, may act on what was true so long ago."""
RESYNC_SECONDS = 300.0
"""An operator whose watch has lost a change of a pool hears of it no later than with the next list."""
CLOCK_SECONDS = 2.0
"""By the server's clock as a process knows it, and in whole seconds."""
DEMAND_SECONDS = 300.0
"""A bind counts for so long in what is recommended."""
OURS = ("operator", "gateway")


class Calls:
    """What callers were told."""

    def __init__(self) -> None:
        self.answered: dict[str, str] = {}
        """Session to the uid of the pod that it was told to have."""
        self.ended: set[str] = set()
        """Sessions that were ended on request."""
        self.given_up: set[str] = set()
        """Sessions whose caller has gone."""


class Invariants:
    """Looks at every change of a pod.

    Args:
        server: what is stored.
        cluster: the agents.
        evictions: who is protected from them.
        history: what was true a while ago.
        calls: what callers know.
        now: true time.
        wrong: told of what does not hold.
    """

    def __init__(
        self,
        server: Server,
        cluster: Cluster,
        evictions: Evictions,
        history: History,
        calls: Calls,
        now: Callable[[], datetime],
        wrong: Callable[[str], None],
    ) -> None:
        self.overshoot = 0
        """The most live pods above ``maxPods`` that a create of ours has made."""
        self.overshoot_bound = 0
        """What is allowed of that; set by the world, which knows how many write."""
        self.calm = False
        """Nothing goes wrong: whoever writes holds the Lease at that moment."""
        self.binds = 0
        self.creates = 0
        self.deletes = 0
        self._server = server
        self._cluster = cluster
        self._evictions = evictions
        self._history = history
        self._calls = calls
        self._now = now
        self._wrong = wrong
        self._sessions: dict[str, str] = {}
        server.observers.append(self._changed)
        cluster.ended_by_order = self._ended_by_order

    def _changed(self, change: Change) -> None:
        if change.actor.startswith("operator") and change.resource != LEASES:
            self._led(change)
        if change.resource == BUDGETS and change.kind == "DELETED":
            self._budget_deleted(change)
        if change.resource != PODS:
            return
        if change.kind == "ADDED":
            self._created(change)
            return
        old = change.old
        if old is None:
            return
        uid = change.new["metadata"]["uid"]
        before, after = old["metadata"]["labels"], change.new["metadata"]["labels"]
        if before[LABEL_STATE] == BindState.WARM and after[LABEL_STATE] == BindState.BOUND:
            self._bound(change, old, uid)
        elif before.get(LABEL_SESSION) != after.get(LABEL_SESSION) or before[LABEL_STATE] != after[LABEL_STATE]:
            self._wrong(f"{_name(change.new)} was taken from session {before.get(LABEL_SESSION)} by {change.actor}")
        grace = [obj["metadata"].get("deletionGracePeriodSeconds", math.inf) for obj in (old, change.new)]
        # Marked for deletion, or given less time than before.
        going = change.kind == "DELETED" or grace[1] < grace[0]
        if going and (change.actor.startswith(OURS) or change.actor == "garbage collector"):
            self._deleted(change, old, uid)

    def _created(self, change: Change) -> None:
        if not change.actor.startswith(OURS):
            return
        self.creates += 1
        labels = change.new["metadata"]["labels"]
        pool = (change.new["metadata"]["namespace"], labels[LABEL_POOL])
        live = sum(not fact.finished for fact in self._facts() if (fact.namespace, fact.pool) == pool)
        eras = [era for era, _ in self._history.eras(pool, REMEMBERED_SECONDS)]
        recent = [era.pool.spec.max_pods for era in eras if era.pool]
        over = live - max(recent, default=0)
        self.overshoot = max(self.overshoot, over)
        if over > self.overshoot_bound:
            self._wrong(
                f"{change.actor} created {_name(change.new)}: {live} live pods are {over} over maxPods, "
                f"and {self.overshoot_bound} is the most that is allowed"
            )
        known = {era.template for era, _ in self._history.eras(pool, REMEMBERED_SECONDS + RESYNC_SECONDS)}
        if labels[LABEL_TEMPLATE] not in known:
            self._wrong(f"{change.actor} created {_name(change.new)} of a template that the pool has long not had")

    def _led(self, change: Change) -> None:
        if not self._history.held_lease(change.actor, 0.0 if self.calm else REMEMBERED_SECONDS):
            self._wrong(f"{change.actor} wrote {_name(change.new)} while {self._history.holder} had the Lease")

    def _budget_deleted(self, change: Change) -> None:
        pool = (change.new["metadata"]["namespace"], change.new["metadata"]["labels"][LABEL_POOL])
        if not self._history.could_budget_go(pool, REMEMBERED_SECONDS):
            self._wrong(f"{change.actor} deleted the budget of pool {pool[1]}, which calls of it need")

    def _bound(self, change: Change, old: Json, uid: str) -> None:
        self.binds += 1
        fact = pod_from_json(old)
        # Its node may have been lost a moment ago: the patch cannot see that, and the delivery fails.
        ready = any(entry.get("ready") for entry in old["status"].get("containerStatuses") or ())
        if fact is None or not ready or fact.deleting or fact.phase != "Running":
            self._wrong(f"{_name(old)} was bound by {change.actor} while it was not Ready, or was going away")
        self._sessions[uid] = change.new["metadata"]["labels"][LABEL_SESSION]

    def _deleted(self, change: Change, old: Json, uid: str) -> None:
        self.deletes += change.actor.startswith(OURS)
        fact = pod_from_json(old)
        if fact is None or fact.state is not BindState.BOUND or fact.finished:
            return
        agent = self._cluster.agents.get(uid)
        if fact.session in self._calls.ended or (agent is not None and not agent.alive):
            return
        if change.actor.startswith(OURS) and agent is not None and not agent.in_session:
            # Its agent has not taken the session: the gateway takes its bind back, or the operator a dead gateway's.
            return
        if change.actor.startswith("operator") and fact.drain_seconds:
            gone_seconds = self._history.gone_seconds((fact.namespace, fact.pool), REMEMBERED_SECONDS)
            if gone_seconds >= fact.drain_seconds - CLOCK_SECONDS:
                return
        self._wrong(f"{change.actor} deleted {_name(old)}, which is bound to session {fact.session} and has not ended")

    def _ended_by_order(self, agent: Agent) -> None:
        session = agent.session or ""
        wanted = session in self._calls.ended or session in self._calls.given_up
        if self._calls.answered.get(session) == agent.uid and not wanted:
            self._wrong(f"the gateway ended session {session} in {agent.key[1]}, whose caller is there")

    def _is_parked(self, uid: str) -> bool:
        agent = self._cluster.agents.get(uid)
        return agent is not None and agent.alive and not agent.in_session

    def _facts(self) -> Iterator[PodFact]:
        return filter(None, map(pod_from_json, self._server.all(PODS)))

    # -- the end -------------------------------------------------------------------------------------------------------------------

    def not_converged(self) -> list[str]:
        """In words, what is not as the specs want it, now that nothing has gone wrong for a long while."""
        pools = {
            (pool.namespace, pool.name): pool for pool in filter(None, map(pool_from_json, self._server.all(POOLS)))
        }
        facts = list(self._facts())
        wrong: list[str] = []
        for fact in facts:
            wrong += self._wrong_with_pod(fact, pools.get((fact.namespace, fact.pool)))
        for key, pool in pools.items():
            own = [fact for fact in facts if (fact.namespace, fact.pool) == key]
            wrong += self._wrong_with_pool(pool, own)
        wrong += self._wrong_with_budgets(pools, facts)
        return wrong

    def _wrong_with_pod(self, fact: PodFact, pool: PoolFact | None) -> Iterator[str]:
        if fact.state is BindState.BOUND:
            if fact.finished:
                yield f"the ended pod {fact.name} is still there"
            elif self._is_parked(fact.uid):
                yield f"{fact.name} is bound to session {fact.session}, which never reached its agent"
            elif pool is None and fact.drain_seconds:
                gone_seconds = self._history.gone_seconds((fact.namespace, fact.pool))
                if gone_seconds > fact.drain_seconds + REMEMBERED_SECONDS:
                    yield f"{fact.name} still has a call, {gone_seconds:.0f} s after its pool went"
        elif pool is None:
            yield f"{fact.name} is there without its pool"
        elif fact.deleting:
            yield f"{fact.name} is still going away"

    def _wrong_with_pool(self, pool: PoolFact, own: list[PodFact]) -> Iterator[str]:
        bound = [fact for fact in own if fact.state is BindState.BOUND and not fact.finished]
        unbound = [fact for fact in own if fact.state is BindState.WARM]
        recommended = self._recommended(pool.spec.headroom, bound) if pool.spec.headroom else None
        native = pool.spec.headroom is not None and pool.spec.headroom.mode == "Native"
        target = max(pool.spec.replicas, min(recommended or 0, pool.spec.max_pods) if native else 0)
        wanted = min(target, max(0, pool.spec.max_pods - len(bound)))
        (current,) = {era.template for era, _ in self._history.eras((pool.namespace, pool.name), 0.0)}
        # With OnReplenish what is warm stays until a call takes it, of whatever template it is.
        rolling = pool.spec.update_strategy.type == "RollingUpdate"
        ready = sum(fact.ready and (fact.template_hash == current or not rolling) for fact in unbound)
        if ready != wanted or len(unbound) != wanted:
            words = ", ".join(f"{fact.name} ({fact.phase}, ready {fact.ready})" for fact in unbound)
            yield f"{ready} of {wanted} pods are warm with template {current}, {len(bound)} are bound; unbound: {words}"
        true = {
            "readyReplicas": ready,
            "boundReplicas": len(bound),
            "replicas": len(unbound),
            "recommendedReplicas": recommended,
        }
        told: Any = {name: pool.status.get(name) for name in true}
        if told != true:
            yield f"the status says {told}, true is {true}"

    def _recommended(self, headroom: HeadroomSpec, bound: list[PodFact]) -> int:
        """What is recommended when nobody has been bound for a while."""
        since = self._now() - timedelta(seconds=DEMAND_SECONDS)
        recent = [fact.name for fact in bound if fact.bound_at and fact.bound_at > since]
        assert not recent, f"{recent} were bound too short a time ago to tell what is recommended"
        share = -(-len(bound) * headroom.percentage // 100)
        return max(share, self._scheduled(headroom))

    def _scheduled(self, headroom: HeadroomSpec) -> int:
        """What the schedule says that came last; here they come once a day."""
        latest: list[tuple[datetime, int]] = []
        for schedule in headroom.schedules:
            minute, hour, *_ = schedule.cron.split()
            local = self._now().astimezone(ZoneInfo(schedule.time_zone))
            moment = local.replace(hour=int(hour), minute=int(minute), second=0, microsecond=0)
            latest.append((moment if moment <= local else moment - timedelta(days=1), schedule.warm_pods))
        return max(latest)[1] if latest else 0

    def _wrong_with_budgets(self, pools: dict[Key, PoolFact], facts: list[PodFact]) -> Iterator[str]:
        there = {key_of(budget)[1].removesuffix("-bound") for budget in self._server.all(BUDGETS)}
        for (_, name), pool in pools.items():
            never = pool.spec.disruption is Disruption.NEVER
            if never != (name in there):
                yield f"the pool {name} has {'no budget' if never else 'a budget that it does not want'}"
        alive = {fact.pool for fact in facts if not fact.finished}
        for name in there - {name for _, name in pools} - alive:
            yield f"the budget of pool {name} is there without the pool and its calls"
        for pod in self._server.all(PODS):
            pool_of_pod = pools.get((pod["metadata"]["namespace"], pod["metadata"]["labels"][LABEL_POOL]))
            never = pool_of_pod is not None and pool_of_pod.spec.disruption is Disruption.NEVER
            bound = pod["metadata"]["labels"][LABEL_STATE] == BindState.BOUND
            if self._evictions.is_refused(pod) != (never and bound) and (pool_of_pod or not bound):
                yield f"{_name(pod)} may {'' if never and bound else 'not '}be evicted"


def _name(pod: Json) -> str:
    return f"{pod['metadata']['name']} ({pod['metadata']['uid']})"
