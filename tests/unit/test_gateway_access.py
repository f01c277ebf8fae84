"""Who may do what: the three kinds of credential side by side, browsers, guessers, and limits per caller."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from tests.unit.fakes import NAMESPACE, FakeKube, pool_object
from tests.unit.gateways import API_KEY, AUTHORIZED, World, hashed, until, world
from tests.unit.issuer import AUDIENCE, ISSUER, FakeIssuer, token

from voicepool.gateway import server as server_module
from voicepool.gateway import token_review
from voicepool.gateway.auth import Caller, Limits, Listed
from voicepool.gateway.buckets import Buckets
from voicepool.gateway.errors import ClusterUnavailable, QuotaExceeded, TooManyFailures
from voicepool.gateway.failures import MAX_ADDRESSES, MAX_GOOD, Failures, network
from voicepool.gateway.quota import SETTLE_SECONDS, Quota
from voicepool.gateway.token_review import (
    ACCESS_REVIEWS,
    KEPT_SECONDS,
    PARALLEL_REVIEWS,
    TOKEN_REVIEWS,
    TokenReviews,
)
from voicepool.gateway.view import ClusterView
from voicepool.kube.api import PODS, POOLS, Forbidden, Json, Resource, ServerFault

ACCOUNT = "system:serviceaccount:shop:frontend"


class ReviewingKube(FakeKube):
    """A cluster that knows one token."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens: dict[str, Json] = {}
        self.allowed: set[tuple[str, str, str]] = set()
        self.reviews: list[tuple[str, Any]] = []

    async def create(
        self, resource: Resource, namespace: str, body: Mapping[str, Any], *, dry_run: bool = False
    ) -> Json:
        if resource not in (TOKEN_REVIEWS, ACCESS_REVIEWS):
            return await super().create(resource, namespace, body, dry_run=dry_run)
        assert namespace == ""
        self.reviews.append((resource.plural, body["spec"]))

        def status() -> Json:
            spec = body["spec"]
            if resource == TOKEN_REVIEWS:
                return self.tokens.get(spec["token"], {"authenticated": False})
            of = spec["resourceAttributes"]
            assert (of["group"], of["resource"], of["subresource"], of["verb"]) == (
                "voicepool.dev",
                "voiceagentpools",
                "sessions",
                "create",
            )
            return {"allowed": (spec["user"], of["namespace"], of["name"]) in self.allowed}

        return await self._call("create", lambda: {**body, "status": status()})


def account_token(number: int = 0, **claims: Any) -> str:
    return token(
        iss="https://kubernetes.default.svc", **{"aud": ["voicepool"], "sub": ACCOUNT, "jti": str(number)} | claims
    )


def accepted(**changes: Any) -> Json:
    user = {"username": ACCOUNT, "uid": "u-1", "groups": ["system:serviceaccounts"], "extra": {"a": ["b"]}}
    return {"authenticated": True, "audiences": ["voicepool"], "user": user, **changes}


@pytest.fixture
async def here(tmp_path: Path) -> AsyncIterator[World]:
    async with world(tmp_path) as made:
        yield made


@pytest.fixture
def issuer(monkeypatch: pytest.MonkeyPatch) -> FakeIssuer:
    made = FakeIssuer()
    monkeypatch.setattr(server_module, "fetcher", lambda _http: made.fetch)
    return made


@pytest.fixture
def kube() -> ReviewingKube:
    return ReviewingKube()


OIDC = {"oidc_issuer": ISSUER, "oidc_audience": AUDIENCE}
REVIEW = {"token_review_audience": "voicepool"}


