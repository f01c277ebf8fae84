"""Signs the orders that agents obey: an assignment (``POST /bind``), an end (``POST /end``), a request to the bot's own routes.

Compact JWTs, alg EdDSA, for one pod (audience = pod uid), used once (``jti``), valid for seconds. The agent holds the public key only.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import jwt
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from voicepool.gateway.errors import BodyTooLarge

ISSUER = "voicepool-gateway"
MAX_ORDER_BYTES = 6 * 1024 * 1024
"""What an agent reads of an order: the constant of the same name in ``agent-image/src/voicepool_agent/assignments.py``."""
MAX_BODY_BYTES = (MAX_ORDER_BYTES - 64 * 1024) // 4 * 3
"""Of a caller's body as it is signed: base64 makes it a third larger, and 64 KB are left for everything else that an order says."""


@dataclass(frozen=True, slots=True)
class Assignment:
    """One session for one agent."""

    session_id: str
    pool: str
    room: str
    url: str
    token: str = field(repr=False)
    body: Any = field(repr=False)
    max_duration_seconds: int
    """That of the bind, so that the agent ends the session before Kubernetes does."""
    traceparent: str | None = None


@dataclass(frozen=True, slots=True)
class Letter:
    """An order to take a session, signed and ready to be sent once."""

    order: str = field(repr=False)
    expires_at: datetime


class Signer:
    """Signs orders with the gateway's private key.

    Args:
        private_key: the key of this installation.
        now: the current time, with its zone.
    """

    def __init__(self, private_key: Ed25519PrivateKey, now: Callable[[], datetime]) -> None:
        self._key = private_key
        self._now = now

    @property
    def public_key(self) -> Ed25519PublicKey:
        """What agents verify with."""
        return self._key.public_key()

    @classmethod
    def from_file(cls, path: Path, now: Callable[[], datetime]) -> Signer:
        """Read the private key, PEM in PKCS 8.

        Raises:
            ValueError: the file is missing or holds no Ed25519 private key; the message names the file, never its content.
        """
        try:
            key = load_pem_private_key(path.read_bytes(), password=None)
        except OSError as error:
            raise ValueError(f"the assignment key {path} cannot be read: {error.strerror}") from None
        except (ValueError, TypeError):
            raise ValueError(
                f"the assignment key {path} is not a private key in PEM (PKCS 8, without a password)"
            ) from None
        if not isinstance(key, Ed25519PrivateKey):
            raise ValueError(f"the assignment key {path} is not an Ed25519 key")
        return cls(key, now)

    def assignment(self, pod_uid: str, assignment: Assignment, *, expires_at: datetime) -> str:
        """An order to take a session, good for that pod and until that moment."""
        claims: dict[str, Any] = {
            "session": assignment.session_id,
            "pool": assignment.pool,
            "room": assignment.room,
            "url": assignment.url,
            "token": assignment.token,
            "body": assignment.body,
            "maxDurationSeconds": assignment.max_duration_seconds,
        }
        if assignment.traceparent:
            claims["traceparent"] = assignment.traceparent
        return self._sign(pod_uid, claims, expires_at)

    def end(self, pod_uid: str, session_id: str, action: Literal["drain", "cancel"], *, expires_at: datetime) -> str:
        """An order to end the session that the pod carries."""
        return self._sign(pod_uid, {"session": session_id, "action": action}, expires_at)

    def route(self, pod_uid: str, session_id: str, *, expires_at: datetime) -> str:
        """An order to let one request through to the own routes of the bot that has the session."""
        return self._sign(pod_uid, {"session": session_id, "route": True}, expires_at)

    def _sign(self, pod_uid: str, claims: dict[str, Any], expires_at: datetime) -> str:
        envelope = {
            "iss": ISSUER,
            "aud": pod_uid,
            "iat": int(self._now().timestamp()),
            # Not rounded: up to this very moment the agent may accept, and past it another one may get the session.
            "exp": expires_at.timestamp(),
            "jti": str(uuid.uuid4()),
        }
        return jwt.api_jws.encode(_json(claims | envelope), self._key, algorithm="EdDSA")


def require_deliverable(body: Any) -> None:
    """Refuse a body that no agent would read; as JSON it may have become larger than it came.

    Raises:
        BodyTooLarge: it is over `MAX_BODY_BYTES`.
    """
    size = len(_json(body))
    if size > MAX_BODY_BYTES:
        raise BodyTooLarge(
            f"The bot's body has {size} bytes as compact JSON, where an agent is sent at most {MAX_BODY_BYTES}."
        )


def _json(value: Any) -> bytes:
    # Not escaped, as PyJWT would have it: most of the world's letters would be three times as long. Half a character is carried as it came.
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode(errors="surrogatepass")
