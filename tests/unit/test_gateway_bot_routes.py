"""Bots' own routes through the gateway: to the session's pod and nowhere else, for those who may use the pool."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import httpx
import pytest
from aiohttp import web
from tests.unit.fakes import NAMESPACE, POOL, POOLS, FakeAgent, pool_object
from tests.unit.gateways import API_KEY, AUTHORIZED, SCOPED_KEY, Gateway, World, until, world

from voicepool.gateway.errors import BadRequest
from voicepool.gateway.route_proxy import passed_on, safe_path
from voicepool.kube.api import PODS


class Call:
    """A session that runs, and its agent."""

    def __init__(self, here: World, gateway: Gateway, session: str, pod: str) -> None:
        self.here, self.gateway, self.session, self.pod = here, gateway, session, pod

    @property
    def agent(self) -> FakeAgent:
        return self.here.agents.of(self.pod)

    async def change(self, **status: Any) -> None:
        """Change the pod's status, and have the gateway see it."""
        self.here.kube.edit(PODS, self.pod, {"status": status})
        version = self.here.kube.pod(self.pod)["metadata"]["resourceVersion"]
        pods = self.gateway.services.view.pods
        await until(lambda: version in [pod.resource_version for pod in pods((NAMESPACE, POOL))])

    async def ask(self, path: str, method: str = "GET", **more: Any) -> httpx.Response:
        more.setdefault("headers", AUTHORIZED)
        return await self.gateway.client.request(method, f"/sessions/{self.session}/{path}", **more)


@pytest.fixture
async def here(tmp_path: Path) -> AsyncIterator[World]:
    async with world(tmp_path) as made:
        yield made


async def start(here: World, **options: Any) -> Call:
    here.pool()
    here.pods(1)
    gateway = await here.gateway(**options)
    started = (await gateway.start()).json()
    return Call(here, gateway, started["sessionId"], started["agent"]["pod"])


@pytest.fixture
async def call(here: World) -> Call:
    return await start(here)


@pytest.mark.parametrize("before", ["", "/v1/public/demo", f"/v1/public/{NAMESPACE}.demo"])
async def test_a_request_reaches_the_bot_as_it_was_sent(call: Call, before: str) -> None:
    url = f"{before}/sessions/{call.session}/notes/a%20b%2Fc?x=1&x=%202"
    answer = await call.gateway.client.put(url, content=b"the body", headers={**AUTHORIZED, "X-Mine": "yes"})
    assert answer.status_code == 200
    assert answer.json() == {"path": f"/sessions/{call.session}/notes/a%20b%2Fc?x=1&x=%202", "body": "the body"}
    (seen,) = call.agent.routed
    assert (seen.method, seen.headers["X-Mine"]) == ("PUT", "yes")


@pytest.mark.parametrize("method", ["DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT"])
async def test_every_method_of_pipecat_cloud_is_passed_on(call: Call, method: str) -> None:
    assert (await call.ask("say", method)).status_code == 200
    assert call.agent.routed[0].method == method


async def test_what_concerns_the_caller_and_the_connection_stays_here(call: Call) -> None:
    headers = {
        **AUTHORIZED,
        "X-API-Key": API_KEY,
        "Cookie": "session=canary",
        "Connection": "X-Hop, close",
        "X-Hop": "1",
        "TE": "trailers",
        "Upgrade": "websocket",
        "Proxy-Authorization": "canary",
        "Expect": "100-continue",
        "Voicepool-Order": "forged",
        "Voicepool-Anything": "forged",
        "Host": "elsewhere.example",
    }
    assert (await call.ask("say", "POST", content=b"hello", headers=headers)).status_code == 200
    (seen,) = call.agent.routed
    assert "canary" not in str(seen.raw_headers)
    assert seen.headers["Host"] == f"{call.here.kube.pod(call.pod)['status']['podIP']}:{call.here.agents.port}"
    assert seen.headers.getall("Voicepool-Order") != ["forged"]
    for name in ("X-Hop", "TE", "Upgrade", "Expect", "Voicepool-Anything"):
        assert name not in seen.headers


async def test_an_answer_comes_back_whole_but_for_what_would_act_on_the_gateway_s_origin(call: Call) -> None:
    async def bot(_request: web.Request) -> web.StreamResponse:
        headers = {"X-Mine": "yes", "Content-Encoding": "gzip", "Keep-Alive": "1", "Set-Cookie": "session=theirs"}
        return web.Response(status=418, body=b"not really gzip", headers=headers)

    call.here.agents.bot = bot
    request = call.gateway.client.build_request("GET", f"/sessions/{call.session}/tea", headers=AUTHORIZED)
    answer = await call.gateway.client.send(request, stream=True)
    assert b"".join([part async for part in answer.aiter_raw()]) == b"not really gzip"
    assert answer.status_code == 418
    assert (answer.headers["X-Mine"], answer.headers["Content-Encoding"]) == ("yes", "gzip")
    assert (answer.headers["Content-Security-Policy"], answer.headers["X-Content-Type-Options"]) == (
        "sandbox",
        "nosniff",
    )
    for name in ("Set-Cookie", "Keep-Alive", "Server"):
        assert name not in answer.headers


