"""The edges of the session API: keys, limits, errors, health."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.types import Message
from tests.unit.fakes import NAMESPACE, POOL, POOLS, pool_object
from tests.unit.gateways import API_KEY, AUTHORIZED, SCOPED_KEY, World, hashed, settings, until, world

from voicepool.gateway.app import create_app
from voicepool.gateway.auth import Listed
from voicepool.gateway.server import http_config


@pytest.fixture
async def here(tmp_path: Path) -> AsyncIterator[World]:
    async with world(tmp_path) as made:
        yield made


async def test_without_a_key_or_with_a_wrong_one_nothing_is_started(here: World) -> None:
    here.pool()
    here.pods(1)
    client = (await here.gateway()).client
    for headers in ({}, {"X-API-Key": "wrong"}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic eDp5"}):
        answer = await client.post("/start", json={}, headers=headers)
        assert (answer.status_code, answer.json()["code"]) == (401, "UNAUTHENTICATED")
    assert not here.kube.bound()


async def test_a_key_may_come_in_either_header(here: World) -> None:
    here.pool()
    here.pods(2)
    client = (await here.gateway()).client
    assert (await client.post("/start", json={}, headers={"X-API-Key": API_KEY})).status_code == 200
    assert (await client.post("/start", headers=AUTHORIZED)).status_code == 200


async def test_a_gateway_without_keys_refuses_everything_and_says_why(here: World) -> None:
    for file in (here.folder / "keys").iterdir():
        file.unlink()
    client = (await here.gateway()).client
    answer = await client.post("/start", headers=AUTHORIZED)
    assert (answer.status_code, answer.json()["code"]) == (401, "NO_API_KEYS")


async def test_a_withdrawn_key_stops_working_and_a_new_one_works_without_a_restart(here: World) -> None:
    here.pool()
    here.pods(1)
    client = (await here.gateway()).client
    (here.folder / "keys" / "everything").unlink()
    assert (await client.post("/start", headers=AUTHORIZED)).status_code == 401
    (here.folder / "keys" / "fresh").write_text(hashed("another"))
    assert (await client.post("/start", headers={"X-API-Key": "another"})).status_code == 200


async def test_what_is_no_file_in_the_folder_of_keys_is_no_key(here: World) -> None:
    here.pool()
    here.pods(1)
    client = (await here.gateway()).client
    (here.folder / "keys" / "..data").symlink_to("everything")
    (here.folder / "keys" / "nowhere").symlink_to("gone")
    (here.folder / "keys" / "folder").mkdir()
    assert (await client.post("/start", headers=AUTHORIZED)).status_code == 200


async def test_a_caller_who_hangs_up_leaves_the_queue(here: World) -> None:
    here.pool()
    gateway = await here.gateway()
    come = iter([{"type": "http.request", "body": b""}])
    sent: list[Message] = []

    async def receive() -> Message:
        for message in come:
            return message
        await until(lambda: gateway.waiting() == 1)
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/start", "raw_path": b"/start", "query_string": b""}
    headers = [(name.lower().encode(), value.encode()) for name, value in AUTHORIZED.items()]
    await create_app(gateway.services)(scope | {"headers": headers}, receive, send)
    assert (sent[0]["status"], json.loads(sent[1]["body"])["code"]) == (499, "CALLER_GONE")
    await until(lambda: gateway.waiting() == 0)
    here.pods(1)
    await until(lambda: gateway.services.view.warm((NAMESPACE, POOL)))
    assert not here.kube.bound()


async def test_a_key_is_good_for_its_pools_only(here: World) -> None:
    here.pool()
    here.kube.put(POOLS, pool_object("other", onEmpty={"policy": "Reject"}))
    client = (await here.gateway()).client
    headers = {"X-API-Key": SCOPED_KEY}
    refused = await client.post("/v1/public/demo/start", headers=headers)
    assert (refused.status_code, refused.json()["code"]) == (403, "POOL_NOT_ALLOWED")
    assert (await client.get("/v1/agents/demo/sessions", headers=headers)).status_code == 403
    assert (await client.post("/v1/public/other/start", headers=headers)).json()["code"] == "NO_WARM_AGENT"
    assert (await client.post("/start", headers=headers)).json()["code"] == "NO_WARM_AGENT"


async def test_a_pool_may_be_named_with_its_namespace(here: World) -> None:
    here.pool()
    here.pods(1)
    client = (await here.gateway(default_namespace="elsewhere")).client
    assert (await client.post("/v1/public/calls.demo/start", headers=AUTHORIZED)).status_code == 200


async def test_an_unknown_pool_and_an_unknown_session_are_not_found(here: World) -> None:
    here.pool()
    client = (await here.gateway()).client
    answer = await client.post("/v1/public/nowhere/start", headers=AUTHORIZED)
    assert (answer.status_code, answer.json()["code"]) == (404, "POOL_NOT_FOUND")
    for name in ("nobody", "a%20b%3Dc"):
        answer = await client.get(f"/v1/agents/demo/sessions/{name}", headers=AUTHORIZED)
        assert (answer.status_code, answer.json()["code"]) == (404, "SESSION_NOT_FOUND")


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"{", "MALFORMED_JSON"),
        (b"\xff\xfe", "MALFORMED_JSON"),
        (b"[]", "INVALID_REQUEST"),
        (b'{"transport": "daily"}', "INVALID_REQUEST"),
        (b'{"sessionId": "not a label"}', "INVALID_REQUEST"),
    ],
)
async def test_a_bad_body_is_refused_in_words(here: World, content: bytes, code: str) -> None:
    here.pool()
    here.pods(1)
    headers = AUTHORIZED | {"Content-Type": "application/json"}
    answer = await (await here.gateway()).client.post("/start", content=content, headers=headers)
    assert (answer.status_code, answer.json()["code"]) == (400, code)
    assert set(answer.json()) == {"error", "code", "detail", "info"}


@pytest.mark.parametrize("kind", ["application/x-www-form-urlencoded", "text/plain", None])
async def test_a_body_that_does_not_say_that_it_is_json_is_refused_in_words(here: World, kind: str | None) -> None:
    here.pool()
    here.pods(1)
    headers = AUTHORIZED | ({"Content-Type": kind} if kind else {})
    answer = await (await here.gateway()).client.post("/start", content=b'{"body": {}}', headers=headers)
    assert (answer.status_code, answer.json()["code"]) == (400, "INVALID_REQUEST")
    assert (kind or "is missing") in answer.json()["detail"]
    assert "Content-Type: application/json" in answer.json()["detail"]


async def test_a_body_over_the_limit_is_refused_before_it_is_read(here: World) -> None:
    read = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal read
        while True:
            read += 1
            yield b"x" * 65536

    here.pool()
    client = (await here.gateway()).client
    answer = await client.post("/start", content=endless(), headers=AUTHORIZED)
    assert (answer.status_code, answer.json()["code"]) == (413, "BODY_TOO_LARGE")
    assert read <= 18
    answer = await client.post("/start", content=b"x", headers=AUTHORIZED | {"Content-Length": "1048577"})
    assert answer.status_code == 413


async def test_bodies_that_are_on_their_way_are_bounded_all_together_whoever_sends_them(here: World) -> None:
    here.pool()
    gateway = await here.gateway(max_buffered_bytes=100_000)
    more = asyncio.Event()

    async def slow() -> AsyncIterator[bytes]:
        yield b" " * 60_000
        held.set()
        await more.wait()

    async def post(content: Any, headers: dict[str, str]) -> httpx.Response:
        return await gateway.client.post("/start", content=content, headers=headers)

    held = asyncio.Event()
    first = asyncio.create_task(post(slow(), {}))
    await held.wait()
    refused = await post(b" " * 60_000, AUTHORIZED)
    assert (refused.status_code, refused.json()["code"]) == (503, "TOO_MANY_BODIES")
    assert refused.headers["Retry-After"] == "1"
    assert (await post(b" " * 30_000, {})).status_code == 401
    more.set()
    assert (await first).status_code == 401
    # Of a request that goes on nothing is on its way any more.
    headers = AUTHORIZED | {"Content-Type": "application/json"}
    waiting = asyncio.create_task(post(b"{}" + b" " * 60_000, headers))
    await until(lambda: gateway.services.sessions.demand.unmet(("calls", "demo")).waiting == 1)
    assert (await post(b" " * 60_000, {})).status_code == 401
    here.pods(1)
    assert (await waiting).status_code == 200


async def test_every_error_has_one_shape(here: World) -> None:
    client = (await here.gateway()).client
    for answer, status in ((await client.get("/nowhere"), 404), (await client.get("/start"), 405)):
        assert answer.status_code == status
        assert set(answer.json()) == {"error", "code", "detail", "info"}


async def test_what_nobody_foresaw_is_a_500_without_a_stack_trace(here: World) -> None:
    here.pool()
    gateway = await here.gateway()
    here.kube.before["list"] = [RuntimeError("canary")]  # type: ignore[list-item]
    answer = await gateway.client.get("/v1/agents/demo/sessions/one", headers=AUTHORIZED)
    assert (answer.status_code, answer.json()["code"]) == (500, "INTERNAL")
    assert "canary" not in answer.text


async def test_health_has_the_first_systems_shape(here: World) -> None:
    here.pool()
    here.pods(2)
    here.pods(1, ready=False, first=2)
    client = (await here.gateway()).client
    assert (await client.get("/api/health")).json() == {
        "success": True,
        "status": "healthy",
        "sessions": {"ready": 0, "starting": 1, "pool": 2},
        "stats": {"totalSpawned": 3, "totalAssigned": 0},
        "capacity": {"current": 3, "max": 50, "available": 47},
    }


async def test_a_pool_that_goes_while_the_callers_rights_are_looked_up_is_left_out(
    here: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    here.pool()
    here.kube.put(POOLS, pool_object("other"))
    gateway = await here.gateway()

    async def allows(*_: Any) -> bool:
        gateway.services.view.pool_gone("calls", "other")
        return True

    monkeypatch.setattr(Listed, "allows", allows)
    listed = await gateway.client.get("/v1/organizations/calls/services", headers=AUTHORIZED)
    assert [one["name"] for one in listed.json()["services"]] == ["demo"]
    gateway.services.view.pool_seen(dataclasses.replace(gateway.services.view.pools["calls", "demo"], name="other"))
    assert (await gateway.client.get("/api/health")).json()["capacity"]["max"] == 50


async def test_probes_metrics_and_the_document_are_served(here: World) -> None:
    here.pool()
    here.pods(1)
    gateway = await here.gateway()
    await gateway.start()
    assert (await gateway.client.get("/healthz")).status_code == 200
    assert (await gateway.client.get("/readyz")).status_code == 200
    metrics = (await gateway.client.get("/metrics")).text
    assert 'voicepool_gateway_starts_total{namespace="calls",outcome="started",pool="demo"} 1.0' in metrics
    document = (await gateway.client.get("/openapi.json")).json()
    assert "/v1/public/{pool}/start" in document["paths"]
    assert {"sessionId", "createdAt", "summary"} <= document["components"]["schemas"]["SessionRecord"][
        "properties"
    ].keys()


async def test_an_idle_connection_outlives_that_of_any_proxy_before_the_gateway(here: World) -> None:
    gateway = await here.gateway()
    assert http_config(gateway.services, settings(here.folder)).timeout_keep_alive > 600
