"""How many agents a pool should keep warm. Pure: the pool, its pods, its unmet callers and the time in; a number out, and when to ask again.

Three rules, of which the largest wins, and a pod more for each caller who waits:

* callers who arrive while a new pod starts find one: the smallest N such that more than N of them come within one lead time only with the chance
  ``missRate``, when they come independently of each other (Poisson);
* ``percentage`` of the calls that are going on;
* what the schedules say for this time.

What was bound is read off the pods that are there, so that a restart forgets nothing. A session counts from its bind, and no longer when its pod is
deleted within the window (a ``retentionSeconds`` below it). Callers who were not bound are on no pod: only the gateways know them, and say so.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

from cronsim import CronSim, CronSimError

from voicepool.model import BindState, HeadroomSpec, PodFact, ScheduleSpec

WINDOWS_SECONDS = (60.0, 300.0)
"""Starts per second are counted in each, and the higher rate is taken: the short one sees a rush, the long one a steady trickle."""
LEAD_PERCENTILE = 0.95
LEAD_UNKNOWN_SECONDS = 10.0
"""Taken for the time from create to Ready until a pod that is there has shown it."""
MOST = 100_000
HOURS_PUT_BACK = 2
"""The most by which any time zone puts its clocks back."""


@dataclass(frozen=True, slots=True)
class Unmet:
    """Callers of a pool whom no pod shows, since they were not bound."""

    waiting: int = 0
    """They are in a queue now."""
    rejected: tuple[int, ...] = (0,) * len(WINDOWS_SECONDS)
    """They were refused, or gave up waiting: how many within each of the windows."""

    def __add__(self, other: Unmet) -> Unmet:
        rejected = tuple(a + b for a, b in zip(self.rejected, other.rejected, strict=True))
        return Unmet(self.waiting + other.waiting, rejected)


NOBODY = Unmet()


@dataclass(frozen=True, slots=True)
class Recommendation:
    """How many pods to keep warm, and from what that follows."""

    replicas: int
    """The largest of the three that follow, and one for each caller who waits."""
    for_demand: int
    for_percentage: int
    for_schedules: int
    calls: int
    """Bound pods whose session is going on."""
    starts_per_second: float
    """Binds, and callers who were not bound."""
    lead_seconds: float
    next_at: datetime | None
    """When the number may change although nothing happens."""
    problem: str | None
    """Why a schedule was left out."""


def recommend(
    headroom: HeadroomSpec,
    pods: Iterable[PodFact],
    now: datetime,
    unmet: Unmet = NOBODY,
    *,
    deadline_seconds: float,
) -> Recommendation:
    """The number of unbound pods that the pool should have now. It knows no ``maxPods``: demand does not end where the pool does.

    Args:
        headroom: the pool's rules.
        pods: all of the pool's, in any state.
        now: by the clock that the pods' times are by.
        unmet: callers whom no pod shows.
        deadline_seconds: how long a start of the pool may take.
    """
    pods = list(pods)
    bound_at = [pod.bound_at for pod in pods if pod.state is BindState.BOUND and pod.bound_at is not None]
    calls = sum(pod.state is BindState.BOUND and not pod.finished for pod in pods)
    rates, moments = [], []
    for seconds, rejected in zip(WINDOWS_SECONDS, unmet.rejected, strict=True):
        window = timedelta(seconds=seconds)
        recent = [moment for moment in bound_at if moment > now - window]
        rates.append((len(recent) + rejected + unmet.waiting) / seconds)
        moments += [moment + window for moment in recent]
    lead_seconds = lead_time_seconds(pods, deadline_seconds)
    scheduled, problem = _scheduled(headroom.schedules, now)
    moments += scheduled.moments
    for_demand = warm_for(max(rates) * lead_seconds, headroom.miss_rate)
    for_percentage = -(-(calls + unmet.waiting) * headroom.percentage // 100)
    return Recommendation(
        # Who waits takes the next pod that becomes warm, and does not leave it to those who come.
        replicas=max(for_demand, for_percentage, scheduled.warm_pods) + unmet.waiting,
        for_demand=for_demand,
        for_percentage=for_percentage,
        for_schedules=scheduled.warm_pods,
        calls=calls,
        starts_per_second=max(rates),
        lead_seconds=lead_seconds,
        next_at=min(moments, default=None),
        problem=problem,
    )


def warm_for(expected: float, miss_rate: float) -> int:
    """The smallest number that a Poisson variable with the mean ``expected`` passes with a chance of at most ``miss_rate``."""
    if expected <= 0:
        return 0
    # What is ten standard deviations below the mean adds nothing to the sum.
    number = min(MOST, max(0, math.floor(expected - 10 * math.sqrt(expected))))
    cumulative = 0.0
    while number < MOST:
        cumulative += math.exp(number * math.log(expected) - expected - math.lgamma(number + 1))
        if 1.0 - cumulative <= miss_rate:
            break
        number += 1
    return number


def lead_time_seconds(pods: Iterable[PodFact], deadline_seconds: float) -> float:
    """From create to Ready: of the pods that are Ready, the time within which 95 of 100 became it; ``deadline_seconds`` as in :func:`recommend`."""
    times = _startups_seconds(pods, deadline_seconds)
    return within(LEAD_PERCENTILE, times) if times else LEAD_UNKNOWN_SECONDS


def service_times(pods: Iterable[PodFact], deadline_seconds: float) -> dict[str, int]:
    """How long the callers waited whose pods are there, and how long warm pods took to become Ready; as ``status.sessions`` tells it."""
    pods = list(pods)
    waited = sorted(pod.waited_seconds for pod in pods if pod.waited_seconds is not None)
    startups = _startups_seconds(pods, deadline_seconds)
    times: dict[str, int] = {}
    if waited:
        times["waitedMillisecondsP50"] = round(within(0.5, waited) * 1000)
        times["waitedMillisecondsP99"] = round(within(0.99, waited) * 1000)
    if startups:
        times["startupSecondsP95"] = math.ceil(within(LEAD_PERCENTILE, startups))
    return times


def within(share: float, values: Sequence[float]) -> float:
    """The value that so large a share of some sorted values does not pass; there has to be one."""
    return values[math.ceil(share * len(values)) - 1]


def _startups_seconds(pods: Iterable[PodFact], deadline_seconds: float) -> list[float]:
    # Kubernetes writes whole seconds, so a start that it calls 0 s long may have taken nearly one.
    return sorted(
        max(0.0, (pod.ready_since - pod.created_at).total_seconds()) + 1.0
        for pod in pods
        if pod.ready_since is not None
        # One that became Ready later was so before, and had only lost it for a while: else it would have been replaced.
        and (pod.ready_since - pod.under_way_since).total_seconds() <= deadline_seconds
    )


@dataclass(frozen=True, slots=True)
class _Scheduled:
    warm_pods: int
    moments: list[datetime]


def _scheduled(schedules: Sequence[ScheduleSpec], now: datetime) -> tuple[_Scheduled, str | None]:
    """What the schedule that came last says; it holds until the next one comes."""
    latest: list[tuple[datetime, int]] = []
    moments: list[datetime] = []
    problem = None
    for schedule in schedules:
        try:
            local = now.astimezone(ZoneInfo(schedule.time_zone)).replace(second=0, microsecond=0)
            # Of an hour that comes twice CronSim takes the first: what it finds may be past when it is to come, and in the second of the two the
            # search backwards has to begin after both. Compared is in UTC. It leaves out the minute that it starts from.
            ahead = timedelta(hours=HOURS_PUT_BACK if local.fold else 0, minutes=1)
            back = CronSim(schedule.cron, local + ahead, reverse=True)
            latest.append(
                (next(past for moment in back if (past := moment.astimezone(UTC)) <= now), schedule.warm_pods)
            )
            on = CronSim(schedule.cron, local)
            moments.append(next(later for moment in on if (later := moment.astimezone(UTC)) > now))
        # StopIteration: no such day in 50 years.
        except (CronSimError, StopIteration) as error:
            problem = f"The cron expression {schedule.cron!r} is not valid: {error}."
        # An unknown name is a KeyError, one that is no name at all a ValueError, a folder of zones an OSError.
        except (KeyError, ValueError, OSError):
            problem = f"There is no time zone {schedule.time_zone!r}; use a name such as Europe/Berlin."
    return _Scheduled(max(latest)[1] if latest else 0, moments), problem
