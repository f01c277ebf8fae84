"""What a pool needs next. Pure: the pool, its pods and the time in; a :class:`Plan` out that says what to create, what to delete, and why.

Invariants, whatever the input:

* a bound pod that has not finished is never deleted, and never counted as warm;
* unbound and bound pods together, those that are going away included, never pass ``maxPods`` by a create of ours;
* every delete names the very version of the pod that was judged, so that a bind which came in between wins;
* what is done twice, or planned from an older view, does no harm: names are deterministic, deletes have preconditions;
* a pool that is as it should be gets an empty plan and the status that it already has.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any

from voicepool.model import LABEL_POOL, LABEL_STATE, BindState, Placement, PodFact, PoolFact, conditions_of
from voicepool.numbers import NONE_USED, UsedNumbers
from voicepool.podspec import agent_image
from voicepool.sizing import Recommendation, recommend

Json = dict[str, Any]

BACKOFF_FIRST_SECONDS = 10.0
BACKOFF_MAX_SECONDS = 300.0
STEADY_SECONDS = 60.0
"""A pod that lived so long after it had been Ready did not fail to start: it is replaced at once, without counting an attempt."""

IMAGE_REASONS = frozenset(
    {
        "ErrImagePull",
        "ImagePullBackOff",
        "InvalidImageName",
        "ErrImageNeverPull",
        "ImageInspectError",
        "RegistryUnavailable",
        "SignatureValidationFailed",
    }
)
CONFIGURATION_REASONS = frozenset({"CreateContainerConfigError", "CreateContainerError", "CreatePodSandboxError"})
SCHEDULING_REASONS = frozenset({"Unschedulable", "SchedulingGated", "SchedulerError"})
HELD_REASONS = IMAGE_REASONS | CONFIGURATION_REASONS | SCHEDULING_REASONS
"""A new pod would wait for the same thing: such pods are kept, counted and reported, not churned. The kubelet or the scheduler tries again."""

AGENT_FAILED = "AgentFailed"
DEADLINE_EXCEEDED = "StartupDeadlineExceeded"
FAILED_START_REASONS = frozenset({AGENT_FAILED, DEADLINE_EXCEEDED})
"""Reasons that a condition keeps telling when the pod that they speak of is gone and its successor has not shown that it does better."""


class DeleteReason(StrEnum):
    """Why a pod is deleted."""

    SCALE_DOWN = "scale_down"
    ROLLOUT = "rollout"
    FAILED = "failed"
    STARTUP_DEADLINE = "startup_deadline"
    COLD_START_UNUSED = "cold_start_unused"
    ENDED = "ended"
    DRAINED = "drained"
    UNDELIVERED = "undelivered"


@dataclass(frozen=True, slots=True)
class Template:
    """The pool's pod template as it is now."""

    hash: str
    error: str | None = None
    """Why the API server refuses it; None where it does not."""


@dataclass(frozen=True, slots=True)
class PodCreate:
    """One pod to create."""

    number: int
    start_attempt: int = 0


@dataclass(frozen=True, slots=True)
class PodDelete:
    """One pod to delete, in the very version that was judged."""

    name: str
    uid: str
    resource_version: str
    reason: DeleteReason


@dataclass(frozen=True, slots=True)
class Plan:
    """What to do for a pool."""

    creates: tuple[PodCreate, ...]
    deletes: tuple[PodDelete, ...]
    status: Json
    """The whole status that the pool should show."""
    requeue_after_seconds: float | None
    """When to look again although nothing happens; None is never."""
    reasons: tuple[str, ...]
    """In words, for people."""
    counts: Mapping[str, int]
    """Pods by state: starting, warm, bound, ended, failed, leaving, cold."""
    warm_target: int = 0
    """How many unbound pods there should be: spec.replicas, or what Native headroom makes of it."""


@dataclass(frozen=True, slots=True)
class _Problem:
    """Why the current template's pods do not become warm."""

    reason: str
    message: str
    stalled: bool
    """Nothing will change until somebody does something."""


