"""Keeps credentials from being guessed quickly: who has sent too many wrong ones from one address has to wait, with whatever comes next from there.

Invariants: memory is bounded, whatever addresses come; an IPv6 address counts as its network of 64 bits, since one machine has all of them; a
credential that was good at that address lately goes on being good, so that who shares an address with a guesser (a proxy, a NAT) is not locked out.
"""

from __future__ import annotations

import functools
import hashlib
import ipaddress
from collections import OrderedDict
from collections.abc import Callable

from voicepool.gateway.buckets import Buckets
from voicepool.gateway.errors import TooManyFailures

MAX_ADDRESSES = 4096
MAX_GOOD = 4096
GOOD_SECONDS = 600.0


class Failures:
    """Wrong credentials, by the address that they came from.

    Args:
        per_minute: how many an address may send, in the long run and at once; 0 is without a limit.
        monotonic: seconds that never go back.
    """

    def __init__(self, per_minute: int, monotonic: Callable[[], float]) -> None:
        self._per_minute = per_minute
        self._monotonic = monotonic
        self._buckets = Buckets(monotonic, max_keys=MAX_ADDRESSES)
        self._good: OrderedDict[bytes, float] = OrderedDict()

    def check(self, address: str, credential: str) -> None:
        """Refuse to look at a credential from an address that has sent too many wrong ones.

        Raises:
            TooManyFailures: with the time after which one more is looked at.
        """
        if not self._per_minute or self._is_good(address, credential):
            return
        wait = self._buckets.wait_seconds(network(address), per_minute=self._per_minute, burst=self._per_minute)
        if wait:
            raise TooManyFailures(
                "Too many wrong credentials came from this address; wait, and then send a good one.",
                retry_after_seconds=wait,
            )

    def wrong(self, address: str) -> None:
        """A credential from there was wrong."""
        if self._per_minute:
            self._buckets.take(network(address), per_minute=self._per_minute, burst=self._per_minute)

    def good(self, address: str, credential: str) -> None:
        """A credential from there was good."""
        mark = _mark(address, credential)
        self._good[mark] = self._monotonic() + GOOD_SECONDS
        self._good.move_to_end(mark)
        if len(self._good) > MAX_GOOD:
            self._good.popitem(last=False)

    def _is_good(self, address: str, credential: str) -> bool:
        return self._good.get(_mark(address, credential), float("-inf")) > self._monotonic()


def network(address: str) -> str:
    """What counts as one address: an IPv4 address, or an IPv6 network of 64 bits."""
    # No address is longer; what a proxy was told instead of one may be, and is not to be remembered whole.
    return _network(address[:64])


@functools.lru_cache(maxsize=MAX_ADDRESSES)
def _network(address: str) -> str:
    try:
        read = ipaddress.ip_address(address)
    except ValueError:
        return address
    if isinstance(read, ipaddress.IPv4Address):
        return str(read)
    if read.ipv4_mapped is not None:
        return str(read.ipv4_mapped)
    return str(ipaddress.ip_network((read.packed, 64), strict=False))


def _mark(address: str, credential: str) -> bytes:
    return hashlib.sha256(f"{network(address)}\0{credential}".encode()).digest()
