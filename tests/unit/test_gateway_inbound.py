"""Calls that come by themselves: webhooks of LiveKit, real and forged, and what becomes of the caller."""

from __future__ import annotations

import asyncio
import base64
import datetime
import hashlib
import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from google.protobuf.json_format import MessageToJson
from livekit import api as livekit_api
from livekit.protocol.webhook import WebhookEvent
from tests.unit.fakes import NAMESPACE, POOL, POOLS, pod_object, pool_object, secret_object
from tests.unit.gateways import LIVEKIT_SECRET, Gateway, World, until, world

from voicepool.gateway.inbound import inbound_session_id
from voicepool.kube.api import PODS, SECRETS

ROOM = "call-_+4930123456_abc"
SIP = livekit_api.ParticipantInfo.Kind.SIP
STANDARD = livekit_api.ParticipantInfo.Kind.STANDARD
AGENT = livekit_api.ParticipantInfo.Kind.AGENT
OWN_SECRET = "canary-own-secret-of-the-pool-0123456789"


@pytest.fixture
async def here(tmp_path: Path) -> AsyncIterator[World]:
    async with world(tmp_path) as made:
        yield made


def joined(room: str, sid: str, *, kind: Any = SIP, event: str = "participant_joined", **attributes: str) -> str:
    told = WebhookEvent(event=event, id="EV_1", created_at=1)
    told.room.name, told.room.sid = room, sid
    told.participant.identity, told.participant.kind = "sip_+4930123456", kind
    told.participant.attributes.update({name.replace("_", "."): value for name, value in attributes.items()})
    return str(MessageToJson(told))


def signed(body: str, key: str = "devkey", secret: str = LIVEKIT_SECRET, *, valid_seconds: float = 300) -> str:
    token = livekit_api.AccessToken(key, secret).with_ttl(datetime.timedelta(seconds=valid_seconds))
    return token.with_sha256(base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()).to_jwt()


async def tell(gateway: Gateway, body: str, token: str | None = None) -> httpx.Response:
    headers = {"Authorization": signed(body) if token is None else token, "Content-Type": "application/webhook+json"}
    return await gateway.client.post("/livekit/webhook", content=body, headers=headers)


async def heard(gateway: Gateway, body: str) -> str:
    """What the gateway answers, once it has done what follows from it."""
    answer = await tell(gateway, body)
    assert answer.status_code == 200, answer.text
    await gateway.services.inbound.settled()
    return str(answer.json()["outcome"])


def inbound_pool(here: World, name: str = POOL, prefix: str = "call-", **spec: Any) -> None:
    here.kube.put(POOLS, pool_object(name, inbound={"roomPrefix": prefix}, **spec))


def calls_in(here: World, room: str) -> list[str]:
    """The pods that are bound to a room."""
    return [
        pod["metadata"]["name"]
        for pod in here.kube.bound()
        if pod["metadata"]["annotations"]["voicepool.dev/room"] == room
    ]


async def test_a_caller_by_telephone_gets_an_agent_that_knows_the_number(here: World) -> None:
    inbound_pool(here)
    (name,) = here.pods(1)
    state = here.rooms.open(ROOM, "sip_+4930123456")
    gateway = await here.gateway()
    told = joined(ROOM, state.sid, sip_phoneNumber="+4930123456", sip_callID="SCL_1", other="kept out")
    assert await heard(gateway, told) == "started"
    assert calls_in(here, ROOM) == [name]
    (order,) = here.agents.of(name).claims
    assert order["room"] == ROOM
    assert order["body"] == {"sip": {"phoneNumber": "+4930123456", "callID": "SCL_1"}}
    assert not here.rooms.made
    assert ROOM in here.rooms.states


async def test_only_a_telephone_is_taken_at_its_word_for_a_number(here: World) -> None:
    inbound_pool(here)
    (name,) = here.pods(1)
    state = here.rooms.open(ROOM, "somebody")
    told = joined(ROOM, state.sid, kind=STANDARD, sip_phoneNumber="+4930123456")
    assert await heard(await here.gateway(), told) == "started"
    assert here.agents.of(name).claims[0]["body"] == {}