@dataclass(slots=True)
class _Sorted:
    """The pods of a pool, each in exactly one list."""

    bound: list[PodFact]
    ended: list[PodFact]
    unbound: list[PodFact]
    """Counted in ``replicas``: neither failed, nor late, nor going away, nor somebody's cold start."""
    failed: list[PodFact]
    late: list[PodFact]
    cold: list[PodFact]
    leaving: list[PodFact]

    def live(self) -> int:
        """Pods that count against ``maxPods``; one that is going away still runs until it is gone."""
        running = (self.bound, self.unbound, self.late, self.cold, self.leaving)
        return sum(not pod.finished for pods in running for pod in pods)


def has_ended(pod: PodFact) -> bool:
    """A bound pod whose process has exited."""
    return pod.state is BindState.BOUND and pod.finished


def ended_at(pod: PodFact) -> datetime:
    """When the pod's process exited, as well as that is known."""
    return pod.finished_at or pod.bound_at or pod.created_at


def is_held(pod: PodFact) -> bool:
    """Whether the pod waits for something that a new pod would wait for, too."""
    return pod.waiting_reason in HELD_REASONS


def plan(
    pool: PoolFact, pods: Iterable[PodFact], now: datetime, template: Template, used: UsedNumbers = NONE_USED
) -> Plan:
    """Decide what the pool needs.

    Args:
        pool: as last seen.
        pods: all its pods, in any state.
        now: the time by the API server's clock, with a time zone.
        template: hash of the current pod template, and what the API server thinks of it.
        used: numbers that are not given again, besides those of ``pods``.
    """
    all_pods = sorted(pods, key=lambda pod: pod.name)
    groups = _sort(pool, all_pods, now)
    timers = _Timers(now)
    deletes: list[PodDelete] = []
    reasons: list[str] = []

    def delete(pod: PodFact, reason: DeleteReason) -> None:
        deletes.append(PodDelete(pod.name, pod.uid, pod.resource_version, reason))

    for pod in expired(groups.ended, now, pool.spec.session.retention_seconds, timers.at):
        delete(pod, DeleteReason.ENDED)
    if pool.deleting:
        # Unbound pods go with their owner, bound ones have none.
        return Plan((), tuple(deletes), dict(pool.status), timers.after_seconds(), ("the pool is being deleted",), {})

    deadline = timedelta(seconds=pool.spec.startup.deadline_seconds)
    target = pool.spec.replicas
    advice = (
        recommend(pool.spec.headroom, all_pods, now, deadline_seconds=pool.spec.startup.deadline_seconds)
        if pool.spec.headroom
        else None
    )
    if advice is not None and advice.next_at is not None:
        timers.at(advice.next_at)
    if advice is not None and pool.spec.headroom and pool.spec.headroom.mode == "Native":
        target = max(target, min(advice.replicas, pool.spec.max_pods))
    steps = _Steps.of(pool, target)
    for pod in groups.cold:
        unused_at = pod.created_at + deadline
        if now >= unused_at:
            delete(pod, DeleteReason.COLD_START_UNUSED)
        else:
            timers.at(unused_at)
    for pod in groups.unbound:
        if not pod.ready and not is_held(pod):
            timers.at(_late_at(pod, deadline))

    failure = _Failure.of(groups, template, deadline)
    possible = min(target, max(0, pool.spec.max_pods - len(groups.bound)))
    counting = [pod for pod in groups.unbound if pod.template_hash == template.hash or not steps.rolling]
    if sum(pod.ready for pod in counting) >= possible:
        # Nothing is missing: a start that failed delays none, and its pod would stay for good.
        failure = None
    for pod in (*groups.failed, *groups.late):
        if failure is None or pod is not failure.pod:
            delete(pod, DeleteReason.STARTUP_DEADLINE if pod in groups.late else DeleteReason.FAILED)

    failed_starts = _failed_starts(pool, groups, template, failure)
    victims = _victims(pool, groups, template, target, steps, failing=failed_starts > 0 or template.error is not None)
    for pod, reason in victims:
        delete(pod, reason)
    gone = {pod.uid for pod, _ in victims}
    staying = [pod for pod in groups.unbound if pod.uid not in gone]

    room = max(0, pool.spec.max_pods - groups.live())
    wanted = _wanted(staying, target, template, steps)
    if wanted and template.error is not None:
        wanted = 0
        reasons.append("no pod is created, since the template is refused")
    if wanted and failed_starts > 1:
        # One pod is enough to find out whether the template works again.
        wanted = 0 if any(pod.template_hash == template.hash and not pod.ready for pod in staying) else 1
    if wanted and failure is not None and now < (wait_until := failure.retry_at()):
        timers.at(wait_until)
        wanted = 0
        reasons.append(f"start {failed_starts} failed, the next is tried at {_words_for(wait_until)}")
    created = min(wanted, room)
    if created < wanted:
        reasons.append(f"{wanted - created} more would pass maxPods {pool.spec.max_pods}")
    if wanted and failure is not None and failure.pod in groups.late:
        # Also where there is no room: the place that it holds is the one that its successor needs.
        delete(failure.pod, DeleteReason.STARTUP_DEADLINE)
    numbers = _free_numbers(used, all_pods, created) if created else ()
    creates = tuple(PodCreate(number, failed_starts) for number in numbers)

    problem = _problem(pool, groups, template, failure, failed_starts)
    status = _status(
        pool, groups, now, template, problem, failed_starts, target, advice, short_of_room=created < wanted
    )
    if creates:
        reasons.append(f"{len(groups.unbound)} unbound of {target}: creates {len(creates)}")
    return Plan(
        creates=creates,
        deletes=tuple(deletes),
        status=status,
        requeue_after_seconds=timers.after_seconds(),
        reasons=tuple(reasons),
        counts=_counts(groups),
        warm_target=target,
    )


