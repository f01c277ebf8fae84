"""Keeps the statuses of the pools at what their plans say. The only writer of them.

Invariants: a pool has one such write on its way at most; it is made in the version of the pool that the plan was made from, only where it changes
something, and not more often than every :data:`STATUS_INTERVAL_SECONDS`; no turn of a pool waits for it, since a caller may wait for that turn.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from voicepool.copies import BY_POOL, PoolStore
from voicepool.events import Note, condition_notes
from voicepool.kube.api import POOLS, Conflict, Json, KubeApi, KubeApiError, NotFound, TooManyRequests
from voicepool.kube.convert import pool_from_json
from voicepool.kube.informer import Informer
from voicepool.metrics import OperatorMetrics
from voicepool.model import Key, PodFact, PoolFact
from voicepool.queue import KeyedQueue
from voicepool.session_counts import Count, SessionCounts
from voicepool.sizing import service_times

logger = logging.getLogger(__name__)

STATUS_INTERVAL_SECONDS = 1.0
STATUS_INTERVAL_MAX_SECONDS = 300.0
"""Where somebody else writes another status each time: the interval doubles up to this."""


@dataclass(frozen=True, slots=True)
class _Write:
    """The last time we wrote a pool's status."""

    at: float
    interval_seconds: float
    """How long we had waited since the one before, at least."""
    status: Json | None
    """None where it is not known whether it was stored."""


class StatusKeeper:
    """Writes statuses.

    Args:
        api: the API server.
        pods: the copy of the pods, for what is told of their sessions.
        pools: the copy of the pools; what was stored is put there.
        metrics: where writes and conflicts are counted.
        workers: how many pools' statuses may be on their way at once.
        look_again: called with a pool that is to be planned again, and in how many seconds.
        pool_read: called with a pool that was read, since it is not what our copy says.
        tell: called with what an Event is to say of a pool.
        may_write: asked before a write; False leaves it, since somebody else works now.
    """

    def __init__(
        self,
        api: KubeApi,
        pods: Informer[PodFact],
        pools: PoolStore,
        metrics: OperatorMetrics,
        *,
        workers: int,
        look_again: Callable[[Key, float], None],
        pool_read: Callable[[PoolFact], None],
        tell: Callable[[PoolFact, Note], None],
        may_write: Callable[[], bool],
    ) -> None:
        self._api = api
        self._pods = pods
        self._pools = pools
        self._metrics = metrics
        self._workers = workers
        self._look_again = look_again
        self._pool_read = pool_read
        self._tell = tell
        self._may_write = may_write
        self._queue: KeyedQueue[Key] = KeyedQueue()
        self._wanted: dict[Key, tuple[PoolFact, Json]] = {}
        """Of each pool the last plan's status, and the version of the pool that it was made from."""
        self._writes: dict[Key, _Write] = {}
        self._counts = SessionCounts()

    def want(self, pool: PoolFact, status: Json) -> None:
        """What the plan of this version of the pool says; takes the place of what an earlier one said."""
        key = (pool.namespace, pool.name)
        self._wanted[key] = (pool, status)
        self._queue.add(key)

    def count(self, pool: Key, what: Count) -> None:
        """One more, for the pool's status."""
        self._counts.count(pool, what)

    async def run(self) -> None:
        """Write until cancelled; may be called again after :meth:`clear`."""
        async with asyncio.TaskGroup() as group:
            for _ in range(self._workers):
                group.create_task(self._work())

    def forget(self, pool: Key) -> None:
        """The pool is gone."""
        self._wanted.pop(pool, None)
        self._writes.pop(pool, None)
        self._counts.forget(pool)

    def clear(self) -> None:
        """Somebody else writes now."""
        self._queue.clear()
        self._wanted.clear()
        self._writes.clear()
        self._counts.clear()

    async def _work(self) -> None:
        while True:
            key = await self._queue.get()
            try:
                wanted = self._wanted.pop(key, None)
                if wanted is not None and self._may_write():
                    await self._write(key, *wanted)
            except KubeApiError as error:
                wait_seconds = error.retry_after_seconds if isinstance(error, TooManyRequests) else 0.0
                self._look_again(key, max(wait_seconds, STATUS_INTERVAL_SECONDS))
                self._metrics.status_writes.labels(*key, "failed").inc()
                logger.warning(
                    "could not write the pool's status, trying again",
                    extra={
                        "namespace": key[0],
                        "pool": key[1],
                        "error": str(error),
                        "reason": error.reason or type(error).__name__,
                    },
                )
            finally:
                self._queue.done(key)

    async def _write(self, key: Key, pool: PoolFact, status: Json) -> None:
        current = self._pools.get(key)
        if current is None or current.resource_version != pool.resource_version:
            # It changed after it was planned, by our own last write perhaps.
            self._look_again(key, 0.0)
            return
        counted = self._counts.to_send(pool)
        if not counted and _shows(pool.status, status):
            return
        time = asyncio.get_running_loop().time()
        last = self._writes.get(key)
        interval_seconds = STATUS_INTERVAL_SECONDS
        if last is not None:
            if last.status is not None and not _shows(pool.status, last.status):
                # Somebody else works on this pool from another view. Which of them is right, the next list tells; until then neither writes often.
                interval_seconds = min(2 * last.interval_seconds, STATUS_INTERVAL_MAX_SECONDS)
            left_seconds = last.at + interval_seconds - time
            if left_seconds > 0:
                self._look_again(key, left_seconds)
                return
        this = self._writes[key] = _Write(time, interval_seconds, None)
        wanted = status
        if counted:
            wanted = {**status, "sessions": self._sessions_told(pool, self._counts.send(pool, counted))}
        try:
            stored = await self._api.merge_patch(
                POOLS,
                pool.namespace,
                pool.name,
                # In this version only: a uid does not guard a status, and sessions are counted on from what was read.
                {"metadata": {"resourceVersion": pool.resource_version}, "status": wanted},
                subresource="status",
            )
        except NotFound:
            return
        except Conflict:
            self._metrics.conflicts.labels("status").inc()
            if last is not None:
                self._writes[key] = dataclasses.replace(last, at=time)
            await self._read_pool(key)
            return
        if self._writes.get(key) is not this:
            return  # the pool is gone by now, and what was counted of it is forgotten
        self._writes[key] = _Write(time, interval_seconds, status)
        self._metrics.status_writes.labels(*key, "ok").inc()
        self._counts.stored(key, counted)
        for note in condition_notes(pool.status, status):
            self._tell(pool, note)
        newer = pool_from_json(stored)
        if newer is not None:
            self._pools.apply(newer)
        if self._counts.waits(key):
            # It happened since these were first sent.
            self._look_again(key, 0.0)

    def _sessions_told(self, pool: PoolFact, counts: Mapping[Count, int]) -> Json:
        sessions: Json = dict(counts.items())
        if sessions["started"]:
            sessions["hitPercent"] = 100 * sessions["hits"] // sessions["started"]
        pods = self._pods.by(BY_POOL, (pool.namespace, pool.name))
        return sessions | service_times(pods, pool.spec.startup.deadline_seconds)

    async def _read_pool(self, key: Key) -> None:
        """Take the pool over as it is now, without waiting for a watch that may have missed it."""
        try:
            newer = pool_from_json(await self._api.get(POOLS, *key))
        except NotFound:
            return
        if newer is not None:
            self._pool_read(newer)


def _shows(status: Mapping[str, Any], wanted: Json) -> bool:
    return all(status.get(field) == value for field, value in wanted.items())
