"""Whether the watch of the pools tells what lists of them show.

A watch that has never begun, or that nobody serves, looks like one in which nothing happens. A version of a pool that a list has shown, and that the
watch has not told long afterwards, tells them apart. Invariant: of a watch that tells everything, however late, nothing is owed for ever.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from voicepool.model import Key


class PoolWatch:
    """What the watch has told, and what it owes.

    Args:
        clock: seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._told: dict[Key, int] = {}
        self._owed: dict[Key, tuple[int, float]] = {}
        """Versions that a list has shown before the watch, and when."""

    def told(self, key: Key, version: int) -> None:
        """The watch has shown this version of a pool."""
        self._told[key] = version
        if key in self._owed and self._owed[key][0] <= version:
            del self._owed[key]

    def listed(self, versions: Mapping[Key, int], position: int) -> None:
        """A list of that resource version has shown these pools, and no others."""
        now = self._clock()
        self._told = {key: version for key, version in self._told.items() if key in versions or version > position}
        self._owed = {
            key: self._owed.get(key, (version, now))
            for key, version in versions.items()
            if self._told.get(key, 0) < version
        }

    def owed_for_seconds(self) -> float:
        """How long the watch has owed what it owes for longest; 0 where it owes nothing."""
        now = self._clock()
        return now - min((since for _, since in self._owed.values()), default=now)