def bearer(credential: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {credential}"}


async def test_a_token_of_the_issuer_starts_sessions_of_its_pools_only(here: World, issuer: FakeIssuer) -> None:
    here.pool()
    here.pods(1)
    client = (await here.gateway(set_to=OIDC)).client
    refused = await client.post("/v1/public/demo/start", headers=bearer(token(voicepool_pools=["calls/other"])))
    assert (refused.status_code, refused.json()["code"]) == (403, "POOL_NOT_ALLOWED")
    good = bearer(token(voicepool_pools=["calls/demo"]))
    started = await client.post("/v1/public/demo/start", headers=good)
    assert started.status_code == 200
    (pod,) = here.kube.bound()
    assert pod["metadata"]["annotations"]["voicepool.dev/caller"].startswith("oidc:")
    assert "ann" not in pod["metadata"]["annotations"]["voicepool.dev/caller"]
    session = f"/v1/agents/demo/sessions/{started.json()['sessionId']}"
    assert (await client.get(session, headers=good)).status_code == 200
    other = bearer(token(voicepool_pools=["calls/other"]))
    for method in ("GET", "DELETE"):
        assert (await client.request(method, session, headers=other)).status_code == 403


async def test_an_issuer_that_is_away_is_a_503_and_not_a_401(here: World, issuer: FakeIssuer) -> None:
    issuer.away = True
    here.pool()
    client = (await here.gateway(set_to=OIDC)).client
    answer = await client.post("/start", headers=bearer(token()))
    assert (answer.status_code, answer.json()["code"]) == (503, "ISSUER_UNAVAILABLE")
    assert int(answer.headers["Retry-After"]) >= 1


async def test_a_credential_is_looked_at_in_one_way_only(
    here: World, issuer: FakeIssuer, monkeypatch: pytest.MonkeyPatch
) -> None:
    foreign, expired = token(iss="https://evil.example"), token(exp=int(time.time()) - 3600)
    # Even where somebody made a token an API key: as a bearer it is a token.
    for name, credential in (("foreign", foreign), ("expired", expired)):
        (here.folder / "keys" / name).write_text(hashed(credential))
    here.pool()
    client = (await here.gateway(set_to=OIDC)).client
    for credential in (foreign, expired):
        assert (await client.post("/start", headers=bearer(credential))).status_code == 401
    assert (await client.get("/v1/agents/demo/sessions", headers=AUTHORIZED)).status_code == 200
    # A good token in the header for API keys is no API key.
    good = token(voicepool_pools=["calls/demo"])
    assert (await client.post("/start", headers={"X-API-Key": good})).status_code == 401


async def test_where_tokens_are_not_taken_one_is_an_unknown_key_and_is_sent_nowhere(
    here: World, issuer: FakeIssuer
) -> None:
    here.pool()
    client = (await here.gateway()).client
    assert (await client.post("/start", headers=bearer(token()))).status_code == 401
    assert (await client.post("/start", headers=bearer(account_token()))).status_code == 401
    assert issuer.asked == []


async def test_a_service_account_may_use_the_pools_that_rbac_lets_it(here: World, kube: ReviewingKube) -> None:
    credential = account_token()
    kube.tokens[credential] = accepted()
    kube.allowed.add((ACCOUNT, NAMESPACE, "demo"))
    kube.put(POOLS, pool_object())
    kube.put(POOLS, pool_object("other"))
    client = (await here.gateway(kube, set_to=REVIEW)).client
    assert (await client.get("/v1/agents/demo/sessions", headers=bearer(credential))).status_code == 200
    refused = await client.get("/v1/agents/other/sessions", headers=bearer(credential))
    assert (refused.status_code, refused.json()["code"]) == (403, "POOL_NOT_ALLOWED")
    first, second = kube.reviews[:2]
    assert first == ("tokenreviews", {"token": credential, "audiences": ["voicepool"]})
    assert second[1]["groups"] == ["system:serviceaccounts"]
    assert second[1]["extra"] == {"a": ["b"]}
    asked = len(kube.reviews)
    assert (await client.get("/v1/agents/demo/sessions", headers=bearer(credential))).status_code == 200
    assert len(kube.reviews) == asked, "answers are kept for a short time"


@pytest.mark.parametrize(
    "status",
    [
        {"authenticated": False},
        {},
        accepted(audiences=["another"]),
        accepted(audiences=None),
        accepted(user={"username": "system:admin"}),
        accepted(authenticated="yes"),
    ],
)
async def test_a_token_is_good_only_for_this_audience_and_a_service_account(
    here: World, kube: ReviewingKube, status: Json
) -> None:
    credential = account_token()
    kube.tokens[credential] = status
    client = (await here.gateway(kube, set_to=REVIEW)).client
    assert (await client.get("/v1/agents/demo/sessions", headers=bearer(credential))).status_code == 401


@pytest.mark.parametrize(
    "claims", [{"aud": ["another"]}, {"aud": "voicepool"}, {"aud": None}, {"sub": "ann"}, {"sub": None}]
)
async def test_a_token_that_cannot_be_meant_for_a_review_is_sent_nowhere(
    here: World, kube: ReviewingKube, claims: dict[str, Any]
) -> None:
    client = (await here.gateway(kube, set_to=REVIEW)).client
    answer = await client.get("/v1/agents/demo/sessions", headers=bearer(account_token(**claims)))
    assert answer.status_code == 401
    assert kube.reviews == []


@pytest.mark.parametrize("error", [ServerFault("no", status=500), Forbidden("no", status=403)])
async def test_an_api_server_that_does_not_review_is_a_503(here: World, kube: ReviewingKube, error: Any) -> None:
    client = (await here.gateway(kube, set_to=REVIEW)).client
    kube.before["create"] = [error]
    answer = await client.get("/v1/agents/demo/sessions", headers=bearer(account_token()))
    assert (answer.status_code, answer.json()["code"]) == (503, "CLUSTER_UNAVAILABLE")


async def test_a_right_that_was_withdrawn_ends_when_the_answer_is_old(kube: ReviewingKube) -> None:
    now = 0.0
    reviews = TokenReviews(kube, "voicepool", monotonic=lambda: now)
    credential = account_token()
    kube.tokens[credential] = accepted()
    kube.allowed.add((ACCOUNT, NAMESPACE, "demo"))
    caller = await reviews.authenticate(credential)
    assert await caller.scope.allows(NAMESPACE, "demo")
    kube.allowed.clear()
    assert await caller.scope.allows(NAMESPACE, "demo")
    now += KEPT_SECONDS
    assert not await caller.scope.allows(NAMESPACE, "demo")


async def test_a_name_that_no_pool_can_have_is_asked_of_nobody(here: World, kube: ReviewingKube) -> None:
    credential = account_token()
    kube.tokens[credential] = accepted()
    client = (await here.gateway(kube, set_to=REVIEW)).client
    name = "X" * 300
    for method, path, body in (
        ("GET", f"/metrics/v1/namespaces/calls/pools/{name}", None),
        ("GET", f"/v1/organizations/calls/services/{name}", None),
        ("GET", f"/v1/agents/{name}/sessions", None),
        ("POST", f"/v1/public/{name}/start", None),
        ("POST", "/start", {"pools": [name, "demo"]}),
    ):
        answer = await client.request(method, path, json=body, headers=bearer(credential))
        assert (answer.status_code, answer.json()["code"]) == (404, "POOL_NOT_FOUND"), path
    assert {plural for plural, _ in kube.reviews} == {"tokenreviews"}


async def test_one_token_is_reviewed_once_however_many_requests_come_with_it(kube: ReviewingKube) -> None:
    reviews = TokenReviews(kube, "voicepool", monotonic=lambda: 0.0)
    credential = account_token()
    kube.tokens[credential] = accepted()
    asking = [asyncio.create_task(reviews.authenticate(credential)) for _ in range(20)]
    await asyncio.sleep(0)
    asking[0].cancel()
    answers = await asyncio.gather(*asking, return_exceptions=True)
    assert [getattr(answer, "name", None) for answer in answers] == [None, *[ACCOUNT] * 19]
    assert len(kube.reviews) == 1


async def test_a_review_that_is_not_answered_is_given_up_and_so_is_the_wait_for_a_turn(
    kube: ReviewingKube, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_review, "REVIEW_SECONDS", 0.1)
    monkeypatch.setattr(kube, "create", lambda *_: asyncio.Event().wait())
    reviews = TokenReviews(kube, "voicepool", monotonic=lambda: 0.0)
    asking = [reviews.authenticate(account_token(number)) for number in range(PARALLEL_REVIEWS + 1)]
    async with asyncio.timeout(3):
        answers = await asyncio.gather(*asking, return_exceptions=True)
    assert {type(answer) for answer in answers} == {ClusterUnavailable}


# -- browsers ------------------------------------------------------------------------------------------------------------------

PREFLIGHT = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}


