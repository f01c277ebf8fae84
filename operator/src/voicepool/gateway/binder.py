"""Binds a pod to a session by the one patch, and undoes a bind whose session did not come to its agent.

Invariants: a bind whose answer was lost is recognised or undone; a pod is deleted only when its agent certainly has no session, with preconditions on uid and
resourceVersion; one that cannot be asked is left alone: its deadline, its probes and the operator decide.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from datetime import datetime

from voicepool.binding import active_deadline_seconds, bind_patch
from voicepool.gateway.allocator import Allocator
from voicepool.gateway.background import Background
from voicepool.gateway.deliverer import SETTLE_SECONDS, Deliverer
from voicepool.gateway.delivery import Courier
from voicepool.gateway.errors import ClusterUnavailable, cluster_error
from voicepool.gateway.metrics import GatewayMetrics
from voicepool.gateway.patience import Patience
from voicepool.gateway.requests import Hold, StartRequest, Trouble, words
from voicepool.gateway.view import is_live
from voicepool.kube.api import (
    PODS,
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
from voicepool.model import ANNOTATION_BOUND_BY, PodFact, PoolFact

log = logging.getLogger("voicepool.gateway")

UNDO_SECONDS = 30.0
"""How long the API server may be away while a bind is undone; past that the operator finds the pod, and much later."""


class Binder:
    """Binds.

    Args:
        kube: the API server.
        allocator: who gets which pod, inside this gateway.
        courier: asks agents.
        deliverer: ends a session that came to its agent too late.
        metrics: what is counted.
        background: where a bind is undone whose outcome is not known.
        identity: this gateway, for ``bound-by``.
        pod_fact: what is kept of a pod.
        now: the current time, with its zone.
        pause: waits a moment before something is tried again.
    """

    def __init__(
        self,
        *,
        kube: KubeApi,
        allocator: Allocator,
        courier: Courier,
        deliverer: Deliverer,
        metrics: GatewayMetrics,
        background: Background,
        identity: str,
        pod_fact: Callable[[Json], PodFact | None],
        now: Callable[[], datetime],
        pause: Callable[[], Awaitable[None]],
    ) -> None:
        self._kube = kube
        self._allocator = allocator
        self._courier = courier
        self._deliverer = deliverer
        self._metrics = metrics
        self._background = background
        self._identity = identity
        self._pod_fact = pod_fact
        self._now = now
        self._pause = pause

    async def bind(
        self,
        pod: PodFact,
        pool: PoolFact,
        request: StartRequest,
        room: str,
        waited_seconds: float,
        hold: list[Hold],
        trouble: Trouble,
    ) -> PodFact | None:
        """Bind a reserved pod; None when it is lost to another, or no longer fit. Tries for as long as it is let, and notes in `trouble` on what.

        Raises:
            ClusterUnavailable: the API server will not do it.
        """
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
            caller=request.caller,
        )
        loop = asyncio.get_running_loop()
        patience = Patience(trouble, self._pause)
        perhaps_written = False
        try:
            while True:
                began = loop.time()
                try:
                    stored = await self._kube.json_patch(PODS, pod.namespace, pod.name, operations)
                except (Unprocessable, Conflict, NotFound):
                    patience.over()
                    if perhaps_written and (ours := await self._ours(pod, request)) is not None:
                        hold.append(Hold(ours))
                        return ours
                    self._allocator.lost(pod)
                    self._metrics.conflicts.labels(*request.key).inc()
                    return None
                except KubeApiError as error:
                    # It may have been written. The same patch again is harmless: it fails where the first one came through.
                    perhaps_written = perhaps_written or isinstance(error, Unreachable | ServerFault)
                    if await patience.wait(error):
                        continue
                    self._allocator.lost(pod)
                    raise cluster_error(error, "bind a pod of", pool) from None
                patience.over()
                bound = self._pod_fact(stored)
                if bound is None:
                    raise ClusterUnavailable(
                        f"The API server answered a bind of {pod.namespace}/{pod.name} with something else."
                    )
                hold.append(Hold(bound))
                self._metrics.bind_seconds.labels(*request.key).observe(loop.time() - began)
                return bound
        except asyncio.CancelledError:
            # The time is up in the middle of a patch; whether it was written is for the next look to say.
            self._background.spawn(self._undo_unknown_bind(pod, request))
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
        await asyncio.sleep(SETTLE_SECONDS)
        ours = await self._ours(pod, request)
        if ours is None:
            self._allocator.lost(pod)
        else:
            await self.give_up(Hold(ours), request, for_good=True)

    async def give_up(self, hold: Hold, request: StartRequest, *, for_good: bool) -> None:
        """See to a pod that was bound here without the session coming to it.

        Args:
            hold: the pod, and until when an assignment may still be taken by it.
            request: whose it was.
            for_good: nobody got the session in its place, so an agent that took it after all is ended (unless its caller may come back).
        """
        pod = hold.pod
        if hold.sent_until is not None:
            wait_seconds = (hold.sent_until - self._now()).total_seconds() + SETTLE_SECONDS
            await asyncio.sleep(max(0.0, wait_seconds))
            status = await self._courier.status(pod)
            if status is None:
                return self.gave_up(pod, request, "left")
            if status.has(request.session_id):
                if for_good and request.keyed:
                    return self.gave_up(pod, request, "kept")
                await self._deliverer.end(pod, request.session_id, "cancel")
                return self.gave_up(pod, request, "ended")
            if status.state != "parked":
                return self.gave_up(pod, request, "left")
        deleted = await self.delete_undelivered(pod, request)
        return self.gave_up(pod, request, "deleted" if deleted else "left")

    def gave_up(self, pod: PodFact, request: StartRequest, result: str) -> None:
        """Count and tell what became of a pod that was given up."""
        self._metrics.abandoned.labels(*request.key, result).inc()
        log.info("a bound pod was given up", extra=words(request, pod) | {"result": result})

    async def delete_undelivered(self, pod: PodFact, request: StartRequest) -> bool:
        """Delete a pod of which it is certain that its agent has no session; whether that worked."""
        seen = pod
        loop = asyncio.get_running_loop()
        until = loop.time() + UNDO_SECONDS
        while loop.time() < until:
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
            except (Unreachable, ServerFault, TooManyRequests, Forbidden):
                # An API server that has just started again forbids everything for a moment.
                await self._pause()
            except KubeApiError:
                return False
            else:
                return True
        return False
