"""Whether a pipeline takes a caller's sound more slowly than it comes, so that the rest would never get through.

Pipecat's processors work off what is urgent first, and sound is: where it comes faster than it is taken, a greeting waits
behind all of it, for as long as the call lasts. To leave sound out until nothing waits costs words, and keeps the call.
Invariant: a processor that waits for one thing, a provider's answer perhaps, and then goes on is no reason to leave anything
out, however much has come meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Generic, NamedTuple, TypeVar

Place = TypeVar("Place")

MUCH_SECONDS = 0.25
"""Of sound: less is on its way, and more waits."""

LIMIT_SECONDS = 2.0
"""How long a pipeline may work without getting to the end of what waits."""

LONGEST_STEP_SECONDS = 0.5
"""What counts of the time between two steps. The rest was spent with waiting, and not with work."""


class Waiting(NamedTuple):
    """What waits in one place: frames of any kind, seconds of sound, and the oldest piece of it, by a number that no other has."""

    frames: int
    sound_seconds: float
    oldest_sound: int | None


class Backlog(Generic[Place]):
    """The sound that waits in one pipeline.

    Args:
        clock: seconds, monotonic.
        waiting: where anything waits, and how much.
    """

    def __init__(self, clock: Callable[[], float], waiting: Callable[[], Mapping[Place, Waiting]]) -> None:
        self._clock = clock
        self._waiting = waiting
        self._oldest: Mapping[Place, int | None] = {}
        self._moved = clock()
        self._behind_seconds = 0.0

    @property
    def _is_long(self) -> bool:
        return self._behind_seconds >= LIMIT_SECONDS

    @property
    def places(self) -> Iterable[Place]:
        """Where it waits, as of the last piece."""
        return self._oldest

    def leaves_out(self) -> bool:
        """Whether a piece that has just come is to be left out; asked for each of them."""
        now = self._clock()
        before = self._oldest
        self._oldest = {
            place: waiting.oldest_sound
            for place, waiting in self._waiting().items()
            # What waits for sound to be taken is next when there is none: then, and not sooner, more may come.
            if (waiting.frames if self._is_long else waiting.sound_seconds > MUCH_SECONDS)
        }
        if not self._oldest:
            self._behind_seconds = 0.0
        if not before:
            self._moved = now
        elif any(before.get(place, oldest) != oldest for place, oldest in self._oldest.items()):
            self._behind_seconds += min(now - self._moved, LONGEST_STEP_SECONDS)
            self._moved = now
        return self._is_long
