"""Writes Events on pools, apart from all other work.

Invariants: taking a note never waits and never fails; an Event that cannot be written is counted and dropped, since it is news and not state;
notes of one pool and reason that come faster than :data:`INTERVAL_SECONDS` become one Event with their number.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime

from voicepool.events import Note, build_event
from voicepool.kube.api import EVENTS, KubeApi, KubeApiError
from voicepool.model import PoolFact

logger = logging.getLogger(__name__)

INTERVAL_SECONDS = 10.0
MAX_PENDING = 1000
"""Of pools times reasons; what comes on top while the API server is slow is dropped."""

_Key = tuple[str, str]


@dataclass(slots=True)
class _Pending:
    pool: PoolFact
    note: Note
    count: int
    due_at: float


class EventRecorder:
    """Takes notes and writes them while :meth:`run` runs.

    Args:
        api: the API server.
        instance: which process this is.
        now: the time, with a time zone.
        on_written: told with the outcome: ``ok``, ``failed`` or ``dropped``.
    """

    def __init__(
        self,
        api: KubeApi,
        instance: str,
        now: Callable[[], datetime],
        *,
        on_written: Callable[[str], None] = lambda outcome: None,
    ) -> None:
        self._api = api
        self._instance = instance
        self._now = now
        self._on_written = on_written
        self._pending: dict[_Key, _Pending] = {}
        self._written_at: dict[_Key, float] = {}
        self._wake = asyncio.Event()

    def note(self, pool: PoolFact, note: Note) -> None:
        """Tell about a pool, soon."""
        key = (pool.uid, note.reason)
        waiting = self._pending.get(key)
        if waiting is not None:
            waiting.count += 1
            return
        if len(self._pending) >= MAX_PENDING:
            self._on_written("dropped")
            return
        due_at = self._written_at.get(key, float("-inf")) + INTERVAL_SECONDS
        self._pending[key] = _Pending(pool, note, 1, max(due_at, asyncio.get_running_loop().time()))
        self._wake.set()

    async def run(self) -> None:
        """Write what was noted until cancelled; what is still pending then is forgotten."""
        loop = asyncio.get_running_loop()
        try:
            while True:
                self._wake.clear()
                key = min(self._pending, key=lambda key: self._pending[key].due_at, default=None)
                if key is None or self._pending[key].due_at > loop.time():
                    seconds = None if key is None else self._pending[key].due_at - loop.time()
                    try:
                        async with asyncio.timeout(seconds):
                            await self._wake.wait()
                    except TimeoutError:
                        pass
                    continue
                self._forget_old(loop.time())
                self._written_at[key] = loop.time()
                await self._write(self._pending.pop(key))
        finally:
            self._pending.clear()

    def _forget_old(self, time: float) -> None:
        for key in [key for key, at in self._written_at.items() if time - at >= INTERVAL_SECONDS]:
            del self._written_at[key]

    async def _write(self, pending: _Pending) -> None:
        pool, note = pending.pool, pending.note
        event = build_event(pool, note, self._now(), self._instance, count=pending.count)
        try:
            await self._api.create(EVENTS, pool.namespace, event)
        except KubeApiError as error:
            self._on_written("failed")
            logger.warning(
                "an Event could not be written and is dropped",
                extra={
                    "namespace": pool.namespace,
                    "pool": pool.name,
                    "reason": note.reason,
                    "note": note.message,
                    "error": str(error),
                },
            )
        else:
            self._on_written("ok")
