"""Callers with a token of an OpenID Connect issuer: a JWT, whose claims name the caller, its pools and its limits."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jwt

from voicepool.gateway.auth import Caller, Limits, Listed
from voicepool.gateway.errors import Unauthenticated
from voicepool.gateway.jwks import ALGORITHMS, SigningKeys

LEEWAY_SECONDS = 30
"""For two clocks that are not one."""
SESSIONS_CLAIM = "voicepool_sessions"
STARTS_CLAIM = "voicepool_starts_per_minute"
MAX_NAME_CHARACTERS = 255

POOL_PATTERN = r"[a-z0-9]([-a-z0-9.]*[a-z0-9])?/(\*|[a-z0-9]([-a-z0-9.]*[a-z0-9])?)"
"""``<namespace>/<pool>`` or ``<namespace>/*``."""


@dataclass(frozen=True, slots=True)
class Issuer:
    """Whose tokens are good, and how they are read."""

    issuer: str
    audience: str
    name_claim: str = "sub"
    pools_claim: str = "voicepool_pools"
    default_pools: frozenset[str] = frozenset()
    """For a token without the claim; empty: it may use nothing."""


class OidcTokens:
    """Reads tokens of one issuer.

    Args:
        issuer: whose tokens are good.
        keys: its keys.
    """

    def __init__(self, issuer: Issuer, keys: SigningKeys) -> None:
        self._issuer = issuer
        self._keys = keys

    @property
    def issuer(self) -> str:
        """What ``iss`` must be."""
        return self._issuer.issuer

    async def authenticate(self, token: str) -> Caller:
        """Whose token this is.

        Raises:
            Unauthenticated: it is not good, or not for this gateway.
            IssuerUnavailable: it cannot be told.
        """
        try:
            header = jwt.get_unverified_header(token)
        except jwt.PyJWTError:
            raise Unauthenticated("The token cannot be read.") from None
        if header.get("alg") not in ALGORITHMS:
            raise Unauthenticated(f"The token must be signed with {', '.join(ALGORITHMS)}.")
        key = await self._keys.key(header.get("kid"))
        try:
            claims = jwt.decode(
                token,
                key,
                algorithms=list(ALGORITHMS),
                issuer=self._issuer.issuer,
                audience=self._issuer.audience,
                leeway=LEEWAY_SECONDS,
                options={"require": ["exp", "iss", "aud"], "enforce_minimum_key_length": True},
            )
        except jwt.ExpiredSignatureError:
            raise Unauthenticated("The token has expired; get a new one.") from None
        except jwt.InvalidAudienceError:
            raise Unauthenticated("The token is for another audience.") from None
        except (jwt.PyJWTError, RecursionError) as error:
            raise Unauthenticated(f"The token is not good ({type(error).__name__}).") from None
        return self._caller(claims)

    def _caller(self, claims: Mapping[str, Any]) -> Caller:
        name = claims.get(self._issuer.name_claim)
        if not isinstance(name, str) or not name or len(name) > MAX_NAME_CHARACTERS or not name.isprintable():
            raise Unauthenticated(f"The token's claim {self._issuer.name_claim!r} does not name its caller.")
        pools = claims.get(self._issuer.pools_claim)
        return Caller(
            # No API key's name has a colon.
            name=f"oidc:{name}",
            scope=Listed(self._issuer.default_pools if pools is None else self._pools(pools)),
            limits=Limits(_count(claims, SESSIONS_CLAIM), _count(claims, STARTS_CLAIM)),
            # The name may be somebody's address; who may read pods need not know it.
            mark=f"oidc:{hashlib.sha256(name.encode()).hexdigest()[:32]}",
        )

    def _pools(self, pools: Any) -> frozenset[str]:
        if not isinstance(pools, list) or not all(
            isinstance(pool, str) and re.fullmatch(POOL_PATTERN, pool) for pool in pools
        ):
            raise Unauthenticated(
                f"The token's claim {self._issuer.pools_claim!r} must be a list of '<namespace>/<pool>' or '<namespace>/*'."
            )
        return frozenset(pools)


def _count(claims: Mapping[str, Any], claim: str) -> int | None:
    value = claims.get(claim)
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise Unauthenticated(f"The token's claim {claim!r} must be a whole number.")
    return value
