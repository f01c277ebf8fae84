"""When a session has ended, its room goes: at once, whoever notices, and never because of a pod that did not have the session."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from tests.unit.fakes import NAMESPACE, POOL, secret_object
from tests.unit.gateways import Gateway, World, until, world

from voicepool.gateway.livekit import RoomState
from voicepool.kube.api import PODS, POOLS, SECRETS, Json

FAST: dict[str, Any] = {"room_left_seconds": 0.02, "room_uncertain_seconds": 0.05}


@pytest.fixture
async def here(tmp_path: Path) -> AsyncIterator[World]:
    async with world(tmp_path) as made:
        yield made


async def call_in(here: World, gateway: Gateway, *people: str, **body: Any) -> tuple[str, str]:
    """A session with people in its room: the room, and the pod."""
    started = (await gateway.start(**body)).json()
    here.rooms.present[started["roomName"]] = list(people)
    return started["roomName"], started["agent"]["pod"]


def ends(here: World, pod: str, *, summary: bool = True, seconds_ago: float = 0.0) -> None:
    """The agent's process exits."""
    session = here.kube.pod(pod)["metadata"]["labels"].get("voicepool.dev/session")
    message = json.dumps({"session": session, "reason": "bot-ended"}) if summary else ""
    finished_at = (datetime.now(UTC) - timedelta(seconds=seconds_ago)).isoformat()
    terminated = {"exitCode": 0, "message": message, "finishedAt": finished_at}
    status = {
        "phase": "Succeeded",
        "containerStatuses": [{"name": "agent", "ready": False, "state": {"terminated": terminated}}],
    }
    here.kube.edit(PODS, pod, {"status": status})


async def goes(here: World, name: str) -> None:
    """A pod is deleted by somebody."""
    metadata = here.kube.pod(name)["metadata"]
    await here.kube.delete(PODS, NAMESPACE, name, uid=metadata["uid"], resource_version=metadata["resourceVersion"])


def closed(gateway: Gateway, outcome: str) -> float:
    labels = {"namespace": NAMESPACE, "pool": POOL, "outcome": outcome}
    found = gateway.services.metrics.registry.get_sample_value("voicepool_gateway_rooms_closed_total", labels)
    return found or 0.0


async def test_the_gateway_that_bound_the_session_deletes_its_room_at_once(here: World) -> None:
    here.pool()
    here.pods(1)
    gateway = await here.gateway(room_left_seconds=3600.0)
    room, pod = await call_in(here, gateway, "caller")
    ends(here, pod)
    await until(lambda: closed(gateway, "deleted"))
    assert here.rooms.deleted == [room]
    await goes(here, pod)
    await gateway.services.ended_rooms.settled()
    assert here.rooms.deleted == [room]