def expired(
    ended: Iterable[PodFact], now: datetime, retention_seconds: float, later: Any = lambda moment: None
) -> list[PodFact]:
    """The ended pods that have been kept long enough; ``later`` is told when each of the others will have been."""
    result = []
    for pod in ended:
        if pod.deleting:
            continue
        until = ended_at(pod) + timedelta(seconds=retention_seconds)
        if now >= until:
            result.append(pod)
        else:
            later(until)
    return result


@dataclass(frozen=True, slots=True)
class Drain:
    """What becomes of the calls of a pool that is gone."""

    limited: tuple[PodFact, ...]
    """Calls that have to be told when they end."""
    over: tuple[PodFact, ...]
    """Calls whose time is up."""
    next_at: datetime | None
    """When the next one's time is up."""


def drain(pods: Iterable[PodFact], now: datetime) -> Drain:
    """Decide about the calls of a pool that is gone. A call without a limit goes on until it ends.

    One whose pod is being deleted (evicted, say) goes on like any other, for the whole grace of its pod, which is that of the longest call.
    """
    calls = [pod for pod in pods if pod.state is BindState.BOUND and not pod.finished and pod.drain_seconds]
    moments = [pod.drain_until for pod in calls if pod.drain_until is not None and pod.drain_until > now]
    return Drain(
        limited=tuple(pod for pod in calls if pod.drain_until is None),
        over=tuple(pod for pod in calls if pod.drain_until is not None and pod.drain_until <= now),
        next_at=min(moments, default=None),
    )


def taken_over(pool: PoolFact, pods: Iterable[PodFact]) -> list[PodFact]:
    """The calls whose end was written down while the pool was gone, which it is no more: their limit does not count until it goes again."""
    if pool.deleting:
        return []
    return [pod for pod in pods if pod.drain_until is not None and pod.state is BindState.BOUND and not pod.finished]


class _Timers:
    """The earliest moment at which a plan could change by time alone."""

    def __init__(self, now: datetime) -> None:
        self._now = now
        self._first: datetime | None = None

    def at(self, moment: datetime) -> None:
        if self._first is None or moment < self._first:
            self._first = moment

    def after_seconds(self) -> float | None:
        return None if self._first is None else max(0.0, (self._first - self._now).total_seconds())


