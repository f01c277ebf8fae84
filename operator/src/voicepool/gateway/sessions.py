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
from collections.abc import Callable, Collection, Container, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal

from voicepool.agents import AgentStatus
from voicepool.gateway.acquirer import Acquirer
from voicepool.gateway.allocator import Allocator
from voicepool.gateway.assignments import Signer, require_deliverable
from voicepool.gateway.background import Background
from voicepool.gateway.binder import Binder
from voicepool.gateway.cold_starts import ColdStarts
from voicepool.gateway.deliverer import SETTLE_SECONDS, Deliverer, Errand, last_delivery
from voicepool.gateway.delivery import Accepted, Courier
from voicepool.gateway.demand import Demand
from voicepool.gateway.errors import (
    AgentsRefused,
    AgentUnreachable,
    BodyTooLarge,
    ClusterUnavailable,
    DeadlinePassed,
    GatewayError,
    LiveKitUnavailable,
    NotJoined,
    NoWarmAgent,
    PoolAtCapacity,
    PoolNotFound,
    QueueFull,
    RoomEnded,
    SessionElsewhere,
    SessionEnded,
)
from voicepool.gateway.livekit import LiveKitServer, LiveKitServers, Rooms
from voicepool.gateway.metrics import GatewayMetrics
from voicepool.gateway.options import GatewayOptions
from voicepool.gateway.patience import Patience
from voicepool.gateway.requests import Hold, Started, StartRequest, Trouble, words
from voicepool.gateway.side_by_side import side_by_side
from voicepool.gateway.view import ClusterView, PoolKey, is_live
from voicepool.kube.api import PODS, Conflict, Json, KubeApi, KubeApiError, NotFound, pages
from voicepool.model import LABEL_SESSION, PodFact, PoolFact

log = logging.getLogger("voicepool.gateway")

_CANCEL_GRACE_SECONDS = 5
_LONGEST_PAUSE = 8
"""Of the pauses between two looks for the agent of a session that another gateway has bound, in pauses: about a second."""


@dataclass(frozen=True, slots=True)
class _Offer:
    """A pool that can take the session."""

    pool: PoolFact
    server: LiveKitServer


