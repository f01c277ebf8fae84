"""Who a request is of: chooses the one way in which its credential is looked at, and refuses addresses that guess.

What comes in ``X-API-Key`` is an API key. What comes as a bearer is an API key too, unless it is a JWT and one of the ways for those is switched on: then its
``iss`` and ``aud``, unverified, say which, and that way alone decides. Invariants: one credential is looked at in one way, and what that way refuses no other
one accepts; a token of a foreign issuer is sent nowhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jwt

from voicepool.gateway.auth import ApiKeys, Caller
from voicepool.gateway.errors import Unauthenticated
from voicepool.gateway.failures import Failures
from voicepool.gateway.oidc import OidcTokens
from voicepool.gateway.token_review import SERVICE_ACCOUNT_PREFIX, TokenReviews

MAX_TOKEN_CHARACTERS = 16_384


class Access:
    """Finds the caller of a request.

    Args:
        keys: API keys.
        failures: wrong credentials, by address.
        oidc: tokens of an OpenID Connect issuer; None: they are not taken.
        reviews: tokens of ServiceAccounts; None: they are not taken.
    """

    def __init__(
        self,
        keys: ApiKeys,
        failures: Failures,
        *,
        oidc: OidcTokens | None = None,
        reviews: TokenReviews | None = None,
    ) -> None:
        self._keys = keys
        self._failures = failures
        self._oidc = oidc
        self._reviews = reviews

    async def authenticate(
        self, *, api_key: str | None, bearer: str | None, address: str, may_be_guess: bool = True
    ) -> Caller:
        """Whose request this is.

        Args:
            api_key: of the header ``X-API-Key``, which goes first.
            bearer: of the header ``Authorization``.
            address: where the request comes from.
            may_be_guess: count it against the address if it is wrong; not so one that was good before.

        Raises:
            Unauthenticated: nobody's.
            TooManyFailures: too many wrong credentials came from that address.
            IssuerUnavailable: the issuer of the token does not say.
            ClusterUnavailable: the API server does not say.
        """
        credential = api_key or bearer
        if not credential:
            # Nothing was guessed.
            return self._keys.authenticate(None)
        claims = None
        if not api_key and (self._oidc or self._reviews):
            claims = _unverified_claims(credential)
        if self._oidc is not None and claims is not None and claims.get("iss") == self._oidc.issuer:
            # A signature cannot be guessed, and looking at one asks nobody: no limit.
            return await self._oidc.authenticate(credential)
        if may_be_guess:
            self._failures.check(address, credential)
        try:
            if claims is None:
                caller = self._keys.authenticate(credential)
            else:
                caller = await self._reviewed(credential, claims)
        except Unauthenticated:
            if may_be_guess:
                self._failures.wrong(address)
            raise
        self._failures.good(address, credential)
        return caller

    async def _reviewed(self, token: str, claims: Mapping[str, Any]) -> Caller:
        audiences = claims.get("aud")
        if (
            self._reviews is None
            or not isinstance(audiences, list)
            or self._reviews.audience not in audiences
            or not str(claims.get("sub")).startswith(SERVICE_ACCOUNT_PREFIX)
        ):
            raise Unauthenticated("The token is of an issuer, or for an audience, that this gateway does not accept.")
        return await self._reviews.authenticate(token)


def _unverified_claims(token: str) -> Mapping[str, Any] | None:
    """What a JWT says of itself; None where it is no JWT. Good for choosing who looks at it, and for nothing else."""
    if len(token) > MAX_TOKEN_CHARACTERS or token.count(".") != 2:
        return None
    try:
        return jwt.decode(token, options={"verify_signature": False})
    except (jwt.PyJWTError, RecursionError):
        return None
