"""Whether a pipeline still moves, told from Pipecat's heartbeats: frames that go through all of it, one each second.

A processor that does not come back from one frame holds up all that queue behind it, while the event loop, the probes and
the room are fine: the caller talks to nobody. Heartbeats stop for good reasons, too: some services let nothing pass while
the agent speaks, a bot may have a processor that keeps heartbeats back, and sound goes before them where it comes in faster
than it is worked off. Invariants: what the caller hears is a sign of life as good as a heartbeat, and so is work that is
only late; a pipeline through which no heartbeat has ever come is never called stuck.
"""

from __future__ import annotations

from collections.abc import Callable


class Pulse:
    """The signs of life of one pipeline.

    Args:
        clock: seconds, monotonic.
        limit_seconds: without any sign for so long, it is stuck.
    """

    def __init__(self, clock: Callable[[], float], limit_seconds: float) -> None:
        self._clock = clock
        self._limit_seconds = limit_seconds
        self._last: float | None = None

    def beat(self) -> None:
        """A heartbeat has come through."""
        self._last = self._clock()

    def moved(self) -> None:
        """There is another sign of life than a heartbeat."""
        if self._last is not None:
            self._last = self._clock()

    @property
    def is_stuck(self) -> bool:
        """Whether it has moved once, and does no more."""
        return self._last is not None and self._clock() - self._last >= self._limit_seconds
