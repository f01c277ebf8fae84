"""Tokens of an OpenID Connect issuer: which are good, and for what; and what happens while the issuer is away."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import jwt
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from tests.unit.clocks import Clock
from tests.unit.issuer import AUDIENCE, ISSUER, KEYS, FakeIssuer, jwk, token

from voicepool.gateway import jwks
from voicepool.gateway.auth import Limits
from voicepool.gateway.errors import IssuerUnavailable, Unauthenticated
from voicepool.gateway.jwks import MAX_AGE_SECONDS, MIN_INTERVAL_SECONDS, JwksError, SigningKeys, fetcher
from voicepool.gateway.oidc import Issuer, OidcTokens


class Here:
    """An issuer and who reads its tokens."""

    def __init__(self, **how: Any) -> None:
        self.issuer, self.clock = FakeIssuer(), Clock()
        self.keys = SigningKeys(ISSUER, None, self.issuer.fetch, monotonic=self.clock)
        self.tokens = OidcTokens(Issuer(issuer=ISSUER, audience=AUDIENCE, **how), self.keys)

    async def refused(self, credential: str) -> str:
        with pytest.raises(Unauthenticated) as caught:
            await self.tokens.authenticate(credential)
        assert credential not in caught.value.detail
        return caught.value.detail


@pytest.fixture
async def here() -> AsyncIterator[Here]:
    made = Here()
    yield made
    await made.keys.close()


@pytest.mark.parametrize("algorithm", ["RS256", "ES256", "EdDSA"])
async def test_a_token_says_who_calls_and_which_pools(here: Here, algorithm: str) -> None:
    pools = ["calls/demo", "other/*"]
    caller = await here.tokens.authenticate(token(algorithm, voicepool_pools=pools))
    assert caller.name == "oidc:ann"
    keys = [("calls", "demo"), ("calls", "else"), ("other", "any"), ("elsewhere", "demo")]
    assert await caller.usable(keys) == [("calls", "demo"), ("other", "any")]


async def test_what_is_written_to_pods_does_not_name_the_person(here: Here) -> None:
    ann = await here.tokens.authenticate(token(sub="ann@example.com"))
    bob = await here.tokens.authenticate(token(sub="bob@example.com"))
    assert "ann" not in ann.mark
    assert ann.mark != bob.mark


async def test_a_token_without_the_claim_may_use_nothing_unless_a_setting_says_what(here: Here) -> None:
    caller = await here.tokens.authenticate(token())
    assert await caller.usable([("calls", "demo")]) == []
    open_to_some = Here(default_pools=frozenset({"calls/demo"}))
    caller = await open_to_some.tokens.authenticate(token())
    assert await caller.usable([("calls", "demo"), ("calls", "other")]) == [("calls", "demo")]
    caller = await open_to_some.tokens.authenticate(token(voicepool_pools=[]))
    assert await caller.usable([("calls", "demo")]) == []


async def test_claims_have_the_names_that_the_settings_say_and_may_hold_limits() -> None:
    here = Here(name_claim="azp", pools_claim="pools")
    caller = await here.tokens.authenticate(
        token(azp="app", pools=["calls/demo"], voicepool_sessions=3, voicepool_starts_per_minute=0)
    )
    assert (caller.name, caller.limits) == ("oidc:app", Limits(sessions=3, starts_per_minute=0))
    assert await caller.usable([("calls", "demo")])


@pytest.mark.parametrize(
    ("claims", "words"),
    [
        ({"exp": int(time.time()) - 3600}, "expired"),
        ({"exp": None}, "not good"),
        ({"nbf": int(time.time()) + 3600}, "not good"),
        ({"iss": "https://evil.example"}, "not good"),
        ({"iss": None}, "not good"),
        ({"aud": "another"}, "audience"),
        ({"aud": None}, "not good"),
        ({"sub": None}, "name its caller"),
        ({"sub": "a" * 300}, "name its caller"),
        ({"sub": "a\nb"}, "name its caller"),
        ({"voicepool_pools": "calls/demo"}, "must be a list"),
        ({"voicepool_pools": ["*/*"]}, "must be a list"),
        ({"voicepool_pools": [7]}, "must be a list"),
        ({"voicepool_sessions": -1}, "whole number"),
        ({"voicepool_sessions": True}, "whole number"),
    ],
)
async def test_a_token_with_a_wrong_claim_is_refused(here: Here, claims: dict[str, Any], words: str) -> None:
    assert words in await here.refused(token(**claims))


async def test_clocks_may_differ_a_little(here: Here) -> None:
    now = int(time.time())
    await here.tokens.authenticate(token(exp=now - 10, nbf=now - 60))
    await here.tokens.authenticate(token(nbf=now + 10))


async def test_a_signature_by_a_key_or_an_algorithm_that_is_not_the_issuer_s_is_refused(here: Here) -> None:
    public = KEYS["RS256"].public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    claims = jwt.decode(token(), options={"verify_signature": False})
    other = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    segments = token().split(".")
    forged = {
        "another key": token(key=other),
        "another kind of key": token("RS256", header={"kid": "ES256"}),
        "none": jwt.encode(claims, "", algorithm="none", headers={"kid": "RS256"}),
        # The public key as the secret of a symmetric algorithm, which PyJWT itself refuses to sign with.
        "symmetric": jwt.encode(claims, public.hex(), algorithm="HS256", headers={"kid": "RS256"}),
        "an algorithm that is not on the list": token("ES384"),
        "no signature": f"{segments[0]}.{segments[1]}.",
        "other claims": ".".join([segments[0], token(sub="eve").split(".")[1], segments[2]]),
        "no token": "a.b.c",
    }
    for name, credential in forged.items():
        assert await here.refused(credential), name


async def test_symmetric_keys_and_keys_for_encryption_are_no_keys(here: Here) -> None:
    here.issuer.keys = [{"kty": "oct", "k": "c2VjcmV0", "kid": "HS256"}, jwk("RS256", use="enc"), jwk("ES384")]
    with pytest.raises(IssuerUnavailable):
        await here.tokens.authenticate(token())


async def test_a_token_without_a_key_s_name_is_good_where_there_is_one_key(here: Here) -> None:
    nameless = jwt.encode(jwt.decode(token(), options={"verify_signature": False}), KEYS["RS256"], algorithm="RS256")
    await here.refused(nameless)
    here.issuer.keys = [jwk("RS256")]
    here.clock.now += MIN_INTERVAL_SECONDS
    assert (await here.tokens.authenticate(nameless)).name == "oidc:ann"


async def test_an_unknown_key_is_looked_for_once_in_a_while_however_many_ask(here: Here) -> None:
    await here.tokens.authenticate(token())
    fetches = len(here.issuer.asked)
    strange = token(header={"kid": "strange"})
    await asyncio.gather(*(here.refused(strange) for _ in range(20)))
    assert len(here.issuer.asked) == fetches
    here.clock.now += MIN_INTERVAL_SECONDS
    await asyncio.gather(*(here.refused(strange) for _ in range(20)))
    assert len(here.issuer.asked) == 2 * fetches


async def test_a_new_key_is_found_and_a_withdrawn_one_forgotten(here: Here) -> None:
    here.issuer.keys = [jwk("RS256")]
    await here.tokens.authenticate(token())
    here.issuer.keys = [jwk("ES256")]
    here.clock.now += MIN_INTERVAL_SECONDS
    await here.tokens.authenticate(token("ES256"))
    await here.refused(token())


async def test_keys_that_nobody_asks_for_anew_are_fetched_again_all_the_same(here: Here) -> None:
    await here.tokens.authenticate(token())
    here.issuer.keys = [jwk("ES256")]
    here.clock.now += MAX_AGE_SECONDS + 1
    await here.tokens.authenticate(token())
    await asyncio.gather(*(task for task in asyncio.all_tasks() if task.get_name() == "voicepool-jwks"))
    await here.refused(token())


async def test_while_the_issuer_is_away_known_keys_work_and_others_can_be_neither_accepted_nor_refused(
    here: Here,
) -> None:
    here.issuer.keys = [jwk("RS256")]
    await here.tokens.authenticate(token())
    here.issuer.away = True
    here.clock.now += MAX_AGE_SECONDS + 1
    assert (await here.tokens.authenticate(token())).name == "oidc:ann"
    with pytest.raises(IssuerUnavailable) as caught:
        await here.tokens.authenticate(token("ES256"))
    assert (caught.value.status, caught.value.code) == (503, "ISSUER_UNAVAILABLE")
    assert (await here.tokens.authenticate(token())).name == "oidc:ann"


@pytest.mark.parametrize(
    "discovery",
    [
        {"issuer": "https://evil.example", "jwks_uri": "https://keys.example/jwks"},
        {"issuer": ISSUER, "jwks_uri": "http://keys.example/jwks"},
        {"issuer": ISSUER, "jwks_uri": "file:///etc/jwks"},
        {"issuer": ISSUER},
        [],
    ],
)
async def test_a_discovery_document_that_leads_elsewhere_is_not_followed(here: Here, discovery: Any) -> None:
    here.issuer.discovery = discovery
    with pytest.raises(IssuerUnavailable):
        await here.tokens.authenticate(token())
    assert here.issuer.asked == [f"{ISSUER}/.well-known/openid-configuration"]


async def test_no_claim_or_header_of_a_token_makes_the_gateway_fetch_anything_else(here: Here) -> None:
    evil = "https://evil.example/jwks"
    await here.refused(token(header={"kid": evil, "jku": evil, "x5u": evil}))
    assert here.issuer.asked == [f"{ISSUER}/.well-known/openid-configuration", "https://keys.example/jwks"]


async def test_a_fetch_has_limits_and_follows_no_redirect(monkeypatch: pytest.MonkeyPatch) -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        match request.path:
            case "/good":
                return web.json_response({"keys": []})
            case "/away":
                raise web.HTTPFound("/good")
            case "/large":
                return web.Response(body=b" " * (jwks.MAX_DOCUMENT_BYTES + 1))
            case "/slow":
                await asyncio.sleep(60)
            case "/broken":
                return web.Response(body=b"[" * 100_000)
        return web.Response(body=b"{")

    monkeypatch.setattr(jwks, "FETCH_SECONDS", 0.2)
    app = web.Application()
    app.router.add_get("/{path}", answer)
    async with TestServer(app) as server, aiohttp.ClientSession() as http:
        fetch = fetcher(http)
        assert await fetch(str(server.make_url("/good"))) == {"keys": []}
        for path, words in (
            ("/away", "answers 302"),
            ("/large", "larger than"),
            ("/slow", "does not answer"),
            ("/broken", "not JSON"),
            ("/half", "not JSON"),
        ):
            with pytest.raises(JwksError, match=words):
                await fetch(str(server.make_url(path)))
