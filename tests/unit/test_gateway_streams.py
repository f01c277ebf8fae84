"""Logs and states that are followed: what is sent, when it ends, and what it may cost."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from tests.unit.fakes import FakeLog
from tests.unit.gateways import API_KEY, AUTHORIZED, SCOPED_KEY, Gateway, World, hashed, until, world
from tests.unit.loopback import served

from voicepool.gateway.auth import Caller
from voicepool.gateway.changes import MAX_PENDING, Changes, FellBehind
from voicepool.gateway.errors import ClusterUnavailable, GatewayError, Unauthenticated
from voicepool.gateway.streams import HEARTBEAT, with_heartbeats
from voicepool.kube.api import PODS, Forbidden, NotFound, Unreachable
from voicepool.model import PodFact


@pytest.fixture
async def here(tmp_path: Path) -> AsyncIterator[World]:
    async with world(tmp_path) as made:
        made.pool()
        made.pods(2)
        yield made


@dataclass
class Event:
    name: str
    data: dict[str, Any]
    id: str | None


class Reading:
    """An open stream."""

    def __init__(self, answer: aiohttp.ClientResponse) -> None:
        self.answer = answer
        self.heartbeats = 0

    async def next(self) -> Event | None:
        """The next event; None at the end."""
        fields: dict[str, str] = {}
        async with asyncio.timeout(10):
            while raw := await self.answer.content.readline():
                line = raw.decode().rstrip("\n")
                if not line and fields:
                    return Event(fields["event"], json.loads(fields["data"]), fields.get("id"))
                if line.startswith(":"):
                    self.heartbeats += 1
                elif line:
                    name, _, value = line.partition(": ")
                    fields[name] = value
        return None

    async def rest(self) -> list[Event]:
        events = []
        while (event := await self.next()) is not None:
            events.append(event)
        return events


@contextlib.asynccontextmanager
async def reading(address: str, path: str, **headers: str) -> AsyncIterator[Reading]:
    async with aiohttp.ClientSession() as http, http.get(address + path, headers=AUTHORIZED | headers) as answer:
        assert answer.status == 200, await answer.text()
        assert answer.content_type == "text/event-stream"
        yield Reading(answer)


async def started(here: World, gateway: Gateway) -> tuple[str, str, FakeLog]:
    """A session, its pod's name and its agent's log."""
    answer = (await gateway.start()).json()
    pod = answer["agent"]["pod"]
    return answer["sessionId"], pod, here.kube.logs[pod]


def end(here: World, pod: str, reason: str = "caller-left") -> None:
    summary = json.dumps({"session": "s", "reason": reason}, separators=(",", ":"))
    state = {"terminated": {"exitCode": 0, "message": summary, "finishedAt": "2026-03-01T12:00:00Z"}}
    status = {
        "phase": "Succeeded",
        "containerStatuses": [{"name": "agent", "ready": False, "state": state}],
    }
    here.kube.edit(PODS, pod, {"status": status})


# -- logs ----------------------------------------------------------------------------------------------------------------------


async def test_the_log_of_a_session_is_what_its_agent_wrote_last(here: World) -> None:
    gateway = await here.gateway()
    session, pod, log = await started(here, gateway)
    for second in range(5):
        log.write(f"line {second}", second)
    answer = await gateway.client.get(f"/v1/agents/demo/sessions/{session}/logs?tail=2", headers=AUTHORIZED)
    assert answer.json() == {
        "logs": [
            {"timestamp": "2026-03-01T12:00:03.000000000Z", "log": "line 3"},
            {"timestamp": "2026-03-01T12:00:04.000000000Z", "log": "line 4"},
        ]
    }
    assert log.asked == [("agent", False, 2, None)]
    end(here, pod)
    assert (await gateway.client.get(f"/v1/agents/demo/sessions/{session}/logs", headers=AUTHORIZED)).status_code == 200


@pytest.mark.parametrize(
    ("error", "status", "code", "words"),
    [
        (NotFound("gone", status=404), 404, "SESSION_NOT_FOUND", "is gone"),
        (Forbidden("no", status=403), 503, "CLUSTER_UNAVAILABLE", "pods/log"),
        (Unreachable("no answer"), 503, "CLUSTER_UNAVAILABLE", "could not be read"),
    ],
)
@pytest.mark.parametrize("follow", ["false", "true"])
async def test_a_log_that_cannot_be_read_is_an_error_in_words(
    here: World, error: Any, status: int, code: str, words: str, follow: str
) -> None:
    gateway = await here.gateway()
    session, _, _ = await started(here, gateway)
    here.kube.before["log"] = [error]
    path = f"/v1/agents/demo/sessions/{session}/logs?follow={follow}"
    answer = await gateway.client.get(path, headers=AUTHORIZED)
    assert (answer.status_code, answer.json()["code"]) == (status, code)
    assert words in answer.json()["detail"]
    # The place of a stream that never began is free again.
    gateway.services.streams.enter(contextlib.AsyncExitStack())


async def test_a_log_is_only_for_those_who_may_use_the_pool(here: World) -> None:
    gateway = await here.gateway()
    session, _, log = await started(here, gateway)
    for path in ("logs", "logs?follow=true", "events"):
        answer = await gateway.client.get(
            f"/v1/agents/demo/sessions/{session}/{path}", headers={"X-API-Key": SCOPED_KEY}
        )
        assert answer.status_code == 403
    assert (
        await gateway.client.get(f"/api/session/{session}/logs", headers={"X-API-Key": SCOPED_KEY})
    ).status_code == 404
    assert not log.asked


async def test_a_followed_log_tells_each_line_as_it_is_written_and_ends_with_its_container(here: World) -> None:
    gateway = await here.gateway()
    session, _, log = await started(here, gateway)
    log.write("before", 1)
    async with (
        served(gateway) as address,
        reading(address, f"/v1/agents/demo/sessions/{session}/logs?follow=true") as it,
    ):
        assert (await it.next()) == Event(
            "log",
            {"timestamp": "2026-03-01T12:00:01.000000000Z", "log": "before"},
            "2026-03-01T12:00:01.000000000Z",
        )
        log.write("äfter\tall", 2)
        line = await it.next()
        assert line is not None
        assert line.data["log"] == "äfter\tall"
        log.end()
        assert await it.rest() == [Event("end", {"sessionId": session}, None)]
    assert log.readers == 0


async def test_a_followed_log_goes_on_after_the_last_line_that_its_client_has(here: World) -> None:
    gateway = await here.gateway()
    session, _, log = await started(here, gateway)
    for second in range(4):
        log.write(f"line {second}", second)
    log.end()
    path = f"/v1/agents/demo/sessions/{session}/logs?follow=true"
    async with (
        served(gateway) as address,
        reading(address, path, **{"Last-Event-ID": "2026-03-01T12:00:01.000000000Z"}) as it,
    ):
        assert [event.data.get("log") for event in await it.rest()] == ["line 2", "line 3", None]
    assert log.asked == [("agent", True, None, "2026-03-01T12:00:01.000000000Z")]
    refused = await gateway.client.get(path, headers=AUTHORIZED | {"Last-Event-ID": "1 or 2"})
    assert (refused.status_code, refused.json()["code"]) == (400, "INVALID_REQUEST")


async def test_a_followed_log_ends_with_the_session_where_its_container_is_never_said_to_have_ended(
    here: World,
) -> None:
    gateway = await here.gateway(log_settle_seconds=0.05)
    session, pod, log = await started(here, gateway)
    async with (
        served(gateway) as address,
        reading(address, f"/v1/agents/demo/sessions/{session}/logs?follow=true") as it,
    ):
        await until(lambda: log.readers)
        end(here, pod)
        log.write("last words")
        assert [event.name for event in await it.rest()] == ["log", "end"]
    await until(lambda: not log.readers)


async def test_a_log_that_breaks_ends_without_the_event_end_so_that_its_client_comes_back(here: World) -> None:
    gateway = await here.gateway()
    session, _, log = await started(here, gateway)
    log.write("one")
    async with (
        served(gateway) as address,
        reading(address, f"/v1/agents/demo/sessions/{session}/logs?follow=true") as it,
    ):
        assert await it.next() is not None
        log.break_off(Unreachable("reset"))
        assert await it.rest() == []


async def test_a_client_that_hangs_up_stops_the_reading_at_once(here: World) -> None:
    gateway = await here.gateway()
    session, _, log = await started(here, gateway)
    log.write("one")
    async with served(gateway) as address:
        async with reading(address, f"/v1/agents/demo/sessions/{session}/logs?follow=true") as it:
            await it.next()
            assert log.readers == 1
        await until(lambda: log.readers == 0)


async def test_a_silent_stream_shows_that_it_lives(here: World) -> None:
    gateway = await here.gateway(heartbeat_seconds=0.02)
    session, _, log = await started(here, gateway)
    async with (
        served(gateway) as address,
        reading(address, f"/v1/agents/demo/sessions/{session}/logs?follow=true") as it,
    ):
        line = asyncio.create_task(it.next())
        await until(lambda: it.heartbeats >= 2)
        log.write("at last")
        event = await line
        assert event is not None
        assert event.data["log"] == "at last"


async def test_there_are_only_so_many_streams_and_each_gives_its_place_back(here: World) -> None:
    gateway = await here.gateway(max_streams=1)
    session, _, log = await started(here, gateway)
    path = f"/v1/agents/demo/sessions/{session}/logs?follow=true"
    async with served(gateway) as address:
        async with reading(address, path):
            for other in (path, f"/v1/agents/demo/sessions/{session}/events", "/v1/agents/demo/events"):
                refused = await gateway.client.get(other, headers=AUTHORIZED)
                assert (refused.status_code, refused.json()["code"]) == (429, "TOO_MANY_STREAMS")
                assert refused.headers["Retry-After"] == "5"
        await until(lambda: not log.readers)
        async with reading(address, path):
            pass


async def test_a_slow_client_holds_the_reading_up_and_loses_its_stream_in_the_end(here: World) -> None:
    gateway = await here.gateway(stream_stalled_seconds=0.3)
    session, _, log = await started(here, gateway)
    for _ in range(2000):
        log.write("x" * 50_000)
    async with (
        served(gateway) as address,
        aiohttp.ClientSession(read_bufsize=1024) as http,
        http.get(
            f"{address}/v1/agents/demo/sessions/{session}/logs?follow=true&tail=5000", headers=AUTHORIZED
        ) as answer,
    ):
        assert answer.status == 200
        await until(lambda: log.readers)
        await until(lambda: not log.readers)
        # Sockets hold some megabytes; a hundred would have been read if nothing held the reading up.
        assert log.read_lines < 1000


async def test_heartbeats_stand_between_events_and_the_source_is_closed_at_the_end() -> None:
    closed = asyncio.Event()

    async def source() -> AsyncGenerator[bytes]:
        try:
            yield b"one"
            await asyncio.Event().wait()
        finally:
            closed.set()

    async def still_may() -> bool:
        return True

    stream = with_heartbeats(source(), 0.01, asyncio.Event(), still_may)
    assert [await anext(stream), await anext(stream), await anext(stream)] == [b"one", HEARTBEAT, HEARTBEAT]
    await stream.aclose()
    assert closed.is_set()


@pytest.mark.parametrize("withdrawn", ["the key", "the pool"])
@pytest.mark.parametrize(
    "path",
    [
        "/v1/agents/demo/sessions/{}/logs?follow=true",
        "/api/session/{}/logs?follow=true",
        "/v1/agents/demo/sessions/{}/events",
        "/v1/agents/demo/events",
    ],
)
async def test_a_stream_ends_when_its_credential_is_withdrawn_however_much_it_has_to_say(
    here: World, path: str, withdrawn: str
) -> None:
    gateway = await here.gateway(heartbeat_seconds=0.1)
    session, _, log = await started(here, gateway)

    async def talk() -> None:
        while True:
            log.write("on and on")
            await asyncio.sleep(0.01)

    talking = asyncio.create_task(talk())
    async with served(gateway) as address, reading(address, path.format(session)) as it:
        assert await it.next() is not None
        await asyncio.sleep(0.3)
        assert not it.answer.content.at_eof()
        key = here.folder / "keys" / "everything"
        if withdrawn == "the key":
            key.unlink()
        else:
            key.write_text(f"{hashed(API_KEY)} pools=calls/other")
        async with asyncio.timeout(5):
            assert "end" not in [event.name for event in await it.rest()]
    talking.cancel()
    await until(lambda: not log.readers)


async def test_a_stream_goes_on_while_nobody_can_say_whether_its_credential_is_still_good(
    here: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway = await here.gateway(heartbeat_seconds=0.02)
    session, _, log = await started(here, gateway)
    asked = 0
    says: type[GatewayError] = ClusterUnavailable

    async def authenticate(**_: Any) -> Caller:
        nonlocal asked
        asked += 1
        raise says("The API server does not say.")

    path = f"/v1/agents/demo/sessions/{session}/logs?follow=true"
    async with served(gateway) as address, reading(address, path) as it:
        monkeypatch.setattr(gateway.services.access, "authenticate", authenticate)
        await until(lambda: asked > 3)
        log.write("still here")
        event = await it.next()
        assert event is not None
        assert event.data["log"] == "still here"
        says = Unauthenticated
        async with asyncio.timeout(5):
            assert await it.rest() == []


async def test_a_gateway_that_ends_ends_its_streams_and_their_clients_know_that_there_is_more(here: World) -> None:
    gateway = await here.gateway()
    session, _pod, log = await started(here, gateway)
    path = f"/v1/agents/demo/sessions/{session}"
    async with (
        served(gateway) as address,
        reading(address, f"{path}/logs?follow=true") as lines,
        reading(address, f"{path}/events") as states,
    ):
        log.write("said")
        event = await lines.next()
        assert event is not None
        assert event.name == "log"
        assert await states.next() is not None
        async with asyncio.timeout(5):
            gateway.services.streams.stop()
            assert await lines.next() is None
            while await states.next() is not None:
                pass
    assert log.readers == 0


# -- states --------------------------------------------------------------------------------------------------------------------


async def test_the_states_of_a_session_are_told_to_its_end_and_no_further(here: World) -> None:
    gateway = await here.gateway(state_interval_seconds=0.02)
    session, pod, _ = await started(here, gateway)
    agent = here.agents.of(pod)
    async with served(gateway) as address, reading(address, f"/v1/agents/demo/sessions/{session}/events") as it:
        seen = [await it.next(), await it.next()]
        assert [event.data["state"] for event in seen if event] == ["accepted", "joined"]
        agent.state = "ending"
        event = await it.next()
        assert event is not None
        assert (event.name, event.data["state"], event.data["sessionId"]) == ("session", "ending", session)
        end(here, pod)
        (last,) = await it.rest()
        assert (last.data["state"], last.data["reason"], last.data["completionStatus"]) == (
            "ended",
            "caller-left",
            "completed",
        )
        assert last.data["summary"]["reason"] == "caller-left"


async def test_a_session_that_has_ended_is_told_once(here: World) -> None:
    gateway = await here.gateway()
    session, pod, _ = await started(here, gateway)
    end(here, pod)
    async with served(gateway) as address, reading(address, f"/v1/agents/demo/sessions/{session}/events") as it:
        assert [event.data["state"] for event in await it.rest()] == ["ended"]


async def test_a_session_whose_pod_vanishes_was_dropped(here: World) -> None:
    gateway = await here.gateway()
    session, pod, _ = await started(here, gateway)
    async with served(gateway) as address, reading(address, f"/v1/agents/demo/sessions/{session}/events") as it:
        await it.next()
        metadata = here.kube.pod(pod)["metadata"]
        await here.kube.delete(PODS, "calls", pod, uid=metadata["uid"], resource_version=metadata["resourceVersion"])
        last = (await it.rest())[-1]
        assert (last.data["state"], last.data["completionStatus"], last.data["reason"]) == (
            "ended",
            "dropped",
            "deleted",
        )


async def test_an_agent_that_cannot_be_asked_is_told_by_its_pod_alone(here: World) -> None:
    gateway = await here.gateway(state_interval_seconds=0.01)
    session, pod, _ = await started(here, gateway)
    here.agents.of(pod).uid = "another pod"
    async with served(gateway) as address, reading(address, f"/v1/agents/demo/sessions/{session}/events") as it:
        first = await it.next()
        assert first is not None
        assert first.data["state"] == "bound"
        end(here, pod)
        assert [event.data["state"] for event in await it.rest()] == ["ended"]


async def test_a_pool_tells_its_counts_and_its_sessions(here: World) -> None:
    gateway = await here.gateway()
    async with served(gateway) as address, reading(address, "/v1/agents/demo/events") as it:
        assert await it.next() == Event(
            "pool", {"namespace": "calls", "pool": "demo", "warm": 2, "starting": 0, "bound": 0, "ended": 0}, None
        )
        session, pod, _ = await started(here, gateway)
        event = await it.next()
        assert event is not None
        assert (event.name, event.data["sessionId"]) == ("session.started", session)
        end(here, pod)
        events = [await it.next(), await it.next()]
        names = {event.name: event.data for event in events if event}
        assert names["session.ended"]["reason"] == "caller-left"
        assert (names["pool"]["warm"], names["pool"]["bound"], names["pool"]["ended"]) == (1, 0, 1)


async def test_a_session_that_never_reached_its_agent_is_over_for_those_who_follow_the_pool(here: World) -> None:
    gateway = await here.gateway()
    async with served(gateway) as address, reading(address, "/v1/agents/demo/events") as it:
        session, pod, _ = await started(here, gateway)
        exited = {"terminated": {"exitCode": 0, "reason": "Completed", "finishedAt": "2026-03-01T12:00:00Z"}}
        here.kube.edit(
            PODS,
            pod,
            {
                "metadata": {"deletionTimestamp": "2026-03-01T12:00:00Z"},
                "status": {
                    "phase": "Succeeded",
                    "containerStatuses": [{"name": "agent", "ready": False, "state": exited}],
                },
            },
        )
        async with asyncio.timeout(5):
            while (event := await it.next()) is None or event.name != "session.dropped":
                assert event is not None
        assert (event.data["sessionId"], event.data["reason"]) == (session, "undelivered")


async def test_a_credential_that_is_withdrawn_from_streams_is_not_guessed(here: World) -> None:
    gateway = await here.gateway(heartbeat_seconds=0.1, set_to={"failed_authentications_per_minute": 1})
    session, _, _ = await started(here, gateway)
    path = f"/v1/agents/demo/sessions/{session}"
    async with served(gateway) as address, contextlib.AsyncExitStack() as stack:
        readings = [await stack.enter_async_context(reading(address, path + "/events")) for _ in range(3)]
        (here.folder / "keys" / "everything").unlink()
        async with asyncio.timeout(5):
            for it in readings:
                await it.rest()
        async with (
            aiohttp.ClientSession() as http,
            http.get(address + path, headers={"X-API-Key": SCOPED_KEY}) as other,
        ):
            assert other.status == 403


async def test_an_unknown_pool_tells_nothing(here: World) -> None:
    client = (await here.gateway()).client
    assert (await client.get("/v1/agents/nowhere/events", headers=AUTHORIZED)).status_code == 404


async def test_a_follower_that_does_not_keep_up_loses_its_place_and_the_others_do_not(here: World) -> None:
    gateway = await here.gateway()
    (pod, *_) = gateway.services.view.pods(("calls", "demo"))
    changes = Changes()

    def mine(one: PodFact) -> bool:
        return one.uid == pod.uid

    with changes.follow(mine) as slow, changes.follow(lambda one: False) as other:
        for _ in range(MAX_PENDING + 1):
            changes.pod_changed(("calls", pod.name), None, pod)
        with pytest.raises(FellBehind):
            await slow.next()
        waiting = asyncio.ensure_future(other.next())
        await asyncio.sleep(0)
        assert not waiting.done()
        waiting.cancel()


# -- the first system's routes -------------------------------------------------------------------------------------------------


async def test_a_session_starts_and_shows_its_log_in_the_first_systems_shapes(here: World) -> None:
    gateway = await here.gateway()
    answer = await gateway.client.post("/api/session/start", json={}, headers=AUTHORIZED)
    body = answer.json()
    assert body.keys() == {"success", "sessionId", "url", "token", "roomName"}
    assert body["success"] is True
    (pod,) = here.kube.bound()
    here.kube.logs[pod["metadata"]["name"]].write("hello")
    answer = await gateway.client.get(f"/api/session/{body['sessionId']}/logs", headers=AUTHORIZED)
    assert answer.json() == {"success": True, "sessionId": body["sessionId"], "logs": ["hello"]}
    unknown = await gateway.client.get("/api/session/nobody/logs", headers=AUTHORIZED)
    assert (unknown.status_code, unknown.json()["code"]) == (404, "SESSION_NOT_FOUND")
    assert (await gateway.client.post("/api/session/start", json={})).status_code == 401
