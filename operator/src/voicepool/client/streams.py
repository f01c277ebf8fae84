"""Logs and events that are followed: what each event means, and where to go on when the connection breaks. Without I/O."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from voicepool.client import calls
from voicepool.client.attempts import LONGEST_PAUSE_SECONDS, Attempts
from voicepool.client.calls import Call
from voicepool.client.errors import VoicepoolError
from voicepool.session_api import LogLine, PoolCounts, SessionRecord

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class SessionNews:
    """A session of a pool began or ended."""

    what: str
    """``started``, ``ended`` or ``dropped``."""
    record: SessionRecord


class Stream(ABC, Generic[T]):
    """What is followed. A new connection after each break, until it is over."""

    over = False
    """Nothing comes any more."""
    resumable = True
    """What happened while nobody was connected is told to who comes back."""

    @abstractmethod
    def call(self) -> Call[None]:
        """The request of the next connection."""

    @abstractmethod
    def take(self, name: str, data: str, id: str) -> T | None:
        """What an event says; None for one that says nothing, or that is not known.

        Raises:
            ValueError: its data is not what it should be.
        """


class LogStream(Stream[LogLine]):
    """The log of a session; comes back for what was written after the last line."""

    def __init__(self, pool: str, session_id: str, tail: int) -> None:
        self._pool, self._session_id, self._tail = pool, session_id, tail
        self._last_id: str | None = None

    def call(self) -> Call[None]:
        """From the last line on, or from so many lines back."""
        return calls.follow_log(self._pool, self._session_id, self._tail, self._last_id)

    def take(self, name: str, data: str, id: str) -> LogLine | None:
        """A line."""
        self.over = name == "end"
        if name != "log":
            return None
        line = LogLine.model_validate_json(data)
        self._last_id = id or self._last_id
        return line


class StateStream(Stream[SessionRecord]):
    """The states of a session; a new connection begins with the state that is known already."""

    def __init__(self, pool: str, session_id: str) -> None:
        self._pool, self._session_id = pool, session_id
        self._told: str | None = None

    def call(self) -> Call[None]:
        """The states from now on."""
        return calls.session_events(self._pool, self._session_id)

    def take(self, name: str, data: str, id: str) -> SessionRecord | None:
        """The record in its new state."""
        if name != "session":
            return None
        record = SessionRecord.model_validate_json(data)
        self.over = record.state == "ended"
        known, self._told = self._told, record.state
        return None if record.state == known else record


class PoolStream(Stream[PoolCounts | SessionNews]):
    """A pool's counts and sessions; what happened while nobody was connected is not told again."""

    resumable = False

    def __init__(self, pool: str) -> None:
        self._pool = pool

    def call(self) -> Call[None]:
        """What goes on from now on."""
        return calls.pool_events(self._pool)

    def take(self, name: str, data: str, id: str) -> PoolCounts | SessionNews | None:
        """Counts, or a session that began or ended."""
        if name == "pool":
            return PoolCounts.model_validate_json(data)
        if name.startswith("session."):
            return SessionNews(name.removeprefix("session."), SessionRecord.model_validate_json(data))
        return None


class Following(Generic[T]):
    """The connections of one stream, one after the other. The time for the next one begins anew after each that was good for something.

    Args:
        stream: what is followed.
        attempts: those of a call.
        monotonic: a clock, in seconds.
    """

    def __init__(
        self,
        stream: Stream[T],
        attempts: Callable[[Call[None]], Attempts],
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.stream = stream
        self._make_attempts = attempts
        self._monotonic = monotonic
        self._connected_at: float | None = None
        self._news = False
        self.call = stream.call()
        self.attempts = attempts(self.call)

    def connected(self) -> None:
        """The gateway has begun to answer; it takes its time from now on."""
        self._connected_at = self._monotonic()
        self.attempts.left.streaming = True

    def take(self, name: str, data: str, id: str) -> T | None:
        """What an event says. Raises ValueError."""
        self._news = True
        return self.stream.take(name, data, id)

    def pause_seconds(self, error: VoicepoolError) -> float | None:
        """How long to wait before the next connection; None: there is none, and the error is the caller's."""
        if self._news and not self.stream.resumable:
            return None
        since, self._connected_at = self._connected_at, None
        # One on which nothing was written for an hour was good as well; one that breaks at once each time is not.
        if self._news or (since is not None and self._monotonic() - since > LONGEST_PAUSE_SECONDS):
            self.attempts = self._make_attempts(self.call)
        self._news = False
        self.attempts.left.streaming = False
        self.call = self.stream.call()
        return self.attempts.pause_seconds(error)
