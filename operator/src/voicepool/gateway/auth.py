"""Who calls: API keys, kept as hashes in a folder of files, each with the pools it may use.

One file per key; its name is the key's name, its content ``sha256:<hex of the key>``, optionally followed by ``pools=<namespace>/<pool>,...``
(``<namespace>/*`` is every pool of a namespace). Invariants: keys are compared as hashes, each with each, in constant time; without a readable key
every call is refused; the folder is read again when it changes, so a key is added or withdrawn without a restart; no key ever reaches a log.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
from dataclasses import dataclass
from pathlib import Path

from voicepool.gateway.errors import NotAllowed, Unauthenticated

log = logging.getLogger("voicepool.gateway")

_ENTRY = re.compile(r"^sha256:(?P<digest>[0-9a-fA-F]{64})(?:\s+pools=(?P<pools>\S+))?\s*$")


@dataclass(frozen=True, slots=True)
class Caller:
    """Somebody with a good key."""

    name: str
    """The key's name, for logs and for what a caller may repeat; not a secret."""
    pools: frozenset[str] | None
    """``<namespace>/<pool>`` or ``<namespace>/*``; None is every pool."""

    def may_use(self, namespace: str, pool: str) -> bool:
        """Whether the pool is in the key's scope."""
        return self.pools is None or f"{namespace}/{pool}" in self.pools or f"{namespace}/*" in self.pools

    def require(self, namespace: str, pool: str) -> None:
        """Refuse a pool that is out of scope.

        Raises:
            NotAllowed: whether or not such a pool exists.
        """
        if not self.may_use(namespace, pool):
            raise NotAllowed(f"The API key {self.name!r} is not for the pool {namespace}/{pool}.")


ANONYMOUS = Caller(name="anonymous", pools=None)
"""The caller where authentication is switched off."""


@dataclass(frozen=True, slots=True)
class _Entry:
    digest: bytes
    caller: Caller


class ApiKeys:
    """The keys of a folder.

    Args:
        folder: where the keys are mounted; it may be missing or empty.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._seen: tuple[tuple[str, int, int], ...] | None = None
        self._entries: tuple[_Entry, ...] = ()

    def authenticate(self, key: str | None) -> Caller:
        """Find whose key this is.

        Raises:
            Unauthenticated: no key, a wrong one, or a gateway without keys.
        """
        self._refresh()
        if not self._entries:
            raise Unauthenticated(
                "This gateway has no API keys, so it refuses every call. Add one to its Secret of API keys: "
                "an entry named after the caller with the value sha256:<hex of the key's SHA-256>.",
                code="NO_API_KEYS",
            )
        if not key:
            raise Unauthenticated("Send an API key as 'Authorization: Bearer <key>' or 'X-API-Key: <key>'.")
        digest = hashlib.sha256(key.encode()).digest()
        found: Caller | None = None
        for entry in self._entries:
            # No early exit: the time taken says nothing about which entry was near.
            if hmac.compare_digest(entry.digest, digest):
                found = entry.caller
        if found is None:
            raise Unauthenticated("This API key is not known here.")
        return found

    def _refresh(self) -> None:
        seen = self._signature()
        if seen == self._seen:
            return
        entries = []
        for name, _, _ in seen:
            try:
                text = (self._folder / name).read_text()
            except (OSError, UnicodeDecodeError):
                log.warning("an API key could not be read", extra={"key": name})
                continue
            entry = _parse(name, text)
            if entry is None:
                log.warning(
                    "an API key is not of the form 'sha256:<hex> [pools=<namespace>/<pool>,...]'", extra={"key": name}
                )
            else:
                entries.append(entry)
        self._entries = tuple(entries)
        self._seen = seen

    def _signature(self) -> tuple[tuple[str, int, int], ...]:
        try:
            files = sorted(path for path in self._folder.iterdir() if not path.name.startswith("."))
            stats = [(path.name, path.stat()) for path in files if path.is_file()]
        except OSError:
            return ()
        return tuple((name, stat.st_mtime_ns, stat.st_ino) for name, stat in stats)


def _parse(name: str, text: str) -> _Entry | None:
    match = _ENTRY.match(text.strip())
    if match is None:
        return None
    pools = match["pools"]
    scope = frozenset(filter(None, pools.split(","))) if pools else None
    return _Entry(digest=bytes.fromhex(match["digest"]), caller=Caller(name=name, pools=scope))
