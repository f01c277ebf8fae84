"""Checks the orders that the gateway signs: an assignment (POST /bind), an end (POST /end), a request to the bot's routes.

All are compact JWTs, alg EdDSA, signed with the one key whose public half this pod was given, with this pod's uid as
audience and seconds to live. Invariants: nothing of an order is looked at before its signature holds; no `alg` but
EdDSA is ever accepted; an order expires at `exp` exactly (no leeway: past that second the gateway may give the
session to another pod); an order that was used is never used again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import jwt
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_public_key
from pydantic import BaseModel, ConfigDict, Field, ValidationError

ISSUER = "voicepool-gateway"
MAX_ORDER_BYTES = 6 * 1024 * 1024
"""Callers may send a body of 1 MB. Written anew it may be four times as long (a number such as 1e15), and base64 makes it a third
larger."""


class OrderError(Exception):
    """An order is not accepted."""


class MalformedOrder(OrderError):
    """It is no compact JWT, or lacks a claim: the sender is broken."""


class InvalidOrder(OrderError):
    """It is well formed, but not for us, not from the gateway, too old, or used before."""


class Assignment(BaseModel):
    """One session for this pod."""

    model_config = ConfigDict(frozen=True)

    jti: str = Field(min_length=1)
    exp: float
    session: str = Field(min_length=1)
    room: str = Field(min_length=1)
    url: str = Field(pattern=r"^wss?://")
    token: str = Field(min_length=1, repr=False)
    pool: str = ""
    body: Any = Field(None, repr=False)
    traceparent: str | None = None
    max_duration_seconds: int | None = Field(None, alias="maxDurationSeconds", gt=0)
    """What the pod's `activeDeadlineSeconds` was made of; None from a gateway that does not say: then that of the settings counts."""


class EndOrder(BaseModel):
    """The end of the session that this pod carries."""

    model_config = ConfigDict(frozen=True)

    jti: str = Field(min_length=1)
    exp: float
    session: str = Field(min_length=1)
    action: Literal["drain", "cancel"]


class RouteOrder(BaseModel):
    """One request for the bot's own routes, from somebody who may use them."""

    model_config = ConfigDict(frozen=True)

    jti: str = Field(min_length=1)
    exp: float
    session: str = Field(min_length=1)
    route: Literal[True]
    """Says that it is this kind of order and no other."""


class OrderVerifier:
    """Verifies orders for one pod.

    Args:
        public_key: PEM of the gateway's Ed25519 public key.
        pod_uid: the audience.
        clock: seconds since the epoch.

    Raises:
        ValueError: `public_key` is not an Ed25519 public key in PEM.
    """

    def __init__(self, public_key: str, pod_uid: str, clock: Callable[[], float]) -> None:
        public = load_pem_public_key(public_key.encode())
        if not isinstance(public, Ed25519PublicKey):
            raise ValueError("VOICEPOOL_ASSIGNMENT_PUBLIC_KEY must be an Ed25519 public key")
        self._key = public
        self._pod_uid = pod_uid
        self._clock = clock
        self._used: dict[str, float] = {}

    def assignment(self, order: bytes) -> Assignment:
        """Verify an assignment. It is not used up by that; see `check_unused` and `use`.

        Raises:
            MalformedOrder: not a JWT, or a claim is missing or of the wrong kind.
            InvalidOrder: wrong signature, issuer or audience, expired.
        """
        try:
            return Assignment.model_validate(self._claims(order))
        except ValidationError as error:
            raise _malformed(error) from None

    def end(self, order: bytes) -> EndOrder:
        """Verify an end; see `assignment`."""
        try:
            return EndOrder.model_validate(self._claims(order))
        except ValidationError as error:
            raise _malformed(error) from None

    def route(self, order: bytes) -> RouteOrder:
        """Verify an order to let a request through; see `assignment`."""
        try:
            return RouteOrder.model_validate(self._claims(order))
        except ValidationError as error:
            raise _malformed(error) from None

    def check_unused(self, order: Assignment | EndOrder | RouteOrder) -> None:
        """Refuse an order that was obeyed before.

        Raises:
            InvalidOrder: it was.
        """
        if order.jti in self._used:
            raise InvalidOrder("this order was used before; sign a new one")

    def use(self, order: Assignment | EndOrder | RouteOrder) -> None:
        """Use an order up: it was obeyed. Forgets the ones that have expired, which nobody can use any more."""
        now = self._clock()
        self._used = {jti: expires for jti, expires in self._used.items() if expires > now}
        self._used[order.jti] = order.exp

    def _claims(self, order: bytes) -> dict[str, Any]:
        try:
            claims: dict[str, Any] = jwt.decode(
                order,
                self._key,
                algorithms=["EdDSA"],
                issuer=ISSUER,
                audience=self._pod_uid,
                # The expiry is checked below, with the clock that was given.
                options={"require": ["exp", "iat", "iss", "aud", "jti"], "verify_exp": False, "verify_iat": False},
            )
        except (jwt.InvalidSignatureError, jwt.InvalidAlgorithmError):
            raise InvalidOrder("the signature is not the gateway's; are gateway and operator of one release?") from None
        except (jwt.InvalidAudienceError, jwt.InvalidIssuerError):
            raise InvalidOrder("the order is for another pod, or not from the gateway") from None
        except jwt.MissingRequiredClaimError as error:
            raise MalformedOrder(f"the claim {error.claim} is missing") from None
        except jwt.InvalidTokenError:
            raise MalformedOrder("the body must be one compact JWT") from None
        expires = claims["exp"]
        if not isinstance(expires, (int, float)) or isinstance(expires, bool):
            raise MalformedOrder("the claim exp must be a number")
        if self._clock() >= expires:
            raise InvalidOrder("the order has expired; are the clocks of the nodes apart?")
        return claims


def _malformed(error: ValidationError) -> MalformedOrder:
    problems = (f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors(include_url=False))
    return MalformedOrder("wrong claims: " + "; ".join(problems))