@dataclass(slots=True)
class _Flight:
    request: StartRequest
    task: asyncio.Task[Started]
    callers: int = 0
    abandoned: bool = False
    """Every caller has gone."""
    waiting: bool = True
    """Nothing is bound yet, so it may simply stop."""
    stopping: bool = False
    """It stops, so whoever comes for the same session now needs another one."""


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
        self._servers = servers
        self._rooms = rooms
        self._options = options
        self._metrics = metrics
        self._pod_fact = pod_fact
        self._now = now
        self._jitter = jitter
        self._flights: dict[tuple[tuple[PoolKey, ...], str], _Flight] = {}
        self._trusted_until: dict[LiveKitServer, float] = {}
        self._background = Background()
        self._deliverer = Deliverer(courier=courier, signer=signer, rooms=rooms, options=options, now=now)
        self._binder = Binder(
            kube=kube,
            allocator=allocator,
            courier=courier,
            deliverer=self._deliverer,
            metrics=metrics,
            background=self._background,
            identity=identity,
            pod_fact=pod_fact,
            now=now,
            pause=self._pause,
        )
        cold_starts = ColdStarts(
            kube=kube,
            view=view,
            allocator=allocator,
            metrics=metrics,
            background=self._background,
            pod_fact=pod_fact,
            cold_pod=cold_pod,
            now=now,
            pause=self._pause,
        )
        self._acquirer = Acquirer(view=view, allocator=allocator, cold_starts=cold_starts, now=now)
        self.demand = Demand(allocator.waiting, now)
        """Callers who were not bound."""

    # -- starting ------------------------------------------------------------------------------------------------------------------

    async def start(self, request: StartRequest) -> Started:
        """Give a session its agent, or say why not.

        A caller who goes away cancels this call; the work behind it stops if nothing was bound yet, and is finished or undone otherwise.

        Raises:
            GatewayError: with the words for the caller.
        """
        key = (request.keys, request.session_id)
        flight = self._flights.get(key)
        if flight is None or flight.stopping:
            task = asyncio.create_task(self._fly(request), name=f"start {request.session_id}")
            flight = self._flights[key] = _Flight(request, task)
            task.add_done_callback(lambda _task: self._has_landed(key, task))
        flight.callers += 1
        flight.abandoned = False
        try:
            return await asyncio.shield(flight.task)
        except asyncio.CancelledError:
            flight.callers -= 1
            if flight.callers == 0:
                self._caller_has_gone(flight)
            raise

    def _has_landed(self, key: tuple[tuple[PoolKey, ...], str], task: asyncio.Task[Started]) -> None:
        flight = self._flights.get(key)
        if flight is not None and flight.task is task:
            del self._flights[key]

    def _caller_has_gone(self, flight: _Flight) -> None:
        flight.abandoned = True
        if flight.task.done():
            if not flight.task.cancelled() and flight.task.exception() is None:
                self._end_unclaimed(flight.request, flight.task.result())
        elif flight.waiting:
            flight.stopping = True
            flight.task.cancel()
        # The outcome is nobody's any more; without this asyncio would report an exception that was never fetched.
        flight.task.add_done_callback(lambda task: None if task.cancelled() else task.exception())

    def _end_unclaimed(self, request: StartRequest, started: Started) -> None:
        # Whoever named the session can come back for it; else nobody can, and the agent need not wait for its join timeout.
        if not request.keyed:
            log.info("the caller has gone; the session is ended", extra=words(request, started.pod))
            self._background.spawn(self._end_quietly(started))

    async def _end_quietly(self, started: Started) -> None:
        await self._deliverer.end(started.pod, started.session_id, "cancel")

    async def _fly(self, request: StartRequest) -> Started:
        flight = self._flights[request.keys, request.session_id]
        labels = request.key
        began = asyncio.get_running_loop().time()
        hold: list[Hold] = []
        outcome = "failed"
        try:
            started = await self._attempts(flight, began, hold)
            outcome = "started"
            labels = (request.namespace, started.pod.pool)
        except GatewayError as error:
            outcome = error.code.lower()
            if isinstance(error, NoWarmAgent | PoolAtCapacity | QueueFull):
                self._rejected(request)
            log.warning("a start failed: %s", error.detail, extra=words(request) | {"code": error.code})
            raise
        except asyncio.CancelledError:
            outcome = "caller_gone"
            if flight.waiting:
                self._rejected(request)
            raise
        finally:
            for held in hold:
                self._background.spawn(self._binder.give_up(held, request.of(held.pod.pool), for_good=True))
            self._metrics.starts.labels(*labels, outcome).inc()
        for key in request.keys:
            self.demand.started(key, request.session_id)
        self._metrics.start_seconds.labels(*labels).observe(started.seconds)
        log.info(
            "a session has its agent",
            extra=words(request, started.pod)
            | {"seconds": round(started.seconds, 4), "cold_start": started.cold_start},
        )
        if flight.abandoned:
            self._end_unclaimed(request, started)
        return started

    def _rejected(self, request: StartRequest) -> None:
        # One caller is demand for one agent: of the best pool that may have one more, else of the best.
        def has_room(key: PoolKey) -> bool:
            pool = self._view.pools.get(key)
            return pool is not None and sum(is_live(pod) for pod in self._view.pods(key)) < pool.spec.max_pods

        key = next((key for key in request.keys if has_room(key)), request.key)
        self.demand.rejected(key, request.session_id)

    async def _attempts(self, flight: _Flight, began: float, hold: list[Hold]) -> Started:
        wanted = flight.request
        require_deliverable(wanted.body)
        offers: dict[str, _Offer] = {}
        mine: set[str] = set()
        refusals: list[str] = []
        trouble = Trouble()
        loop = asyncio.get_running_loop()
        deadline = began + self._options.start_deadline_seconds
        queued_seconds = 0.0
        conflicts = 0
        again = False

        def answer(pod: PodFact) -> Started:
            return Started(
                session_id=wanted.session_id,
                pod=pod,
                room=pod.room or wanted.of(pod.pool).room,
                server=offers[pod.pool].server,
                cold_start=pod.cold_start == wanted.session_id,
                seconds=loop.time() - began,
            )

        try:
            async with asyncio.timeout_at(deadline):
                offers |= await self._offers(wanted)
            pools = [offer.pool for offer in offers.values()]
            while True:
                flight.waiting = True
                if flight.abandoned:
                    # A race was lost, and nobody waits for the outcome any more: the next pod is for somebody else.
                    raise asyncio.CancelledError
                if wanted.keyed:
                    async with asyncio.timeout_at(deadline):
                        known = await self._known(wanted, mine, offers, trouble)
                    if known is not None:
                        return answer(known)
                waited = loop.time()
                with wanted.span.child("wait for a pod", policy=pools[0].spec.on_empty.policy) as step:
                    candidate = await self._acquirer.acquire(
                        pools, wanted, since=began, waited_seconds=queued_seconds, again=again
                    )
                    again = True
                    step.note(pod=candidate.name)
                flight.waiting = False
                request, pool, server = (
                    wanted.of(candidate.pool),
                    offers[candidate.pool].pool,
                    offers[candidate.pool].server,
                )
                # Waiting for a pod has its own limits, which the pool sets.
                queued_seconds += loop.time() - waited
                deadline += loop.time() - waited
                async with asyncio.timeout_at(deadline):
                    with Errand() as errand:
                        bound = await self._bind_with_room(
                            candidate, pool, request, server, loop.time() - began, hold, trouble, errand
                        )
                        if bound is None:
                            conflicts += 1
                            request.span.note(conflicts=conflicts)
                            continue
                        mine.add(bound.uid)
                        if request.keyed and await self._rival(request, mine, trouble):
                            await self._yield(hold)
                            continue
                        since_bind = loop.time()
                        with request.span.child("delivery", pod=bound.name) as step:
                            refusal = await self._deliverer.deliver(hold[-1], pool, request, server, errand)
                            step.note(outcome=(refusal or "accepted").lower())
                    if refusal is None:
                        hold.clear()
                        self._metrics.delivery_seconds.labels(*request.key).observe(loop.time() - since_bind)
                        return answer(bound)
                    refusals.append(refusal)
                    self._metrics.refusals.labels(*request.key, refusal).inc()
                    log.warning(
                        "an agent did not take the session; the next one gets it",
                        extra=words(request, bound) | {"code": refusal},
                    )
                    self._background.spawn(self._binder.give_up(hold.pop(), request, for_good=False))
                    if refusal == "TOO_LARGE":
                        # The next agent would say the same.
                        raise BodyTooLarge(f"The body is larger than what an agent of {_named(wanted)} reads.")
                    if len(refusals) >= self._options.max_refusals:
                        raise AgentsRefused(
                            f"{len(refusals)} agents of {_named(wanted)} in a row did not take the session "
                            f"({', '.join(sorted(set(refusals)))}); look at the agents' logs.",
                            retry_after_seconds=5,
                        )
        except TimeoutError:
            if trouble.last is not None:
                raise ClusterUnavailable(
                    f"The Kubernetes API did not do what a session of {_named(wanted)} needs "
                    f"within {self._options.start_deadline_seconds:g} s ({type(trouble.last).__name__}).",
                    retry_after_seconds=2,
                ) from None
            raise DeadlinePassed(
                f"No agent of {_named(wanted)} took the session within {self._options.start_deadline_seconds:g} s.",
                retry_after_seconds=2,
            ) from None

    async def _bind_with_room(
        self,
        candidate: PodFact,
        pool: PoolFact,
        request: StartRequest,
        server: LiveKitServer,
        waited_seconds: float,
        hold: list[Hold],
        trouble: Trouble,
        errand: Errand,
    ) -> PodFact | None:
        """Bind the pod, and see to the room; None when the pod is lost.

        Side by side where the server has just made a room, and the delivery is prepared meanwhile. When the room then fails after all, the pod is in
        `hold`, and is given up as one that nothing was sent to. Else the room comes first: a server that is down would cost a warm pod for each caller
        whom it refuses. A caller's own room comes first too: that it has gone is nothing unusual.
        """
        trusted = asyncio.get_running_loop().time() < self._trusted_until.get(server, 0.0)
        if not trusted or request.callers_room is not None:
            try:
                await self._see_to_room(pool, request, server)
            except BaseException:
                self._allocator.release(candidate)
                raise
            return await self._bind(candidate, pool, request, waited_seconds, hold, trouble)
        beside = asyncio.create_task(self._prepare(candidate, pool, request, server, errand))
        try:
            bound = await self._bind(candidate, pool, request, waited_seconds, hold, trouble)
            await beside
            return bound
        finally:
            # Where all is done there is nothing to wait for: everything else that the event loop has to do would go first.
            if not beside.done():
                beside.cancel()
                await asyncio.gather(beside, return_exceptions=True)
            elif not beside.cancelled():
                beside.exception()

    async def _prepare(
        self, pod: PodFact, pool: PoolFact, request: StartRequest, server: LiveKitServer, errand: Errand
    ) -> None:
        # The patch goes first: before Python 3.12 aiohttp sends what it is given one turn of the event loop later.
        await asyncio.sleep(0)
        self._deliverer.prepare(errand, pod, pool, request, server)
        request.beside(server, request.room)
        await self._see_to_room(pool, request, server)

    async def _see_to_room(self, pool: PoolFact, request: StartRequest, server: LiveKitServer) -> None:
        with request.span.child("room"):
            if request.callers_room is not None:
                found = await self._rooms.find(server, request.room)
                if found is None or found.sid != request.callers_room.sid:
                    raise RoomEnded(f"The room {request.room} of the session {request.session_id} is no longer there.")
                return
            try:
                await self._rooms.create(
                    server, request.room, empty_timeout_seconds=pool.spec.session.join_timeout_seconds + 30
                )
            except LiveKitUnavailable:
                self._trusted_until.pop(server, None)
                raise
            self._trusted_until[server] = asyncio.get_running_loop().time() + self._options.livekit_trusted_seconds

    async def _bind(
        self,
        candidate: PodFact,
        pool: PoolFact,
        request: StartRequest,
        waited_seconds: float,
        hold: list[Hold],
        trouble: Trouble,
    ) -> PodFact | None:
        with request.span.child("bind", pod=candidate.name) as step:
            bound = await self._binder.bind(candidate, pool, request, request.room, waited_seconds, hold, trouble)
            step.note(outcome="conflict" if bound is None else "bound")
        return bound

    def in_flight(self, key: PoolKey, session_id: str) -> bool:
        """Whether this gateway is looking for an agent of this very pool for a session."""
        return ((key,), session_id) in self._flights

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

    async def _offers(self, request: StartRequest) -> dict[str, _Offer]:
        """The pools of a request that can take it, by name, the best first. One of several that cannot is passed over.

        Raises:
            GatewayError: what the first of them lacks, where none can.
        """
        offers: dict[str, _Offer] = {}
        problems: list[GatewayError] = []
        # Side by side, or each Secret that cannot be read would add its time.
        for offer in await side_by_side(map(self._offer, request.keys)):
            if isinstance(offer, _Offer):
                offers[offer.pool.name] = offer
                continue
            if request.others:
                log.warning("a pool is passed over: %s", offer.detail, extra=words(request))
            problems.append(offer)
        if not offers:
            first = problems[0]
            raise type(first)(
                " ".join(problem.detail for problem in problems),
                code=first.code,
                retry_after_seconds=first.retry_after_seconds,
            )
        return offers

    async def _offer(self, key: PoolKey) -> _Offer | GatewayError:
        try:
            pool = self.pool(key)
            return _Offer(pool, await self._servers.of(pool))
        except (PoolNotFound, LiveKitUnavailable) as problem:
            return problem

    # -- the same session, elsewhere -----------------------------------------------------------------------------------------------

    async def carriers(self, namespace: str, session_id: str) -> list[PodFact]:
        """The pods that carry a session, by a consistent list: every bind that was answered before this call is in it.

        Raises:
            ClusterUnavailable: the API server did not answer.
        """
        try:
            return await self._list_carriers(namespace, session_id)
        except KubeApiError as error:
            raise _not_listed(namespace, error) from None

    async def _list_carriers(self, namespace: str, session_id: str) -> list[PodFact]:
        found: list[PodFact] = []
        # From the API server's latest state, not from whatever its cache holds.
        async for page in pages(self._kube, PODS, namespace, label_selector=f"{LABEL_SESSION}={session_id}"):
            found += [fact for item in page.get("items") or [] if (fact := self._pod_fact(item)) is not None]
        return found

    async def _carriers_in_the_end(self, request: StartRequest, trouble: Trouble) -> list[PodFact]:
        """As `carriers`, but for as long as the caller has time."""
        patience = Patience(trouble, self._pause)
        while True:
            try:
                found = await self._list_carriers(request.namespace, request.session_id)
            except KubeApiError as error:
                if not await patience.wait(error):
                    raise _not_listed(request.namespace, error) from None
            else:
                patience.over()
                return found

    async def _rival(self, request: StartRequest, mine: Collection[str], trouble: Trouble) -> bool:
        """Whether another pod carries this session, seen after our own bind.

        Two gateways that start one session each write (bind) and then read (a consistent list). Writes and such reads are in one order on the API
        server,
        so of two binds at least one is followed by a list that shows the other. Whoever sees another yields, always, and has delivered nothing yet;
        so two
        agents never get the session. Both may see each other and yield; then both try again after a random pause. A rule like "the smaller uid stays"
        would be wrong: the other may have listed before our bind, seen nobody, and delivered. A pod that has ended carried the session just as well; one
        that is being deleted is what is left of somebody who yielded.
        """
        return any(
            pod.uid not in mine and (is_live(pod) or not pod.deleting)
            for pod in await self._carriers_in_the_end(request, trouble)
        )

    async def _yield(self, hold: list[Hold]) -> None:
        held = hold[-1]
        # Nothing was sent to this pod's agent. The delete fails if anything about the pod has changed but its status.
        request = StartRequest(held.pod.namespace, held.pod.pool, held.pod.session or "", keyed=True)
        deleted = await self._binder.delete_undelivered(held.pod, request)
        hold.pop()
        self._binder.gave_up(held.pod, request, "yielded" if deleted else "left")
        await self._pause()

    async def _known(
        self, request: StartRequest, mine: set[str], pools: Container[str], trouble: Trouble
    ) -> PodFact | None:
        """The pod whose agent has this session already; None when there is none and a new one may be bound.

        Waits while another gateway is about to deliver. A pod whose gateway died between bind and delivery is deleted once that gateway's own
        assignment can no longer arrive.

        Raises:
            SessionEnded: it had its agent and is over.
            SessionElsewhere: a pool has it that is none of these.
        """
        looks = 0
        while True:
            looks += 1
            # One that has ended and is being deleted is what is left of a bind that was undone, or soon not there at all.
            pods = [
                pod
                for pod in await self._carriers_in_the_end(request, trouble)
                if pod.uid not in mine and (is_live(pod) or not pod.deleting)
            ]
            if not pods:
                return None
            if any(pod.pool not in pools for pod in pods):
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
                if await self._binder.delete_undelivered(pod, request):
                    mine.add(pod.uid)
                    self._binder.gave_up(pod, request.of(pod.pool), "deleted")
            # Another gateway delivers within moments, or it is gone: then hundreds may wait here until it certainly is.
            await self._pause(times=min(looks, _LONGEST_PAUSE))

    def _undelivered(self, live: Sequence[PodFact], statuses: Sequence[AgentStatus | None]) -> Iterator[PodFact]:
        """The pods that another gateway bound and will never deliver to: their agents are parked, and no assignment for them can be good."""
        for pod, status in zip(live, statuses, strict=True):
            if status is not None and status.state == "parked" and not pod.deleting and pod.bound_at is not None:
                settled_at = last_delivery(pod, pod.bound_at) + timedelta(seconds=SETTLE_SECONDS)
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

    async def joined_status(self, pod: PodFact, seconds: float) -> AgentStatus | None:
        """As `status`, but wait for so many seconds until the agent has joined or is ending."""
        if not seconds or not pod.pod_ip:
            return await self.status(pod)
        return await self._courier.wait_joined(pod, seconds)

    async def end(self, pod: PodFact, session_id: str, mode: Literal["drain", "cancel"]) -> None:
        """End a session that runs.

        An agent that cannot be reached cannot say goodbye; for ``cancel`` its pod is deleted then, as an explicit end allows.

        Raises:
            AgentUnreachable: ``drain`` could not be asked for, or ``cancel`` could not be enforced.
        """
        outcome = await self._deliverer.end(pod, session_id, mode)
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
        await self._background.close(
            [flight.task for flight in self._flights.values()], timeout_seconds=timeout_seconds
        )

    async def settled(self) -> None:
        """Wait until nothing runs in the background."""
        await self._background.settled()

    async def _pause(self, times: int = 1) -> None:
        await asyncio.sleep((0.05 + 0.2 * self._jitter()) * times)


def _not_listed(namespace: str, error: KubeApiError) -> ClusterUnavailable:
    return ClusterUnavailable(
        f"The Kubernetes API did not list the session's pods in {namespace} ({type(error).__name__}).",
        retry_after_seconds=2,
    )


def _named(request: StartRequest) -> str:
    return " and ".join(f"{namespace}/{name}" for namespace, name in request.keys)
