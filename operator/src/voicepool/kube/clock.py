"""The time by the API server's clock, learned from the ``Date`` header of its answers.

Ages are differences: between now and a moment that the API server wrote down (a creation), or that one of us did. Measured with this clock, both
ends come from the same one, and a machine whose own clock is wrong does no harm.

Invariants: between two answers time goes on as the monotonic clock does; each answer corrects it by no more than the answer proves.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

logger = logging.getLogger(__name__)

DIFFERENCE_WORTH_A_WARNING_SECONDS = 5.0


def utc_now() -> datetime:
    """The time by this machine's clock, with its zone."""
    return datetime.now(UTC)


class ServerClock:
    """See the module.

    Args:
        local: the time by this machine's clock, with its zone; holds until the first answer.
        monotonic: seconds that never go back.
    """

    def __init__(
        self, local: Callable[[], datetime] = utc_now, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self.monotonic = monotonic
        self._local = local
        self._offset_seconds: float | None = None
        """From the monotonic clock to the API server's, in seconds since 1970."""
        self._last: tuple[str, float] = ("", 0.0)
        self._warned = False

    def now(self) -> datetime:
        """The time at the API server; better than a second, and the better the more often it has answered."""
        if self._offset_seconds is None:
            return self._local()
        return datetime.fromtimestamp(self.monotonic() + self._offset_seconds, UTC)

    def heard(self, date: str | None, asked_at: float) -> None:
        """An answer came just now.

        Args:
            date: its ``Date`` header: whole seconds, rounded down, of some moment between question and answer. None, or nonsense, proves nothing.
            asked_at: when the question was sent, by :attr:`monotonic`.
        """
        seconds = self._seconds_of(date)
        if seconds is None:
            return
        least, most = seconds - self.monotonic(), seconds + 1.0 - asked_at
        guess = self._offset_seconds
        if guess is None:
            # Where this machine's clock is right it is more exact than a header.
            guess = self._local().timestamp() - self.monotonic()
        self._offset_seconds = min(max(guess, least), most)
        self._warn()

    def _seconds_of(self, date: str | None) -> float | None:
        if not date:
            return None
        text, seconds = self._last
        if text != date:
            try:
                seconds = parsedate_to_datetime(date).timestamp()
            except ValueError:
                return None
            self._last = (date, seconds)
        return seconds

    def _warn(self) -> None:
        difference_seconds = (self._local() - self.now()).total_seconds()
        if abs(difference_seconds) >= DIFFERENCE_WORTH_A_WARNING_SECONDS and not self._warned:
            self._warned = True
            logger.warning(
                "this machine's clock is not the API server's, whose time is used; set one of them right",
                extra={"seconds_ahead": round(difference_seconds, 1)},
            )
