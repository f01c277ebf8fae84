"""Starts through the whole HTTP path, against an API server in memory and agents that verify their orders."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from tests.unit.facts import pool
from tests.unit.fakes import NAMESPACE, POOL, Agents, FakeKube, FakeRooms, pod_status, secret_object
from tests.unit.gateways import API_KEY, AUTHORIZED, LIVEKIT_SECRET, Gateway, World, until, world, write_files
from tests.unit.virtual_time import in_virtual_time

from voicepool.binding import DELIVERY_DEADLINE_SECONDS
from voicepool.gateway import assignments, livekit, patience
from voicepool.gateway import deliverer as deliverer_module
from voicepool.gateway.assignments import MAX_BODY_BYTES, MAX_ORDER_BYTES, Assignment, Signer
from voicepool.gateway.errors import NoWarmAgent
from voicepool.gateway.livekit import LiveKitServers
from voicepool.gateway.requests import StartRequest
from voicepool.kube.api import PODS, POOLS, SECRETS, Forbidden, KubeApiError, ServerFault, TooManyRequests, Unreachable
from voicepool_agent.assignments import MAX_ORDER_BYTES as READ_BY_AN_AGENT

LABEL = "voicepool.dev/session"


@pytest.fixture
async def here(tmp_path: Path) -> AsyncIterator[World]:
    async with world(tmp_path) as made:
        yield made


async def test_a_start_binds_a_warm_pod_and_hands_out_a_token_for_its_room(here: World) -> None:
    here.pool()
    (name,) = here.pods(1)
    gateway = await here.gateway()
    answer = await gateway.start(body={"name": "Ada"})
    assert answer.status_code == 200, answer.text
    started = answer.json()
    assert started["url"] == "ws://livekit.example:7880"
    assert started["coldStart"] is False
    assert here.kube.pod(name)["metadata"]["labels"][LABEL] == started["sessionId"]
    (claims,) = here.agents.of(name).claims
    assert claims["body"] == {"name": "Ada"}
    assert claims["room"] == started["roomName"] == here.rooms.made[0]
    assert "ownerReferences" not in here.kube.pod(name)["metadata"]
    assert 0 <= float(here.kube.pod(name)["metadata"]["annotations"]["voicepool.dev/waited-seconds"]) < 10


async def test_a_callers_token_is_for_minutes_one_room_and_the_microphone(here: World) -> None:
    here.pool()
    here.pods(1)
    started = (await (await here.gateway()).start()).json()
    claims = jwt.decode(started["token"], LIVEKIT_SECRET, algorithms=["HS256"])
    grants = claims["video"]
    assert grants["room"] == started["roomName"]
    assert grants["canPublishSources"] == ["microphone"]
    assert grants["canSubscribe"] is grants["canPublishData"] is True
    assert {name for name, value in grants.items() if value is False} >= {
        "roomAdmin",
        "roomCreate",
        "roomList",
        "agent",
        "hidden",
    }
    assert claims["exp"] - claims["nbf"] == 300


async def test_an_agents_token_is_refused_by_livekit_from_the_assignments_expiry_on(here: World) -> None:
    here.pool()
    (name,) = here.pods(1)
    await (await here.gateway()).start()
    (order,) = here.agents.of(name).claims
    token = jwt.decode(order["token"], LIVEKIT_SECRET, algorithms=["HS256"], options={"verify_exp": False})
    assert token["kind"] == "agent"
    assert token["video"]["agent"] is True
    # LiveKit's server goes on accepting for 60 seconds.
    assert token["exp"] + 60 <= order["exp"]


async def test_an_agent_is_told_the_duration_after_which_kubernetes_ends_its_session(here: World) -> None:
    here.pool(session={"maxDurationSeconds": 900})
    (name,) = here.pods(1)
    await (await here.gateway()).start()
    (claims,) = here.agents.of(name).claims
    assert claims["maxDurationSeconds"] == 900
    assert here.kube.pod(name)["spec"]["activeDeadlineSeconds"] >= 900


async def test_two_gateways_and_one_pod_give_one_winner(here: World) -> None:
    here.pool(onEmpty={"policy": "Reject"})
    here.pods(1)
    one, two = await here.gateway(), await here.gateway()
    here.kube.hold_patch = asyncio.Event()
    starts = [asyncio.create_task(gateway.start()) for gateway in (one, two)]
    await until(lambda: len(here.rooms.made) == 2)
    here.kube.hold_patch.set()
    answers = await asyncio.gather(*starts)
    assert sorted(answer.status_code for answer in answers) == [200, 429]
    assert len(here.kube.bound()) == 1


async def test_fifty_simultaneous_starts_on_ten_pods_bind_ten_and_say_so_to_forty(here: World) -> None:
    here.pool(onEmpty={"policy": "Reject"})
    here.pods(10)
    gateways = [await here.gateway(), await here.gateway()]
    answers = await asyncio.gather(*(gateways[number % 2].start() for number in range(50)))
    winners = [answer.json() for answer in answers if answer.status_code == 200]
    losers = [answer for answer in answers if answer.status_code != 200]
    assert len({winner["agent"]["pod"] for winner in winners}) == len(winners) == 10
    assert {(answer.status_code, answer.json()["code"]) for answer in losers} == {(429, "NO_WARM_AGENT")}
    assert all(int(answer.headers["Retry-After"]) >= 1 for answer in losers)


async def test_a_pod_that_is_dying_is_not_bound_though_the_view_is_stale(here: World) -> None:
    here.pool(onEmpty={"policy": "Reject"})
    (name,) = here.pods(1)
    gateway = await here.gateway()
    here.kube.quiet = True
    here.kube.edit(PODS, name, {"metadata": {"deletionTimestamp": datetime.now(UTC).isoformat()}})
    assert (await gateway.start()).status_code == 429
    assert not here.kube.bound()


async def test_a_pod_that_is_no_longer_ready_is_not_bound_though_the_view_is_stale(here: World) -> None:
    here.pool(onEmpty={"policy": "Reject"})
    (name,) = here.pods(1)
    gateway = await here.gateway()
    here.kube.quiet = True
    here.kube.edit(PODS, name, {"status": pod_status(0, ready=False)})
    assert (await gateway.start()).status_code == 429
    assert not here.kube.bound()


async def test_with_no_pod_ready_a_queued_start_is_answered_when_its_time_is_up(here: World) -> None:
    here.pool(onEmpty={"policy": "Queue", "timeoutSeconds": 1})
    here.pods(2, ready=False)
    answer = await (await here.gateway()).start()
    assert (answer.status_code, answer.json()["code"]) == (503, "NO_WARM_AGENT")
    assert "2 are starting" in answer.json()["detail"]


def test_lost_races_do_not_lengthen_the_time_in_the_queue(tmp_path: Path) -> None:
    async def seconds_until_the_answer() -> float:
        kube = FakeKube()
        here = World(tmp_path, kube, Agents(kube, write_files(tmp_path).public_key()), FakeRooms())
        here.pool(onEmpty={"policy": "Queue", "timeoutSeconds": 10})
        gateway = await here.gateway()
        kube.hold_patch = asyncio.Event()
        loop = asyncio.get_running_loop()
        began = loop.time()
        start = asyncio.create_task(
            gateway.services.sessions.start(StartRequest(NAMESPACE, POOL, "session-1", keyed=False))
        )
        await asyncio.sleep(6)
        (name,) = here.pods(1)
        await asyncio.sleep(1)
        bound_before(here, name, "faster", 1)
        kube.hold_patch.set()
        with pytest.raises(NoWarmAgent):
            await start
        seconds = loop.time() - began
        await here.close()
        return seconds

    # Ten in the queue, before and after the bind that failed and took one.
    assert in_virtual_time(seconds_until_the_answer()) == pytest.approx(11, abs=0.1)


async def test_those_who_wait_are_served_first_come_first_served(here: World) -> None:
    here.pool()
    gateway = await here.gateway()
    starts = []
    for number in range(3):
        starts.append(asyncio.create_task(gateway.start(sessionId=f"caller-{number}")))
        await until(lambda number=number: gateway.waiting() == number + 1)
    for number in range(3):
        here.pods(1, first=number)
        answer = await starts[number]
        assert answer.json()["agent"]["pod"].endswith(f"-{number}")


async def test_a_refused_session_goes_to_the_next_pod_at_once_in_the_same_room(here: World) -> None:
    here.pool()
    here.pods(2)
    here.agents.refuse_next = [(503, "NOT_PARKED")]
    gateway = await here.gateway()
    answer = await gateway.start()
    assert answer.status_code == 200, answer.text
    await gateway.services.sessions.settled()
    assert len(here.kube.pods()) == 1
    carriers = here.kube.bound()
    assert [pod["metadata"]["name"] for pod in carriers] == [answer.json()["agent"]["pod"]]
    assert len(set(here.rooms.made)) == 1


async def test_a_silent_agents_session_goes_to_another_only_after_the_assignment_has_expired(here: World) -> None:
    here.pool()
    names = here.pods(2)
    for name in names:
        here.agents.of(name).silent_for, here.agents.of(name).deaf = 1, True
        here.agents.of(name).state = "starting"
    gateway = await here.gateway(bind_timeout_seconds=0.2, assignment_seconds=2.0)
    start = asyncio.create_task(gateway.start())
    await until(lambda: any(agent.claims for agent in here.agents.all()))
    first = next(agent for agent in here.agents.all() if agent.claims)
    second = next(agent for agent in here.agents.all() if agent is not first)
    second.silent_for, second.state = 0, "parked"
    assert (await start).status_code == 200
    assert second.session is not None
    assert second.answered_at[0].timestamp() >= first.claims[0]["exp"]


async def test_a_lost_answer_is_found_by_asking_the_agent(here: World) -> None:
    here.pool()
    (name,) = here.pods(1)
    here.agents.of(name).silent_for = 1
    answer = await (await here.gateway(bind_timeout_seconds=0.2)).start()
    assert answer.status_code == 200
    assert len(here.agents.of(name).claims) == 1


async def test_a_bind_whose_answer_was_lost_is_recognised_as_our_own(here: World) -> None:
    here.pool()
    (name,) = here.pods(1)
    here.kube.after["patch"] = [Unreachable("reset")]
    answer = await (await here.gateway()).start()
    assert answer.status_code == 200
    assert here.kube.pod(name)["metadata"]["labels"][LABEL] == answer.json()["sessionId"]


async def test_a_bind_of_another_gateway_for_the_same_session_is_not_taken_for_our_own(here: World) -> None:
    here.pool()
    (name,) = here.pods(1)
    gateway = await here.gateway(start_deadline_seconds=1.0)
    here.kube.hold_patch = asyncio.Event()
    start = asyncio.create_task(gateway.start(sessionId="once"))
    await until(lambda: here.rooms.made)
    labels = {"voicepool.dev/state": "bound", LABEL: "once"}
    annotations = {"voicepool.dev/bound-by": "another gateway"}
    here.kube.edit(PODS, name, {"metadata": {"labels": labels, "annotations": annotations}})
    # The first patch gets no answer and the second one is refused. Then nobody can say who has the session, so this start is given up.
    here.kube.before["patch"] = [Unreachable("reset")]
    here.kube.before["list"] = [Unreachable("refused") for _ in range(100)]
    here.kube.hold_patch.set()
    assert (await start).json()["code"] == "CLUSTER_UNAVAILABLE"
    await gateway.services.sessions.settled()
    assert here.kube.pod(name)["metadata"]["labels"][LABEL] == "once"


async def test_the_same_idempotency_key_through_two_gateways_gets_one_agent(here: World) -> None:
    here.pool()
    here.pods(6)
    gateways = [await here.gateway(), await here.gateway()]
    key = {"Idempotency-Key": "order-1"}
    answers = await asyncio.gather(*(gateways[number % 2].start(headers=key) for number in range(8)))
    assert {answer.status_code for answer in answers} == {200}, [answer.text for answer in answers]
    started = [answer.json() for answer in answers]
    assert len({one["sessionId"] for one in started}) == len({one["agent"]["pod"] for one in started}) == 1
    assert len({one["token"] for one in started}) == len(started)
    assert len(here.agents.with_session(started[0]["sessionId"])) == 1
    assert len(here.kube.bound()) == 1


@pytest.mark.parametrize("key", ["", "  "])
@pytest.mark.parametrize("path", ["/start", "/v1/public/demo/start", "/api/session/start", "/v1/demo/livekit/token"])
async def test_an_empty_idempotency_key_is_none(here: World, path: str, key: str) -> None:
    here.pool()
    here.pods(2)
    client = (await here.gateway()).client
    headers = AUTHORIZED | {"Idempotency-Key": key}
    for _ in range(2):
        assert (await client.post(path, headers=headers)).is_success
    assert len({pod["metadata"]["labels"][LABEL] for pod in here.kube.bound()}) == 2
    assert len(set(here.rooms.made)) == 2


async def test_a_start_that_comes_while_that_of_a_caller_who_has_gone_is_stopped_gets_its_agent(here: World) -> None:
    here.pool()
    sessions = (await here.gateway()).services.sessions
    request = StartRequest(NAMESPACE, POOL, "once", keyed=True)
    gone = asyncio.create_task(sessions.start(request))
    await until(lambda: sessions.in_flight((NAMESPACE, POOL), "once"))
    gone.cancel()
    again = asyncio.create_task(sessions.start(request))
    await asyncio.gather(gone, return_exceptions=True)
    await asyncio.sleep(0.05)
    assert sessions.in_flight((NAMESPACE, POOL), "once")
    (name,) = here.pods(1)
    assert (await again).pod.name == name


async def test_an_ended_session_does_not_get_a_second_agent(here: World) -> None:
    here.pool()
    (_name, _) = here.pods(2)
    gateway = await here.gateway()
    started = (await gateway.start(sessionId="once")).json()
    here.kube.edit(PODS, started["agent"]["pod"], {"status": {"phase": "Succeeded"}})
    answer = await gateway.start(sessionId="once")
    assert (answer.status_code, answer.json()["code"]) == (409, "SESSION_ENDED")


async def test_a_session_that_ended_elsewhere_before_it_was_delivered_here_does_not_get_a_second_agent(
    here: World,
) -> None:
    here.pool()
    (name,) = here.pods(1)
    here.kube.hold_patch = asyncio.Event()
    start = asyncio.create_task((await here.gateway()).start(sessionId="once"))
    await until(lambda: here.rooms.made)
    (carrier,) = here.pods(1, first=1)
    bound_before(here, carrier, "once", 1)
    here.kube.edit(PODS, carrier, {"status": {"phase": "Succeeded"}})
    here.kube.hold_patch.set()
    answer = await start
    assert (answer.status_code, answer.json()["code"]) == (409, "SESSION_ENDED")
    assert here.agents.with_session("once") == []
    assert name not in [pod["metadata"]["name"] for pod in here.kube.pods()]


def bound_before(here: World, name: str, session_id: str, seconds: float) -> None:
    """What a gateway leaves behind that died between bind and delivery."""
    labels = {"voicepool.dev/state": "bound", LABEL: session_id}
    at = (datetime.now(UTC) - timedelta(seconds=seconds)).isoformat()
    annotations = {"voicepool.dev/bound-at": at, "voicepool.dev/bound-by": "gone"}
    here.kube.edit(PODS, name, {"metadata": {"labels": labels, "annotations": annotations}})


async def test_a_session_whose_gateway_died_before_it_delivered_gets_another_agent(here: World) -> None:
    here.pool()
    left, other = here.pods(2)
    bound_before(here, left, "once", DELIVERY_DEADLINE_SECONDS + 5)
    answer = await (await here.gateway()).start(sessionId="once")
    assert (answer.status_code, answer.json()["agent"]["pod"]) == (200, other)
    assert [pod["metadata"]["name"] for pod in here.kube.bound()] == [other]


async def test_a_session_that_another_gateway_may_still_deliver_is_waited_for(here: World) -> None:
    here.pool()
    left, _other = here.pods(2)
    bound_before(here, left, "once", DELIVERY_DEADLINE_SECONDS - 5)
    answer = await (await here.gateway(start_deadline_seconds=0.5)).start(sessionId="once")
    assert (answer.status_code, answer.json()["code"]) == (504, "DEADLINE_PASSED")
    assert [pod["metadata"]["name"] for pod in here.kube.bound()] == [left]


async def test_what_is_left_of_a_bind_that_was_undone_is_not_taken_for_the_session(here: World) -> None:
    here.pool()
    left, other = here.pods(2)
    bound_before(here, left, "once", DELIVERY_DEADLINE_SECONDS + 20)
    going = {"deletionTimestamp": datetime.now(UTC).isoformat()}
    here.kube.edit(PODS, left, {"metadata": going, "status": {"phase": "Succeeded"}})
    answer = await (await here.gateway()).start(sessionId="once")
    assert (answer.status_code, answer.json()["agent"]["pod"]) == (200, other)


async def test_no_assignment_outlives_the_time_in_which_a_bind_must_be_delivered(
    here: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deliverer_module, "DELIVERY_DEADLINE_SECONDS", 3.0)
    here.pool()
    (name,) = here.pods(1)
    await (await here.gateway()).start()
    (order,) = here.agents.of(name).claims
    bound_at = datetime.fromisoformat(here.kube.pod(name)["metadata"]["annotations"]["voicepool.dev/bound-at"])
    assert order["exp"] <= bound_at.timestamp() + 3.0


async def test_with_livekit_down_nothing_is_bound(here: World) -> None:
    here.pool()
    here.pods(1)
    here.rooms.down = True
    gateway = await here.gateway()
    answer = await gateway.start()
    assert (answer.status_code, answer.json()["code"]) == (503, "LIVEKIT_UNAVAILABLE")
    assert not here.kube.bound()
    here.rooms.down = False
    assert (await gateway.start()).status_code == 200


async def with_a_server_that_works(here: World, **options: Any) -> Gateway:
    """A gateway that has just made a room, for a call that has ended."""
    here.pool(onEmpty={"policy": "Reject"})
    here.pods(1)
    gateway = await here.gateway(**options)
    assert (await gateway.start()).status_code == 200
    return gateway


async def spare_pods(here: World, gateway: Gateway, count: int) -> list[str]:
    """Warm pods that the gateway has seen."""
    names = here.pods(count, first=1)
    await until(lambda: len(gateway.services.view.warm((NAMESPACE, POOL))) == count)
    return names


async def test_with_a_livekit_that_works_the_room_is_made_side_by_side_with_the_bind(here: World) -> None:
    gateway = await with_a_server_that_works(here)
    (name,) = await spare_pods(here, gateway, 1)
    here.rooms.hold = asyncio.Event()
    start = asyncio.create_task(gateway.start())
    await until(lambda: name in [pod["metadata"]["name"] for pod in here.kube.bound()])
    assert not here.agents.of(name).claims, "nothing is delivered before the room is there"
    here.rooms.hold.set()
    assert (await start).json()["agent"]["pod"] == name


async def test_what_the_callers_answer_needs_is_made_while_the_pod_is_bound_and_after_the_patch_went_out(
    here: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway = await with_a_server_that_works(here)
    await spare_pods(here, gateway, 1)
    here.kube.hold_patch = asyncio.Event()
    order: list[str] = []
    patch = here.kube.json_patch

    async def sent_in_the_next_turn(*what: Any) -> Any:
        await asyncio.sleep(0)
        order.append("patch")
        return await patch(*what)

    monkeypatch.setattr(here.kube, "json_patch", sent_in_the_next_turn)
    wanted = StartRequest(
        *(NAMESPACE, POOL, "s-1"), keyed=False, beside=lambda server, room: order.extend((server.url, room))
    )
    start = asyncio.create_task(gateway.services.sessions.start(wanted))
    await until(lambda: len(order) == 3)
    assert len(here.kube.bound()) == 1, "of the call that began before"
    here.kube.hold_patch.set()
    started = await start
    assert order == ["patch", started.server.url, started.room]


async def test_a_room_that_fails_beside_its_bind_costs_one_pod_and_the_next_one_none(here: World) -> None:
    gateway = await with_a_server_that_works(here)
    lost, kept = await spare_pods(here, gateway, 2)
    here.rooms.down = True
    for _ in range(3):
        assert (await gateway.start()).json()["code"] == "LIVEKIT_UNAVAILABLE"
        await gateway.services.sessions.settled()
    left = [pod["metadata"]["name"] for pod in here.kube.pods()]
    assert len({lost, kept} & set(left)) == 1
    assert len(here.kube.bound()) == 1, "of the call that began before"
    here.rooms.down = False
    assert (await gateway.start()).status_code == 200


async def test_a_livekit_of_which_nothing_was_heard_for_a_while_comes_before_the_bind(here: World) -> None:
    gateway = await with_a_server_that_works(here, livekit_trusted_seconds=0.0)
    await spare_pods(here, gateway, 1)
    here.rooms.down = True
    assert (await gateway.start()).json()["code"] == "LIVEKIT_UNAVAILABLE"
    await gateway.services.sessions.settled()
    assert len(here.kube.pods()) == 2


async def test_a_bind_that_fails_beside_its_room_fails_as_it_did(here: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "JUST_STARTED_SECONDS", 0.0)
    gateway = await with_a_server_that_works(here)
    await spare_pods(here, gateway, 1)
    here.rooms.hold = asyncio.Event()
    here.kube.before["patch"] = [Forbidden("no", status=403)]
    assert (await gateway.start()).json()["code"] == "CLUSTER_UNAVAILABLE"
    here.rooms.hold.set()
    assert len(here.kube.bound()) == 1


async def test_a_room_that_is_not_made_in_time_leaves_no_bound_pod(here: World) -> None:
    gateway = await with_a_server_that_works(here, start_deadline_seconds=0.2)
    (name,) = await spare_pods(here, gateway, 1)
    here.rooms.hold = asyncio.Event()
    assert (await gateway.start()).json()["code"] == "DEADLINE_PASSED"
    await gateway.services.sessions.settled()
    assert name not in [pod["metadata"]["name"] for pod in here.kube.pods()]


async def test_a_pool_whose_livekit_secret_is_missing_says_so(here: World) -> None:
    here.pool(livekit={"secretName": "nowhere"})
    here.pods(1)
    answer = await (await here.gateway()).start()
    assert (answer.status_code, answer.json()["code"]) == (503, "LIVEKIT_NOT_CONFIGURED")
    assert "calls/nowhere" in answer.json()["detail"]


async def test_a_livekit_secret_that_cannot_be_read_for_a_moment_is_used_as_it_was(here: World) -> None:
    here.pool(livekit={"secretName": "own"})
    here.kube.put(SECRETS, secret_object("own", url="ws://own.example:7880", api_key="own", api_secret=LIVEKIT_SECRET))
    here.pods(2)
    gateway = await here.gateway(secret_cache_seconds=0.0)
    here.kube.before["get"] = [Unreachable("refused")]
    answer = await gateway.start()
    assert (answer.status_code, answer.json()["code"]) == (503, "CLUSTER_UNAVAILABLE")
    assert int(answer.headers["Retry-After"]) == 2
    assert (await gateway.start()).status_code == 200
    here.kube.before["get"] = [Unreachable("refused")]
    assert (await gateway.start()).status_code == 200
    assert not here.kube.before["get"]


async def never(*_: Any) -> Any:
    """An answer that does not come."""
    await asyncio.Event().wait()


async def test_a_livekit_secret_that_is_never_answered_takes_no_longer_than_the_start(
    here: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    here.pool(livekit={"secretName": "own"})
    here.pods(1)
    gateway = await here.gateway(start_deadline_seconds=0.2)
    monkeypatch.setattr(here.kube, "get", never)
    async with asyncio.timeout(3):
        assert (await gateway.start()).json()["code"] == "DEADLINE_PASSED"


async def test_a_livekit_secret_that_is_known_and_takes_too_long_is_used_as_it_was_and_not_waited_for_each_time(
    here: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(livekit, "_READ_SECONDS", 0.2)
    here.pool(livekit={"secretName": "own"})
    here.kube.put(SECRETS, secret_object("own", url="ws://own.example", api_key="own", api_secret=LIVEKIT_SECRET))
    here.pods(3)
    gateway = await here.gateway(secret_cache_seconds=0.0)
    assert (await gateway.start()).status_code == 200
    asked = []

    async def silent(*which: Any) -> Any:
        asked.append(which)
        await never()

    monkeypatch.setattr(here.kube, "get", silent)
    async with asyncio.timeout(5):
        for _ in range(2):
            assert (await gateway.start()).status_code == 200
    assert len(asked) == 1


async def test_a_cold_start_makes_one_pod_for_this_caller_and_says_so(here: World) -> None:
    here.pool(onEmpty={"policy": "ColdStart"})
    gateway = await here.gateway()
    start = asyncio.create_task(gateway.start())
    await until(here.kube.pods)
    (pod,) = here.kube.pods()
    here.kube.edit(PODS, pod["metadata"]["name"], {"status": pod_status(0)})
    answer = (await start).json()
    assert answer["coldStart"] is True
    assert pod["metadata"]["annotations"]["voicepool.dev/cold-start"] == answer["sessionId"]


async def test_a_cold_start_does_not_pass_max_pods(here: World) -> None:
    here.pool(onEmpty={"policy": "ColdStart"}, maxPods=1)
    here.pods(1, ready=False)
    answer = await (await here.gateway()).start()
    assert (answer.status_code, answer.json()["code"]) == (429, "POOL_AT_CAPACITY")


async def test_a_caller_who_leaves_the_queue_takes_no_pod(here: World) -> None:
    here.pool()
    gateway = await here.gateway()
    start = asyncio.create_task(gateway.start())
    await until(lambda: gateway.waiting() == 1)
    start.cancel()
    await asyncio.gather(start, return_exceptions=True)
    here.pods(1)
    second = await gateway.start()
    assert second.status_code == 200
    assert len(here.kube.bound()) == 1


async def left_during_the_bind(here: World) -> tuple[Gateway, asyncio.Event]:
    """The gateway of a caller who has gone while his bind is held up, and what lets it go on."""
    gateway = await here.gateway()
    hold = here.kube.hold_patch = asyncio.Event()
    start = asyncio.create_task(gateway.start())
    await until(lambda: here.rooms.made)
    start.cancel()
    await asyncio.gather(start, return_exceptions=True)
    return gateway, hold


async def test_a_caller_who_leaves_while_a_race_is_lost_takes_no_other_pod(here: World) -> None:
    here.pool()
    (name,) = here.pods(1)
    gateway, hold = await left_during_the_bind(here)
    bound_before(here, name, "faster", 1)
    hold.set()
    await until(lambda: outcomes(gateway, "caller_gone") == 1)
    here.pods(1, first=1)
    assert (await gateway.start()).status_code == 200
    assert len(here.kube.bound()) == 2


@pytest.mark.parametrize(
    "errors",
    [
        {"patch": [Forbidden("not known yet", status=403), Unreachable("refused"), ServerFault("etcd", status=500)]},
        {"list": [Unreachable("refused"), Forbidden("not known yet", status=403), ServerFault("etcd", status=500)]},
        {"patch": [TooManyRequests("busy", retry_after_seconds=0.01)], "list": [Unreachable("refused")]},
    ],
)
async def test_an_api_server_that_comes_back_in_time_costs_its_callers_only_time(
    here: World, errors: dict[str, list[KubeApiError]]
) -> None:
    here.pool()
    here.pods(1)
    gateway = await here.gateway()
    here.kube.before.update(errors)
    assert (await gateway.start(sessionId="once")).status_code == 200
    assert not any(errors.values())


@pytest.mark.parametrize("session", ["once", None], ids=["with an id", "without"])
async def test_an_api_server_that_stays_away_is_told_when_the_callers_time_is_up(
    here: World, session: str | None
) -> None:
    here.pool()
    (name,) = here.pods(1)
    gateway = await here.gateway(start_deadline_seconds=0.5)
    for verb in ("list", "patch"):
        here.kube.before[verb] = [Unreachable("refused") for _ in range(100)]
    answer = await gateway.start(sessionId=session)
    assert (answer.status_code, answer.json()["code"]) == (503, "CLUSTER_UNAVAILABLE")
    assert "within 0.5 s (Unreachable)" in answer.json()["detail"]
    assert int(answer.headers["Retry-After"]) == 2
    assert here.kube.pod(name)["metadata"]["labels"]["voicepool.dev/state"] == "warm"


async def test_what_stays_forbidden_is_told_before_the_callers_time_is_up(
    here: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patience, "JUST_STARTED_SECONDS", 0.3)
    here.pool()
    here.pods(1)
    gateway = await here.gateway()
    here.kube.before["patch"] = [Forbidden("may not patch", status=403) for _ in range(100)]
    answer = await gateway.start()
    assert (answer.status_code, answer.json()["code"]) == (503, "CLUSTER_UNAVAILABLE")
    assert "check the chart's RBAC" in answer.json()["detail"]


async def test_a_bind_that_took_too_long_is_not_delivered_and_the_next_pod_gets_the_session(
    here: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deliverer_module, "DELIVERY_DEADLINE_SECONDS", 1.5)
    here.pool()
    here.pods(2)
    gateway = await here.gateway()
    here.kube.hold_patch = asyncio.Event()
    start = asyncio.create_task(gateway.start())
    await until(lambda: here.rooms.made)
    await asyncio.sleep(1.6)
    here.kube.hold_patch.set()
    answer = await start
    assert answer.status_code == 200
    assert len([agent for agent in here.agents.all() if agent.claims]) == 1
    await gateway.services.sessions.settled()
    assert [pod["metadata"]["name"] for pod in here.kube.pods()] == [answer.json()["agent"]["pod"]]


@pytest.mark.parametrize(
    "body",
    ['"%s"' % ("я" * 500_000), '"%s"' % (r"\u044f" * 170_000), r'"\ud800"', f"[{','.join(['1e15'] * 200_000)}]"],
    ids=["Cyrillic", "escaped", "half a character", "what grows most"],
)
async def test_a_body_of_any_kind_within_the_limit_comes_to_the_bot_as_it_was(here: World, body: str) -> None:
    here.pool()
    (name,) = here.pods(1)
    headers = AUTHORIZED | {"Content-Type": "application/json"}
    client = (await here.gateway()).client
    answer = await client.post("/start", content=f'{{"body":{body}}}'.encode(), headers=headers)
    assert answer.status_code == 200, answer.text
    (claims,) = here.agents.of(name).claims
    assert claims["body"] == json.loads(body)


async def test_a_body_that_no_agent_would_read_is_refused_before_any_pod_is_taken(here: World) -> None:
    here.pool()
    here.pods(1)
    gateway = await here.gateway(max_body_bytes=MAX_ORDER_BYTES)
    answer = await gateway.start(body="x" * MAX_BODY_BYTES)
    assert (answer.status_code, answer.json()["code"]) == (413, "BODY_TOO_LARGE")
    assert str(MAX_BODY_BYTES) in answer.json()["detail"]
    assert not here.kube.bound()


def test_what_is_let_through_is_what_an_agent_reads() -> None:
    assert MAX_ORDER_BYTES == READ_BY_AN_AGENT
    longest = "ы" * ((MAX_BODY_BYTES - 2) // 2)
    assignments.require_deliverable(longest)
    name = "x" * 253
    said = Assignment(name, f"{name}/{name}", name * 3, f"wss://{name}", "x" * 2000, longest, 7200, "x" * 255)
    signer = Signer(Ed25519PrivateKey.generate(), lambda: datetime.now(UTC))
    assert len(signer.assignment("uid", said, expires_at=datetime.now(UTC))) <= READ_BY_AN_AGENT


async def test_an_agent_that_finds_a_body_too_large_is_not_followed_by_others(here: World) -> None:
    here.pool()
    here.pods(3)
    here.agents.refuse_next = [(413, "TOO_LARGE")] * 3
    gateway = await here.gateway()
    answer = await gateway.start()
    assert (answer.status_code, answer.json()["code"]) == (413, "BODY_TOO_LARGE")
    await gateway.services.sessions.settled()
    assert len(here.kube.pods()) == 2


def outcomes(gateway: Gateway, outcome: str) -> float | None:
    labels = {"namespace": "calls", "pool": POOL, "outcome": outcome}
    return gateway.services.metrics.registry.get_sample_value("voicepool_gateway_starts_total", labels)


async def test_a_bind_is_undone_when_the_api_server_comes_back(here: World) -> None:
    here.pool()
    (name,) = here.pods(1)
    gateway = await here.gateway(start_deadline_seconds=0.5)
    here.kube.hold_patch = asyncio.Event()
    start = asyncio.create_task(gateway.start(sessionId="once"))
    await until(lambda: here.rooms.made)
    away = [Unreachable("refused") for _ in range(6)]
    here.kube.before["list"] = [Unreachable("refused") for _ in range(100)]
    here.kube.before["delete"] = [*away, Forbidden("not known yet", status=403)]
    here.kube.hold_patch.set()
    assert (await start).json()["code"] == "CLUSTER_UNAVAILABLE"
    await until(lambda: name not in [pod["metadata"]["name"] for pod in here.kube.pods()])


async def test_a_caller_who_leaves_after_the_bind_leaves_no_agent_waiting(here: World) -> None:
    here.pool()
    (name,) = here.pods(1)
    _, hold = await left_during_the_bind(here)
    hold.set()
    await until(lambda: here.agents.of(name).ends == ["cancel"])


async def test_a_caller_may_wait_until_the_agent_has_joined(here: World) -> None:
    here.pool()
    here.pods(1)
    gateway = await here.gateway()
    assert (await gateway.start(waitFor="joined")).json()["state"] == "joined"


async def test_a_session_is_listed_shown_and_ended(here: World) -> None:
    here.pool()
    (name,) = here.pods(1)
    gateway = await here.gateway()
    session_id = (await gateway.start()).json()["sessionId"]
    path = f"/v1/agents/{POOL}/sessions"
    await until(lambda: any(pod.session for pod in gateway.services.view.pods(("calls", POOL))))
    assert (await gateway.client.get(path, headers=AUTHORIZED)).json()["total_count"] == 1
    shown = (await gateway.client.get(f"{path}/{session_id}", headers=AUTHORIZED)).json()
    assert (shown["state"], shown["agent"]["pod"]) == ("accepted", name)
    ended = await gateway.client.delete(f"{path}/{session_id}?mode=drain", headers=AUTHORIZED)
    assert ended.json() == {"status": "draining", "session_id": session_id}
    assert here.agents.of(name).ends == ["drain"]


async def test_no_secret_reaches_a_log_or_an_error(here: World, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    here.pool()
    (name, _) = here.pods(2)
    here.agents.of(name).refuses = (503, "NOT_PARKED")
    gateway = await here.gateway()
    answer = await gateway.start(body={"card": "canary-body"})
    await gateway.client.post("/start", headers={"X-API-Key": "canary-wrong-key"})
    secrets = [API_KEY, LIVEKIT_SECRET, "canary", answer.json()["token"]]
    secrets += [claims["token"] for agent in here.agents.all() for claims in agent.claims]
    written = " ".join(
        f"{record.getMessage()} {vars(record)}" for record in caplog.records if record.name.startswith("voicepool")
    )
    assert "a session has its agent" in written
    assert [secret for secret in secrets if secret in written] == []


async def test_a_pool_that_is_being_deleted_takes_no_new_session(here: World) -> None:
    here.pool()
    here.pods(1)
    gateway = await here.gateway()
    here.kube.edit(POOLS, POOL, {"metadata": {"deletionTimestamp": datetime.now(UTC).isoformat()}})
    await until(lambda: gateway.services.view.pools["calls", POOL].deleting)
    assert (await gateway.start()).json()["code"] == "POOL_NOT_FOUND"


async def test_a_new_key_to_the_gateways_own_livekit_server_is_used_when_the_old_one_has_been_used_for_a_while(
    here: World,
) -> None:
    now = 0.0
    servers = LiveKitServers(here.kube, here.folder / "livekit", monotonic=lambda: now, cache_seconds=30)
    assert (await servers.of(pool())).api_key == "devkey"
    (here.folder / "livekit" / "api-key").write_text("newkey")
    assert (await servers.of(pool())).api_key == "devkey"
    now = 30.0
    assert (await servers.of(pool())).api_key == "newkey"
