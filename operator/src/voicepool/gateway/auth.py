"""Who calls, and what they may: callers, their scopes, and API keys, kept as hashes in a folder of files.

One file per key; its name is the key's name, its content ``sha256:<hex of the key>``, optionally followed by ``pools=<namespace>/<pool>,...``
(``<namespace>/*`` is every pool of a namespace), ``sessions=<number>`` and ``startsPerMinute=<number>``. Invariants: keys are compared as hashes, each
with each, in constant time; without a readable key every call with one is refused; an entry with a word that is not understood is no key, so a misspelt
limit never is none; the folder is read again when it changes, so a key is added or withdrawn without a restart; no key ever reaches a log.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from voicepool.gateway.errors import NotAllowed, Unauthenticated
from voicepool.gateway.side_by_side import side_by_side
from voicepool.gateway.view import PoolKey

log = logging.getLogger("voicepool.gateway")

_ENTRY = re.compile(r"^sha256:(?P<digest>[0-9a-fA-F]{64})(?P<words>(?:\s+[A-Za-z]+=\S+)*)$")


class Scope(Protocol):
    """Which pools a caller may use."""

    async def allows(self, namespace: str, pool: str) -> bool:
        """Whether this one."""
        ...


@dataclass(frozen=True, slots=True)
class Listed:
    """A scope that is written down."""

    pools: frozenset[str] | None
    """``<namespace>/<pool>`` or ``<namespace>/*``; None is every pool."""

    async def allows(self, namespace: str, pool: str) -> bool:
        """Whether the pool, or every pool of its namespace, is listed."""
        return self.pools is None or f"{namespace}/{pool}" in self.pools or f"{namespace}/*" in self.pools


@dataclass(frozen=True, slots=True)
class Limits:
    """How much one caller may have; None is what the gateway's settings say, 0 is without a limit."""

    sessions: int | None = None
    """Sessions at the same time."""
    starts_per_minute: int | None = None


UNLIMITED = Limits(sessions=0, starts_per_minute=0)


@dataclass(frozen=True, slots=True)
class Caller:
    """Somebody whose credential is good."""

    name: str
    """For messages, and for what a caller may repeat; not a secret."""
    scope: Scope
    limits: Limits = Limits()
    mark: str = field(default="")
    """Tells this caller from all others in the annotation of a bound pod: of at most 340 characters, and nobody's personal data. Default: the name."""

    def __post_init__(self) -> None:
        if not self.mark:
            object.__setattr__(self, "mark", self.name)

    async def usable(self, keys: Iterable[PoolKey]) -> list[PoolKey]:
        """Those of these pools that are in the caller's scope, in their order."""
        asked = list(keys)
        answers = await side_by_side(self.scope.allows(*key) for key in asked)
        return [key for key, answer in zip(asked, answers, strict=True) if answer]

    async def require(self, namespace: str, pool: str) -> None:
        """Refuse a pool that is out of scope.

        Raises:
            NotAllowed: whether or not such a pool exists.
        """
        if not await self.scope.allows(namespace, pool):
            raise NotAllowed(f"The caller {self.name!r} may not use the pool {namespace}/{pool}.")


ANONYMOUS = Caller(name="anonymous", scope=Listed(None), limits=UNLIMITED)
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
                    "an API key is not of the form 'sha256:<hex> [pools=<namespace>/<pool>,...] [sessions=<number>] [startsPerMinute=<number>]'",
                    extra={"key": name},
                )
            else:
                entries.append(entry)
        self._entries = tuple(entries)
        self._seen = seen

    def _signature(self) -> tuple[tuple[str, int, int], ...]:
        # At each request, hence without pathlib: it looks at each file twice.
        try:
            with os.scandir(self._folder) as entries:
                files = sorted(
                    (file.name, file.stat()) for file in entries if not file.name.startswith(".") and file.is_file()
                )
        except OSError:
            return ()
        return tuple((name, stat.st_mtime_ns, stat.st_ino) for name, stat in files)


def _parse(name: str, text: str) -> _Entry | None:
    match = _ENTRY.match(text.strip())
    if match is None:
        return None
    pairs = [(word, value) for word, _, value in (one.partition("=") for one in match["words"].split())]
    words = dict(pairs)
    pools = words.pop("pools", None)
    counts = {word: words.pop(word, None) for word in ("sessions", "startsPerMinute")}
    if words or len(dict(pairs)) < len(pairs):
        return None
    if any(value is not None and not re.fullmatch(r"[0-9]{1,6}", value) for value in counts.values()):
        return None
    sessions, starts = (None if value is None else int(value) for value in counts.values())
    scope = Listed(frozenset(filter(None, pools.split(","))) if pools else None)
    return _Entry(bytes.fromhex(match["digest"]), Caller(name, scope, Limits(sessions, starts)))
