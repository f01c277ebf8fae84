"""What the gateway says about the size of a pool, and whom it counts."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import aiohttp
import httpx
import pytest
from aiohttp import web
from tests.unit.documentation import documents
from tests.unit.fakes import NAMESPACE, POOL
from tests.unit.gateways import API_KEY, AUTHORIZED, SCOPED_KEY, Gateway, World, until, world

from voicepool.gateway.advice import Advisor
from voicepool.gateway.demand import MOST, Demand
from voicepool.gateway.peers import Peers
from voicepool.kube.api import ENDPOINT_SLICES, POOLS, Unreachable
from voicepool.sizing import NOBODY, Unmet

KEY = (NAMESPACE, POOL)
PATH = f"/metrics/v1/namespaces/{NAMESPACE}/pools/{POOL}"


@pytest.fixture
async def here(tmp_path: Path) -> AsyncIterator[World]:
    async with world(tmp_path) as made:
        yield made


async def said(gateway: Gateway) -> dict[str, Any]:
    answer = await gateway.client.get(PATH, headers=AUTHORIZED)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


@contextlib.asynccontextmanager
async def waiting(gateway: Gateway, count: int) -> AsyncIterator[None]:
    callers = [asyncio.create_task(gateway.start()) for _ in range(count)]
    try:
        await until(lambda: gateway.services.sessions.demand.unmet(KEY).waiting == count)
        yield
    finally:
        for caller in callers:
            caller.cancel()
        await asyncio.gather(*callers, return_exceptions=True)


async def test_the_recommendation_comes_with_all_that_it_follows_from(here: World) -> None:
    here.pool(replicas=4, headroom={"percentage": 50, "schedules": [{"cron": "* * * * *", "warmPods": 1}]})
    here.pods(2)
    here.pods(1, ready=False, first=2)
    gateway = await here.gateway()
    assert (await gateway.start()).status_code == 200
    await until(lambda: len(gateway.services.view.warm(KEY)) == 1)
    answer = await said(gateway)
    assert datetime.fromisoformat(answer.pop("at")) <= datetime.now(UTC)
    assert answer == {
        "namespace": NAMESPACE,
        "pool": POOL,
        "recommendedReplicas": 2,
        "replicas": 4,
        "maxPods": 50,
        "warm": 1,
        "starting": 1,
        "bound": 1,
        "waiting": 0,
        "rejected": {"last60Seconds": 0, "last300Seconds": 0},
        "headroom": {
            "mode": "Advise",
            "missRate": 0.01,
            "percentage": 50,
            "startsPerSecond": round(1 / 60, 6),
            "leadTimeSeconds": 10.0,
            "forDemand": 2,
            "forPercentage": 1,
            "forSchedules": 1,
            "problem": None,
        },
        "gateways": {"known": 1, "answered": 1},
    }


async def test_the_documentation_shows_these_numbers_and_keda_finds_them(here: World) -> None:
    pages = documents(Path(__file__).parents[2] / "docs" / "operations.md")
    here.pool(headroom={})
    gateway = await here.gateway()
    [shown] = [page for page in pages if "recommendedReplicas" in page]
    answer = await said(gateway)
    assert shown.keys() == answer.keys()
    assert shown["headroom"].keys() == answer["headroom"].keys()
    [scaled] = [page for page in pages if page.get("kind") == "ScaledObject"]
    asked = scaled["spec"]["triggers"][0]["metadata"]
    url = httpx.URL(asked["url"].replace("default", NAMESPACE).replace("support-line", POOL))
    assert url.path == PATH
    headers = {asked["keyParamName"]: API_KEY}
    value = (await gateway.client.get(url.path, headers=headers)).json()[asked["valueLocation"]]
    assert isinstance(value, int)


async def test_a_pool_without_headroom_has_no_recommendation(here: World) -> None:
    here.pool()
    answer = await said(await here.gateway())
    assert (answer["recommendedReplicas"], answer["headroom"]) == (None, None)


async def test_it_is_for_good_keys_and_their_pools_only(here: World) -> None:
    here.pool()
    client = (await here.gateway()).client
    assert (await client.get(PATH)).json()["code"] == "UNAUTHENTICATED"
    assert (await client.get(PATH, headers={"X-API-Key": SCOPED_KEY})).json()["code"] == "POOL_NOT_ALLOWED"
    answer = await client.get(PATH + "x", headers=AUTHORIZED)
    assert (answer.status_code, answer.json()["code"]) == (404, "POOL_NOT_FOUND")


async def test_asking_asks_nothing_of_the_api_server(here: World) -> None:
    here.pool(headroom={})
    gateway = await here.gateway()
    before = list(here.kube.requests)
    await said(gateway)
    assert here.kube.requests == before


async def test_each_caller_who_waits_asks_for_a_pod_more(here: World) -> None:
    here.pool(headroom={"missRate": 0.5}, onEmpty={"policy": "Queue", "timeoutSeconds": 60})
    gateway = await here.gateway()
    async with waiting(gateway, 5):
        answer = await said(gateway)
    assert answer["waiting"] == 5
    assert answer["recommendedReplicas"] == 5 + answer["headroom"]["forDemand"]


async def test_who_was_refused_counts_as_a_start_and_who_was_bound_counts_once(here: World) -> None:
    here.pool(headroom={}, onEmpty={"policy": "Reject"})
    gateway = await here.gateway()
    for session in ("one", "two", "two"):
        assert (await gateway.start(sessionId=session)).status_code == 429
    assert (await said(gateway))["rejected"] == {"last60Seconds": 2, "last300Seconds": 2}
    here.pods(1)
    await until(lambda: gateway.services.view.warm(KEY))
    assert (await gateway.start(sessionId="two")).status_code == 200
    await until(lambda: not gateway.services.view.warm(KEY))
    answer = await said(gateway)
    assert answer["rejected"]["last60Seconds"] == 1
    assert answer["headroom"]["startsPerSecond"] == pytest.approx(2 / 60, abs=1e-6)


async def test_who_gave_up_waiting_counts_as_refused(here: World) -> None:
    here.pool(headroom={}, onEmpty={"policy": "Queue", "timeoutSeconds": 60})
    gateway = await here.gateway()
    async with waiting(gateway, 1):
        pass
    await until(lambda: gateway.services.sessions.demand.unmet(KEY) == Unmet(0, (1, 1)))


async def test_a_caller_with_a_cold_start_under_way_needs_no_warm_pod(here: World) -> None:
    here.pool(headroom={}, onEmpty={"policy": "ColdStart"})
    gateway = await here.gateway()
    caller = asyncio.create_task(gateway.start())
    await until(here.kube.pods)
    assert (await said(gateway))["waiting"] == 0
    caller.cancel()
    await asyncio.gather(caller, return_exceptions=True)


class TestDemand:
    """What is remembered of those who were refused."""

    now = datetime(2026, 3, 1, 12, tzinfo=UTC)

    def demand(self) -> Demand:
        return Demand(lambda _key: 0, lambda: self.now)

    def test_each_window_forgets_in_its_time(self) -> None:
        demand = self.demand()
        demand.rejected(KEY, "one")
        told = []
        for seconds in (59, 2, 238, 2):
            self.now += timedelta(seconds=seconds)
            told.append(demand.unmet(KEY).rejected)
        assert told == [(1, 1), (0, 1), (0, 1), (0, 0)]

    def test_a_flood_is_remembered_up_to_a_limit(self) -> None:
        demand = self.demand()
        for number in range(MOST + 5):
            demand.rejected(KEY, str(number))
        assert demand.unmet(KEY).rejected == (MOST, MOST)

    def test_nothing_is_remembered_of_a_pool_that_is_gone(self) -> None:
        demand = self.demand()
        demand.rejected(KEY, "one")
        demand.forget(KEY)
        assert demand.unmet(KEY) == NOBODY


async def test_a_pool_that_was_deleted_and_made_again_begins_anew(here: World) -> None:
    here.pool(headroom={}, onEmpty={"policy": "Reject"})
    gateway = await here.gateway()
    await gateway.start()
    assert gateway.services.sessions.demand.unmet(KEY).rejected == (1, 1)
    metadata = (await here.kube.get(POOLS, *KEY))["metadata"]
    await here.kube.delete(POOLS, *KEY, uid=metadata["uid"], resource_version=metadata["resourceVersion"])
    await until(lambda: KEY not in gateway.services.view.pools)
    assert gateway.services.sessions.demand.unmet(KEY) == NOBODY


class TestPeers:
    """Gateways that ask each other."""

    @contextlib.asynccontextmanager
    async def served(self, gateway: Gateway) -> AsyncIterator[int]:
        """The gateway on a port."""

        async def forward(request: web.Request) -> web.Response:
            answer = await gateway.client.get(request.path)
            return web.Response(body=answer.content, status=answer.status_code, content_type="application/json")

        application = web.Application()
        application.router.add_get("/{path:.*}", forward)
        runner = web.AppRunner(application)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        try:
            yield runner.addresses[0][1]
        finally:
            await runner.cleanup()

    def endpoints(self, here: World, port: int, *addresses: str, **conditions: bool) -> None:
        endpoints = [
            {
                "addresses": [address],
                "conditions": conditions,
                "targetRef": {"kind": "Pod", "name": f"gateway-{number}"},
            }
            for number, address in enumerate(addresses)
        ]
        here.kube.put(
            ENDPOINT_SLICES,
            {
                "metadata": {"name": "gateway-x", "labels": {"kubernetes.io/service-name": "gateway"}},
                "addressType": "IPv4",
                "ports": [{"name": "other", "port": 1}, {"name": "http", "port": port}],
                "endpoints": endpoints,
            },
        )

    def peers(self, here: World, http: aiohttp.ClientSession, identity: str = "gateway-0") -> Peers:
        return Peers(
            here.kube,
            http,
            namespace=NAMESPACE,
            service="gateway",
            identity=identity,
            monotonic=asyncio.get_running_loop().time,
            timeout_seconds=5,
        )

    async def test_the_callers_of_all_gateways_are_added_up(self, here: World) -> None:
        here.pool(headroom={}, onEmpty={"policy": "Queue", "timeoutSeconds": 60})
        one, two = await here.gateway(), await here.gateway()
        async with self.served(two) as port, aiohttp.ClientSession() as http, waiting(one, 2), waiting(two, 3):
            self.endpoints(here, port, "127.0.0.9", "127.0.0.1")
            sessions, view = one.services.sessions, one.services.view
            advisor = Advisor(view, sessions.demand, self.peers(here, http), lambda: datetime.now(UTC))
            advice = await advisor.advise(view.pools[KEY])
        assert advice.unmet.waiting == 5
        assert (advice.gateways, advice.gateways_answered) == (2, 2)

    async def test_one_that_does_not_answer_is_left_out_and_told(self, here: World) -> None:
        here.pool(headroom={})
        gateway = await here.gateway()
        async with self.served(gateway) as port, aiohttp.ClientSession() as http:
            # Nobody listens at the address of the second one.
            self.endpoints(here, port, "127.0.0.8", "127.0.0.9", "127.0.0.1")
            answers = await self.peers(here, http).unmet(KEY)
            unknown = await self.peers(here, http).unmet((NAMESPACE, "unknown"))
        assert (answers.unmet, answers.asked, answers.answered) == (NOBODY, 2, 1)
        assert unknown.answered == 0

    async def test_one_that_no_longer_serves_is_not_asked(self, here: World) -> None:
        self.endpoints(here, 1, "127.0.0.8", "127.0.0.9", serving=False)
        async with aiohttp.ClientSession() as http:
            assert (await self.peers(here, http).unmet(KEY)).asked == 0

    async def test_without_the_api_server_a_gateway_speaks_for_itself(self, here: World) -> None:
        here.kube.before["list"] = [Unreachable("no answer")]
        async with aiohttp.ClientSession() as http:
            assert (await self.peers(here, http).unmet(KEY)).asked == 0