async def test_another_gateway_deletes_what_is_left_and_finds_nothing_if_nothing_is(
    here: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    here.pool()
    here.pods(2)
    monkeypatch.setenv("HOSTNAME", "one")
    one = await here.gateway(**FAST)
    monkeypatch.setenv("HOSTNAME", "two")
    two = await here.gateway(**FAST)
    _, pod = await call_in(here, one, "caller")
    ends(here, pod)
    await until(lambda: closed(one, "deleted") and closed(two, "absent"))
    # Bound by a gateway that is no longer there.
    room, pod = await call_in(here, one, "caller")
    here.kube.edit(PODS, pod, {"metadata": {"annotations": {"voicepool.dev/bound-by": "three"}}})
    ends(here, pod)
    await until(lambda: closed(one, "deleted") + closed(two, "deleted") == 2)
    assert here.rooms.deleted[1:] == [room]


async def test_the_room_of_an_agent_that_died_without_a_word_goes_a_little_later(here: World) -> None:
    here.pool()
    here.pods(2)
    gateway = await here.gateway(**FAST)
    rooms = []
    for vanish in (False, True):
        room, pod = await call_in(here, gateway, "caller")
        rooms.append(room)
        if vanish:
            await goes(here, pod)
        else:
            ends(here, pod, summary=False)
    await until(lambda: closed(gateway, "deleted") == 2)
    assert sorted(here.rooms.deleted) == sorted(rooms)


async def test_a_pod_that_never_had_the_session_takes_no_room_with_it(here: World) -> None:
    here.pool()
    here.pods(2)
    gateway = await here.gateway(**FAST)
    here.agents.refuse_next = [(503, "NOT_PARKED")]
    room, pod = await call_in(here, gateway, "caller")
    await gateway.services.sessions.settled()
    assert [one["metadata"]["name"] for one in here.kube.pods()] == [pod]
    await until(lambda: closed(gateway, "kept"))
    assert room in here.rooms.states


async def test_a_session_that_is_looking_for_its_next_agent_keeps_its_room(here: World) -> None:
    here.pool()
    (first,) = here.pods(1)
    gateway = await here.gateway(**FAST)
    here.agents.refuse_next = [(503, "NOT_PARKED")]
    start = asyncio.create_task(gateway.start())
    await until(lambda: closed(gateway, "kept"))
    assert first not in [pod["metadata"]["name"] for pod in here.kube.pods()]
    here.pods(1, first=1)
    assert (await start).json()["roomName"] in here.rooms.states


async def test_people_who_talk_to_each_other_are_left_to_it(here: World) -> None:
    here.pool()
    here.pods(1)
    gateway = await here.gateway()
    room, pod = await call_in(here, gateway, "caller", "a colleague")
    ends(here, pod)
    await until(lambda: closed(gateway, "kept"))
    assert room in here.rooms.states


async def test_a_room_that_was_made_again_is_left_alone(here: World) -> None:
    here.pool()
    here.pods(1)
    gateway = await here.gateway()
    room, pod = await call_in(here, gateway, "caller")
    here.rooms.states[room] = RoomState("RM_next", datetime.now(UTC) + timedelta(seconds=10))
    ends(here, pod)
    await until(lambda: closed(gateway, "kept"))
    assert room in here.rooms.states


async def test_ends_of_long_ago_are_not_looked_at_again(here: World) -> None:
    here.pool()
    here.pods(1)
    gateway = await here.gateway()
    room, pod = await call_in(here, gateway, "caller")
    ends(here, pod, seconds_ago=3600)
    await until(lambda: any(one.finished for one in gateway.services.view.pods((NAMESPACE, POOL))))
    await gateway.services.ended_rooms.settled()
    assert room in here.rooms.states


async def test_the_pools_own_server_is_asked_also_when_the_pool_is_gone(here: World) -> None:
    secret: Json = secret_object("own", url="ws://own.example", api_key="own", api_secret="x" * 32)
    here.kube.put(SECRETS, secret)
    here.pool(livekit={"secretName": "own"})
    here.pods(1)
    gateway = await here.gateway()
    _, pod = await call_in(here, gateway, "caller")
    metadata = here.kube.objects[POOLS.plural, NAMESPACE, POOL]["metadata"]
    await here.kube.delete(POOLS, NAMESPACE, POOL, uid=metadata["uid"], resource_version=metadata["resourceVersion"])
    await until(lambda: not gateway.services.view.pools)
    ends(here, pod)
    await until(lambda: closed(gateway, "deleted"))
    assert here.rooms.servers == ["ws://own.example"]


async def test_a_server_that_is_away_is_asked_again(here: World) -> None:
    here.pool()
    here.pods(1)
    gateway = await here.gateway()
    room, pod = await call_in(here, gateway, "caller")
    here.rooms.down = True
    asked = here.rooms.asked
    ends(here, pod)
    await until(lambda: here.rooms.asked > asked)
    here.rooms.down = False
    await until(lambda: closed(gateway, "deleted"))
    assert here.rooms.deleted == [room]