@dataclass(frozen=True, slots=True)
class _Failure:
    """The newest start of the current template that failed, while nothing has shown since that the template works."""

    pod: PodFact
    attempts: int
    """How many starts failed in a row."""
    moment: datetime
    """When this one did."""

    @classmethod
    def of(cls, groups: _Sorted, template: Template, deadline: timedelta) -> _Failure | None:
        failures = [
            cls(
                pod=pod,
                attempts=0 if _was_steady(pod) else pod.start_attempt + 1,
                moment=_late_at(pod, deadline) if pod in groups.late else ended_at(pod),
            )
            for pod in (*groups.failed, *groups.late)
            if pod.template_hash == template.hash
        ]
        if not failures:
            return None
        newest = max(failures, key=lambda failure: (failure.attempts, failure.moment, failure.pod.name))
        works = any(
            pod.template_hash == template.hash and pod.created_at > newest.pod.created_at
            for pod in (*(pod for pod in groups.unbound if pod.ready), *groups.bound)
        )
        return None if works or newest.attempts == 0 else newest

    def retry_at(self) -> datetime:
        return self.moment + timedelta(seconds=backoff_seconds(self.attempts))


def _failed_starts(pool: PoolFact, groups: _Sorted, template: Template, failure: _Failure | None) -> int:
    """How many starts of the current template failed in a row.

    The pod of the last one may be gone: its place is the one that its successor needs. Then the status remembers, until something shows that
    the template works.
    """
    if failure is not None:
        return failure.attempts
    # A failed pod that is no failure has been outlived by one that works.
    works = (*(pod for pod in groups.unbound if pod.ready), *groups.failed, *groups.late)
    if pool.status.get("templateHash") != template.hash or any(pod.template_hash == template.hash for pod in works):
        return 0
    return int(pool.status.get("failedStarts") or 0)


def backoff_seconds(attempts: int) -> float:
    """How long to wait after so many failed starts in a row: nothing after the first, then 10 seconds doubling to 300."""
    return 0.0 if attempts <= 1 else min(BACKOFF_MAX_SECONDS, BACKOFF_FIRST_SECONDS * 2.0 ** min(attempts - 2, 30))


def _was_steady(pod: PodFact) -> bool:
    until = ended_at(pod) if pod.finished else pod.not_ready_since or pod.created_at
    return pod.once_ready and (until - pod.created_at).total_seconds() >= STEADY_SECONDS


def _late_at(pod: PodFact, deadline: timedelta) -> datetime:
    # Not before it was made: a node whose clock is behind would otherwise have each of its pods replaced at once.
    return max(pod.under_way_since, pod.not_ready_since or pod.created_at) + deadline


def _sort(pool: PoolFact, pods: Iterable[PodFact], now: datetime) -> _Sorted:
    deadline = timedelta(seconds=pool.spec.startup.deadline_seconds)
    groups = _Sorted([], [], [], [], [], [], [])
    for pod in pods:
        if pod.state is BindState.BOUND:
            (groups.ended if has_ended(pod) else groups.bound).append(pod)
        elif pod.deleting:
            groups.leaving.append(pod)
        elif pod.cold_start is not None:
            groups.cold.append(pod)
        elif pod.finished:
            groups.failed.append(pod)
        elif not pod.ready and not is_held(pod) and now >= _late_at(pod, deadline):
            groups.late.append(pod)
        else:
            groups.unbound.append(pod)
    return groups


@dataclass(frozen=True, slots=True)
class _Steps:
    """How a rollout goes on, in pods."""

    rolling: bool
    """Old unbound pods are replaced; otherwise they stay until they are taken or fail."""
    surge: int
    unavailable: int

    @classmethod
    def of(cls, pool: PoolFact, target: int) -> _Steps:
        strategy = pool.spec.update_strategy
        if strategy.type == "OnReplenish" or target == 0:
            return cls(strategy.type != "OnReplenish", 0, 0)
        surge = _share(strategy.rolling_update.max_surge, target, round_up=True)
        unavailable = _share(strategy.rolling_update.max_unavailable, target, round_up=False)
        # Without either a rollout could not take its first step; a Deployment gives way in the same direction.
        return cls(True, surge, unavailable if surge else max(1, unavailable))


