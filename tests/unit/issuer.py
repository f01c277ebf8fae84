"""An issuer of tokens for tests: real keys and signatures, and documents that a test may spoil."""

from __future__ import annotations

import json
import time
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm

from voicepool.gateway.jwks import JwksError

ISSUER = "https://issuer.example/tenant"
AUDIENCE = "voicepool"

KEYS: dict[str, Any] = {
    "RS256": rsa.generate_private_key(public_exponent=65537, key_size=2048),
    "ES256": ec.generate_private_key(ec.SECP256R1()),
    "EdDSA": ed25519.Ed25519PrivateKey.generate(),
    "ES384": ec.generate_private_key(ec.SECP384R1()),
}
_ALGORITHMS: dict[str, Any] = {"RS256": RSAAlgorithm, "ES256": ECAlgorithm, "EdDSA": OKPAlgorithm, "ES384": ECAlgorithm}


def jwk(algorithm: str, **more: Any) -> dict[str, Any]:
    """The public half of a key, named after its algorithm."""
    found = json.loads(_ALGORITHMS[algorithm].to_jwk(KEYS[algorithm].public_key()))
    return {**found, "kid": algorithm, "use": "sig", **more}


class FakeIssuer:
    """Answers at the issuer's addresses."""

    def __init__(self) -> None:
        self.keys = [jwk(algorithm) for algorithm in ("RS256", "ES256", "EdDSA")]
        self.discovery: Any = {"issuer": ISSUER, "jwks_uri": "https://keys.example/jwks"}
        self.away = False
        self.asked: list[str] = []

    async def fetch(self, url: str) -> Any:
        self.asked.append(url)
        if self.away:
            raise JwksError("away")
        return {"keys": self.keys} if url.endswith("/jwks") else self.discovery


def token(algorithm: str = "RS256", *, key: Any = None, header: dict[str, Any] | None = None, **claims: Any) -> str:
    """A token that is good unless a claim says otherwise; a claim None is left out."""
    now = int(time.time())
    whole = {"iss": ISSUER, "aud": AUDIENCE, "sub": "ann", "exp": now + 60, "iat": now, **claims}
    return jwt.encode(
        {name: value for name, value in whole.items() if value is not None},
        KEYS[algorithm] if key is None else key,
        algorithm=algorithm,
        headers={"kid": algorithm, **(header or {})},
    )
