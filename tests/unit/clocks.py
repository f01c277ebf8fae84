"""A clock for what asks one for the time, and sets no timers; `virtual_time.py` has one for event loops."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Clock:
    """Stands still until it is set."""

    now: float = 1000.0

    def __call__(self) -> float:
        """Seconds."""
        return self.now
