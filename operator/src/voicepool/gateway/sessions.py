"""The life of a start: find a pod, bind it, deliver the assignment, answer; and what becomes of a pod when that does not work out.

Invariants:

* A session is given to another pod only after the agent before it refused, was never reached, or the assignment that it was sent has expired.
* No assignment is good for longer than `DELIVERY_DEADLINE_SECONDS` after the bind, also one from a gateway that was frozen before it signed.
* A pod whose agent certainly never took the session is deleted, with preconditions on uid and resourceVersion. One that cannot be asked is left
  alone: its deadline, its probes and the operator decide.
* Every wait has a limit; a request that fails or whose caller has gone leaves no reservation, no place in the queue, and no bound pod behind.
* Of the requests with one session id, one at a time works here; against other gateways the API server's consistent lists decide (see `_rival`).
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Collection, Coroutine, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, Literal

from voicepool.agents import AgentStatus
from voicepool.binding import DELIVERY_DEADLINE_SECONDS, active_deadline_seconds, bind_patch, is_candidate
from voicepool.gateway.allocator import Allocator
from voicepool.gateway.assignments import Assignment, Signer
from voicepool.gateway.delivery import Accepted, Courier, NotReached, Refused, Unknown
from voicepool.gateway.demand import Demand
from voicepool.gateway.errors import (
    AgentsRefused,
    AgentUnreachable,
    ClusterUnavailable,
    DeadlinePassed,
    GatewayError,
    LiveKitUnavailable,
    NotJoined,
    NoWarmAgent,
    PoolAtCapacity,
    PoolNotFound,
    SessionElsewhere,
    SessionEnded,
)
from voicepool.gateway.livekit import LiveKitServer, LiveKitServers, Rooms, agent_identity, agent_token
from voicepool.gateway.metrics import GatewayMetrics
from voicepool.gateway.options import GatewayOptions
from voicepool.gateway.view import ClusterView, PoolKey, is_live
from voicepool.kube.api import (
    PODS,
    AlreadyExists,
    Conflict,
    Forbidden,
    Json,
    KubeApi,
    KubeApiError,
    NotFound,
    ServerFault,
    TooManyRequests,
    Unprocessable,
    Unreachable,
)
from voicepool.model import ANNOTATION_BOUND_BY, LABEL_SESSION, BindState, PodFact, PoolFact

log = logging.getLogger("voicepool.gateway")

_CANCEL_GRACE_SECONDS = 5
_SETTLE_SECONDS = 2.0
"""Past an assignment's expiry, before its agent is taken at its word that it never got it: the two clocks are not one."""


@dataclass(frozen=True, slots=True)
class StartRequest:
    """Somebody wants an agent."""

    namespace: str
    pool: str
    session_id: str
    keyed: bool
    """The caller may send the same session again, here or to another gateway."""
    body: Any = field(default=None, repr=False)
    traceparent: str | None = None

    @property
    def key(self) -> PoolKey:
        """The pool."""
        return (self.namespace, self.pool)


@dataclass(frozen=True, slots=True)
class Started:
    """A session that an agent has taken."""

    session_id: str
    pod: PodFact
    room: str
    server: LiveKitServer
    cold_start: bool
    seconds: float


@dataclass(slots=True)
class _Flight:
    request: StartRequest
    task: asyncio.Task[Started]
    callers: int = 0
    abandoned: bool = False
    """Every caller has gone."""
    waiting: bool = True
    """Nothing is bound yet, so it may simply stop."""


@dataclass(slots=True)
class _Hold:
    """A pod that was bound for a session whose agent has not accepted yet."""

    pod: PodFact
    sent_until: datetime | None = None
    """The expiry of the last assignment that may have arrived; None: none was sent."""