async def test_the_same_webhook_again_and_at_two_gateways_gets_one_agent(here: World) -> None:
    inbound_pool(here)
    here.pods(4)
    state = here.rooms.open(ROOM, "sip_+4930123456")
    gateways = [await here.gateway(), await here.gateway()]
    told = joined(ROOM, state.sid)
    await asyncio.gather(*(heard(gateway, told) for gateway in gateways for _ in range(3)))
    for gateway in gateways:
        await gateway.services.sessions.settled()
        await heard(gateway, told)
    assert len(here.agents.with_session(inbound_session_id(ROOM, state.sid))) == 1
    assert len(calls_in(here, ROOM)) == 1
    assert not here.rooms.deleted


async def test_a_webhook_that_is_sent_again_after_its_call_gets_no_agent_for_the_next_one(here: World) -> None:
    inbound_pool(here)
    here.pods(3)
    gateway = await here.gateway()
    first = joined(ROOM, here.rooms.open(ROOM, "caller").sid)
    await heard(gateway, first)
    for pod in here.kube.bound():
        metadata = pod["metadata"]
        await here.kube.delete(
            PODS, NAMESPACE, metadata["name"], uid=metadata["uid"], resource_version=metadata["resourceVersion"]
        )
    second = here.rooms.open(ROOM, "caller")
    await heard(gateway, first)
    assert not here.kube.bound()
    assert here.rooms.states[ROOM] == second
    await heard(gateway, joined(ROOM, second.sid))
    assert len(calls_in(here, ROOM)) == 1


@pytest.mark.parametrize(
    ("event", "kind", "room"),
    [
        ("participant_joined", AGENT, ROOM),
        ("participant_left", SIP, ROOM),
        ("room_started", STANDARD, ROOM),
        ("participant_joined", SIP, "elsewhere-1"),
    ],
)
async def test_other_events_bind_nothing(here: World, event: str, kind: Any, room: str) -> None:
    inbound_pool(here)
    here.pods(1)
    told = joined(room, here.rooms.open(room, "caller").sid, kind=kind, event=event)
    assert await heard(await here.gateway(), told) == "ignored"
    assert not here.kube.bound()


async def test_the_room_of_a_session_gets_no_second_agent_whatever_the_prefix(here: World) -> None:
    inbound_pool(here, prefix=f"{NAMESPACE}_")
    here.pods(2)
    gateway = await here.gateway()
    room = (await gateway.start()).json()["roomName"]
    assert await heard(gateway, joined(room, here.rooms.states[room].sid, kind=STANDARD)) == "ignored"
    assert len(here.kube.bound()) == 1


@pytest.mark.parametrize(
    "token",
    [
        pytest.param(lambda body: "nonsense", id="no token"),
        pytest.param(lambda body: signed(body, secret="x" * 32), id="forged"),
        pytest.param(lambda body: signed(body, key="unknown"), id="unknown key"),
        pytest.param(lambda body: signed(body, valid_seconds=-120), id="expired"),
        pytest.param(lambda body: signed(body + " "), id="another body"),
        pytest.param(
            lambda body: livekit_api.AccessToken("devkey", LIVEKIT_SECRET).with_identity("x").to_jwt(), id="a caller's"
        ),
        pytest.param(lambda body: "", id="none"),
    ],
)
async def test_a_webhook_that_is_not_signed_for_its_body_now_is_refused(here: World, token: Any) -> None:
    inbound_pool(here)
    here.pods(1)
    gateway = await here.gateway()
    body = joined(ROOM, here.rooms.open(ROOM, "caller").sid)
    answer = await tell(gateway, body, token(body))
    assert (answer.status_code, answer.json()["code"]) == (401, "INVALID_WEBHOOK")
    await gateway.services.inbound.settled()
    assert not here.kube.bound()
    assert LIVEKIT_SECRET not in answer.text


async def test_a_signed_body_that_is_no_event_is_a_bad_request(here: World) -> None:
    answer = await tell(await here.gateway(), "no JSON")
    assert (answer.status_code, answer.json()["code"]) == (400, "INVALID_REQUEST")


async def test_a_server_speaks_for_its_own_pools_only(here: World) -> None:
    here.kube.put(SECRETS, secret_object("own", url="ws://own.example", api_key="own", api_secret=OWN_SECRET))
    inbound_pool(here, livekit={"secretName": "own"})
    here.pods(2)
    state = here.rooms.open(ROOM, "caller")
    gateway = await here.gateway()
    told = joined(ROOM, state.sid)
    assert await heard(gateway, told) == "ignored"
    answer = await tell(gateway, told, signed(told, "own", OWN_SECRET))
    await gateway.services.inbound.settled()
    assert answer.json()["outcome"] == "started"
    (name,) = calls_in(here, ROOM)
    assert here.agents.of(name).claims[0]["url"] == "ws://own.example"


