"""The gateway does what its OpenAPI document says, whatever comes: made-up requests, some that are valid and many that are not."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from tests.openapi import configuration, hold
from tests.unit.fakes import POOLS, pool_object
from tests.unit.gateways import API_KEY, AUTHORIZED, World, world
from tests.unit.loopback import served

OPEN = {"/api/health", "/healthz", "/readyz", "/metrics"}
ALIKE = ["delete", "head", "options", "patch", "put"]
"""Methods of the bots' routes that are as the others; a run for each of them takes a second."""


@pytest.fixture
async def here(tmp_path: Path) -> AsyncIterator[World]:
    async with world(tmp_path) as made:
        made.pool(onEmpty={"policy": "Reject"}, maxPods=250)
        made.kube.put(POOLS, pool_object("empty", onEmpty={"policy": "Queue", "timeoutSeconds": 1}))
        made.pods(200)
        yield made


async def document(here: World) -> dict[str, Any]:
    client = (await here.gateway()).client
    found: dict[str, Any] = (await client.get("/openapi.json")).json()
    return found


async def test_what_is_made_up_from_the_document_is_answered_as_it_says(here: World, tmp_path: Path) -> None:
    gateway = await here.gateway()
    for number in range(3):
        started = await gateway.client.post("/v1/public/demo/start", headers=AUTHORIZED)
        here.kube.logs[started.json()["agent"]["pod"]].write(f"line {number}", number)
    chosen = configuration(
        key=API_KEY,
        pools=["demo", "calls.demo", "empty"],
        namespaces=["calls"],
        examples=2,
        phases=["fuzzing"],
        stream_seconds=0.2,
        leave_out_of_bots=ALIKE,
    )
    async with served(gateway) as url:
        code, said = await hold(url, tmp_path, key=API_KEY, deadline_seconds=120, settings=chosen)
    assert code == 0, said


async def test_without_a_key_every_route_but_the_open_ones_is_a_401_before_anything_is_looked_at(here: World) -> None:
    client = (await here.gateway()).client
    for path, operations in (await document(here))["paths"].items():
        for method in operations:
            answer = await client.request(
                method,
                re.sub(r"\{\w+\}", "x%20", path) + "?tail=-1",
                content=b"{",
                headers={"Content-Type": "application/json", "Idempotency-Key": "x" * 300},
            )
            assert (path, method, answer.status_code == 401) == (path, method, path not in OPEN)


async def test_every_error_has_the_declared_shape_and_comes_again_says_when(here: World) -> None:
    for path, operations in (await document(here))["paths"].items():
        for method, operation in operations.items():
            for status, answer in operation["responses"].items():
                where = (path, method, status)
                assert status != "422", where
                if status.startswith(("4", "5")):
                    schema = answer["content"]["application/json"]["schema"]
                    assert schema == {"$ref": "#/components/schemas/ErrorAnswer"}, where
                if status in ("429", "503"):
                    assert answer["headers"]["Retry-After"]["required"], where


@pytest.mark.parametrize(
    ("path", "status", "code"),
    [
        ("/v1/agents/demo/sessions?createdAfter=0.5", 400, "INVALID_REQUEST"),
        ("/v1/agents/demo/sessions/abc%0A", 404, "SESSION_NOT_FOUND"),
        ("/v1/agents/.demo/sessions", 404, "POOL_NOT_FOUND"),
        ("/v1/agents/a%3Fb.demo/sessions/one", 404, "POOL_NOT_FOUND"),
        ("/v1/organizations/%2e%2e/services/demo/sessions", 404, "POOL_NOT_FOUND"),
    ],
)
async def test_odd_names_and_times_are_refused_before_the_cluster_is_asked(
    here: World, path: str, status: int, code: str
) -> None:
    client = (await here.gateway()).client
    before = len(here.kube.requests)
    answer = await client.get(path, headers=AUTHORIZED)
    assert (answer.status_code, answer.json()["code"]) == (status, code)
    assert len(here.kube.requests) == before


@pytest.mark.parametrize("traceparent", ["x" * 400, "00-zz", "\u00ff", ""])
async def test_a_trace_that_is_none_is_no_reason_to_refuse_a_caller(here: World, traceparent: str) -> None:
    gateway = await here.gateway()
    answer = await gateway.client.post(
        "/v1/public/demo/start",
        headers=[(b"x-api-key", API_KEY.encode()), (b"traceparent", traceparent.encode("latin-1"))],
    )
    assert answer.status_code == 200
    (agent,) = here.agents.with_session(answer.json()["sessionId"])
    assert "traceparent" not in agent.claims[0]


async def test_a_405_names_all_methods_of_the_path(here: World) -> None:
    client = (await here.gateway()).client
    answer = await client.put("/v1/agents/demo/sessions/one", headers=AUTHORIZED)
    assert (answer.status_code, answer.headers["Allow"]) == (405, "DELETE, GET")