async def test_no_redirect_is_followed_and_no_address_of_a_caller_is_fetched(call: Call) -> None:
    async def bot(request: web.Request) -> web.StreamResponse:
        return web.Response(status=307, headers={"Location": request.query["to"]})

    call.here.agents.bot = bot
    elsewhere = "http://127.9.9.9/elsewhere"
    for path in (f"go?to={elsewhere}", f"{elsewhere}?to={elsewhere}", f"@127.9.9.9/?to={elsewhere}"):
        answer = await call.ask(path)
        assert (answer.status_code, answer.headers["Location"]) == (307, elsewhere)
    assert len(call.agent.routed) == 3


async def test_a_caller_who_may_not_use_the_pool_reaches_no_bot(call: Call) -> None:
    call.here.kube.put(POOLS, pool_object("other"))
    client, path = call.gateway.client, f"/sessions/{call.session}/say"
    assert (await client.get(path)).status_code == 401
    assert (await client.get(f"/v1/public/demo{path}")).status_code == 401
    scoped = {"X-API-Key": SCOPED_KEY}
    assert (await client.get(path, headers=scoped)).json()["code"] == "SESSION_NOT_FOUND"
    assert (await client.get(f"/v1/public/demo{path}", headers=scoped)).json()["code"] == "POOL_NOT_ALLOWED"
    assert (await client.get(f"/v1/public/other{path}", headers=scoped)).json()["code"] == "SESSION_NOT_FOUND"
    assert not call.agent.routed


@pytest.mark.parametrize(
    "path", ["%2e%2e/%2e%2e/status", "a/%2E%2E/b", "a/.%2e", "%2e", "a%5Cb", "a%00b", "a%09b", "%2e%2e%2fstatus"]
)
async def test_a_path_that_climbs_is_refused_before_anybody_is_asked(call: Call, path: str) -> None:
    answer = await call.ask(path)
    assert (answer.status_code, answer.json()["code"]) == (400, "INVALID_REQUEST")
    assert not call.agent.routed


@pytest.mark.parametrize("session", ["%2e%2e", "a%2Fb", "a%20b", "-", "x" * 64])
async def test_what_is_no_session_id_is_asked_nowhere(call: Call, session: str) -> None:
    answer = await call.gateway.client.get(f"/sessions/{session}/say", headers=AUTHORIZED)
    assert answer.status_code in (400, 404)
    assert not call.agent.routed


@pytest.mark.parametrize(
    ("end", "read"),
    [
        ("../b", "../b"),
        ("a/..", "a/.."),
        ("./b", "./b"),
        ("a\\b", "a\\b"),
        ("a b", "a b"),
        ("a#b", "a#b"),
        ("ä", "ä"),
        ("a", "b"),
    ],
)
def test_a_path_that_could_mean_another_one_is_refused(end: str, read: str) -> None:
    with pytest.raises(BadRequest):
        safe_path(f"/sessions/s-1/{end}".encode(), 3, read)


@pytest.mark.parametrize("end", ["", "a", "a/b/", "/host/a", "a..b/...", "@host", "http://host/a", "a:b@c/d;e=f"])
def test_a_path_that_means_itself_is_kept_as_it_is(end: str) -> None:
    assert safe_path(f"/sessions/s-1/{end}".encode(), 3, end) == end
    assert safe_path(f"/v1/public/demo/sessions/s-1/{end}".encode(), 6, end) == end


async def test_a_query_that_would_break_the_request_is_refused(call: Call) -> None:
    async def ask(query: bytes) -> int:
        path = f"/sessions/{call.session}/say"
        sent: list[Any] = []
        scope = {
            "type": "http",
            "method": "GET",
            "path": path,
            "raw_path": path.encode(),
            "query_string": query,
            "headers": [(b"x-api-key", API_KEY.encode())],
        }

        body = iter([{"type": "http.request", "body": b"", "more_body": False}])

        async def receive() -> Any:
            if (message := next(body, None)) is None:
                await asyncio.Event().wait()
            return message

        async def send(message: Any) -> None:
            sent.append(message)

        await call.gateway.client._transport.app(scope, receive, send)  # type: ignore[attr-defined]
        return int(sent[0]["status"])

    assert [await ask(query) for query in (b"a=b", b"a=\r\nX: 1", b"a= b", b"a=\xff")] == [200, 400, 400, 400]


async def test_a_session_that_another_gateway_bound_a_moment_ago_is_found(here: World) -> None:
    call = await start(here)
    other = await here.gateway()
    other.services.view.pod_gone(NAMESPACE, call.pod)
    answer = await other.client.get(f"/sessions/{call.session}/say", headers=AUTHORIZED)
    assert answer.status_code == 200


async def test_a_session_that_nobody_has_or_that_has_ended_is_said_to_be_so(call: Call) -> None:
    unknown = await call.gateway.client.get("/sessions/nobody/say", headers=AUTHORIZED)
    assert (unknown.status_code, unknown.json()["code"]) == (404, "SESSION_NOT_FOUND")
    await call.change(phase="Succeeded")
    ended = await call.ask("say")
    assert (ended.status_code, ended.json()["code"]) == (409, "SESSION_ENDED")


