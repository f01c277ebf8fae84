"""A queue of keys: each key at most once, one worker a key, with delays and a back-off of its own for each key.

Invariants: a key that is added while a worker has it is handed out once more afterwards, so no change is lost; a key never has two workers.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)

RETRY_FIRST_SECONDS = 0.1
RETRY_MAX_SECONDS = 30.0


class KeyedQueue(Generic[K]):
    """Hands out keys to workers.

    Args:
        jitter: source of randomness for the back-off.
    """

    def __init__(self, jitter: random.Random | None = None) -> None:
        self._jitter = jitter or random.Random()
        self._waiting: deque[K] = deque()
        self._known: set[K] = set()
        """Keys in ``_waiting``."""
        self._at_work: set[K] = set()
        self._again: set[K] = set()
        self._timers: dict[K, tuple[float, asyncio.Handle]] = {}
        """With the moment at which each is due: a handle does not always know it, uvloop's for a delay of nothing does not."""
        self._failures: dict[K, int] = {}
        self._added_at: dict[K, float] = {}
        """Since when each key waits, also behind the worker that has it."""
        self._waited: dict[K, float] = {}
        """How long each key at work had waited."""
        self._wake = asyncio.Event()

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, key: K) -> None:
        """Hand the key out as soon as a worker is free."""
        self._added_at.setdefault(key, asyncio.get_running_loop().time())
        if key in self._at_work:
            self._again.add(key)
        elif key not in self._known:
            self._known.add(key)
            self._waiting.append(key)
            self._wake.set()

    def add_after(self, key: K, seconds: float) -> None:
        """Add the key later; of several delays of one key the shortest counts."""
        loop = asyncio.get_running_loop()
        due = loop.time() + seconds
        timer = self._timers.get(key)
        if timer is not None:
            due_already, handle = timer
            if due_already <= due:
                return
            handle.cancel()
        self._timers[key] = (due, loop.call_at(due, self._due, key))

    def retry(self, key: K, at_least_seconds: float = 0.0) -> float:
        """Add the key after its back-off, which doubles with each failure in a row; returns the seconds."""
        failures = self._failures.get(key, 0)
        self._failures[key] = failures + 1
        seconds = min(RETRY_MAX_SECONDS, RETRY_FIRST_SECONDS * 2.0 ** min(failures, 20)) * self._jitter.uniform(
            0.8, 1.2
        )
        seconds = max(seconds, at_least_seconds)
        self.add_after(key, seconds)
        return seconds

    def succeeded(self, key: K) -> None:
        """Forget the failures of the key."""
        self._failures.pop(key, None)

    async def get(self) -> K:
        """The next key; it stays with the caller until :meth:`done`."""
        while not self._waiting:
            self._wake.clear()
            await self._wake.wait()
        key = self._waiting.popleft()
        self._known.discard(key)
        self._at_work.add(key)
        self._waited[key] = asyncio.get_running_loop().time() - self._added_at.pop(key)
        return key

    def waited_seconds(self, key: K) -> float:
        """How long a key that was handed out had waited for a worker."""
        return self._waited[key]

    def done(self, key: K) -> None:
        """Give the key back."""
        self._at_work.discard(key)
        self._waited.pop(key, None)
        if key in self._again:
            self._again.discard(key)
            self.add(key)

    def clear(self) -> None:
        """Forget all keys, delays and failures; a key that a worker has stays with it until :meth:`done`."""
        for _, handle in self._timers.values():
            handle.cancel()
        for collection in (self._timers, self._failures, self._known, self._again, self._waiting, self._added_at):
            collection.clear()

    def _due(self, key: K) -> None:
        self._timers.pop(key, None)
        self.add(key)
