"""Finds a pod for a start: at once, in the queues of its pools, or by a cold start, in this order.

Invariants: the first pool with a free warm agent that nobody waits for wins at once; a caller waits in all queues of his pools at the same time, in each as
long as that pool lets callers wait; no pod is started for him while he may wait; a caller who has lost a race is back in his place, with the time that is
left.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from datetime import datetime

from voicepool.binding import is_candidate
from voicepool.gateway.allocator import Allocator, QueuesFull
from voicepool.gateway.cold_starts import ColdStarts
from voicepool.gateway.errors import GatewayError, NoWarmAgent, PoolAtCapacity, QueueFull
from voicepool.gateway.requests import StartRequest
from voicepool.gateway.retry_after import retry_after_seconds
from voicepool.gateway.view import ClusterView, PoolKey, is_live
from voicepool.model import BindState, PodFact, PoolFact


class Acquirer:
    """Reserves pods.

    Args:
        view: what the informers know.
        allocator: who gets which pod, inside this gateway.
        cold_starts: makes pods.
        now: the current time, with its zone.
    """

    def __init__(
        self, *, view: ClusterView, allocator: Allocator, cold_starts: ColdStarts, now: Callable[[], datetime]
    ) -> None:
        self._view = view
        self._allocator = allocator
        self._cold_starts = cold_starts
        self._now = now

    async def acquire(
        self, pools: Sequence[PoolFact], request: StartRequest, *, since: float, waited_seconds: float, again: bool
    ) -> PodFact:
        """A pod of one of these pools, reserved for the session.

        Args:
            pools: the best first; at least one.
            request: whose it is to be.
            since: when the caller came, by the event loop's clock.
            waited_seconds: how long he has waited for pods that he then lost; off the time that he may wait.
            again: he has lost one.

        Raises:
            GatewayError: there is none.
        """
        for pool in pools:
            free = self._allocator.take(_key(pool), request.session_id)
            if free is not None:
                return free
        limits = {
            _key(pool): float(pool.spec.on_empty.timeout_seconds)
            for pool in pools
            if pool.spec.on_empty.policy == "Queue"
        }
        full = False
        if limits:
            try:
                waited_for = await self._wait(limits, request, since, waited_seconds, again)
            except QueuesFull:
                full = True
            else:
                if waited_for is not None:
                    return waited_for
        for pool in pools:
            if pool.spec.on_empty.policy == "ColdStart" and self._cold_starts.have_room(pool):
                return await self._cold_starts.start(pool, request)
        if full:
            raise QueueFull(
                f"As many callers as may wait do so already for {_named([_key(pool) for pool in pools])}; "
                "try again later, or keep more agents warm (replicas).",
                retry_after_seconds=self.retry_after_seconds(pools),
            )
        raise self._nothing_left(pools, max(limits.values(), default=0.0))

    async def _wait(
        self, limits: dict[PoolKey, float], request: StartRequest, since: float, waited_seconds: float, again: bool
    ) -> PodFact | None:
        """A pod of any of these queues; None when the time of all is over. Raises `QueuesFull`."""
        loop = asyncio.get_running_loop()
        began = loop.time() - waited_seconds
        while limits:
            nearest = min(limits.values())
            try:
                async with asyncio.timeout_at(began + nearest):
                    return await self._allocator.wait(
                        limits, request.session_id, caller=request.caller or "", since=since, again=again
                    )
            except TimeoutError:
                limits = {key: seconds for key, seconds in limits.items() if seconds > nearest}
        return None

    def retry_after_seconds(self, pools: Sequence[PoolFact]) -> int:
        """When the first of these pools may have an agent for one who comes then."""
        now = self._now()
        return min(
            retry_after_seconds(pool, self._view.pods(_key(pool)), waiting=self._allocator.waiting(_key(pool)), now=now)
            for pool in pools
        )

    def _nothing_left(self, pools: Sequence[PoolFact], queued_seconds: float) -> GatewayError:
        after = f" after {queued_seconds:.0f} s in the queue" if queued_seconds else ""
        retry_after = self.retry_after_seconds(pools)
        states = [self._state(pool) for pool in pools]
        if all(
            # Where a pod could have been started for this caller, one would have been.
            in_sessions >= pool.spec.max_pods or pool.spec.on_empty.policy == "ColdStart"
            for pool, (in_sessions, _) in zip(pools, states, strict=True)
        ):
            counts = ", ".join(f"{pool.spec.max_pods} of {pool.namespace}/{pool.name}" for pool in pools)
            return PoolAtCapacity(
                f"All pods that there may be (maxPods: {counts}) are taken{after}; try again later or raise maxPods.",
                retry_after_seconds=retry_after,
            )
        words = "; ".join(
            f"of the pods of {pool.namespace}/{pool.name} {in_sessions} are in sessions or about to be, {others} are starting"
            for pool, (in_sessions, others) in zip(pools, states, strict=True)
        )
        return NoWarmAgent(
            f"No warm agent{after}: {words}.", status=503 if queued_seconds else 429, retry_after_seconds=retry_after
        )

    def _state(self, pool: PoolFact) -> tuple[int, int]:
        """How many pods of a pool are in sessions or about to be, and how many others it has."""
        pods = [pod for pod in self._view.pods(_key(pool)) if is_live(pod)]
        in_sessions = sum(pod.state is BindState.BOUND or is_candidate(pod) for pod in pods)
        return in_sessions, len(pods) - in_sessions


def _key(pool: PoolFact) -> PoolKey:
    return (pool.namespace, pool.name)


def _named(keys: Sequence[PoolKey]) -> str:
    return " and ".join(f"{namespace}/{name}" for namespace, name in keys)