def _share(value: int | str, of: int, *, round_up: bool) -> int:
    """A number of pods as it is, a percentage as that share of ``of``."""
    if isinstance(value, int):
        return value
    hundredths = of * int(value.removesuffix("%"))
    return -(-hundredths // 100) if round_up else hundredths // 100


def _victims(
    pool: PoolFact, groups: _Sorted, template: Template, wanted: int, steps: _Steps, *, failing: bool
) -> list[tuple[PodFact, DeleteReason]]:
    """Unbound pods that have to go: too many, or of an old template and no longer needed."""
    # Also where maxPods has been lowered: sessions keep their pods, unbound ones give way.
    ceiling = max(0, pool.spec.max_pods - len(groups.bound) - sum(not pod.finished for pod in groups.cold))
    target = min(wanted, ceiling)
    old = [pod for pod in groups.unbound if pod.template_hash != template.hash]
    if not old and len(groups.unbound) <= target:
        # The usual case by far, and to put the pods in order is most of the work of a plan.
        return []
    ordered = _cheapest_first(pool.spec.placement, groups, template)
    surplus = steps.surge if old and target else 0
    too_many = max(0, len(ordered) - min(target + surplus, ceiling))
    result = [(pod, DeleteReason.SCALE_DOWN) for pod in ordered[:too_many]]
    staying = ordered[too_many:]
    old = [pod for pod in staying if pod.template_hash != template.hash]
    current = [pod for pod in staying if pod.template_hash == template.hash]
    if not old or not steps.rolling:
        if len(staying) > target:
            result += [(pod, DeleteReason.SCALE_DOWN) for pod in staying[: len(staying) - target]]
        return result
    warm = sum(pod.ready for pod in staying)
    # While the new template fails, or is refused, the old one's warm pods are all that callers have.
    removable = max(0, warm - target + (0 if failing else steps.unavailable))
    starting = not all(pod.ready for pod in current)
    if not removable and not failing and not starting and not groups.leaving and groups.live() >= pool.spec.max_pods:
        # There is no room for a surplus pod: one warm pod of the old template makes room for its successor.
        removable = 1
    for pod in old:
        if not pod.ready:
            # It would become warm with an agent that nobody wants any more.
            result.append((pod, DeleteReason.ROLLOUT))
        elif removable:
            removable -= 1
            result.append((pod, DeleteReason.ROLLOUT))
    return result


def _cheapest_first(placement: Placement, groups: _Sorted, template: Template) -> list[PodFact]:
    """Unbound pods in the order in which they are given up: not Ready first, then old template, then by placement, then newest first."""

    def worth(pod: PodFact) -> tuple[bool, bool, bool]:
        # One that no node has taken leaves no node emptier.
        return pod.ready, pod.template_hash == template.hash, pod.node is not None

    def age(pod: PodFact) -> tuple[float, str]:
        return -pod.created_at.timestamp(), pod.name

    ordered = sorted(groups.unbound, key=lambda pod: (*worth(pod), *age(pod)))
    on_node = Counter(pod.node for pod in (*groups.bound, *groups.unbound, *groups.cold))
    if placement is Placement.PACKED:
        # Node by node, the one with fewest pods first, so that it is empty soon.
        return sorted(ordered, key=lambda pod: (*worth(pod), on_node[pod.node], pod.node or "", *age(pod)))
    # Always from the node that is the fullest at that moment: the height of a pod is how many its node has while it is still there.
    height: dict[str, int] = {}
    for pod in ordered:
        height[pod.uid] = on_node[pod.node]
        on_node[pod.node] -= 1
    return sorted(ordered, key=lambda pod: (*worth(pod), -height[pod.uid], *age(pod)))


def _wanted(staying: Sequence[PodFact], target: int, template: Template, steps: _Steps) -> int:
    """How many pods of the current template are missing; more than the target may exist while old ones are replaced."""
    current = sum(pod.template_hash == template.hash for pod in staying)
    old = len(staying) - current
    surplus = steps.surge if old else 0
    return max(0, min(target - current, target + surplus - len(staying)))


def _free_numbers(used: UsedNumbers, pods: Iterable[PodFact], count: int) -> Iterable[int]:
    taken = used.and_of(pod.name for pod in pods)
    return itertools.islice((number for number in itertools.count() if number not in taken), count)


def _counts(groups: _Sorted) -> dict[str, int]:
    warm = sum(pod.ready for pod in groups.unbound)
    return {
        "starting": len(groups.unbound) - warm,
        "warm": warm,
        "bound": len(groups.bound),
        "ended": len(groups.ended),
        "failed": len(groups.failed) + len(groups.late),
        "leaving": len(groups.leaving),
        "cold": len(groups.cold),
    }


def _problem(
    pool: PoolFact, groups: _Sorted, template: Template, failure: _Failure | None, failed_starts: int
) -> _Problem | None:
    """The one thing that a person should know, the most certain first."""
    if template.error is not None:
        return _Problem("TemplateInvalid", template.error, stalled=True)
    current = [pod for pod in groups.unbound if pod.template_hash == template.hash]
    held = {pod.waiting_reason: pod for pod in reversed(current) if is_held(pod)}
    for reasons, reason, words in (
        (IMAGE_REASONS, "ImagePullFailed", "cannot get its image {image!r}"),
        (CONFIGURATION_REASONS, "ContainerConfigFailed", "cannot be set up by the kubelet"),
    ):
        pod = next((pod for waiting, pod in sorted(held.items(), key=str) if waiting in reasons), None)
        if pod is not None:
            what = words.format(image=pod.waiting_image or agent_image(pool))
            return _Problem(reason, f"Pod {pod.name} {what}: {_first_line(pod.message or pod.waiting_reason)}", True)
    if failure is not None:
        evidence = any(pod.ready for pod in current)
        if failure.attempts > 1 or not evidence:
            return _failure_problem(failure, pool)
    elif failed_starts:
        told = conditions_of(pool.status).get("Ready", {})
        if told.get("reason") in FAILED_START_REASONS:
            return _Problem(told["reason"], told["message"], stalled=failed_starts > 1)
    unschedulable = next((pod for waiting, pod in sorted(held.items(), key=str) if waiting in SCHEDULING_REASONS), None)
    if unschedulable is not None:
        return _Problem(
            "Unschedulable",
            f"No node takes pod {unschedulable.name}: {_first_line(unschedulable.message or unschedulable.waiting_reason)}",
            stalled=False,
        )
    return None


def _failure_problem(failure: _Failure, pool: PoolFact) -> _Problem:
    pod = failure.pod
    stalled = failure.attempts > 1
    if not pod.finished:
        return _Problem(
            DEADLINE_EXCEEDED,
            f"Pod {pod.name} was not Ready within {pool.spec.startup.deadline_seconds} s"
            + (f": {_first_line(pod.message)}" if pod.message else " (its readiness probe, or its log, says why)"),
            stalled,
        )
    code = "" if pod.exit_code is None else f" with exit code {pod.exit_code}"
    words = _first_line(pod.message) if pod.message else "it left no termination message; its log may say why"
    return _Problem(AGENT_FAILED, f"Pod {pod.name} ended{code} before a caller came: {words}", stalled)


def _status(
    pool: PoolFact,
    groups: _Sorted,
    now: datetime,
    template: Template,
    problem: _Problem | None,
    failed_starts: int,
    target: int,
    advice: Recommendation | None,
    *,
    short_of_room: bool,
) -> Json:
    warm = sum(pod.ready for pod in groups.unbound)
    updated = [pod for pod in groups.unbound if pod.template_hash == template.hash]
    updated_warm = sum(pod.ready for pod in updated)
    # What maxPods does not allow is told by AtCapacity and WarmTargetMet.
    possible = min(target, max(0, pool.spec.max_pods - len(groups.bound)))
    old = len(groups.unbound) - len(updated)
    rolling = pool.spec.update_strategy.type == "RollingUpdate"
    reached = template.error is None and (updated_warm >= possible and not old if rolling else warm >= possible)
    conditions = _Conditions(pool, now)

    under_way = ("Starting", "Pods are being started.")
    if old and rolling:
        progress = (
            f"{len(updated)} unbound pods are of the current template ({updated_warm} of them warm, of {target} wanted)"
        )
        under_way = ("RollingOut", f"{progress}; {old} of an older one are still to be replaced.")

    before = conditions.previous("Ready")
    same_template = pool.status.get("templateHash") == template.hash
    if reached:
        words = "No agent is wanted." if target == 0 else "The pool has reached its warm target."
        if old:
            words += f" {old} of its unbound pods are of an older template, and stay until they are taken."
        conditions.set("Ready", True, "TargetReached" if target else "ScaledToZero", words)
    elif problem is not None:
        conditions.set("Ready", False, problem.reason, problem.message)
    elif before is not None and before.get("status") == "True" and same_template:
        # Each call takes a pod away for a moment: that is what a pool is for, and no reason to call it unready.
        conditions.set("Ready", True, str(before.get("reason")), str(before.get("message")))
    else:
        conditions.set("Ready", False, *under_way)

    stalled = not reached and problem is not None and problem.stalled
    if stalled and problem is not None:
        conditions.set("Stalled", True, problem.reason, problem.message)
    was_busy = conditions.previous("Reconciling") is not None or conditions.previous("Stalled") is not None
    same_spec = same_template and pool.status.get("observedGeneration") == pool.generation
    if not reached and not stalled and (was_busy or not same_spec):
        conditions.set("Reconciling", True, *((problem.reason, problem.message) if problem else under_way))

    if warm >= target:
        conditions.set("WarmTargetMet", True, "Warm", "At least as many pods are warm as wanted.")
    else:
        reason = problem.reason if problem else "AtCapacity" if short_of_room else "Refilling"
        conditions.set("WarmTargetMet", False, reason, "Fewer pods are warm than wanted.")
    if template.error is not None:
        conditions.set("TemplateValid", False, "Refused", template.error)
    else:
        conditions.set("TemplateValid", True, "Accepted", "The API server accepts pods of this template.")
    if short_of_room:
        conditions.set(
            "AtCapacity",
            True,
            "MaxPods",
            f"The pool has all of its maxPods {pool.spec.max_pods}; raise it, or lower replicas, or wait for sessions to end.",
        )
    else:
        conditions.set("AtCapacity", False, "Room", "The pool may create the pods that it wants.")

    if advice is not None and advice.problem is not None:
        conditions.set("HeadroomValid", False, "BadSchedule", f"{advice.problem} The schedule is left out.")

    return {
        "observedGeneration": pool.generation,
        "replicas": len(groups.unbound),
        "readyReplicas": warm,
        "startingReplicas": len(groups.unbound) - warm,
        "boundReplicas": len(groups.bound),
        "endedReplicas": len(groups.ended),
        "updatedReplicas": len(updated),
        "failedReplicas": len(groups.failed) + len(groups.late),
        "failedStarts": 0 if reached else failed_starts,
        # Null takes it out of the status when headroom is no longer asked for.
        "recommendedReplicas": advice.replicas if advice else None,
        "selector": f"{LABEL_POOL}={pool.name},{LABEL_STATE}={BindState.WARM.value}",
        "templateHash": template.hash,
        "image": agent_image(pool),
        "conditions": conditions.result(),
    }


class _Conditions:
    """Builds the list of conditions; a transition time moves only when the status does."""

    def __init__(self, pool: PoolFact, now: datetime) -> None:
        self._generation = pool.generation
        self._now = now
        self._previous = conditions_of(pool.status)
        self._result: list[Json] = []

    def previous(self, kind: str) -> Mapping[str, Any] | None:
        return self._previous.get(kind)

    def set(self, kind: str, value: bool, reason: str, message: str) -> None:
        status = "True" if value else "False"
        before = self._previous.get(kind)
        same = before is not None and before.get("status") == status
        self._result.append(
            {
                "type": kind,
                "status": status,
                "reason": reason,
                "message": message,
                "observedGeneration": self._generation,
                "lastTransitionTime": before["lastTransitionTime"] if before and same else _words_for(self._now),
            }
        )

    def result(self) -> list[Json]:
        return self._result


def _first_line(text: str | None) -> str:
    lines = [line.strip() for line in (text or "").splitlines() if line.strip()]
    return lines[0][:500] if lines else ""


def _words_for(moment: datetime) -> str:
    return moment.replace(microsecond=0).isoformat().replace("+00:00", "Z")