async def test_a_call_that_outlives_its_pool_is_found(call: Call) -> None:
    pool = call.here.kube.objects[POOLS.plural, NAMESPACE, POOL]["metadata"]
    await call.here.kube.delete(POOLS, NAMESPACE, POOL, uid=pool["uid"], resource_version=pool["resourceVersion"])
    await until(lambda: not call.gateway.services.view.pools)
    assert (await call.ask("say")).status_code == 200
    call.here.kube.logs[call.pod].write("hello")
    log = await call.gateway.client.get(f"/api/session/{call.session}/logs", headers=AUTHORIZED)
    assert log.json()["logs"] == ["hello"]


async def test_a_session_in_two_pools_must_be_named_with_one(call: Call) -> None:
    call.here.kube.put(POOLS, pool_object("other"))
    call.here.pods(1, first=7)
    name = f"demo-{'a' * 8}-7"
    labels = {"voicepool.dev/pool": "other", "voicepool.dev/state": "bound", "voicepool.dev/session": call.session}
    call.here.kube.edit(PODS, name, {"metadata": {"labels": labels}})
    call.here.agents.of(name).session = call.session
    gateway = await call.here.gateway()
    path = f"/sessions/{call.session}/say"
    assert (await gateway.client.get(path, headers=AUTHORIZED)).json()["code"] == "INVALID_REQUEST"
    assert (await gateway.client.get(f"/v1/public/other{path}", headers=AUTHORIZED)).status_code == 200
    assert len(call.here.agents.of(name).routed) == 1
    assert not call.agent.routed


@pytest.mark.parametrize(
    ("refused", "status", "code"),
    [
        ("SESSION_NOT_FOUND", 404, "SESSION_NOT_FOUND"),
        ("NOT_FOUND", 404, "NOT_FOUND"),
        ("INVALID_ASSIGNMENT", 503, "AGENT_UNREACHABLE"),
    ],
)
async def test_an_agent_s_refusal_is_told_in_the_gateway_s_words(
    call: Call, refused: str, status: int, code: str
) -> None:
    async def agent(_request: web.Request) -> web.StreamResponse:
        return web.json_response({"error": "raw"}, status=401, headers={"Voicepool-Refused": refused})

    call.here.agents.bot = agent
    answer = await call.ask("say")
    assert (answer.status_code, answer.json()["code"]) == (status, code)


async def test_an_agent_that_cannot_be_reached_is_a_503(here: World) -> None:
    call = await start(here)
    gateway = await here.gateway(agent_port=1)
    answer = await gateway.client.get(f"/sessions/{call.session}/say", headers=AUTHORIZED)
    assert (answer.status_code, answer.json()["code"]) == (503, "AGENT_UNREACHABLE")
    await call.change(podIP=None)
    assert (await call.ask("say")).json()["code"] == "AGENT_UNREACHABLE"
    text = (await call.gateway.client.get("/metrics")).text
    assert 'voicepool_gateway_bot_requests_total{namespace="calls",outcome="unreachable",pool="demo"} 1.0' in text


async def test_a_pod_that_never_answers_the_connection_is_a_503(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    async def never(*_arguments: Any, **_named: Any) -> Any:
        raise aiohttp.ConnectionTimeoutError

    monkeypatch.setattr(aiohttp.ClientSession, "request", never)
    assert (await call.ask("say")).json()["code"] == "AGENT_UNREACHABLE"


async def test_a_bot_that_is_silent_for_too_long_is_a_504(here: World) -> None:
    call = await start(here, route_timeout_seconds=0.05)
    released = asyncio.Event()

    async def bot(_request: web.Request) -> web.StreamResponse:
        await released.wait()
        return web.Response()

    here.agents.bot = bot
    answer = await call.ask("say")
    released.set()
    assert (answer.status_code, answer.json()["code"]) == (504, "DEADLINE_PASSED")


async def test_an_answer_that_breaks_off_does_not_look_whole(call: Call) -> None:
    async def bot(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b"half")
        assert request.transport is not None
        request.transport.abort()
        return response

    call.here.agents.bot = bot
    call.gateway.client._transport.raise_app_exceptions = True  # type: ignore[attr-defined]
    with pytest.raises(aiohttp.ClientPayloadError):
        await call.ask("say")


async def test_a_gateway_that_does_not_know_the_cluster_yet_says_so(
    call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(call.gateway.services), "synced", property(lambda _self: lambda: False))
    assert (await call.ask("say")).json()["code"] == "NOT_SYNCED"
    log = await call.gateway.client.get(f"/api/session/{call.session}/logs", headers=AUTHORIZED)
    assert log.json()["code"] == "NOT_SYNCED"


def test_headers_that_a_connection_names_are_left_out() -> None:
    headers = [
        (b"Connection", b"X-One, close"),
        (b"connection", b"x-two"),
        (b"X-One", b"1"),
        (b"X-TWO", b"2"),
        (b"X", b"3"),
    ]
    assert passed_on(headers, frozenset({"connection"})) == [(b"X", b"3")]
