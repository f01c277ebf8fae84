"""LiveKit's standard token endpoint: what its client SDKs send and expect, and what they cannot get with it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import jwt
import pytest
from tests.unit.fakes import NAMESPACE, POOLS, pool_object, secret_object
from tests.unit.gateways import AUTHORIZED, LIVEKIT_SECRET, SCOPED_KEY, Gateway, World, world

from voicepool.kube.api import SECRETS


@pytest.fixture
async def here(tmp_path: Path) -> AsyncIterator[World]:
    async with world(tmp_path) as made:
        yield made


async def ask(
    gateway: Gateway, headers: dict[str, str] | None = None, pool: str = "demo", **body: Any
) -> httpx.Response:
    return await gateway.client.post(f"/v1/{pool}/livekit/token", json=body, headers=headers or AUTHORIZED)


def claims(answer: httpx.Response, secret: str = LIVEKIT_SECRET) -> dict[str, Any]:
    assert answer.status_code == 201, answer.text
    assert set(answer.json()) == {"server_url", "participant_token"}
    read: dict[str, Any] = jwt.decode(answer.json()["participant_token"], secret, algorithms=["HS256"])
    return read


async def test_a_client_gets_a_token_for_a_room_with_a_warm_agent(here: World) -> None:
    here.pool()
    (name,) = here.pods(1)
    gateway = await here.gateway()
    answer = await ask(
        gateway,
        participant_name="Ada",
        participant_identity="ada",
        participant_metadata="vip",
        participant_attributes={"plan": "gold"},
        room_config={"agents": [{"agent_name": "demo", "metadata": '{"language": "de"}'}]},
    )
    token = claims(answer)
    assert answer.json()["server_url"] == "ws://livekit.example:7880"
    assert (token["name"], token["sub"], token["metadata"], token["attributes"]) == (
        "Ada",
        "ada",
        "vip",
        {"plan": "gold"},
    )
    (order,) = here.agents.of(name).claims
    assert order["body"] == {"language": "de"}
    assert token["video"]["room"] == order["room"] == here.rooms.made[0]
    assert token["video"]["canPublishSources"] == ["microphone"]
    assert not token["video"].get("roomAdmin")
    assert "roomConfig" not in token


async def test_a_request_without_a_body_is_enough(here: World) -> None:
    here.pool()
    here.pods(1)
    answer = await (await here.gateway()).client.post("/v1/demo/livekit/token", headers=AUTHORIZED)
    assert claims(answer)["sub"].startswith("caller-")


async def test_camel_case_is_understood_as_well(here: World) -> None:
    here.pool()
    (name,) = here.pods(1)
    answer = await ask(
        await here.gateway(),
        participantIdentity="ada",
        participantName="Ada",
        roomConfig={"name": "", "agents": [{"agentName": "calls.demo", "metadata": "not JSON"}]},
    )
    assert (claims(answer)["sub"], claims(answer)["name"]) == ("ada", "Ada")
    assert here.agents.of(name).claims[0]["body"] == "not JSON"


async def test_the_same_room_name_gets_the_same_agent_at_two_gateways_and_another_callers_another_one(
    here: World,
) -> None:
    here.pool()
    here.kube.put(POOLS, pool_object("other"))
    here.pods(3)
    gateways = [await here.gateway(), await here.gateway()]
    rooms = {claims(await ask(gateway, room_name="support"))["video"]["room"] for gateway in gateways}
    assert len(rooms) == len(here.kube.bound()) == 1
    (here.folder / "keys" / "narrow").write_text(
        (here.folder / "keys" / "narrow").read_text().replace(f"{NAMESPACE}/other", f"{NAMESPACE}/demo")
    )
    rooms.add(claims(await ask(gateways[0], {"X-API-Key": SCOPED_KEY}, room_name="support"))["video"]["room"])
    assert len(rooms) == 2


async def test_the_room_of_another_session_cannot_be_had_by_its_name(here: World) -> None:
    here.pool()
    here.pods(2)
    gateway = await here.gateway()
    room = (await gateway.start()).json()["roomName"]
    assert claims(await ask(gateway, room_name=room))["video"]["room"] != room


async def test_an_idempotency_key_is_kept_to(here: World) -> None:
    here.pool()
    here.pods(2)
    gateway = await here.gateway()
    keyed = AUTHORIZED | {"Idempotency-Key": "once"}
    assert claims(await ask(gateway, keyed))["video"] == claims(await ask(gateway, keyed))["video"]


async def test_the_pools_own_server_is_the_one_that_is_answered(here: World) -> None:
    secret = "canary-own-secret-of-the-pool-0123456789"
    here.kube.put(SECRETS, secret_object("own", url="wss://own.example", api_key="own", api_secret=secret))
    here.pool(livekit={"secretName": "own"})
    here.pods(1)
    answer = await ask(await here.gateway())
    assert claims(answer, secret)["iss"] == "own"
    assert answer.json()["server_url"] == "wss://own.example"


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"room_config": {"agents": [{"agent_name": "another"}]}}, "agent_name"),
        ({"room_config": {"agents": [{}, {}]}}, "agents"),
        ({"room_config": {"egress": {"room": {"room_name": "x"}}}}, "egress"),
        ({"room_config": {"max_participants": 2}}, "max_participants"),
        ({"participant_identity": "x" * 257}, "participant_identity"),
        ({"participant_name": "x" * 257}, "participant_name"),
        ({"participant_metadata": "x" * 4097}, "participant_metadata"),
        ({"participant_attributes": {"a": "x" * 4096}}, "4096"),
        ({"participant_attributes": {str(number): "" for number in range(65)}}, "64"),
        ({"participant_attributes": {"sip.phoneNumber": "+49"}}, "sip."),
        ({"participant_attributes": {"a": 1}}, "participant_attributes"),
        ({"room_name": "x" * 257}, "room_name"),
    ],
)
async def test_what_a_client_may_not_choose_is_refused_in_words(here: World, body: dict[str, Any], words: str) -> None:
    here.pool()
    here.pods(1)
    answer = await ask(await here.gateway(), **body)
    assert (answer.status_code, answer.json()["code"]) == (400, "INVALID_REQUEST")
    assert words in answer.json()["detail"]
    assert not here.kube.bound()


async def test_the_agents_own_identity_is_not_given_to_a_caller(here: World) -> None:
    here.pool()
    here.pods(2)
    gateway = await here.gateway()
    room = claims(await ask(gateway, room_name="support"))["video"]["room"]
    session_id = room.removeprefix(f"{NAMESPACE}_demo_")
    answer = await ask(gateway, room_name="support", participant_identity=f"agent-{session_id}")
    assert answer.status_code == 400


async def test_keys_pools_and_errors_are_those_of_start(here: World) -> None:
    here.pool(onEmpty={"policy": "Reject"})
    gateway = await here.gateway()
    for headers, pool, status, code in (
        ({"X-API-Key": "wrong"}, "demo", 401, "UNAUTHENTICATED"),
        ({"X-API-Key": SCOPED_KEY}, "demo", 403, "POOL_NOT_ALLOWED"),
        (AUTHORIZED, "nowhere", 404, "POOL_NOT_FOUND"),
        (AUTHORIZED, "demo", 429, "NO_WARM_AGENT"),
    ):
        answer = await ask(gateway, headers, pool)
        assert (answer.status_code, answer.json()["code"]) == (status, code)
