"""Callers of this gateway who were not bound: those who wait now, and those who were refused or gave up waiting.

Invariants: forgets what is older than the longest window that sizing looks at; keeps at most ``MOST`` sessions of a pool; one session counts once, however
often it is tried, and no longer when it has its agent (it is on a pod then). No I/O.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta

from voicepool.gateway.view import PoolKey
from voicepool.sizing import WINDOWS_SECONDS, Unmet

MOST = 10_000


class Demand:
    """What only this gateway knows of the demand for pools.

    Args:
        waiting: how many callers wait for any pod of a pool.
        now: the current time, with its zone.
    """

    def __init__(self, waiting: Callable[[PoolKey], int], now: Callable[[], datetime]) -> None:
        self._waiting = waiting
        self._now = now
        self._rejected: dict[PoolKey, dict[str, datetime]] = {}
        """By session, the oldest first."""

    def rejected(self, key: PoolKey, session_id: str) -> None:
        """A caller got no agent, for want of a pod."""
        sessions = self._rejected.setdefault(key, {})
        sessions.pop(session_id, None)
        sessions[session_id] = self._now()
        if len(sessions) > MOST:
            del sessions[next(iter(sessions))]

    def started(self, key: PoolKey, session_id: str) -> None:
        """A caller got an agent."""
        self._rejected.get(key, {}).pop(session_id, None)

    def forget(self, key: PoolKey) -> None:
        """A pool is gone."""
        self._rejected.pop(key, None)

    def unmet(self, key: PoolKey) -> Unmet:
        """The callers of a pool who were not bound."""
        now = self._now()
        sessions = self._rejected.get(key, {})
        horizon = now - timedelta(seconds=max(WINDOWS_SECONDS))
        for session_id, moment in list(sessions.items()):
            if moment > horizon:
                break
            del sessions[session_id]
        if not sessions:
            self._rejected.pop(key, None)
        ages = [(now - moment).total_seconds() for moment in sessions.values()]
        return Unmet(
            waiting=self._waiting(key),
            rejected=tuple(sum(age < seconds for age in ages) for seconds in WINDOWS_SECONDS),
        )
