"""The keys of a token issuer: fetched from where the operator's settings say, kept, and fetched again when a token names one that is not known.

Invariants: no address comes from a caller; a fetch has limits in time and size and follows no redirect; however many tokens name unknown keys, there is at
most one fetch in `MIN_INTERVAL_SECONDS`; keys that are known go on working when the issuer is away; only asymmetric keys are kept.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import aiohttp
import jwt

from voicepool.gateway.errors import IssuerUnavailable, Unauthenticated

log = logging.getLogger("voicepool.gateway")

ALGORITHMS = ("RS256", "ES256", "EdDSA")
MIN_INTERVAL_SECONDS = 10.0
MAX_AGE_SECONDS = 600.0
"""After so long keys are fetched again, though nobody asks for an unknown one: one may have been withdrawn."""
FETCH_SECONDS = 5.0
MAX_DOCUMENT_BYTES = 512 * 1024

FetchJson = Callable[[str], Awaitable[Any]]
"""Fetches a JSON document. Raises JwksError."""


class JwksError(Exception):
    """The issuer's keys could not be had; the message says why, without what was received."""


def fetcher(http: aiohttp.ClientSession) -> FetchJson:
    """How documents are fetched from an issuer."""

    async def fetch(url: str) -> Any:
        timeout = aiohttp.ClientTimeout(total=FETCH_SECONDS)
        try:
            async with http.get(url, timeout=timeout, allow_redirects=False) as answer:
                if answer.status != 200:
                    raise JwksError(f"{url} answers {answer.status}")
                content = bytearray()
                async for part in answer.content.iter_any():
                    content += part
                    if len(content) > MAX_DOCUMENT_BYTES:
                        raise JwksError(f"{url} is larger than {MAX_DOCUMENT_BYTES} bytes")
            return json.loads(content)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise JwksError(f"{url} does not answer ({type(error).__name__})") from None
        except (ValueError, RecursionError):
            raise JwksError(f"{url} is not JSON") from None

    return fetch


class SigningKeys:
    """The public keys of an issuer.

    Args:
        issuer: its name, an address.
        jwks_url: where its keys are; None: where its discovery document says.
        fetch: fetches JSON.
        monotonic: seconds that never go back.
    """

    def __init__(self, issuer: str, jwks_url: str | None, fetch: FetchJson, *, monotonic: Callable[[], float]) -> None:
        self._issuer = issuer
        self._jwks_url = jwks_url
        self._fetch = fetch
        self._monotonic = monotonic
        self._keys: Mapping[str | None, jwt.PyJWK] = {}
        self._refresh: asyncio.Task[None] | None = None
        self._tried_at = float("-inf")
        self._fetched_at = float("-inf")
        self._failed = True

    async def key(self, kid: str | None) -> jwt.PyJWK:
        """The key of that name; without a name, the only one that the issuer has.

        Raises:
            Unauthenticated: the issuer has no such key.
            IssuerUnavailable: the issuer could not be asked.
        """
        found = self._find(kid)
        if found is not None:
            if self._monotonic() - self._fetched_at > MAX_AGE_SECONDS:
                # Nobody waits for it: the key is good until the issuer says otherwise.
                self._begin_refresh()
            return found
        refresh = self._begin_refresh()
        if refresh is not None:
            # Another caller may wait for the same.
            await asyncio.shield(refresh)
        found = self._find(kid)
        if found is not None:
            return found
        if self._failed:
            raise IssuerUnavailable(
                "The keys of the tokens' issuer cannot be fetched, so this token can be neither accepted nor refused.",
                retry_after_seconds=MIN_INTERVAL_SECONDS,
            )
        raise Unauthenticated("The token is signed with a key that its issuer does not have.")

    async def close(self) -> None:
        """Stop a fetch that is under way."""
        if self._refresh is not None:
            self._refresh.cancel()
            await asyncio.gather(self._refresh, return_exceptions=True)

    def _find(self, kid: str | None) -> jwt.PyJWK | None:
        if kid is None:
            return next(iter(self._keys.values())) if len(self._keys) == 1 else None
        return self._keys.get(kid)

    def _begin_refresh(self) -> asyncio.Task[None] | None:
        """The fetch that is under way, or a new one; None when the last one is too recent."""
        if self._refresh is not None and not self._refresh.done():
            return self._refresh
        if self._monotonic() - self._tried_at < MIN_INTERVAL_SECONDS:
            return None
        self._tried_at = self._monotonic()
        self._refresh = asyncio.create_task(self._fetch_keys(), name="voicepool-jwks")
        return self._refresh

    async def _fetch_keys(self) -> None:
        try:
            keys = _usable(await self._fetch(self._jwks_url or await self._discovered()))
        except JwksError as error:
            self._failed = True
            log.warning("the keys of the tokens' issuer cannot be fetched", extra={"error": str(error)})
            return
        self._keys, self._failed, self._fetched_at = keys, False, self._monotonic()

    async def _discovered(self) -> str:
        url = self._issuer.rstrip("/") + "/.well-known/openid-configuration"
        document = await self._fetch(url)
        if not isinstance(document, dict) or document.get("issuer") != self._issuer:
            raise JwksError(f"{url} is not of the issuer {self._issuer}")
        found = document.get("jwks_uri")
        # What was fetched over TLS does not lead to where anybody can answer.
        if not isinstance(found, str) or found.partition("://")[0] != self._issuer.partition("://")[0]:
            raise JwksError(f"{url} has no jwks_uri that can be used")
        return found


def _usable(document: Any) -> Mapping[str | None, jwt.PyJWK]:
    try:
        found = jwt.PyJWKSet.from_dict(document).keys
    except (jwt.PyJWTError, AttributeError, TypeError, ValueError) as error:
        raise JwksError(f"the issuer's document is no set of keys ({type(error).__name__})") from None
    keys = {
        key.key_id: key for key in found if key.algorithm_name in ALGORITHMS and key.public_key_use in (None, "sig")
    }
    if not keys:
        raise JwksError(f"the issuer has no key for {', '.join(ALGORITHMS)}")
    return keys
