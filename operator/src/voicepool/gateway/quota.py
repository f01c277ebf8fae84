"""How much one caller may have: starts a minute, and sessions at the same time.

Invariants: sessions are counted by what the informer shows of all gateways' binds, and what is under way in this one; another gateway's start that is under way
is not seen, so as many sessions more than the quota as other gateways have starts of the same caller in the same moment are possible, and no more. The
rate is this gateway's own. A session that is asked for again counts once.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from voicepool.gateway.auth import Caller
from voicepool.gateway.buckets import Buckets
from voicepool.gateway.errors import BadRequest, GatewayError, QuotaExceeded, RateLimited
from voicepool.gateway.view import ClusterView

MAX_CALLERS = 10_000
"""Whose rates are remembered."""
SETTLE_SECONDS = 3.0
"""A session that was started here counts for so long, unless the informer shows it before: then it counts while it is shown."""
QUOTA_RETRY_SECONDS = 5.0
"""When a session ends nobody knows; so often a caller may well ask."""

Session = tuple[str, str]
"""Namespace and session id."""


class Quota:
    """Admits starts.

    Args:
        view: what the informers know.
        sessions: for a caller without a number of its own; 0 is without a limit.
        starts_per_minute: the same.
        starts_burst: how many starts may come at once.
        monotonic: seconds that never go back.
    """

    def __init__(
        self,
        view: ClusterView,
        *,
        sessions: int,
        starts_per_minute: int,
        starts_burst: int,
        monotonic: Callable[[], float],
    ) -> None:
        self._view = view
        self._sessions = sessions
        self._starts_per_minute = starts_per_minute
        self._starts_burst = starts_burst
        self._monotonic = monotonic
        self._buckets = Buckets(monotonic, max_keys=MAX_CALLERS)
        self._under_way: defaultdict[str, Counter[Session]] = defaultdict(Counter)
        self._settling: dict[str, dict[Session, float]] = {}
        self._until: deque[tuple[float, str, Session]] = deque()

    @contextmanager
    def admitted(self, caller: Caller, namespace: str, session_id: str) -> Iterator[None]:
        """Count a start while it is under way, and until the informer shows what became of it.

        Raises:
            QuotaExceeded: the caller has as many sessions as it may have.
            RateLimited: it has started too many of late.
        """
        quota = self._sessions if caller.limits.sessions is None else caller.limits.sessions
        session = (namespace, session_id)
        if quota:
            self._check_sessions(caller, session, quota)
        self._check_rate(caller)
        if not quota:
            yield
            return
        under_way = self._under_way[caller.mark]
        under_way[session] += 1
        perhaps_bound = True
        try:
            yield
        except BadRequest:
            # The caller has gone; its agent may come all the same.
            raise
        except GatewayError:
            perhaps_bound = False
            raise
        finally:
            under_way[session] -= 1
            if not under_way[session]:
                del under_way[session]
            if not under_way:
                del self._under_way[caller.mark]
            if perhaps_bound:
                self._settles(caller.mark, session)

    def _check_sessions(self, caller: Caller, session: Session, quota: int) -> None:
        self._forget_settled()
        mark = caller.mark
        seen, settling = self._view.sessions_of(mark), self._settling.get(mark, {})
        for known in [one for one in settling if one in seen]:
            del settling[known]
        mine = {*seen, *self._under_way.get(mark, ()), *settling}
        if session not in mine and len(mine) >= quota:
            raise QuotaExceeded(
                f"The caller {caller.name!r} has {len(mine)} sessions and may have {quota} at the same time; end one, or wait until one ends.",
                retry_after_seconds=QUOTA_RETRY_SECONDS,
            )

    def _settles(self, mark: str, session: Session) -> None:
        until = self._monotonic() + SETTLE_SECONDS
        self._settling.setdefault(mark, {})[session] = until
        self._until.append((until, mark, session))

    def _forget_settled(self) -> None:
        now = self._monotonic()
        while self._until and self._until[0][0] <= now:
            until, mark, session = self._until.popleft()
            settling = self._settling.get(mark, {})
            if settling.get(session) == until:
                del settling[session]
                if not settling:
                    del self._settling[mark]

    def _check_rate(self, caller: Caller) -> None:
        own = caller.limits.starts_per_minute
        per_minute = self._starts_per_minute if own is None else own
        if not per_minute:
            return
        wait = self._buckets.take(caller.mark, per_minute=per_minute, burst=self._starts_burst)
        if wait:
            raise RateLimited(
                f"The caller {caller.name!r} may start {per_minute} sessions a minute ({self._starts_burst} at once); the next in {wait:.1f} s.",
                retry_after_seconds=wait,
            )
