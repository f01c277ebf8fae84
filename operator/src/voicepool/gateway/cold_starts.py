"""Starts a pod for one caller, when the pool is empty and its ``onEmpty.policy`` is ``ColdStart``.

Invariants: ``maxPods`` counts those that are being created here; a pod whose caller has gone before it was Ready is deleted, unless it was bound.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection
from datetime import datetime

from voicepool.gateway.allocator import Allocator
from voicepool.gateway.background import Background
from voicepool.gateway.errors import NoWarmAgent, cluster_error
from voicepool.gateway.metrics import GatewayMetrics
from voicepool.gateway.requests import StartRequest
from voicepool.gateway.retry_after import retry_after_seconds
from voicepool.gateway.view import ClusterView, PoolKey, is_live
from voicepool.kube.api import (
    PODS,
    AlreadyExists,
    Conflict,
    Json,
    KubeApi,
    KubeApiError,
    ServerFault,
    TooManyRequests,
    Unreachable,
)
from voicepool.model import BindState, PodFact, PoolFact


class ColdStarts:
    """Creates pods for callers.

    Args:
        kube: the API server.
        view: what the informers know.
        allocator: hands out the pod once it is Ready.
        metrics: what is counted.
        background: where a pod is deleted that nobody waits for any more.
        pod_fact: what is kept of a pod.
        cold_pod: the pod to create for one session, given the names that are taken.
        now: the current time, with its zone.
        pause: waits a moment before something is tried again.
    """

    def __init__(
        self,
        *,
        kube: KubeApi,
        view: ClusterView,
        allocator: Allocator,
        metrics: GatewayMetrics,
        background: Background,
        pod_fact: Callable[[Json], PodFact | None],
        cold_pod: Callable[[PoolFact, str, Collection[str]], Json],
        now: Callable[[], datetime],
        pause: Callable[[], Awaitable[None]],
    ) -> None:
        self._kube = kube
        self._view = view
        self._allocator = allocator
        self._metrics = metrics
        self._background = background
        self._pod_fact = pod_fact
        self._cold_pod = cold_pod
        self._now = now
        self._pause = pause
        self._creating: dict[PoolKey, int] = {}

    def have_room(self, pool: PoolFact) -> bool:
        """Whether a pod may be made: ``maxPods`` is not reached, those that are being created included."""
        key = (pool.namespace, pool.name)
        return sum(is_live(pod) for pod in self._view.pods(key)) + self._creating.get(key, 0) < pool.spec.max_pods

    async def start(self, pool: PoolFact, request: StartRequest) -> PodFact:
        """Create a pod for this session alone and wait until it is Ready; to be called only of a pool that has room.

        Raises:
            GatewayError: it could not be created, or was not Ready in time.
        """
        key = (pool.namespace, pool.name)
        created: Json | None = None
        self._creating[key] = self._creating.get(key, 0) + 1
        counted = True
        ready = False
        try:
            async with asyncio.timeout(pool.spec.startup.deadline_seconds):
                created = await self._create(pool, request.session_id)
                self._metrics.cold_starts.labels(*key).inc()
                if (fact := self._pod_fact(created)) is not None and fact.uid not in {
                    pod.uid for pod in self._view.pods(key)
                }:
                    # Known from now on, so that maxPods counts it once whether or not the informer has seen it.
                    self._view.pod_seen(fact)
                self._creating[key] -= 1
                counted = False
                pod = await self._allocator.wait_for(key, created["metadata"]["uid"])
                ready = True
                return pod
        except TimeoutError:
            raise NoWarmAgent(
                f"The agent that was started for this call in the pool {key[0]}/{key[1]} was not Ready within "
                f"{pool.spec.startup.deadline_seconds} s (startup.deadlineSeconds).",
                retry_after_seconds=retry_after_seconds(
                    pool, self._view.pods(key), waiting=self._allocator.waiting(key), now=self._now()
                ),
            ) from None
        except KubeApiError as error:
            raise cluster_error(error, "create a pod in", pool) from None
        finally:
            if counted:
                self._creating[key] -= 1
            if created is not None and not ready:
                self._background.spawn(self._delete_unbound(key, created))

    async def _create(self, pool: PoolFact, session_id: str) -> Json:
        taken = {pod.name for pod in self._view.pods((pool.namespace, pool.name))}
        while True:
            body = self._cold_pod(pool, session_id, taken)
            try:
                return await self._kube.create(PODS, pool.namespace, body)
            except AlreadyExists:
                taken.add(body["metadata"]["name"])
            except TooManyRequests as error:
                await asyncio.sleep(error.retry_after_seconds)
            except (Unreachable, ServerFault):
                # The name is the same the next time: if the first one was made after all, this answers AlreadyExists, and that pod is found.
                name = body["metadata"]["name"]
                try:
                    found = await self._kube.get(PODS, pool.namespace, name)
                except KubeApiError:
                    await self._pause()
                    continue
                fact = self._pod_fact(found)
                if fact is not None and fact.cold_start == session_id:
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