async def test_no_page_may_call_unless_a_setting_says_so(here: World) -> None:
    here.pool()
    client = (await here.gateway()).client
    answer = await client.options("/start", headers={"Origin": "https://a.example", **PREFLIGHT})
    assert answer.status_code == 405
    answer = await client.get("/api/health", headers={"Origin": "https://a.example"})
    assert not [name for name in answer.headers if name.startswith("access-control")]


@pytest.mark.parametrize(
    ("allowed", "origin", "answered"),
    [
        (("https://a.example",), "https://a.example", "https://a.example"),
        (("https://a.example",), "https://a.example.evil.example", None),
        (("https://a.example",), "http://a.example", None),
        (("https://a.example",), "null", None),
        (("*",), "https://anybody.example", "*"),
    ],
)
async def test_pages_of_the_origins_that_are_listed_may_call_and_never_with_credentials(
    here: World, allowed: tuple[str, ...], origin: str, answered: str | None
) -> None:
    here.pool()
    client = (await here.gateway(cors_allow_origins=allowed)).client
    for answer in (
        await client.options("/start", headers={"Origin": origin, **PREFLIGHT}),
        await client.post("/start", headers={"Origin": origin, "Cookie": "a=b"}),
        await client.post("/start", content=b"x" * 2**21, headers={"Origin": origin}),
    ):
        assert answer.headers.get("Access-Control-Allow-Origin") == answered
        assert "Access-Control-Allow-Credentials" not in answer.headers


