"""Whose turn a pod is that has just become warm, where several gateways have callers who wait.

All of them see such a pod in the same moment; if all offered it to their queues, all but one would lose, and in an overload each bind would cost as many
patches as there are gateways. So each pod is one gateway's own for a moment, by rendezvous hashing; the others offer it if it is still there after that.

Invariants: nothing is asked and nothing is agreed on: who else binds is read off the pods that others have bound; a gateway that has bound nothing for
`ACTIVE_SECONDS` has no turn; no pod waits longer than `TURN_SECONDS` for anybody. Pure.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

from voicepool.model import BindState, PodFact

TURN_SECONDS = 0.2
"""Enough for a bind and for its event; a caller who is served out of turn has waited for longer already."""
ACTIVE_SECONDS = 10.0


class Turns:
    """What one gateway knows of the others' turns.

    Args:
        identity: this gateway, as in ``bound-by``.
        monotonic: seconds that never go back.
    """

    def __init__(self, identity: str, monotonic: Callable[[], float]) -> None:
        self._identity = identity
        self._monotonic = monotonic
        self._warm_since: dict[str, float] = {}
        self._bound_at: dict[str, float] = {}
        """When each other gateway was last seen to have bound a pod."""

    def seen(self, uid: str, pod: PodFact | None, *, warm: bool) -> None:
        """A pod has changed; None: it is gone."""
        if warm:
            self._warm_since.setdefault(uid, self._monotonic())
            return
        was_warm = self._warm_since.pop(uid, None) is not None
        if was_warm and pod is not None and pod.state is BindState.BOUND and pod.bound_by not in (None, self._identity):
            self._bound_at[pod.bound_by or ""] = self._monotonic()

    def wait_seconds(self, uid: str) -> float:
        """How long to leave a warm pod to another gateway; 0: no longer, or not at all."""
        now = self._monotonic()
        left = self._warm_since.get(uid, now) + TURN_SECONDS - now
        if left <= 0 or not self._bound_at:
            return 0.0
        for other, at in list(self._bound_at.items()):
            if now - at > ACTIVE_SECONDS:
                del self._bound_at[other]
        first = max((self._identity, *self._bound_at), key=lambda gateway: _weight(gateway, uid))
        return 0.0 if first == self._identity else left


def _weight(gateway: str, uid: str) -> bytes:
    return hashlib.blake2b(f"{gateway}\0{uid}".encode(), digest_size=8).digest()
