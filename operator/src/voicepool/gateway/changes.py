"""Tells those who follow sessions and pools of each change of a pod, as the informer sees it.

Invariants: telling never waits; who does not keep up loses its place, and with it its stream, instead of ever more memory.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator

from voicepool.model import Key, PodFact

MAX_PENDING = 1000

Change = tuple[PodFact | None, PodFact | None]
"""Old and new; None is "not there"."""


class FellBehind(Exception):
    """More has happened than is kept for one follower."""


class Follower:
    """Waits for changes, one after the other."""

    def __init__(self, wants: Callable[[PodFact], bool]) -> None:
        self._wants = wants
        self._queue: asyncio.Queue[Change] = asyncio.Queue(MAX_PENDING)
        self._lost = False

    async def next(self) -> Change:
        """The next change that was not taken yet. May be cancelled without losing one.

        Raises:
            FellBehind: some were lost.
        """
        if self._lost:
            raise FellBehind
        return await self._queue.get()

    def tell(self, old: PodFact | None, new: PodFact | None) -> None:
        """Take a change over, if it concerns this one."""
        if any(pod is not None and self._wants(pod) for pod in (old, new)):
            try:
                self._queue.put_nowait((old, new))
            except asyncio.QueueFull:
                self._lost = True


class Changes:
    """All that follow anything in this gateway."""

    def __init__(self) -> None:
        self._followers: set[Follower] = set()

    def pod_changed(self, key: Key, old: PodFact | None, new: PodFact | None) -> None:
        """A handler for the informer of the pods."""
        for follower in self._followers:
            follower.tell(old, new)

    @contextlib.contextmanager
    def follow(self, wants: Callable[[PodFact], bool]) -> Iterator[Follower]:
        """Be told of the pods that are wanted, from now on until the context is left."""
        follower = Follower(wants)
        self._followers.add(follower)
        try:
            yield follower
        finally:
            self._followers.discard(follower)