class Sessions:
    """Starts and ends sessions.

    Args:
        kube: the API server.
        view: what the informers know.
        allocator: who gets which pod, inside this gateway.
        courier: talks to agents.
        signer: signs their orders.
        servers: the LiveKit server of each pool.
        rooms: their rooms.
        options: times and limits.
        metrics: what is counted.
        identity: this gateway, for ``bound-by``.
        pod_fact: what is kept of a pod.
        cold_pod: the pod to create for one session, given the names that are taken.
        now: the current time, with its zone.
        jitter: a number in [0, 1).
    """

    def __init__(
        self,
        *,
        kube: KubeApi,
        view: ClusterView,
        allocator: Allocator,
        courier: Courier,
        signer: Signer,
        servers: LiveKitServers,
        rooms: Rooms,
        options: GatewayOptions,
        metrics: GatewayMetrics,
        identity: str,
        pod_fact: Callable[[Json], PodFact | None],
        cold_pod: Callable[[PoolFact, str, Collection[str]], Json],
        now: Callable[[], datetime],
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self._kube = kube
        self._view = view
        self._allocator = allocator
        self._courier = courier
        self._signer = signer
        self._servers = servers
        self._rooms = rooms
        self._options = options
        self._metrics = metrics
        self._identity = identity
        self._pod_fact = pod_fact
        self._cold_pod = cold_pod
        self._now = now
        self._jitter = jitter
        self._flights: dict[tuple[PoolKey, str], _Flight] = {}
        self._background: set[asyncio.Task[None]] = set()
        self._creating: dict[PoolKey, int] = {}
        self.demand = Demand(allocator.waiting, now)
        """Callers who were not bound."""

    # -- starting ------------------------------------------------------------------------------------------------------------------

    async def start(self, request: StartRequest) -> Started:
        """Give a session its agent, or say why not.

        A caller who goes away cancels this call; the work behind it stops if nothing was bound yet, and is finished or undone otherwise.

        Raises:
            GatewayError: with the words for the caller.
        """
        key = (request.key, request.session_id)
        flight = self._flights.get(key)
        if flight is None:
            task = asyncio.create_task(self._fly(request), name=f"start {request.session_id}")
            flight = _Flight(request, task)
            self._flights[key] = flight
            task.add_done_callback(lambda _task: self._flights.pop(key, None))
        flight.callers += 1
        flight.abandoned = False
        try:
            return await asyncio.shield(flight.task)
        except asyncio.CancelledError:
            flight.callers -= 1
            if flight.callers == 0:
                self._caller_has_gone(flight)
            raise

    def _caller_has_gone(self, flight: _Flight) -> None:
        flight.abandoned = True
        if flight.task.done():
            if not flight.task.cancelled() and flight.task.exception() is None:
                self._end_unclaimed(flight.request, flight.task.result())
        elif flight.waiting:
            flight.task.cancel()
        # The outcome is nobody's any more; without this asyncio would report an exception that was never fetched.
        flight.task.add_done_callback(lambda task: None if task.cancelled() else task.exception())

    def _end_unclaimed(self, request: StartRequest, started: Started) -> None:
        # Whoever named the session can come back for it; else nobody can, and the agent need not wait for its join timeout.
        if not request.keyed:
            log.info("the caller has gone; the session is ended", extra=_words(request, started.pod))
            self._spawn(self._end_quietly(started.pod, request.session_id))

    async def _fly(self, request: StartRequest) -> Started:
        # The flight is registered right after this task is made; nothing of it runs before that.
        await asyncio.sleep(0)
        flight = self._flights[request.key, request.session_id]
        labels = request.key
        began = asyncio.get_running_loop().time()
        hold: list[_Hold] = []
        outcome = "failed"
        try:
            started = await self._attempts(flight, began, hold)
            outcome = "started"
        except GatewayError as error:
            outcome = error.code.lower()
            if isinstance(error, NoWarmAgent | PoolAtCapacity):
                self.demand.rejected(request.key, request.session_id)
            log.warning("a start failed: %s", error.detail, extra=_words(request) | {"code": error.code})
            raise
        except asyncio.CancelledError:
            outcome = "caller_gone"
            if flight.waiting:
                self.demand.rejected(request.key, request.session_id)
            raise
        finally:
            for held in hold:
                self._spawn(self._give_up(held, request, for_good=True))
            self._metrics.starts.labels(*labels, outcome).inc()
        self.demand.started(request.key, request.session_id)
        self._metrics.start_seconds.labels(*labels).observe(started.seconds)
        log.info(
            "a session has its agent",
            extra=_words(request, started.pod)
            | {"seconds": round(started.seconds, 4), "cold_start": started.cold_start},
        )
        if flight.abandoned:
            self._end_unclaimed(request, started)
        return started

    async def _attempts(self, flight: _Flight, began: float, hold: list[_Hold]) -> Started:
        request = flight.request
        pool = self.pool(request.key)
        server = await self._servers.of(pool)
        room = room_name(request.namespace, request.pool, request.session_id)
        mine: set[str] = set()
        refusals: list[str] = []
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._options.start_deadline_seconds

        def answer(pod: PodFact) -> Started:
            return Started(
                session_id=request.session_id,
                pod=pod,
                room=pod.room or room,
                server=server,
                cold_start=pod.cold_start == request.session_id,
                seconds=loop.time() - began,
            )

        try:
            while True:
                if request.keyed:
                    async with asyncio.timeout_at(deadline):
                        known = await self._known(request, mine)
                    if known is not None:
                        return answer(known)
                waited = loop.time()
                flight.waiting = True
                candidate = await self._acquire(pool, request)
                flight.waiting = False
                # Waiting for a pod has its own limits, which the pool sets.
                deadline += loop.time() - waited
                async with asyncio.timeout_at(deadline):
                    try:
                        await self._rooms.create(
                            server, room, empty_timeout_seconds=pool.spec.session.join_timeout_seconds + 30
                        )
                    except BaseException:
                        self._allocator.release(candidate)
                        raise
                    bound = await self._bind(candidate, pool, request, room, loop.time() - began, hold)
                    if bound is None:
                        continue
                    mine.add(bound.uid)
                    if request.keyed and await self._rival(request, mine):
                        await self._yield(hold)
                        continue
                    since_bind = loop.time()
                    refusal = await self._deliver(hold[-1], request, server, room)
                    if refusal is None:
                        hold.clear()
                        self._metrics.delivery_seconds.labels(*request.key).observe(loop.time() - since_bind)
                        return answer(bound)
                    refusals.append(refusal)
                    self._metrics.refusals.labels(*request.key, refusal).inc()
                    log.warning(
                        "an agent did not take the session; the next one gets it",
                        extra=_words(request, bound) | {"code": refusal},
                    )
                    self._spawn(self._give_up(hold.pop(), request, for_good=False))
                    if len(refusals) >= self._options.max_refusals:
                        raise AgentsRefused(
                            f"{len(refusals)} agents of the pool {request.namespace}/{request.pool} in a row did not take the session "
                            f"({', '.join(sorted(set(refusals)))}); look at the agents' logs.",
                            retry_after_seconds=5,
                        )
        except TimeoutError:
            raise DeadlinePassed(
                f"No agent of the pool {request.namespace}/{request.pool} took the session within "
                f"{self._options.start_deadline_seconds:g} s.",
                retry_after_seconds=2,
            ) from None

    def pool(self, key: PoolKey) -> PoolFact:
        """A pool by its key.

        Raises:
            PoolNotFound: it does not exist, or is being deleted.
        """
        pool = self._view.pools.get(key)
        if pool is None:
            raise PoolNotFound(f"There is no VoiceAgentPool {key[0]}/{key[1]}.")
        if pool.deleting:
            raise PoolNotFound(f"The VoiceAgentPool {key[0]}/{key[1]} is being deleted and takes no new sessions.")
        return pool

    # -- a pod for the session -----------------------------------------------------------------------------------------------------

    async def _acquire(self, pool: PoolFact, request: StartRequest) -> PodFact:
        pod = self._allocator.take(request.key, request.session_id)
        if pod is not None:
            return pod
        policy = pool.spec.on_empty
        if policy.policy == "Reject":
            raise self._nothing_left(pool, NoWarmAgent("", status=429))
        if policy.policy == "ColdStart":
            return await self._start_cold(pool, request)
        try:
            async with asyncio.timeout(policy.timeout_seconds):
                return await self._allocator.wait(request.key, request.session_id)
        except TimeoutError:
            raise self._nothing_left(pool, NoWarmAgent("", status=503), waited=policy.timeout_seconds) from None

    def _nothing_left(self, pool: PoolFact, error: NoWarmAgent, waited: int = 0) -> GatewayError:
        pods = [pod for pod in self._view.pods((pool.namespace, pool.name)) if is_live(pod)]
        bound = sum(pod.state is BindState.BOUND for pod in pods)
        taken = sum(is_candidate(pod) for pod in pods)
        after = f" after {waited} s in the queue" if waited else ""
        where = f"the pool {pool.namespace}/{pool.name}"
        retry = 2.0 if len(pods) > bound else 5.0
        if bound + taken >= pool.spec.max_pods:
            return PoolAtCapacity(
                f"All {pool.spec.max_pods} pods (maxPods) of {where} are in sessions{after}; try again later or raise maxPods.",
                retry_after_seconds=5,
            )
        return NoWarmAgent(
            f"No warm agent in {where}{after}: {bound + taken} of its pods are in sessions or about to be, {len(pods) - bound - taken} are starting.",
            status=error.status,
            retry_after_seconds=retry,
        )

    async def _start_cold(self, pool: PoolFact, request: StartRequest) -> PodFact:
        """Create a pod for this session alone and wait until it is Ready."""
        key = request.key
        live = sum(is_live(pod) for pod in self._view.pods(key)) + self._creating.get(key, 0)
        if live >= pool.spec.max_pods:
            raise PoolAtCapacity(
                f"The pool {key[0]}/{key[1]} has all of its {pool.spec.max_pods} pods (maxPods); none can be started for this call.",
                retry_after_seconds=5,
            )
        created: Json | None = None
        self._creating[key] = self._creating.get(key, 0) + 1
        counted = True
        ready = False
        try:
            async with asyncio.timeout(pool.spec.startup.deadline_seconds):
                created = await self._create(pool, request)
                self._metrics.cold_starts.labels(*key).inc()
                if (fact := self._pod_fact(created)) is not None and fact.uid not in {
                    pod.uid for pod in self._view.pods(key)
                }:
                    # Known from now on, so that maxPods counts it once whether or not the informer has seen it.
                    self._view.pod_seen(fact)
                self._creating[key] -= 1
                counted = False
                pod = await self._allocator.wait(key, request.session_id, only_uid=created["metadata"]["uid"])
                ready = True
                return pod
        except TimeoutError:
            raise NoWarmAgent(
                f"The agent that was started for this call in the pool {key[0]}/{key[1]} was not Ready within "
                f"{pool.spec.startup.deadline_seconds} s (startup.deadlineSeconds).",
                retry_after_seconds=5,
            ) from None
        except KubeApiError as error:
            raise _cluster_error(error, "create a pod in", pool) from None
        finally:
            if counted:
                self._creating[key] -= 1
            if created is not None and not ready:
                self._spawn(self._delete_unbound(key, created))

    async def _create(self, pool: PoolFact, request: StartRequest) -> Json:
        taken = {pod.name for pod in self._view.pods(request.key)}
        while True:
            body = self._cold_pod(pool, request.session_id, taken)
            try:
                return await self._kube.create(PODS, pool.namespace, body)
            except AlreadyExists:
                taken.add(body["metadata"]["name"])
            except Unreachable:
                # The name is the same the next time: if the first one was made after all, this answers AlreadyExists, and that pod is found.
                name = body["metadata"]["name"]
                try:
                    found = await self._kube.get(PODS, pool.namespace, name)
                except KubeApiError:
                    await self._pause()
                    continue
                fact = self._pod_fact(found)
                if fact is not None and fact.cold_start == request.session_id:
                    return found
                taken.add(name)

    async def _delete_unbound(self, key: PoolKey, created: Json) -> None:
        """Delete a pod that was started for a caller who has gone; a bind that came first makes this fail, as it must."""
        metadata = created["metadata"]
        for _ in range(3):
            try:
                pod = await self._kube.get(PODS, key[0], metadata["name"])
                fact = self._pod_fact(pod)
                if fact is None or fact.uid != metadata["uid"] or fact.state is not BindState.WARM or fact.deleting:
                    return
                await self._kube.delete(PODS, key[0], fact.name, uid=fact.uid, resource_version=fact.resource_version)
            except Conflict:
                continue
            except KubeApiError:
                return
            else:
                return

    # -- the bind ------------------------------------------------------------------------------------------------------------------

    async def _bind(
        self,
        pod: PodFact,
        pool: PoolFact,
        request: StartRequest,
        room: str,
        waited_seconds: float,
        hold: list[_Hold],
    ) -> PodFact | None:
        """Bind a reserved pod; None when it is lost to another, or no longer fit."""
        now = self._now()
        operations = bind_patch(
            pod,
            session_id=request.session_id,
            room=room,
            bound_at=now,
            bound_by=self._identity,
            active_deadline_seconds=active_deadline_seconds(pod, pool.spec.session.max_duration_seconds, now),
            disruption=pool.spec.disruption,
            drain_seconds=pool.spec.drain_seconds,
            waited_seconds=waited_seconds,
        )
        loop = asyncio.get_running_loop()
        perhaps_written = False
        try:
            while True:
                began = loop.time()
                try:
                    stored = await self._kube.json_patch(PODS, pod.namespace, pod.name, operations)
                except TooManyRequests as error:
                    await asyncio.sleep(error.retry_after_seconds)
                    continue
                except (Unreachable, ServerFault):
                    # It may have been written. The same patch again is harmless: it fails where the first one came through.
                    perhaps_written = True
                    await self._pause()
                    continue
                except (Unprocessable, Conflict, NotFound):
                    if perhaps_written and (ours := await self._ours(pod, request)) is not None:
                        hold.append(_Hold(ours))
                        return ours
                    self._allocator.lost(pod)
                    self._metrics.conflicts.labels(*request.key).inc()
                    return None
                except KubeApiError as error:
                    self._allocator.lost(pod)
                    raise _cluster_error(error, "bind a pod of", pool) from None
                bound = self._pod_fact(stored)
                if bound is None:
                    raise ClusterUnavailable(
                        f"The API server answered a bind of {pod.namespace}/{pod.name} with something else."
                    )
                hold.append(_Hold(bound))
                self._metrics.bind_seconds.labels(*request.key).observe(loop.time() - began)
                return bound
        except asyncio.CancelledError:
            # The time is up in the middle of a patch; whether it was written is for the next look to say.
            self._spawn(self._undo_unknown_bind(pod, request))
            raise

    async def _ours(self, pod: PodFact, request: StartRequest) -> PodFact | None:
        """The pod as it is now, if this gateway bound it to the session.

        The session alone does not tell: another gateway that was asked for the same one prefers the same pod.
        """
        try:
            stored = await self._kube.get(PODS, pod.namespace, pod.name)
        except KubeApiError:
            return None
        fact = self._pod_fact(stored)
        bound_by = (stored["metadata"].get("annotations") or {}).get(ANNOTATION_BOUND_BY)
        if fact is None or fact.uid != pod.uid or fact.session != request.session_id or bound_by != self._identity:
            return None
        return fact

    async def _undo_unknown_bind(self, pod: PodFact, request: StartRequest) -> None:
        await asyncio.sleep(_SETTLE_SECONDS)
        ours = await self._ours(pod, request)
        if ours is None:
            self._allocator.lost(pod)
        else:
            await self._give_up(_Hold(ours), request, for_good=True)

    # -- the delivery --------------------------------------------------------------------------------------------------------------

    async def _deliver(self, hold: _Hold, request: StartRequest, server: LiveKitServer, room: str) -> str | None:
        """Bring the assignment to the agent; None when it was accepted, else why it certainly was not.

        When no answer comes, the agent is asked until the assignment has expired, and is brought it again if it says that it is parked (the same
        session
        twice is harmless there). Only past the expiry, from which on agent and LiveKit server refuse it, is the session free for another pod.
        """
        expires_at = min(
            self._now() + timedelta(seconds=self._options.assignment_seconds), _last_delivery(hold.pod, self._now())
        )
        while True:
            hold.sent_until = expires_at
            match await self._courier.bind(hold.pod, self._order(hold.pod, request, server, room, expires_at)):
                case Accepted():
                    return None
                case Refused(code):
                    if code == "ALREADY_BOUND":
                        # Whatever it does, it does not do it for us; it is not ours to delete.
                        return code
                    hold.sent_until = None
                    return code
                case NotReached():
                    hold.sent_until = None
                    return "NOT_REACHED"
                case Unknown():
                    pass
            log.warning("an agent did not answer; it is asked", extra=_words(request, hold.pod))
            while (left := (expires_at - self._now()).total_seconds()) > 0:
                status = await self._courier.status(hold.pod)
                if status is not None and status.has(request.session_id):
                    return None
                if status is not None and status.state == "ending":
                    return "ENDING"
                if status is not None and status.state == "parked" and left > self._options.status_interval_seconds:
                    break
                await asyncio.sleep(min(self._options.status_interval_seconds, max(0.0, left)))
            else:
                return await self._after_expiry(hold, request, server, room)

    async def _after_expiry(self, hold: _Hold, request: StartRequest, server: LiveKitServer, room: str) -> str | None:
        status = await self._courier.status(hold.pod)
        if status is not None:
            return None if status.has(request.session_id) else "TIMED_OUT"
        # It cannot be asked, but it may be in the room for all that.
        try:
            present = await self._rooms.has(server, room, agent_identity(request.session_id))
        except LiveKitUnavailable:
            present = False
        return None if present else "TIMED_OUT"

    def _order(
        self, pod: PodFact, request: StartRequest, server: LiveKitServer, room: str, expires_at: datetime
    ) -> str:
        ttl_seconds = (expires_at - self._now()).total_seconds() - self._options.livekit_token_leeway_seconds
        token = agent_token(server, room=room, identity=agent_identity(request.session_id), ttl_seconds=ttl_seconds)
        assignment = Assignment(
            session_id=request.session_id,
            pool=f"{request.namespace}/{request.pool}",
            room=room,
            url=server.url,
            token=token,
            body=request.body,
            traceparent=request.traceparent,
        )
        return self._signer.assignment(pod.uid, assignment, expires_at=expires_at)

    # -- pods that are not needed after all ----------------------------------------------------------------------------------------

    async def _give_up(self, hold: _Hold, request: StartRequest, *, for_good: bool) -> None:
        """See to a pod that was bound here without the session coming to it.

        Args:
            hold: the pod, and until when an assignment may still be taken by it.
            request: whose it was.
            for_good: nobody got the session in its place, so an agent that took it after all is ended (unless its caller may come back).
        """
        pod = hold.pod
        if hold.sent_until is not None:
            wait_seconds = (hold.sent_until - self._now()).total_seconds() + _SETTLE_SECONDS
            await asyncio.sleep(max(0.0, wait_seconds))
            status = await self._courier.status(pod)
            if status is None:
                return self._gave_up(pod, request, "left")
            if status.has(request.session_id):
                if for_good and request.keyed:
                    return self._gave_up(pod, request, "kept")
                await self._end_quietly(pod, request.session_id)
                return self._gave_up(pod, request, "ended")
            if status.state != "parked":
                return self._gave_up(pod, request, "left")
        deleted = await self._delete_undelivered(pod, request)
        return self._gave_up(pod, request, "deleted" if deleted else "left")

    def _gave_up(self, pod: PodFact, request: StartRequest, result: str) -> None:
        self._metrics.abandoned.labels(*request.key, result).inc()
        log.info("a bound pod was given up", extra=_words(request, pod) | {"result": result})

    async def _delete_undelivered(self, pod: PodFact, request: StartRequest) -> bool:
        """Delete a pod of which it is certain that its agent has no session; whether that worked."""
        seen = pod
        for _ in range(5):
            try:
                await self._kube.delete(
                    PODS, seen.namespace, seen.name, uid=seen.uid, resource_version=seen.resource_version
                )
            except Conflict:
                # The kubelet writes the status all the time; look again whether it is still what it was.
                again = await self._ours(pod, request)
                if again is None or again.deleting or not is_live(again):
                    return again is not None
                seen = again
            except NotFound:
                return True
            except (Unreachable, ServerFault, TooManyRequests):
                await self._pause()
            except KubeApiError:
                return False
            else:
                return True
        return False

    async def _end_quietly(self, pod: PodFact, session_id: str) -> None:
        await self._courier.end(pod, self._end_order(pod, session_id, "cancel"))

    def _end_order(self, pod: PodFact, session_id: str, action: Literal["drain", "cancel"]) -> str:
        expires_at = self._now() + timedelta(seconds=self._options.assignment_seconds)
        return self._signer.end(pod.uid, session_id, action, expires_at=expires_at)

    # -- the same session, elsewhere -----------------------------------------------------------------------------------------------

    async def carriers(self, namespace: str, session_id: str) -> list[PodFact]:
        """The pods that carry a session, by a consistent list: every bind that was answered before this call is in it.

        Raises:
            ClusterUnavailable: the API server did not answer.
        """
        found: list[PodFact] = []
        continue_token = ""
        try:
            while True:
                # No resourceVersion: the API server answers from the latest state, not from whatever its cache holds.
                page = await self._kube.list_page(
                    PODS, namespace, label_selector=f"{LABEL_SESSION}={session_id}", continue_token=continue_token
                )
                found += [fact for item in page.get("items") or [] if (fact := self._pod_fact(item)) is not None]
                continue_token = (page.get("metadata") or {}).get("continue") or ""
                if not continue_token:
                    return found
        except KubeApiError as error:
            raise ClusterUnavailable(
                f"The Kubernetes API did not list the session's pods in {namespace} ({type(error).__name__}).",
                retry_after_seconds=2,
            ) from None

    async def _rival(self, request: StartRequest, mine: Collection[str]) -> bool:
        """Whether another pod carries this session, seen after our own bind.

        Two gateways that start one session each write (bind) and then read (a consistent list). Writes and such reads are in one order on the API
        server,
        so of two binds at least one is followed by a list that shows the other. Whoever sees another yields, always, and has delivered nothing yet;
        so two
        agents never get the session. Both may see each other and yield; then both try again after a random pause. A rule like "the smaller uid stays"
        would be wrong: the other may have listed before our bind, seen nobody, and delivered.
        """
        return any(
            pod.uid not in mine and is_live(pod) for pod in await self.carriers(request.namespace, request.session_id)
        )

    async def _yield(self, hold: list[_Hold]) -> None:
        held = hold[-1]
        # Nothing was sent to this pod's agent. The delete fails if anything about the pod has changed but its status.
        request = StartRequest(held.pod.namespace, held.pod.pool, held.pod.session or "", keyed=True)
        deleted = await self._delete_undelivered(held.pod, request)
        hold.pop()
        self._gave_up(held.pod, request, "yielded" if deleted else "left")
        await self._pause()

    async def _known(self, request: StartRequest, mine: set[str]) -> PodFact | None:
        """The pod whose agent has this session already; None when there is none and a new one may be bound.

        Waits while another gateway is about to deliver. A pod whose gateway died between bind and delivery is deleted once that gateway's own
        assignment can no longer arrive.

        Raises:
            SessionEnded: it had its agent and is over.
            SessionElsewhere: another pool has it.
        """
        while True:
            pods = [pod for pod in await self.carriers(request.namespace, request.session_id) if pod.uid not in mine]
            if not pods:
                return None
            if any(pod.pool != request.pool for pod in pods):
                raise SessionElsewhere(
                    f"The session {request.session_id} belongs to another pool of {request.namespace}."
                )
            live = [pod for pod in pods if is_live(pod)]
            if not live:
                raise SessionEnded(
                    f"The session {request.session_id} has ended; start a new one with another id or Idempotency-Key."
                )
            statuses = await asyncio.gather(*(self._courier.status(pod) for pod in live))
            for pod, status in zip(live, statuses, strict=True):
                if status is not None and status.has(request.session_id):
                    return pod
            if all(status is not None and status.state == "ending" and status.session_id for status in statuses):
                raise SessionEnded(
                    f"The session {request.session_id} is ending; start a new one with another id or Idempotency-Key."
                )
            for pod in self._undelivered(live, statuses):
                if await self._delete_undelivered(pod, request):
                    mine.add(pod.uid)
                    self._gave_up(pod, request, "deleted")
            await self._pause()

    def _undelivered(self, live: Sequence[PodFact], statuses: Sequence[AgentStatus | None]) -> Iterator[PodFact]:
        """The pods that another gateway bound and will never deliver to: their agents are parked, and no assignment for them can be good."""
        for pod, status in zip(live, statuses, strict=True):
            if status is not None and status.state == "parked" and not pod.deleting and pod.bound_at is not None:
                settled_at = _last_delivery(pod, pod.bound_at) + timedelta(seconds=_SETTLE_SECONDS)
                if self._now() > settled_at:
                    yield pod

    # -- later -------------------------------------------------------------------------------------------------------------------

    async def wait_joined(self, started: Started, seconds: float, *, required: bool) -> str:
        """Wait until a started session's agent is in the room; its state then.

        Raises:
            NotJoined: it is not, and the caller said that it must be.
        """
        status = await self._courier.wait_joined(started.pod, seconds)
        state = status.state if status is not None and status.session_id == started.session_id else "unknown"
        if required and state != "joined":
            raise NotJoined(
                f"The agent {started.pod.name} accepted the session {started.session_id} but did not join its room within {seconds:g} s.",
                retry_after_seconds=2,
            )
        return state

    async def status(self, pod: PodFact) -> AgentStatus | None:
        """What the agent of a pod says about itself; None when it cannot be asked."""
        return await self._courier.status(pod) if pod.pod_ip else None

    async def end(self, pod: PodFact, session_id: str, mode: Literal["drain", "cancel"]) -> None:
        """End a session that runs.

        An agent that cannot be reached cannot say goodbye; for ``cancel`` its pod is deleted then, as an explicit end allows.

        Raises:
            AgentUnreachable: ``drain`` could not be asked for, or ``cancel`` could not be enforced.
        """
        outcome = await self._courier.end(pod, self._end_order(pod, session_id, mode))
        log.info("a session is ended on request", extra={"session": session_id, "pod": pod.name, "mode": mode})
        if isinstance(outcome, Accepted):
            return
        if mode == "cancel":
            await self._delete_carrier(pod, session_id)
            return
        raise AgentUnreachable(
            f"The agent of the session {session_id} did not take the order to drain; '?mode=cancel' ends it all the same.",
            retry_after_seconds=2,
        )

    async def _delete_carrier(self, pod: PodFact, session_id: str) -> None:
        for _ in range(5):
            carriers = [one for one in await self.carriers(pod.namespace, session_id) if one.uid == pod.uid]
            if not carriers or carriers[0].deleting or not is_live(carriers[0]):
                return
            seen = carriers[0]
            try:
                await self._kube.delete(
                    PODS,
                    seen.namespace,
                    seen.name,
                    uid=seen.uid,
                    resource_version=seen.resource_version,
                    grace_period_seconds=_CANCEL_GRACE_SECONDS,
                )
            except Conflict:
                continue
            except NotFound:
                return
            except KubeApiError:
                await self._pause()
                continue
            else:
                return
        raise AgentUnreachable(
            f"The session {session_id} could not be ended: its agent does not answer and its pod could not be deleted.",
            retry_after_seconds=2,
        )

    async def close(self, *, timeout_seconds: float) -> None:
        """Wait for what still runs in the background (starts, and pods that are given up), then stop it."""
        tasks = {*self._background, *(flight.task for flight in self._flights.values())}
        if tasks:
            _, pending = await asyncio.wait(tasks, timeout=timeout_seconds)
            for task in pending:
                task.cancel()
            await asyncio.gather(*pending, return_exceptions=True)

    async def settled(self) -> None:
        """Wait until nothing runs in the background."""
        while self._background:
            await asyncio.gather(*self._background)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._background.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("work in the background failed", exc_info=error)

    async def _pause(self) -> None:
        await asyncio.sleep(0.05 + 0.2 * self._jitter())


def _last_delivery(pod: PodFact, otherwise: datetime) -> datetime:
    """Until when an assignment for a bound pod may be good."""
    return (pod.bound_at or otherwise) + timedelta(seconds=DELIVERY_DEADLINE_SECONDS)


def room_name(namespace: str, pool: str, session_id: str) -> str:
    """The room of a session. Names of namespaces and pools have no underscore, so no two sessions share a room."""
    return f"{namespace}_{pool}_{session_id}"


def _cluster_error(error: KubeApiError, what: str, pool: PoolFact) -> ClusterUnavailable:
    where = f"the pool {pool.namespace}/{pool.name}"
    if isinstance(error, Forbidden):
        return ClusterUnavailable(f"The gateway's account may not {what} {where}; check the chart's RBAC.")
    return ClusterUnavailable(
        f"The Kubernetes API refused to {what} {where} ({type(error).__name__}).", retry_after_seconds=2
    )


def _words(request: StartRequest, pod: PodFact | None = None) -> dict[str, Any]:
    words: dict[str, Any] = {"session": request.session_id, "namespace": request.namespace, "pool": request.pool}
    if pod is not None:
        words["pod"] = pod.name
    return words