async def test_a_stranger_cannot_have_a_missing_secret_asked_for_again_and_again(here: World) -> None:
    inbound_pool(here, livekit={"secretName": "nowhere"})
    gateway = await here.gateway()
    before = here.kube.requests.count(("get", ""))
    for _ in range(5):
        assert (await tell(gateway, "{}", signed("{}", "guessed"))).status_code == 401
    assert here.kube.requests.count(("get", "")) == before + 1


async def test_the_longest_prefix_wins_and_of_equal_ones_the_first_by_name_with_a_warning(
    here: World, caplog: pytest.LogCaptureFixture
) -> None:
    inbound_pool(here, "short", "call-")
    inbound_pool(here, "zulu", "call-vip-")
    inbound_pool(here, "alpha", "call-vip-")
    for number, pool in enumerate(("short", "zulu", "alpha")):
        here.kube.put(PODS, pod_object(number, pool=pool))
    gateway = await here.gateway()
    for room, pool in (("call-1", "short"), ("call-vip-1", "alpha")):
        with caplog.at_level(logging.WARNING, "voicepool.gateway"):
            await heard(gateway, joined(room, here.rooms.open(room, "caller").sid))
        (name,) = calls_in(here, room)
        assert name.startswith(pool)
        assert ("same spec.inbound.roomPrefix" in caplog.text) is (pool == "alpha")


async def test_a_caller_who_can_get_no_agent_is_hung_up_on(here: World) -> None:
    inbound_pool(here, onEmpty={"policy": "Reject"})
    state = here.rooms.open(ROOM, "caller")
    gateway = await here.gateway()
    assert await heard(gateway, joined(ROOM, state.sid)) == "started"
    assert here.rooms.deleted == [ROOM]


async def test_a_caller_whom_another_gateway_has_served_is_not_hung_up_on(here: World) -> None:
    inbound_pool(here, onEmpty={"policy": "Reject"})
    state = here.rooms.open(ROOM, "caller", f"agent-{inbound_session_id(ROOM, 'RM_1')}")
    assert state.sid == "RM_1"
    await heard(await here.gateway(), joined(ROOM, state.sid))
    assert not here.rooms.deleted


async def test_a_caller_who_hung_up_while_waiting_costs_no_agent(here: World) -> None:
    inbound_pool(here)
    state = here.rooms.open(ROOM, "caller")
    gateway = await here.gateway()
    told = asyncio.create_task(tell(gateway, joined(ROOM, state.sid)))
    await until(lambda: gateway.services.sessions.demand.unmet((NAMESPACE, POOL)).waiting)
    del here.rooms.states[ROOM]
    (name,) = here.pods(1)
    assert (await told).status_code == 200
    assert not here.kube.bound()
    assert name in [pod["metadata"]["name"] for pod in here.kube.pods()]
    assert (await gateway.start()).status_code == 200


async def test_a_webhook_is_answered_when_its_caller_has_an_agent_and_not_before(here: World) -> None:
    inbound_pool(here)
    here.pods(2)
    state = here.rooms.open(ROOM, "caller")
    here.kube.hold_patch = asyncio.Event()
    one, two = await here.gateway(), await here.gateway()
    told = [asyncio.create_task(tell(gateway, joined(ROOM, state.sid))) for gateway in (one, two)]
    for gateway in (one, two):
        await until(lambda known=gateway: known.services.sessions.in_flight((NAMESPACE, POOL), session_of(state.sid)))
    # The first gateway's connection breaks; LiveKit has heard nothing, and has told the second one.
    told[0].cancel()
    await asyncio.sleep(0.05)
    assert not told[1].done()
    here.kube.hold_patch.set()
    assert (await told[1]).json() == {"outcome": "started"}
    await one.services.sessions.settled()
    assert len(here.agents.with_session(session_of(state.sid))) == 1


def session_of(sid: str) -> str:
    return inbound_session_id(ROOM, sid)


async def test_with_livekit_down_a_webhook_fails_without_a_bind(here: World, caplog: pytest.LogCaptureFixture) -> None:
    inbound_pool(here)
    here.pods(1)
    state = here.rooms.open(ROOM, "caller")
    here.rooms.down = True
    assert await heard(await here.gateway(), joined(ROOM, state.sid)) == "started"
    assert not here.kube.bound()
    assert "could not be hung up on" in caplog.text
