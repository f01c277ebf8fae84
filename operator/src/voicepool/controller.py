"""Does what ``plan()`` decided: takes a pool from the queue, plans, creates and deletes, and has the status written.

:meth:`Controller.watch` writes nothing and runs everywhere, :meth:`Controller.work` runs where the Lease is.
Invariants: it decides nothing by itself; every delete carries the preconditions of its plan, and a create or
delete that lost a race is dropped quietly, since the next look sees what happened; its own writes are in the pods' copy before the pool is
planned again, and those of a status in the pools' copy before the next one (:class:`voicepool.status_keeper.StatusKeeper`).
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import datetime

from voicepool.agents import AgentStatus
from voicepool.binding import drain_patch, take_over_patch
from voicepool.budgets import BudgetKeeper
from voicepool.copies import BY_POOL, PoolStore
from voicepool.disruption import BudgetFact
from voicepool.events import (
    UNDELIVERED,
    Happening,
    Kind,
    Note,
    deadline_note,
    happenings,
    is_hit,
    note_of,
    startup_phases_seconds,
)
from voicepool.kube.api import (
    PODS,
    POOLS,
    AlreadyExists,
    Conflict,
    Forbidden,
    Json,
    KubeApi,
    KubeApiError,
    NotFound,
    TooManyRequests,
    Unprocessable,
    pages,
)
from voicepool.kube.convert import pod_from_json, pool_from_json
from voicepool.kube.informer import Informer
from voicepool.metrics import POD_STATES, OperatorMetrics
from voicepool.model import LABEL_POOL, LABEL_STATE, BindState, Disruption, Key, PodFact, PoolFact
from voicepool.numbers import UsedNumbers
from voicepool.plan import (
    DeleteReason,
    Plan,
    PodCreate,
    PodDelete,
    Template,
    drain,
    expired,
    has_ended,
    plan,
    taken_over,
)
from voicepool.podspec import PodSettings, build_pod
from voicepool.pool_watch import PoolWatch
from voicepool.queue import KeyedQueue
from voicepool.reaper import Reaper
from voicepool.recorder import EventRecorder
from voicepool.status_keeper import StatusKeeper
from voicepool.template_check import TemplateCheck
from voicepool.webhooks import Webhooks, recent

logger = logging.getLogger(__name__)

LOOK_AGAIN_SECONDS = 0.2
"""How long a change of a pod may wait that asks for no pod to be created: it shows in the status, or lets a rollout go on."""
LIST_AGAIN_SECONDS = 2.0
"""After a list of pools that failed: before the first one the operator cannot lead."""
UNSEEN_CALLS_SECONDS = 60.0
"""How often it is asked whether the calls of a pool that is gone have ended, where its pods are not in our copy."""
SLOW_START_FIRST = 2
WRITES_IN_A_TURN = 128
"""Of creates, and of deletes. Then the pool goes to the end of the queue, so that one that needs thousands does not keep a worker from the others."""
UNBOUND_GRACE_SECONDS = 30
"""No call runs in a pod that is deleted here, or one whose time is up, so the grace that a call would need does not apply."""
TAKEN_AWAY = frozenset({DeleteReason.SCALE_DOWN, DeleteReason.ROLLOUT})
"""Reasons for which a pod is deleted that could serve a caller: for them the pool is read again first."""


@dataclass(frozen=True, slots=True)
class ControllerSettings:
    """How the controller works."""

    namespace: str | None = None
    """One namespace, or None for all."""
    workers: int = 4
    parallel_writes: int = 16
    resync_seconds: float = 60.0
    orphan_retention_seconds: int = 300


class Controller:
    """Keeps all pools at what their specs say.

    Args:
        api: the API server.
        pods: a running informer from :func:`voicepool.copies.pod_informer`.
        pools: filled by the caller with watch events; the controller lists now and then.
        pod_settings: what every agent pod gets.
        metrics: where to count.
        now: the time by the API server's clock, with a time zone.
        settings: see there.
        recorder: writes Events; None writes none.
        may_write: asked before a pool is taken up; False leaves it alone, since somebody else works now.
        jitter: source of randomness for the back-off.
        budgets: a running informer from :func:`voicepool.copies.budget_informer`; without it the pools get no PodDisruptionBudget.
        ask_agent: asks the agent of a pod, None when it cannot be asked; without it a bind that was never delivered is not found.
        webhooks: tells somebody else of the sessions; None tells nobody.
    """

    def __init__(
        self,
        api: KubeApi,
        pods: Informer[PodFact],
        pools: PoolStore,
        pod_settings: PodSettings,
        metrics: OperatorMetrics,
        now: Callable[[], datetime],
        settings: ControllerSettings | None = None,
        *,
        recorder: EventRecorder | None = None,
        may_write: Callable[[], bool] = lambda: True,
        jitter: random.Random | None = None,
        budgets: Informer[BudgetFact] | None = None,
        ask_agent: Callable[[PodFact], Awaitable[AgentStatus | None]] | None = None,
        webhooks: Webhooks | None = None,
    ) -> None:
        self.queue: KeyedQueue[Key] = KeyedQueue(jitter)
        self.pools_listed = asyncio.Event()
        """Set after the first complete list of pools: from then on every pool is looked after."""
        self._api = api
        self._pods = pods
        self._pools = pools
        self._pod_settings = pod_settings
        self._metrics = metrics
        self._now = now
        self._settings = settings or ControllerSettings()
        self._recorder = recorder
        self._webhooks = webhooks
        self._may_write = may_write
        self._asked_for_at: dict[str, float] = {}
        """Pods that are not warm yet, by uid, and when we asked for them."""
        self._templates = TemplateCheck(api, pod_settings)
        self._used_numbers: dict[Key, UsedNumbers] = {}
        self._seen: set[Key] = set()
        self._doubtful: set[Key] = set()
        """Pools of which somebody else has deleted an unbound pod: perhaps they are not what our copy says."""
        self._deleted: set[str] = set()
        """Pods by uid that we delete and that are not gone yet."""
        self._working = False
        self._pools_listed_at = float("-inf")
        self._pool_watch = PoolWatch(lambda: asyncio.get_running_loop().time())
        self._budgets = BudgetKeeper(api, budgets, metrics, self._add)
        self._reaper = Reaper(pods, ask_agent, self._reap) if ask_agent is not None else None
        self._statuses = StatusKeeper(
            api,
            pods,
            pools,
            metrics,
            workers=self._settings.workers,
            look_again=self.queue.add_after,
            pool_read=self.pool_changed,
            tell=self._tell,
            may_write=may_write,
        )
        self._reaped: set[str] = set()
        """Pods by uid whose agent never got its session, and which we delete."""
        pods.handlers.append(self._pod_changed)
        if self._reaper is not None:
            pods.handlers.append(self._reaper.pod_changed)

    def pool_changed(self, pool: PoolFact) -> None:
        """A watch showed the pool."""
        self._pool_watch.told((pool.namespace, pool.name), int(pool.resource_version))
        if self._pools.apply(pool):
            self._add((pool.namespace, pool.name))

    def pool_deleted(self, key: Key, uid: str) -> None:
        """A watch showed that the pool is gone."""
        if self._pools.remove(key, uid):
            self._add(key)

    async def run(self) -> None:
        """Watch and work until cancelled, for a process that is the only one."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self.watch())
            group.create_task(self.work())

    async def watch(self) -> None:
        """Keep the pools' copy complete until cancelled: look at everything now and then, and drop pools whose deletion was missed."""
        await self._pods.synced.wait()
        while True:
            wait_seconds = self._settings.resync_seconds
            try:
                await self._list_pools()
            except KubeApiError as error:
                wait_seconds = min(wait_seconds, LIST_AGAIN_SECONDS)
                logger.warning("listing pools failed, trying again", extra={"error": str(error)})
            self._add_everything()
            await asyncio.sleep(wait_seconds)

    async def work(self) -> None:
        """Do what the plans say until cancelled; may be called again after that.

        An error that nobody expected ends it: a process that fails openly is started again.
        """
        await self._pods.synced.wait()
        self._working = True
        self._add_everything()
        try:
            async with asyncio.TaskGroup() as group:
                if self._recorder is not None:
                    group.create_task(self._recorder.run())
                if self._webhooks is not None:
                    for happening in recent(self._pods, self._now()):
                        self._webhooks.tell(happening)
                    group.create_task(self._webhooks.run())
                group.create_task(self._statuses.run())
                group.create_task(self._when_budgets_are_known())
                if self._reaper is not None:
                    group.create_task(self._reaper.run())
                for _ in range(self._settings.workers):
                    group.create_task(self._work())
        finally:
            self._working = False
            self.queue.clear()
            # Whoever works now counts the pods.
            for namespace, name in self._seen:
                self._metrics.forget(namespace, name)
            self._seen.clear()
            self._asked_for_at.clear()
            self._used_numbers.clear()
            self._statuses.clear()
            self._doubtful.clear()
            self._deleted.clear()

    def pools_age_seconds(self) -> float:
        """Seconds since the last complete list of pools; infinite before the first."""
        return asyncio.get_running_loop().time() - self._pools_listed_at

    def pools_owed_seconds(self) -> float:
        """How long ago a list showed a pool of which the watch has told nothing since; 0 where there is none."""
        return self._pool_watch.owed_for_seconds()

    async def _when_budgets_are_known(self) -> None:
        """Pools are filled without waiting for it: missing rights to budgets must not cost any caller an agent."""
        await self._budgets.known()
        self._add_everything()

    def _add_everything(self) -> None:
        for pool in self._pools:
            self._add((pool.namespace, pool.name))
        for key in self._pods.values_of(BY_POOL):
            self._add(key)  # type: ignore[arg-type]
        for key in self._budgets.pools():
            self._add(key)

    def _add(self, key: Key) -> None:
        # Nobody would take it out again; whoever begins to work adds everything.
        if self._working:
            self.queue.add(key)

    def _look(self, key: Key, *, soon: bool) -> None:
        if soon:
            self._add(key)
        elif self._working:
            # To look costs time in proportion to the pool's pods: a storm of such events is seen to in a few looks.
            self.queue.add_after(key, LOOK_AGAIN_SECONDS)

    async def _list_pools(self) -> None:
        found: list[PoolFact] = []
        position = 0
        async for page in pages(self._api, POOLS, self._settings.namespace):
            position = position or int(page["metadata"]["resourceVersion"])
            found += filter(None, map(pool_from_json, page.get("items") or ()))
        for key in self._pools.replace(found, position):
            self._add(key)
        if owed := self.pools_owed_seconds():
            logger.warning(
                "a list showed a pool of which the watch has told nothing", extra={"seconds": round(owed, 1)}
            )
        self._pool_watch.listed({(pool.namespace, pool.name): int(pool.resource_version) for pool in found}, position)
        self._pools_listed_at = asyncio.get_running_loop().time()
        self.pools_listed.set()

    async def _work(self) -> None:
        while True:
            key = await self.queue.get()
            if not self._may_write():
                # Frozen for a while, say, and not told yet. The end of this task is on its way.
                self.queue.done(key)
                continue
            self._metrics.queued_pools.set(len(self.queue))
            self._metrics.queue_age_seconds.observe(self.queue.waited_seconds(key))
            started = asyncio.get_running_loop().time()
            outcome = "ok"
            try:
                await self.reconcile(key)
                self.queue.succeeded(key)
            except KubeApiError as error:
                outcome = "error"
                wait_seconds = error.retry_after_seconds if isinstance(error, TooManyRequests) else 0.0
                retry_seconds = self.queue.retry(key, wait_seconds)
                logger.warning(
                    "could not do all that the pool needs, trying again",
                    extra={
                        "namespace": key[0],
                        "pool": key[1],
                        "error": str(error),
                        "reason": error.reason or type(error).__name__,
                        "retry_seconds": round(retry_seconds, 2),
                    },
                )
            finally:
                self.queue.done(key)
            self._metrics.reconcile_seconds.labels(outcome).observe(asyncio.get_running_loop().time() - started)

    async def reconcile(self, key: Key) -> None:
        """Bring one pool closer to its spec.

        Raises:
            KubeApiError: something could not be written; the pool should be looked at again.
        """
        pool = self._pools.get(key)
        if pool is None:
            await self._clean_up_after(key)
            return
        self._seen.add(key)
        template = await self._templates.check(pool)
        pods = self._pods.by(BY_POOL, key)
        names = [pod.name for pod in pods]
        known = self._used_numbers.get(key)
        used = UsedNumbers.up_to(names) if known is None else known.and_of(names)
        self._used_numbers[key] = used
        decided = plan(pool, pods, self._now(), template, used)
        calls_taken_over = taken_over(pool, pods)
        takes_away = any(delete.reason in TAKEN_AWAY for delete in decided.deletes)
        if (takes_away or calls_taken_over or key in self._doubtful) and not await self._is_current(pool):
            self.queue.add(key)
            return
        self._doubtful.discard(key)
        self._count(pool, decided)
        if decided.creates or decided.deletes:
            logger.info(
                "pool changes",
                extra={
                    "namespace": pool.namespace,
                    "pool": pool.name,
                    "creates": len(decided.creates),
                    "deletes": [f"{delete.name} ({delete.reason})" for delete in decided.deletes],
                    "why": "; ".join(decided.reasons),
                },
            )
        if decided.requeue_after_seconds is not None:
            self.queue.add_after(key, decided.requeue_after_seconds)
        if template.error is not None:
            self.queue.add_after(key, self._templates.asked_again_after_seconds(key))
        failures = await _together([self._budgets.keep(key, wanted=pool.spec.disruption is Disruption.NEVER)])
        failures += await _together([self._take_over(pod) for pod in calls_taken_over])
        # Callers wait for what is created, nobody for what is deleted.
        failures += await self._create_all(pool, template, decided.creates[:WRITES_IN_A_TURN])
        failures += await self._delete_all(pool.namespace, pool.name, decided.deletes[:WRITES_IN_A_TURN])
        self._statuses.want(pool, decided.status)
        if failures:
            raise failures[0]
        if max(len(decided.deletes), len(decided.creates)) > WRITES_IN_A_TURN:
            self.queue.add(key)

    async def _is_current(self, pool: PoolFact) -> bool:
        """Ask the API server whether our copy of the pool is what it has, and mend it where it is not.

        Of two that work for a moment, one with an old copy would create what the other deletes, as fast as both can.
        """
        key = (pool.namespace, pool.name)
        try:
            found = pool_from_json(await self._api.get(POOLS, *key))
        except NotFound:
            self._pools.remove(key, pool.uid)
            return False
        if found is None:
            return True
        self._pools.apply(found)
        return (found.uid, found.generation, found.deleting) == (pool.uid, pool.generation, pool.deleting)

    async def _create_all(self, pool: PoolFact, template: Template, creates: Sequence[PodCreate]) -> list[KubeApiError]:
        async def create(item: PodCreate) -> None:
            body = build_pod(pool, item.number, template.hash, self._pod_settings, start_attempt=item.start_attempt)
            asked_at = asyncio.get_running_loop().time()
            try:
                stored = await self._api.create(PODS, pool.namespace, body)
            except AlreadyExists:
                # Somebody with the same view was faster, or our own create of before was answered too late; the watch shows it.
                self._metrics.conflicts.labels("create").inc()
                return
            except (Unprocessable, Forbidden) as error:
                self._templates.refused(pool, template.hash, f"The API server refuses a pod: {error}")
                raise
            self._metrics.creates.labels(pool.namespace, pool.name).inc()
            self._asked_for_at[stored["metadata"]["uid"]] = asked_at
            self._pods.apply(stored)

        # As a ReplicaSet does: few at first, so that a pod which is refused is not refused a hundred times.
        size = SLOW_START_FIRST
        position = 0
        while position < len(creates):
            batch = creates[position : position + size]
            failures = await _together([create(item) for item in batch])
            if failures:
                return failures
            position += size
            size = min(size * 2, self._settings.parallel_writes)
        return []

    async def _delete_all(self, namespace: str, pool: str, deletes: Sequence[PodDelete]) -> list[KubeApiError]:
        async def delete(item: PodDelete) -> None:
            known = self._pods.get(namespace, item.name)
            # The watch may show the end before the delete is answered.
            self._deleted.add(item.uid)
            try:
                await self._api.delete(
                    PODS,
                    namespace,
                    item.name,
                    uid=item.uid,
                    resource_version=item.resource_version,
                    grace_period_seconds=UNBOUND_GRACE_SECONDS,
                )
            except NotFound:
                self._deleted.discard(item.uid)
                self._pods.forget(namespace, item.name, item.uid)
                return
            except Conflict:
                # It was bound, or has changed: whatever it is now, the next look decides anew.
                self._deleted.discard(item.uid)
                self._reaped.discard(item.uid)
                self._metrics.conflicts.labels("delete").inc()
                await self._read_pod((namespace, item.name), item.uid)
                self._add((namespace, pool))
                return
            except KubeApiError:
                self._deleted.discard(item.uid)
                raise
            self._metrics.deletes.labels(namespace, pool, item.reason.value).inc()
            if item.reason is DeleteReason.STARTUP_DEADLINE:
                was_warm = known is not None and known.once_ready
                counter = self._metrics.warm_deaths if was_warm else self._metrics.start_failures
                counter.labels(namespace, pool, "deadline").inc()
                fact = self._pools.get((namespace, pool))
                if fact is not None:
                    seconds = fact.spec.startup.deadline_seconds
                    self._tell(fact, deadline_note(item.name, seconds, was_warm=was_warm))
            self._pods.update(namespace, item.name, item.uid, lambda pod: dataclasses.replace(pod, deleting=True))

        failures: list[KubeApiError] = []
        size = self._settings.parallel_writes
        for position in range(0, len(deletes), size):
            failures += await _together([delete(item) for item in deletes[position : position + size]])
        return failures

    async def _read_pod(self, key: Key, uid: str) -> None:
        """Take a pod over as it is now: what has changed in it may be nothing that a watch would tell a handler of."""
        try:
            self._pods.apply(await self._api.get(PODS, *key))
        except NotFound:
            self._pods.forget(*key, uid)

    async def _reap(self, pod: PodFact) -> None:
        """Delete a bound pod whose agent never got its session, in this version of it.

        Raises:
            KubeApiError: that did not work.
        """
        if not self._may_write():
            return
        # The watch may show the end before the delete is answered.
        self._reaped.add(pod.uid)
        item = PodDelete(pod.name, pod.uid, pod.resource_version, DeleteReason.UNDELIVERED)
        failures = await self._delete_all(pod.namespace, pod.pool, [item])
        if failures:
            raise failures[0]

    async def _clean_up_after(self, key: Key) -> None:
        """The pool is gone. Its unbound pods go with it, its bound pods go on, some with a limit; what has ended is kept for a while."""
        namespace, name = key
        if key in self._seen:
            self._seen.discard(key)
            self._templates.forget(key)
            self._used_numbers.pop(key, None)
            self._statuses.forget(key)
            self._doubtful.discard(key)
            self._metrics.forget(namespace, name)
        pods = self._pods.by(BY_POOL, key)
        if not pods:
            self._metrics.forget_all(namespace, name)
        ended = [pod for pod in pods if has_ended(pod)]
        moments: list[datetime] = []
        now = self._now()
        deletes = [
            PodDelete(pod.name, pod.uid, pod.resource_version, DeleteReason.ENDED)
            for pod in expired(ended, now, self._settings.orphan_retention_seconds, moments.append)
        ]
        draining = drain(pods, now)
        if draining.next_at is not None:
            moments.append(draining.next_at)
        failures: list[KubeApiError] = []
        if (draining.limited or draining.over) and await self._is_gone(key):
            deletes += [
                PodDelete(pod.name, pod.uid, pod.resource_version, DeleteReason.DRAINED)
                for pod in draining.over
                if pod.uid not in self._deleted
            ]
            failures += await _together([self._limit(pod, now) for pod in draining.limited])
        failures += await self._delete_all(namespace, name, deletes)
        # The budget protects the calls that go on without their pool, and nobody but us takes it away. A pod that is unbound in our copy may have
        # been bound since; its owner's end takes it away, or the watch shows its call.
        alive = any(not pod.finished for pod in pods)
        if not alive and self._budgets.has(key) and await self._is_gone(key):
            if await self._has_calls(key):
                # Their pods have not come to our copy, so nothing will tell us of their end.
                self.queue.add_after(key, UNSEEN_CALLS_SECONDS)
            else:
                failures += await _together([self._budgets.keep(key, wanted=False)])
        if moments:
            self.queue.add_after(key, (min(moments) - now).total_seconds())
        if failures:
            raise failures[0]

    async def _limit(self, pod: PodFact, now: datetime) -> None:
        """Write down when the call ends, so that a restart of ours does not begin to count anew."""
        await self._patch_drain(pod, drain_patch(pod, now))

    async def _take_over(self, pod: PodFact) -> None:
        """Take back what was written down, or the call would end at once when the pool is deleted again."""
        if pod.drain_until is not None:
            await self._patch_drain(pod, take_over_patch(pod, pod.drain_until))

    async def _patch_drain(self, pod: PodFact, operations: Sequence[Json]) -> None:
        try:
            self._pods.apply(await self._api.json_patch(PODS, pod.namespace, pod.name, operations))
        except (NotFound, Unprocessable):
            self._metrics.conflicts.labels("drain").inc()

    async def _is_gone(self, key: Key) -> bool:
        """Ask the API server itself: a pool that is not in our copy may only be new, or written in a way that we cannot read."""
        try:
            await self._api.get(POOLS, *key)
        except NotFound:
            return True
        return False

    async def _has_calls(self, key: Key) -> bool:
        """Ask the API server itself: a budget is deleted once, and nobody would make another one for a call that our copy did not show."""
        namespace, name = key
        selector = f"{LABEL_POOL}={name},{LABEL_STATE}={BindState.BOUND.value}"
        async for page in pages(self._api, PODS, namespace, label_selector=selector):
            for pod in filter(None, map(pod_from_json, page.get("items") or ())):
                if (pod.pool, pod.state) == (name, BindState.BOUND) and not pod.finished:
                    return True
        return False

    def _count(self, pool: PoolFact, decided: Plan) -> None:
        for state in POD_STATES:
            self._metrics.pods.labels(pool.namespace, pool.name, state).set(decided.counts.get(state, 0))
        self._metrics.warm_target.labels(pool.namespace, pool.name).set(decided.warm_target)
        recommended = decided.status.get("recommendedReplicas")
        self._metrics.recommended.labels(pool.namespace, pool.name).set(recommended or 0)

    def _pod_changed(self, key: Key, old: PodFact | None, new: PodFact | None) -> None:
        soon = old is None or new is None or _what_matters(old) != _what_matters(new)
        for pod in (old, new):
            if pod is not None:
                self._look((pod.namespace, pod.pool), soon=soon)
        if self._working:
            for happening in happenings(old, new):
                self._happened(happening)
        if self._working and old is not None and _was_taken_away(old, new) and old.uid not in self._deleted:
            self._doubtful.add((old.namespace, old.pool))
        if new is None and old is not None:
            self._deleted.discard(old.uid)
            self._asked_for_at.pop(old.uid, None)
            self._reaped.discard(old.uid)

    def _happened(self, happening: Happening) -> None:
        pod = happening.pod
        pool = (pod.namespace, pod.pool)
        if pod.uid in self._reaped and happening.kind in (Kind.SESSION_ENDED, Kind.SESSION_DROPPED):
            # Nobody was in it: neither a call that ended nor one that was lost.
            happening = Happening(Kind.SESSION_UNDELIVERED, pod, UNDELIVERED)
        match happening.kind:
            case Kind.BECAME_WARM:
                asked_at = self._asked_for_at.pop(pod.uid, None)
                seconds = (
                    asyncio.get_running_loop().time() - asked_at
                    if asked_at is not None
                    else (self._now() - pod.created_at).total_seconds()
                )
                self._metrics.startup_seconds.labels(*pool).observe(max(0.0, seconds))
                for phase, phase_seconds in startup_phases_seconds(pod).items():
                    self._metrics.startup_phase_seconds.labels(*pool, phase).observe(phase_seconds)
            case Kind.SESSION_STARTED:
                self._statuses.count(pool, "started")
                if is_hit(pod):
                    self._statuses.count(pool, "hits")
                self._metrics.sessions_started.labels(*pool).inc()
                if pod.waited_seconds is not None:
                    self._metrics.session_waited_seconds.labels(*pool).observe(pod.waited_seconds)
                if pod.bound_at is not None:
                    self._metrics.event_lag_seconds.observe(max(0.0, (self._now() - pod.bound_at).total_seconds()))
            case Kind.SESSION_ENDED | Kind.SESSION_UNDELIVERED:
                ended = happening.kind is Kind.SESSION_ENDED
                self._statuses.count(pool, "ended" if ended else "undelivered")
                self._metrics.sessions_ended.labels(*pool, happening.reason).inc()
            case Kind.SESSION_DROPPED:
                self._statuses.count(pool, "dropped")
                self._metrics.sessions_dropped.labels(*pool, happening.reason).inc()
            case Kind.START_FAILED:
                self._metrics.start_failures.labels(*pool, happening.reason).inc()
            case Kind.WARM_POD_DIED:
                self._metrics.warm_deaths.labels(*pool, happening.reason).inc()
        if self._webhooks is not None:
            self._webhooks.tell(happening)
        note = note_of(happening)
        fact = self._pools.get(pool)
        if note is not None and fact is not None:
            self._tell(fact, note)

    def _tell(self, pool: PoolFact, note: Note) -> None:
        if self._recorder is not None:
            self._recorder.note(pool, note)


def _was_taken_away(old: PodFact, new: PodFact | None) -> bool:
    """Whether an unbound pod was deleted, by whomever."""
    going = new is None or (new.uid == old.uid and new.deleting)
    return going and old.state is BindState.WARM and not old.finished and not old.deleting


def _what_matters(pod: PodFact) -> tuple[object, ...]:
    """What of a pod decides whether another one is missing."""
    return pod.uid, pod.pool, pod.state, pod.finished, pod.deleting


async def _together(actions: Sequence[Awaitable[None]]) -> list[KubeApiError]:
    """Await all of them, whatever each does; returns what the API server would not do.

    Raises:
        BaseException: the first error of another kind.
    """
    failures: list[KubeApiError] = []
    for result in await asyncio.gather(*actions, return_exceptions=True):
        if isinstance(result, KubeApiError):
            failures.append(result)
        elif isinstance(result, BaseException):
            raise result
    return failures
