"""Orders from the gateway: which are obeyed, and what a refusal says."""

from __future__ import annotations

from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1
from cryptography.hazmat.primitives.asymmetric.ec import generate_private_key as generate_ec_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from tests.unit.clocks import Clock

from voicepool_agent.assignments import MAX_ORDER_BYTES, InvalidOrder, MalformedOrder, OrderVerifier

NOW = 1_800_000_000.0
KEY = Ed25519PrivateKey.generate()
PUBLIC_KEY = KEY.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()


@pytest.fixture
def clock() -> Clock:
    return Clock(NOW)


@pytest.fixture
def verifier(clock: Clock) -> OrderVerifier:
    return OrderVerifier(PUBLIC_KEY, "uid-1", clock)


def claims(**changes: Any) -> dict[str, Any]:
    standard: dict[str, Any] = {
        "iss": "voicepool-gateway",
        "aud": "uid-1",
        "iat": NOW,
        "exp": NOW + 10,
        "jti": "j-1",
        "session": "s-1",
        "pool": "demo",
        "room": "r-1",
        "url": "wss://livekit",
        "token": "t",
        "body": {"name": "Ada"},
    }
    return {name: value for name, value in {**standard, **changes}.items() if value is not None}


def signed(key: Any = KEY, algorithm: str = "EdDSA", **changes: Any) -> bytes:
    return jwt.encode(claims(**changes), key, algorithm=algorithm).encode()


def test_an_assignment_of_the_gateway_for_this_pod_is_accepted(verifier: OrderVerifier) -> None:
    assignment = verifier.assignment(signed())
    assert (assignment.session, assignment.room, assignment.url, assignment.token) == (
        "s-1",
        "r-1",
        "wss://livekit",
        "t",
    )
    assert assignment.body == {"name": "Ada"}


@pytest.mark.parametrize("seconds", [None, 90])
def test_an_assignment_may_say_how_long_its_session_lasts(verifier: OrderVerifier, seconds: int | None) -> None:
    assert verifier.assignment(signed(maxDurationSeconds=seconds)).max_duration_seconds == seconds


@pytest.mark.parametrize("character", ["a", "é", "漢", "🙂"])
def test_an_order_may_be_as_long_as_the_longest_body_in_any_script(verifier: OrderVerifier, character: str) -> None:
    body = character * (1024 * 1024 // len(character.encode()))
    order = signed(body=body)
    assert len(order) < MAX_ORDER_BYTES
    assert verifier.assignment(order).body == body


@pytest.mark.parametrize("body", [None, [1, 2], "text", 7, {"deep": {"er": []}}])
def test_the_body_of_an_assignment_may_be_any_json(verifier: OrderVerifier, body: Any) -> None:
    assert verifier.assignment(signed(body=body)).body == body


@pytest.mark.parametrize(
    "order",
    [
        signed(Ed25519PrivateKey.generate()),
        signed(aud="uid-2"),
        signed(iss="somebody"),
        signed(exp=NOW),
        signed(exp=NOW - 1),
        signed(generate_ec_key(SECP256R1()), "ES256"),
        signed("a-secret-that-is-long-enough-for-hs256", "HS256"),
        jwt.encode(claims(), "", algorithm="none").encode(),
    ],
    ids=["other key", "other pod", "other issuer", "at its expiry", "expired", "ES256", "HS256", "unsigned"],
)
def test_a_foreign_or_expired_order_is_invalid(verifier: OrderVerifier, order: bytes) -> None:
    with pytest.raises(InvalidOrder):
        verifier.assignment(order)


def test_a_signature_over_other_claims_is_invalid(verifier: OrderVerifier) -> None:
    header, _, signature = signed().split(b".")
    _, other, _ = signed(session="s-2").split(b".")
    with pytest.raises(InvalidOrder):
        verifier.assignment(b".".join([header, other, signature]))


@pytest.mark.parametrize(
    "order",
    [
        b"",
        b"nonsense",
        b"a.b.c",
        b"\xff\xfe",
        b'{"session": "s-1"}',
        signed(jti=None),
        signed(exp=None),
        signed(session=None),
        signed(room=""),
        signed(token=None),
        signed(url="http://livekit"),
        signed(session=7),
        signed(maxDurationSeconds=0),
        signed(maxDurationSeconds="long"),
    ],
)
def test_an_order_without_what_it_needs_is_malformed(verifier: OrderVerifier, order: bytes) -> None:
    with pytest.raises(MalformedOrder):
        verifier.assignment(order)


def test_an_order_is_obeyed_once(verifier: OrderVerifier) -> None:
    assignment = verifier.assignment(signed())
    verifier.check_unused(assignment)
    verifier.use(assignment)
    with pytest.raises(InvalidOrder, match="used before"):
        verifier.check_unused(verifier.assignment(signed(session="s-2")))


def test_an_order_that_was_refused_can_be_sent_again(verifier: OrderVerifier) -> None:
    verifier.check_unused(verifier.assignment(signed()))
    verifier.check_unused(verifier.assignment(signed()))


def test_used_orders_are_forgotten_once_they_have_expired(verifier: OrderVerifier, clock: Clock) -> None:
    first = verifier.assignment(signed())
    verifier.use(first)
    clock.now = NOW + 11
    verifier.use(verifier.assignment(signed(jti="j-2", exp=NOW + 20)))
    verifier.check_unused(first)  # its expiry refuses it now
    with pytest.raises(InvalidOrder, match="expired"):
        verifier.assignment(signed())


@pytest.mark.parametrize("action", ["drain", "cancel"])
def test_an_end_says_how(verifier: OrderVerifier, action: str) -> None:
    assert verifier.end(signed(action=action)).action == action


def test_an_end_with_another_action_is_malformed(verifier: OrderVerifier) -> None:
    with pytest.raises(MalformedOrder, match="action"):
        verifier.end(signed(action="explode"))


def test_an_assignment_never_shows_its_token_or_body(verifier: OrderVerifier) -> None:
    shown = repr(verifier.assignment(signed(token="canary-token", body={"name": "canary-name"})))
    assert "canary" not in shown


def test_another_kind_of_public_key_is_refused_at_once(clock: Clock) -> None:
    other = generate_ec_key(SECP256R1()).public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    with pytest.raises(ValueError, match="Ed25519"):
        OrderVerifier(other.decode(), "uid-1", clock)
