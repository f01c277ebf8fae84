"""When a call is tried again, and for how long: the decisions, without I/O.

Invariants: only what can be repeated is repeated; never before the gateway's own ``Retry-After``; a pause that would lead past the call's deadline is not
begun, and the error is told at once; each step of a request may take what is left of the whole.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping

from voicepool.client.errors import ConnectionFailed, NotUnderstood, TlsFailed, TryAgainLater, VoicepoolError

FIRST_PAUSE_SECONDS = 0.25
LONGEST_PAUSE_SECONDS = 8.0
"""Pauses double where the gateway does not say when; none is longer."""
SPREAD = 0.1
"""Each pause is longer by up to this share of it, so that those who were refused together do not come together."""
SILENCE_SECONDS = 50.0
"""A stream on which nothing comes for so long is broken: the gateway sends a comment every 15 s."""

_STEPS = ("connect", "read", "write", "pool")
_PASSING = (429, 502, 503, 504)
"""What proxies answer while a gateway is replaced."""


class TimeLeft(Mapping[str, float]):
    """The time-outs of one request, as httpx looks them up when a step of it begins: what is left until the deadline.

    Four fixed ones could take four times as long as the caller said.

    Args:
        deadline: on the clock.
        monotonic: the clock, in seconds.
    """

    def __init__(self, deadline: float, monotonic: Callable[[], float]) -> None:
        self._deadline = deadline
        self._monotonic = monotonic
        self.streaming = False
        """The answer has begun and goes on for as long as there is news."""

    @property
    def seconds(self) -> float:
        """What is left."""
        return self._deadline - self._monotonic()

    def __getitem__(self, step: str) -> float:
        if step not in _STEPS:
            raise KeyError(step)
        if self.streaming and step == "read":
            return SILENCE_SECONDS
        # Nothing at all would mean "do not wait" to a socket.
        return max(self.seconds, 0.001)

    def __iter__(self) -> Iterator[str]:
        return iter(_STEPS)

    def __len__(self) -> int:
        return len(_STEPS)


class Attempts:
    """The attempts of one call.

    Args:
        timeout_seconds: for all of them.
        repeatable: whether there may be a second one.
        monotonic: a clock, in seconds.
        random_share: between 0 and 1.
    """

    def __init__(
        self,
        timeout_seconds: float,
        *,
        repeatable: bool,
        monotonic: Callable[[], float] = time.monotonic,
        random_share: Callable[[], float] = random.random,
    ) -> None:
        self.timeout_seconds = timeout_seconds
        self._repeatable = repeatable
        self._random_share = random_share
        self._pause_seconds = FIRST_PAUSE_SECONDS
        self.left = TimeLeft(monotonic() + timeout_seconds, monotonic)
        self.made = 1
        """How many there were, with the one that goes on."""
        self.earlier: VoicepoolError | None = None
        """What the last one but this one came to."""

    def pause_seconds(self, error: VoicepoolError) -> float | None:
        """How long to wait before the next attempt; None: there is none, and the error is the caller's.

        Args:
            error: what this one came to.
        """
        if not (self._repeatable and _passes(error)):
            return None
        pause = error.retry_after_seconds
        if pause is None:
            pause, self._pause_seconds = self._pause_seconds, min(2 * self._pause_seconds, LONGEST_PAUSE_SECONDS)
        pause *= 1 + SPREAD * self._random_share()
        if pause >= self.left.seconds:
            return None
        self.made += 1
        self.earlier = error
        return pause


def _passes(error: VoicepoolError) -> bool:
    match error:
        case TlsFailed():
            return False
        case ConnectionFailed():
            return True
        case TryAgainLater():
            # The gateway says when wherever it thinks that it is worth while.
            return error.retry_after_seconds is not None
        case NotUnderstood():
            return error.status in _PASSING
        case _:
            return False
