"""What a pool needs, for whoever scales it: the recommendation of `sizing`, with the callers who were not bound, and everything it follows from.

Invariants: the same rule and the same pods as in the operator, so that both say the same where nobody waits and nobody was rejected; reads only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime

from pydantic import BaseModel

from voicepool.binding import is_candidate, timestamp
from voicepool.gateway.demand import Demand
from voicepool.gateway.peers import Peers
from voicepool.gateway.view import ClusterView, is_live
from voicepool.model import BindState, PodFact, PoolFact
from voicepool.sizing import WINDOWS_SECONDS, Recommendation, Unmet, recommend


@dataclass(frozen=True, slots=True)
class Advice:
    """How many pods to keep warm, and why."""

    at: datetime
    pool: PoolFact
    recommendation: Recommendation | None
    """None where the pool does not ask for it (``spec.headroom``)."""
    warm: int
    starting: int
    bound: int
    unmet: Unmet
    gateways: int
    """That there are, with this one."""
    gateways_answered: int


class Advisor:
    """Makes advices.

    Args:
        view: what is known of the cluster.
        demand: this gateway's callers who were not bound.
        peers: the other gateways.
        now: the current time, with its zone.
    """

    def __init__(self, view: ClusterView, demand: Demand, peers: Peers, now: Callable[[], datetime]) -> None:
        self._view = view
        self._demand = demand
        self._peers = peers
        self._now = now

    async def advise(self, pool: PoolFact) -> Advice:
        """What this pool needs now."""
        key = (pool.namespace, pool.name)
        others = await self._peers.unmet(key)
        unmet = self._demand.unmet(key) + others.unmet
        pods = list(self._view.pods(key))
        live = [pod for pod in pods if is_live(pod)]
        now = self._now()
        headroom, deadline_seconds = pool.spec.headroom, pool.spec.startup.deadline_seconds
        return Advice(
            at=now,
            pool=pool,
            recommendation=recommend(headroom, pods, now, unmet, deadline_seconds=deadline_seconds)
            if headroom
            else None,
            warm=sum(is_candidate(pod) for pod in live),
            starting=sum(_is_starting(pod) for pod in live),
            bound=sum(pod.state is BindState.BOUND for pod in live),
            unmet=unmet,
            gateways=others.asked + 1,
            gateways_answered=others.answered + 1,
        )

    def unmet(self, pool: PoolFact) -> Unmet:
        """This gateway's own callers of a pool who were not bound."""
        return self._demand.unmet((pool.namespace, pool.name))


def _is_starting(pod: PodFact) -> bool:
    return pod.state is BindState.WARM and not pod.ready and not pod.deleting


class HeadroomAnswer(BaseModel):
    """What `spec.headroom` asks for, and from what that follows."""

    mode: str
    missRate: float  # noqa: N815 -- the wire's spelling
    percentage: int
    startsPerSecond: float  # noqa: N815 -- the wire's spelling
    leadTimeSeconds: float  # noqa: N815 -- the wire's spelling
    forDemand: int  # noqa: N815 -- the wire's spelling
    forPercentage: int  # noqa: N815 -- the wire's spelling
    forSchedules: int  # noqa: N815 -- the wire's spelling
    problem: str | None
    """A schedule that cannot be read."""


class GatewaysAnswer(BaseModel):
    """The gateways, this one among them."""

    known: int
    answered: int
    """Those whose callers are in the counts."""


class AdviceAnswer(BaseModel):
    """An advice in the words of the pool's spec and status. Counts are pods or callers."""

    namespace: str
    pool: str
    at: str
    recommendedReplicas: int | None  # noqa: N815 -- the wire's spelling
    """Null where the pool does not ask for it."""
    replicas: int
    maxPods: int  # noqa: N815 -- the wire's spelling
    warm: int
    starting: int
    bound: int
    waiting: int
    rejected: dict[str, int]
    """By how far back: `last60Seconds` and so on."""
    headroom: HeadroomAnswer | None
    gateways: GatewaysAnswer


def answer(advice: Advice) -> AdviceAnswer:
    """An advice for whoever asks over HTTP."""
    spec, recommendation = advice.pool.spec, advice.recommendation
    headroom = None
    if spec.headroom and recommendation:
        headroom = HeadroomAnswer(
            mode=spec.headroom.mode,
            missRate=spec.headroom.miss_rate,
            percentage=spec.headroom.percentage,
            startsPerSecond=round(recommendation.starts_per_second, 6),
            leadTimeSeconds=round(recommendation.lead_seconds, 3),
            forDemand=recommendation.for_demand,
            forPercentage=recommendation.for_percentage,
            forSchedules=recommendation.for_schedules,
            problem=recommendation.problem,
        )
    return AdviceAnswer(
        namespace=advice.pool.namespace,
        pool=advice.pool.name,
        at=timestamp(advice.at),
        recommendedReplicas=recommendation.replicas if recommendation else None,
        replicas=spec.replicas,
        maxPods=spec.max_pods,
        warm=advice.warm,
        starting=advice.starting,
        bound=advice.bound,
        waiting=advice.unmet.waiting,
        rejected={
            f"last{seconds:.0f}Seconds": count
            for seconds, count in zip(WINDOWS_SECONDS, advice.unmet.rejected, strict=True)
        },
        headroom=headroom,
        gateways=GatewaysAnswer(known=advice.gateways, answered=advice.gateways_answered),
    )