# -- guessers ------------------------------------------------------------------------------------------------------------------


async def test_keys_cannot_be_guessed_quickly(here: World) -> None:
    here.pool()
    client = (await here.gateway(set_to={"failed_authentications_per_minute": 3})).client
    codes = [(await client.post("/start", headers=bearer(f"guess-{n}"))).json()["code"] for n in range(5)]
    assert codes == ["UNAUTHENTICATED"] * 3 + ["TOO_MANY_FAILURES"] * 2
    blocked = await client.post("/start", headers=AUTHORIZED)
    assert blocked.status_code == 429, "a good guess is not told from a bad one"
    assert 1 <= int(blocked.headers["Retry-After"]) <= 20


async def test_who_shares_an_address_with_a_guesser_goes_on_and_no_header_chooses_the_address(here: World) -> None:
    here.pool()
    client = (await here.gateway(set_to={"failed_authentications_per_minute": 3})).client
    assert (await client.get("/v1/agents/demo/sessions", headers=AUTHORIZED)).status_code == 200
    for number in range(5):
        last = await client.post("/start", headers={**bearer("guess"), "X-Forwarded-For": f"192.0.2.{number}"})
    assert last.status_code == 429
    assert (await client.get("/v1/agents/demo/sessions", headers=AUTHORIZED)).status_code == 200


async def test_a_request_without_a_credential_is_no_guess(here: World) -> None:
    client = (await here.gateway(set_to={"failed_authentications_per_minute": 3})).client
    for _ in range(5):
        assert (await client.post("/start")).status_code == 401


def test_what_is_remembered_of_guessers_is_bounded() -> None:
    now = 0.0
    failures = Failures(2, lambda: now)
    for number in range(MAX_ADDRESSES + 10):
        failures.wrong(f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}")
    for number in range(MAX_GOOD + 10):
        failures.good("192.0.2.1", f"key-{number}")
    assert len(failures._buckets) == MAX_ADDRESSES
    assert len(failures._good) == MAX_GOOD


def test_an_address_may_try_again_after_a_while() -> None:
    now = 0.0
    failures = Failures(2, lambda: now)
    for _ in range(2):
        failures.check("192.0.2.1", "x")
        failures.wrong("192.0.2.1")
    with pytest.raises(TooManyFailures) as caught:
        failures.check("192.0.2.1", "x")
    failures.check("192.0.2.2", "x")
    assert caught.value.retry_after_seconds == 30
    now += 30
    failures.check("192.0.2.1", "x")


def test_one_machine_is_one_address() -> None:
    assert network("2001:db8::1") == network("2001:db8::ffff:1") != network("2001:db8:1::1")
    assert network("::ffff:192.0.2.1") == network("192.0.2.1") != network("192.0.2.2")
    assert network("") == ""


# -- limits of one caller ------------------------------------------------------------------------------------------------------


async def test_a_caller_over_its_quota_is_refused_and_others_are_not(here: World) -> None:
    (here.folder / "keys" / "small").write_text(f"{hashed('small')} pools=calls/* sessions=1")
    here.pool()
    here.pods(4)
    gateway = await here.gateway()
    small = {"X-API-Key": "small"}
    first = (await gateway.client.post("/start", headers=small)).json()
    over = await gateway.client.post("/start", headers=small)
    assert (over.status_code, over.json()["code"]) == (429, "QUOTA_EXCEEDED")
    assert int(over.headers["Retry-After"]) >= 1
    again = await gateway.client.post("/start", json={"sessionId": first["sessionId"]}, headers=small)
    assert again.json()["sessionId"] == first["sessionId"], "a session that is asked for again counts once"
    assert (await gateway.start()).status_code == 200
    await until(lambda: gateway.services.view.sessions_of("small"))
    assert (await gateway.client.post("/start", headers=small)).status_code == 429
    here.kube.edit(PODS, first["agent"]["pod"], {"status": {"phase": "Succeeded"}})
    await until(lambda: not gateway.services.view.sessions_of("small"))
    assert (await gateway.client.post("/start", headers=small)).status_code == 200


