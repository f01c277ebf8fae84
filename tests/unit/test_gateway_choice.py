"""Starts that may have an agent of one of several pools, and keys that take turns."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from tests.unit.fakes import NAMESPACE, pod_object, pod_status, pool_object, secret_object
from tests.unit.gateways import AUTHORIZED, LIVEKIT_SECRET, SCOPED_KEY, Gateway, World, hashed, until, world

from voicepool.kube.api import PODS, POOLS, SECRETS

BOTH = ["gpu", "cpu"]


@pytest.fixture
async def here(tmp_path: Path) -> AsyncIterator[World]:
    async with world(tmp_path) as made:
        yield made


def pools(here: World, *, labels: dict[str, dict[str, str]] | None = None, **specs: Any) -> None:
    """Pools by their names, each with its policy and how long it lets callers wait."""
    for name, policy in specs.items():
        body = pool_object(name, onEmpty={"policy": policy, "timeoutSeconds": 1})
        body["metadata"]["labels"] = (labels or {}).get(name, {})
        here.kube.put(POOLS, body)


def agent(here: World, pool: str, number: int, *, ready: bool = True) -> str:
    made = here.kube.put(PODS, pod_object(number, pool=pool, ready=ready))
    return str(made["metadata"]["name"])


async def test_the_first_pool_with_a_free_agent_wins(here: World) -> None:
    pools(here, gpu="Queue", cpu="Queue")
    agent(here, "cpu", 1)
    gateway = await here.gateway()
    first = (await gateway.start(pools=BOTH)).json()
    agent(here, "gpu", 2)
    agent(here, "cpu", 3)
    await until(
        lambda: gateway.services.view.warm((NAMESPACE, "gpu")) and gateway.services.view.warm((NAMESPACE, "cpu"))
    )
    second = (await gateway.start(pools=BOTH)).json()
    assert [one["agent"]["pool"] for one in (first, second)] == ["cpu", "gpu"]
    for one in (first, second):
        assert one["roomName"] == f"calls_{one['agent']['pool']}_{one['sessionId']}"
        (claims,) = here.agents.of(one["agent"]["pod"]).claims
        assert (claims["pool"], claims["room"]) == (f"calls/{one['agent']['pool']}", one["roomName"])


async def test_the_livekit_secrets_of_several_pools_are_read_side_by_side(
    here: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    pools(here, gpu="Reject", cpu="Reject")
    for name in BOTH:
        secret = secret_object(name, url="ws://own.example", api_key="own", api_secret=LIVEKIT_SECRET)
        here.kube.put(SECRETS, secret)
        here.kube.edit(POOLS, name, {"spec": {"livekit": {"secretName": name}}})
    agent(here, "cpu", 1)
    gateway = await here.gateway()
    asked: list[str] = []
    get = here.kube.get

    async def get_when_both_are_asked_for(*which: Any) -> Any:
        asked.append(which[-1])
        await until(lambda: len(asked) == 2)
        return await get(*which)

    monkeypatch.setattr(here.kube, "get", get_when_both_are_asked_for)
    assert (await gateway.start(pools=BOTH)).json()["agent"]["pool"] == "cpu"
    assert sorted(asked) == sorted(BOTH)


async def test_a_caller_waits_in_all_queues_and_leaves_them_with_the_first_agent(here: World) -> None:
    pools(here, gpu="Queue", cpu="Queue", tpu="Reject")
    gateway = await here.gateway()
    start = asyncio.create_task(gateway.start(pools=["gpu", "tpu", "cpu"]))
    await until(lambda: gateway.waiting("gpu") == gateway.waiting("cpu") == 1)
    agent(here, "cpu", 1)
    assert (await start).json()["agent"]["pool"] == "cpu"
    assert gateway.waiting("gpu") == gateway.waiting("cpu") == 0
    agent(here, "gpu", 2)
    assert (await gateway.start(pool="gpu")).json()["agent"]["pool"] == "gpu"


async def test_a_caller_who_hangs_up_leaves_all_queues(here: World) -> None:
    pools(here, gpu="Queue", cpu="Queue")
    gateway = await here.gateway()
    start = asyncio.create_task(gateway.start(pools=BOTH))
    await until(lambda: gateway.waiting("gpu") == gateway.waiting("cpu") == 1)
    start.cancel()
    await asyncio.gather(start, return_exceptions=True)
    await until(lambda: gateway.waiting("gpu") == gateway.waiting("cpu") == 0)
    assert not here.kube.bound()


async def test_no_pod_is_started_while_the_caller_may_wait(here: World) -> None:
    pools(here, gpu="ColdStart", cpu="Queue")
    gateway = await here.gateway()
    start = asyncio.create_task(gateway.start(pools=BOTH))
    await until(lambda: gateway.waiting("cpu") == 1)
    assert not here.kube.pods()
    await until(here.kube.pods)
    (pod,) = here.kube.pods()
    here.kube.edit(PODS, pod["metadata"]["name"], {"status": pod_status(0)})
    started = (await start).json()
    assert (started["coldStart"], started["agent"]["pool"]) == (True, "gpu")


async def test_a_caller_who_hangs_up_while_a_pod_starts_for_him_leaves_none(here: World) -> None:
    pools(here, tpu="Reject", gpu="ColdStart")
    gateway = await here.gateway()
    start = asyncio.create_task(gateway.start(pools=["tpu", "gpu"]))
    await until(here.kube.pods)
    start.cancel()
    await asyncio.gather(start, return_exceptions=True)
    await until(lambda: not here.kube.pods())


async def test_a_pool_that_has_all_its_pods_leaves_the_cold_start_to_the_next(here: World) -> None:
    pools(here, gpu="ColdStart", cpu="ColdStart")
    here.kube.edit(POOLS, "gpu", {"spec": {"maxPods": 1}})
    agent(here, "gpu", 1, ready=False)
    gateway = await here.gateway()
    start = asyncio.create_task(gateway.start(pools=BOTH))
    await until(lambda: len(here.kube.pods()) == 2)
    assert {pod["metadata"]["labels"]["voicepool.dev/pool"] for pod in here.kube.pods()} == {"gpu", "cpu"}
    start.cancel()
    await asyncio.gather(start, return_exceptions=True)


async def test_an_error_names_all_pools_and_says_when_to_come_again(here: World) -> None:
    pools(here, gpu="Reject", cpu="Queue")
    agent(here, "gpu", 1, ready=False)
    gateway = await here.gateway()
    queued = await gateway.start(pools=BOTH)
    assert (queued.status_code, queued.json()["code"]) == (503, "NO_WARM_AGENT")
    assert all(name in queued.json()["detail"] for name in ("calls/gpu", "calls/cpu", "after 1 s in the queue"))
    assert 1 <= int(queued.headers["Retry-After"]) <= 60
    here.kube.edit(POOLS, "cpu", {"spec": {"onEmpty": {"policy": "Reject"}}})
    await until(lambda: gateway.services.view.pools[NAMESPACE, "cpu"].spec.on_empty.policy == "Reject")
    assert (await gateway.start(pools=BOTH)).status_code == 429


async def test_a_caller_who_got_no_agent_is_demand_for_one_of_the_best_pool_that_may_have_one_more(here: World) -> None:
    pools(here, gpu="Reject", cpu="Reject")
    gateway = await here.gateway()
    assert (await gateway.start(pools=BOTH)).status_code == 429

    def rejected() -> list[int]:
        demand = gateway.services.sessions.demand
        return [demand.unmet((NAMESPACE, name)).rejected[0] for name in ("gpu", "cpu")]

    assert rejected() == [1, 0]
    here.kube.edit(POOLS, "gpu", {"spec": {"maxPods": 1}})
    agent(here, "gpu", 1, ready=False)
    await until(lambda: list(gateway.services.view.pods((NAMESPACE, "gpu"))))
    await until(lambda: gateway.services.view.pools[NAMESPACE, "gpu"].spec.max_pods == 1)
    assert (await gateway.start(pools=BOTH)).status_code == 429
    assert rejected() == [1, 1]
    here.kube.edit(POOLS, "cpu", {"spec": {"maxPods": 1}})
    agent(here, "cpu", 2, ready=False)
    await until(lambda: list(gateway.services.view.pods((NAMESPACE, "cpu"))))
    await until(lambda: gateway.services.view.pools[NAMESPACE, "cpu"].spec.max_pods == 1)
    assert (await gateway.start(pools=BOTH)).status_code == 429
    assert rejected() == [2, 1]


async def test_a_session_whose_agent_refused_goes_to_another_pool(here: World) -> None:
    pools(here, gpu="Queue", cpu="Queue")
    agent(here, "gpu", 1)
    agent(here, "cpu", 2)
    here.agents.refuse_next = [(503, "NOT_PARKED")]
    gateway = await here.gateway()
    started = (await gateway.start(pools=BOTH)).json()
    await gateway.services.sessions.settled()
    assert started["agent"]["pool"] == "cpu"
    assert started["roomName"].startswith("calls_cpu_")
    assert [pod["metadata"]["name"] for pod in here.kube.bound()] == [started["agent"]["pod"]]


@pytest.mark.parametrize("wish", [{"pools": BOTH}, {"selector": "!legacy"}])
async def test_the_same_idempotency_key_through_two_gateways_gets_one_agent_of_several_pools(
    here: World, wish: dict[str, Any]
) -> None:
    pools(here, gpu="Queue", cpu="Queue")
    for number in range(6):
        agent(here, BOTH[number % 2], number)
    gateways = [await here.gateway(), await here.gateway()]
    key = {"Idempotency-Key": "order-1"}
    answers = await asyncio.gather(*(gateways[number % 2].start(headers=key, **wish) for number in range(8)))
    assert {answer.status_code for answer in answers} == {200}, [answer.text for answer in answers]
    # The pools in another order are the same wish.
    again = await gateways[0].start(headers=key, pools=BOTH[::-1])
    started = [answer.json() for answer in (*answers, again)]
    assert len({(one["sessionId"], one["agent"]["pod"], one["roomName"]) for one in started}) == 1
    assert len(here.kube.bound()) == 1


async def test_a_session_of_a_pool_that_is_not_named_is_not_started_again(here: World) -> None:
    pools(here, gpu="Queue", cpu="Queue", tpu="Queue")
    agent(here, "tpu", 1)
    agent(here, "cpu", 2)
    gateway = await here.gateway()
    assert (await gateway.start(sessionId="once", pool="tpu")).status_code == 200
    answer = await gateway.start(sessionId="once", pools=BOTH)
    assert (answer.status_code, answer.json()["code"]) == (409, "SESSION_IN_OTHER_POOL")


async def test_a_pool_without_a_livekit_server_is_passed_over(here: World) -> None:
    pools(here, gpu="Queue", cpu="Queue")
    here.kube.edit(POOLS, "gpu", {"spec": {"livekit": {"secretName": "nowhere"}}})
    agent(here, "gpu", 1)
    agent(here, "cpu", 2)
    gateway = await here.gateway()
    assert (await gateway.start(pools=BOTH)).json()["agent"]["pool"] == "cpu"


async def test_a_mistyped_pool_among_others_does_not_go_unnoticed(here: World) -> None:
    pools(here, gpu="Queue", cpu="Queue")
    agent(here, "gpu", 1)
    gateway = await here.gateway()
    answer = await gateway.start(pools=["gpu", "mistyped"])
    assert (answer.status_code, answer.json()["code"]) == (404, "POOL_NOT_FOUND")
    assert answer.json()["detail"] == "There is no VoiceAgentPool calls/mistyped."
    answer = await gateway.start(pools=["mistyped", "gpu", "other"])
    assert answer.json()["detail"] == "There is no VoiceAgentPool calls/mistyped and none calls/other."
    assert not here.kube.bound()


async def test_a_selector_chooses_among_the_pools_of_the_callers_key(here: World) -> None:
    labels = {"gpu": {"language": "fr"}, "cpu": {"language": "de"}, "other": {"language": "fr"}}
    pools(here, labels=labels, gpu="Queue", cpu="Queue", other="Queue")
    for number, name in enumerate(labels):
        agent(here, name, number)
    gateway = await here.gateway()
    started = [
        (await gateway.start(selector={"language": "de"})).json(),
        (await gateway.start({"Authorization": "", "X-API-Key": SCOPED_KEY}, selector="language in (fr)")).json(),
        (await gateway.start(selector={"language": "fr"}, namespace=NAMESPACE)).json(),
    ]
    assert [one["agent"]["pool"] for one in started] == ["cpu", "other", "gpu"]
    answer = await gateway.start(selector={"language": "it"})
    assert (answer.status_code, answer.json()["code"]) == (404, "POOL_NOT_FOUND")


@pytest.mark.parametrize(
    "wish",
    [
        {"pools": []},
        {"pools": [f"pool-{number}" for number in range(11)]},
        {"pools": ["gpu", "elsewhere.cpu"]},
        {"pools": ["gpu"], "pool": "cpu"},
        {"pools": ["gpu"], "selector": {"a": "b"}},
        {"selector": "language=fr,"},
        {"selector": {"matchLabels": {"a": "b"}}},
    ],
)
async def test_a_wish_that_cannot_be_understood_is_refused_in_words(here: World, wish: dict[str, Any]) -> None:
    pools(here, gpu="Queue", cpu="Queue")
    answer = await (await here.gateway()).start(**wish)
    assert (answer.status_code, answer.json()["code"]) == (400, "INVALID_REQUEST")


async def test_a_query_that_names_no_pool_names_none(here: World) -> None:
    pools(here, cpu="Queue")
    agent(here, "cpu", 1)
    client = (await here.gateway()).client
    answer = await client.post("/start?pool=", json={"pools": ["cpu"]}, headers=AUTHORIZED)
    assert answer.status_code == 200


async def test_a_route_that_names_its_pool_takes_no_others(here: World) -> None:
    pools(here, gpu="Queue")
    client = (await here.gateway()).client
    answer = await client.post("/v1/public/gpu/start", json={"pools": BOTH}, headers=AUTHORIZED)
    assert answer.status_code == 400


async def test_each_pool_that_is_named_has_to_be_the_callers(here: World) -> None:
    pools(here, gpu="Queue", other="Queue")
    agent(here, "other", 1)
    gateway = await here.gateway()
    answer = await gateway.start({"Authorization": "", "X-API-Key": SCOPED_KEY}, pools=["other", "gpu"])
    assert (answer.status_code, answer.json()["code"]) == (403, "POOL_NOT_ALLOWED")
    assert not here.kube.bound()


async def two_keys(here: World, **options: Any) -> tuple[Gateway, dict[str, dict[str, str]]]:
    headers = {}
    for name in ("crowd", "lonely"):
        (here.folder / "keys" / name).write_text(hashed(name))
        headers[name] = {"Authorization": "", "X-API-Key": name}
    return await here.gateway(**options), headers


async def test_a_keys_many_callers_do_not_starve_another_keys_one(here: World) -> None:
    pools(here, gpu="Queue")
    here.kube.edit(POOLS, "gpu", {"spec": {"onEmpty": {"timeoutSeconds": 30}}})
    gateway, headers = await two_keys(here)
    crowd = [asyncio.create_task(gateway.start(headers["crowd"], pool="gpu")) for _ in range(20)]
    await until(lambda: gateway.waiting("gpu") == 20)
    lonely = asyncio.create_task(gateway.start(headers["lonely"], pool="gpu"))
    await until(lambda: gateway.waiting("gpu") == 21)
    for number in range(2):
        agent(here, "gpu", number)
    assert (await lonely).status_code == 200
    assert len(here.kube.bound()) == 2
    for task in crowd:
        task.cancel()
    await asyncio.gather(*crowd, return_exceptions=True)


async def test_a_full_queue_refuses_and_makes_room_for_another_key(here: World) -> None:
    pools(here, gpu="Queue")
    here.kube.edit(POOLS, "gpu", {"spec": {"onEmpty": {"timeoutSeconds": 30}}})
    gateway, headers = await two_keys(here, max_waiting=3)
    crowd = []
    for number in range(3):
        crowd.append(asyncio.create_task(gateway.start(headers["crowd"], pool="gpu")))
        await until(lambda number=number: gateway.waiting("gpu") == number + 1)
    refused = await gateway.start(headers["crowd"], pool="gpu")
    assert (refused.status_code, refused.json()["code"]) == (429, "QUEUE_FULL")
    assert 1 <= int(refused.headers["Retry-After"]) <= 60
    lonely = asyncio.create_task(gateway.start(headers["lonely"], pool="gpu"))
    assert (await crowd.pop()).json()["code"] == "QUEUE_FULL"
    for number in range(3):
        agent(here, "gpu", number)
    assert {(await start).status_code for start in (*crowd, lonely)} == {200}
