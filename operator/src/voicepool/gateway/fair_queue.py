"""The order in which callers are served who wait for one pool: a turn for each key, and within a key first come, first served.

Invariants: while anybody waits, `first` is somebody; a key that waits is passed by each other key at most once between two turns of its own (and once more
for a pod that another key was given and lost); with one key it is a plain queue. Pure.
"""

from __future__ import annotations

import bisect
from collections import OrderedDict
from collections.abc import Iterator
from typing import Generic, Protocol, TypeVar


class Waiting(Protocol):
    """One who waits. Told apart by identity."""

    @property
    def caller(self) -> str:
        """Whose turn it takes: the name of a key."""
        ...

    @property
    def since(self) -> float:
        """When it came, in seconds of some clock."""
        ...


W = TypeVar("W", bound=Waiting)


class FairQueue(Generic[W]):
    """Who waits, in the order of their turns."""

    def __init__(self) -> None:
        self._lines: OrderedDict[str, list[W]] = OrderedDict()
        """By key, the one whose turn it is first; none is empty."""
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[W]:
        for line in self._lines.values():
            yield from line

    def add(self, waiter: W, *, again: bool = False) -> None:
        """Let somebody wait.

        Args:
            waiter: who; its place among its key's others is by `since`.
            again: it was served before and lost what it was given, so it is its key's turn still.
        """
        bisect.insort_right(self._lines.setdefault(waiter.caller, []), waiter, key=_since)
        if again:
            self._lines.move_to_end(waiter.caller, last=False)
        self._length += 1

    def first(self) -> W | None:
        """Who is to be served next; None when nobody waits."""
        for line in self._lines.values():
            return line[0]
        return None

    def remove(self, waiter: W) -> None:
        """Somebody no longer waits; he need not be here."""
        line = self._lines.get(waiter.caller, [])
        if waiter not in line:
            return
        line.remove(waiter)
        self._length -= 1
        if not line:
            del self._lines[waiter.caller]

    def served(self, waiter: W) -> None:
        """Somebody got what he waited for: the next turn is another key's."""
        self.remove(waiter)
        if waiter.caller in self._lines:
            self._lines.move_to_end(waiter.caller)

    def last_of_the_longest(self) -> W:
        """Who came last, of the key that has most who wait; there has to be one."""
        return max(self._lines.values(), key=len)[-1]

    def waiting_of(self, caller: str) -> int:
        """How many wait of one key."""
        return len(self._lines.get(caller, ()))


def _since(waiter: Waiting) -> float:
    return waiter.since
