"""Token buckets, one for each key, in bounded memory. Pure, but for the clock that it is given."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass


@dataclass(slots=True)
class _Bucket:
    tokens: float
    at: float


class Buckets:
    """Says whether something may happen once more for a key, and if not, when.

    A key that has not been seen has a full bucket. When there are too many keys, the one that has not been used for longest is forgotten, and so has a full
    bucket again: memory is bounded, and a limit may be missed rather than somebody be refused for what another did.

    Args:
        monotonic: seconds that never go back.
        max_keys: how many keys are remembered.
    """

    def __init__(self, monotonic: Callable[[], float], *, max_keys: int) -> None:
        self._monotonic = monotonic
        self._max_keys = max_keys
        self._buckets: OrderedDict[Hashable, _Bucket] = OrderedDict()

    def wait_seconds(self, key: Hashable, *, per_minute: float, burst: float) -> float:
        """In how many seconds there is a token for this key; 0: now. Nothing is taken."""
        tokens = self._tokens(key, per_minute, burst)
        return max(0.0, (1.0 - tokens) * 60.0 / per_minute)

    def take(self, key: Hashable, *, per_minute: float, burst: float) -> float:
        """Take a token of this key and give 0; where there is none, the seconds until there is one."""
        tokens = self._tokens(key, per_minute, burst)
        if tokens < 1.0:
            return (1.0 - tokens) * 60.0 / per_minute
        self._buckets[key] = _Bucket(tokens - 1.0, self._monotonic())
        self._buckets.move_to_end(key)
        if len(self._buckets) > self._max_keys:
            self._buckets.popitem(last=False)
        return 0.0

    def _tokens(self, key: Hashable, per_minute: float, burst: float) -> float:
        bucket = self._buckets.get(key)
        if bucket is None:
            return burst
        return min(burst, bucket.tokens + (self._monotonic() - bucket.at) * per_minute / 60.0)

    def __len__(self) -> int:
        return len(self._buckets)
