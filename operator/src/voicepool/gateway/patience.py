"""How long a start puts up with an API server that does not do what it is asked, and when it asks again.

Invariants: what has passed by the next attempt (it is away, busy, or has just started) is tried again for as long as the caller has time, and no sooner
than the API server said; what has not is told at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from voicepool.gateway.requests import Trouble
from voicepool.kube.api import Forbidden, KubeApiError, ServerFault, TooManyRequests, Unreachable

JUST_STARTED_SECONDS = 10.0
"""An API server that has just started does not know its accounts and roles yet, and forbids everything. What it still forbids after that is forbidden."""

MOST_PAUSES = 4
"""Between two attempts."""


class Patience:
    """Of one start, or of one step of it.

    Args:
        trouble: where the last error is written down, for who has to say why the time was up.
        pause: waits a moment.
    """

    def __init__(self, trouble: Trouble, pause: Callable[[], Awaitable[None]]) -> None:
        self._trouble = trouble
        self._pause = pause
        self._tries = 0
        self._forbidden_since: float | None = None

    async def wait(self, error: KubeApiError) -> bool:
        """Wait until it is worth while to try again; False, at once, where it is not."""
        now = asyncio.get_running_loop().time()
        if isinstance(error, Forbidden):
            self._forbidden_since = now if self._forbidden_since is None else self._forbidden_since
            if now - self._forbidden_since >= JUST_STARTED_SECONDS:
                return False
        elif not isinstance(error, TooManyRequests | Unreachable | ServerFault):
            return False
        self._trouble.last = error
        self._tries += 1
        if isinstance(error, TooManyRequests):
            await asyncio.sleep(error.retry_after_seconds)
            return True
        # Hundreds may wait like this one for an API server that comes back.
        for _ in range(min(self._tries, MOST_PAUSES)):
            await self._pause()
        return True

    def over(self) -> None:
        """The API server has answered."""
        self._trouble.last = None
