"""What must hold at every write, and what at the end. Reads the server's log and the agents; changes nothing."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from typing import Any

from voicepool.kube.api import PODS, POOLS, Json
from voicepool.kube.convert import pod_from_json, pool_from_json
from voicepool.model import LABEL_POOL, LABEL_SESSION, LABEL_STATE, BindState, PodFact
from voicepool.podspec import PodSettings, template_hash

from .cluster import Agent, Cluster
from .server import Change, Key, Server

REMEMBERED_SECONDS = 150.0
"""A process that was frozen, or whose call was committed late, may act on what was true so long ago."""
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
        calls: what callers know.
        now: true time.
        wrong: told of what does not hold.
    """

    def __init__(
        self,
        server: Server,
        cluster: Cluster,
        calls: Calls,
        now: Callable[[], datetime],
        wrong: Callable[[str], None],
    ) -> None:
        self.overshoot = 0
        """The most live pods above ``maxPods`` that a create of ours has made."""
        self.overshoot_bound = 0
        """What is allowed of that; set by the world, which knows how many write."""
        self.binds = 0
        self.creates = 0
        self.deletes = 0
        self._server = server
        self._cluster = cluster
        self._calls = calls
        self._now = now
        self._wrong = wrong
        self._ceilings: defaultdict[Key, list[tuple[datetime, int]]] = defaultdict(list)
        """By pool: from when on it had which ``maxPods``."""
        self._sessions: dict[str, str] = {}
        server.observers.append(self._changed)
        cluster.ended_by_order = self._ended_by_order

    def _changed(self, change: Change) -> None:
        if change.resource == POOLS:
            if change.kind != "DELETED":
                self._ceilings[_key(change.new)].append((self._now(), change.new["spec"].get("maxPods", 50)))
            return
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
        going = change.kind == "DELETED" or (
            "deletionTimestamp" in change.new["metadata"] and "deletionTimestamp" not in old["metadata"]
        )
        if going and (change.actor.startswith(OURS) or change.actor == "garbage collector"):
            self._deleted(change, old, uid)

    def _created(self, change: Change) -> None:
        if not change.actor.startswith(OURS):
            return
        self.creates += 1
        pool = (change.new["metadata"]["namespace"], change.new["metadata"]["labels"][LABEL_POOL])
        live = sum(not fact.finished for fact in self._facts() if (fact.namespace, fact.pool) == pool)
        since = self._now() - timedelta(seconds=REMEMBERED_SECONDS)
        # Those of the last while, and the one that was in force when it began.
        recent = [value for moment, value in self._ceilings[pool] if moment >= since]
        recent += [value for moment, value in self._ceilings[pool] if moment < since][-1:]
        over = live - max(recent, default=0)
        self.overshoot = max(self.overshoot, over)
        if over > self.overshoot_bound:
            self._wrong(
                f"{change.actor} created {_name(change.new)}: {live} live pods are {over} over maxPods, "
                f"and {self.overshoot_bound} is the most that is allowed"
            )

    def _bound(self, change: Change, old: Json, uid: str) -> None:
        self.binds += 1
        fact = pod_from_json(old)
        if fact is None or not fact.ready or fact.deleting or fact.phase != "Running":
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

    def not_converged(self, settings: PodSettings) -> list[str]:
        """In words, what is not as the specs want it, now that nothing has gone wrong for a long while."""
        wrong: list[str] = []
        pools = {
            (pool.namespace, pool.name): pool for pool in filter(None, map(pool_from_json, self._server.all(POOLS)))
        }
        facts = list(self._facts())
        for fact in facts:
            if fact.state is BindState.BOUND and fact.finished:
                wrong.append(f"the ended pod {fact.name} is still there")
            elif fact.state is BindState.WARM and (fact.namespace, fact.pool) not in pools:
                wrong.append(f"{fact.name} is there without its pool")
            elif fact.deleting and fact.state is BindState.WARM:
                wrong.append(f"{fact.name} is still going away")
            elif fact.state is BindState.BOUND and self._is_parked(fact.uid):
                wrong.append(f"{fact.name} is bound to session {fact.session}, which never reached its agent")
        for key, pool in pools.items():
            own = [fact for fact in facts if (fact.namespace, fact.pool) == key]
            bound = sum(fact.state is BindState.BOUND and not fact.finished for fact in own)
            unbound = [fact for fact in own if fact.state is BindState.WARM]
            wanted = min(pool.spec.replicas, max(0, pool.spec.max_pods - bound))
            current = template_hash(pool, settings)
            ready = sum(fact.ready and fact.template_hash == current for fact in unbound)
            if ready != wanted or len(unbound) != wanted:
                words = ", ".join(f"{fact.name} ({fact.phase}, ready {fact.ready})" for fact in unbound)
                wrong.append(
                    f"{ready} of {wanted} pods are warm with template {current}, {bound} are bound; unbound: {words}"
                )
            told: Any = {name: pool.status.get(name) for name in ("readyReplicas", "boundReplicas", "replicas")}
            true = {"readyReplicas": ready, "boundReplicas": bound, "replicas": len(unbound)}
            if told != true:
                wrong.append(f"the status says {told}, true is {true}")
        return wrong


def _key(obj: Json) -> Key:
    return obj["metadata"]["namespace"], obj["metadata"]["name"]


def _name(pod: Json) -> str:
    return f"{pod['metadata']['name']} ({pod['metadata']['uid']})"