async def test_sessions_that_another_gateway_bound_count(here: World) -> None:
    (here.folder / "keys" / "small").write_text(f"{hashed('small')} sessions=1")
    here.pool()
    here.pods(2)
    one, other = await here.gateway(), await here.gateway()
    assert (await one.client.post("/start", headers={"X-API-Key": "small"})).status_code == 200
    await until(lambda: other.services.view.sessions_of("small"))
    refused = await other.client.post("/start", headers={"X-API-Key": "small"})
    assert refused.json()["code"] == "QUOTA_EXCEEDED"


async def test_a_caller_who_starts_too_quickly_is_told_when_the_next_one_may_come(here: World) -> None:
    (here.folder / "keys" / "slow").write_text(f"{hashed('slow')} startsPerMinute=6")
    here.pool()
    here.pods(3)
    client = (await here.gateway(set_to={"starts_burst": 1})).client
    assert (await client.post("/start", headers={"X-API-Key": "slow"})).status_code == 200
    refused = await client.post("/start", headers={"X-API-Key": "slow"})
    assert (refused.status_code, refused.json()["code"], refused.headers["Retry-After"]) == (429, "RATE_LIMITED", "10")
    assert (await client.post("/start", headers=AUTHORIZED)).status_code == 200


@pytest.mark.parametrize("words", ["session=1", "sessions=many", "sessions=1 sessions=2", "pools=a/* pools=b/*", "x"])
async def test_a_key_with_a_word_that_is_not_understood_is_no_key(here: World, words: str) -> None:
    (here.folder / "keys" / "misspelt").write_text(f"{hashed('misspelt')} {words}")
    client = (await here.gateway()).client
    assert (await client.post("/start", headers={"X-API-Key": "misspelt"})).status_code == 401


def test_a_start_that_failed_counts_no_more_and_one_that_is_not_seen_yet_counts_a_while() -> None:
    now = 0.0
    quota = Quota(ClusterView(), sessions=1, starts_per_minute=0, starts_burst=1, monotonic=lambda: now)
    caller = Caller("one", Listed(None))
    with pytest.raises(QuotaExceeded), quota.admitted(caller, "a", "s1"), quota.admitted(caller, "a", "s2"):
        pass
    with quota.admitted(caller, "a", "s3"):
        pass
    with pytest.raises(QuotaExceeded), quota.admitted(caller, "b", "s3"):
        pass
    now += SETTLE_SECONDS
    with quota.admitted(caller, "a", "s4"):
        pass
    now += SETTLE_SECONDS
    with quota.admitted(Caller("another", Listed(None), Limits(sessions=0)), "a", "s5"):
        pass
    with quota.admitted(caller, "a", "s6"):
        pass
    assert list(quota._settling) == ["one"]


def test_buckets_are_bounded_and_fill_up_again() -> None:
    now = 0.0
    buckets = Buckets(lambda: now, max_keys=2)
    assert [buckets.take("a", per_minute=60, burst=2) for _ in range(3)] == [0.0, 0.0, 1.0]
    now += 0.5
    assert buckets.take("a", per_minute=60, burst=2) == 0.5
    for key in "bcd":
        buckets.take(key, per_minute=60, burst=2)
    assert len(buckets) == 2


async def test_no_credential_is_logged_or_told(
    here: World, issuer: FakeIssuer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    here.pool()
    here.pods(1)
    client = (await here.gateway(set_to=OIDC)).client
    credentials = [API_KEY, "canary-wrong", token(), token(iss="https://evil.example"), token(exp=1)]
    for credential in credentials:
        answer = await client.post("/start", headers=bearer(credential))
        assert credential not in answer.text
        assert credential not in caplog.text
        assert credential not in str([vars(record) for record in caplog.records if record.name.startswith("voicepool")])


async def test_one_caller_s_idempotency_key_is_not_another_s(here: World) -> None:
    (here.folder / "keys" / "second").write_text(hashed("second"))
    here.pool()
    here.pods(2)
    client = (await here.gateway()).client
    same = {"Idempotency-Key": "one"}
    first = (await client.post("/start", headers={**AUTHORIZED, **same})).json()
    second = (await client.post("/start", headers={"X-API-Key": "second", **same})).json()
    assert first["sessionId"] != second["sessionId"]
