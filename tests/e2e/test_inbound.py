"""Real calls that come by themselves, as LiveKit SIP brings them, and those of LiveKit's own clients; with a real LiveKit server's webhooks."""

from __future__ import annotations

import asyncio
import datetime
import secrets
from collections.abc import AsyncIterator

import pytest
from livekit import api
from tests.e2e.caller import Caller
from tests.e2e.deployment import Deployment, Json, livekit_key, livekit_secret, livekit_url
from tests.e2e.pools import MakePool, is_ready, light, until

pytestmark = pytest.mark.cluster

NUMBER = "+4930123456"
HANG_UP_SECONDS = 30.0


@pytest.fixture
async def livekit(deployment: Deployment) -> AsyncIterator[api.LiveKitAPI]:
    cluster = deployment.cluster
    async with api.LiveKitAPI(livekit_url(cluster), livekit_key(cluster), livekit_secret(cluster)) as server:
        yield server


def telephone(deployment: Deployment, room: str) -> Caller:
    """A caller who joins as the SIP service does: no room was made before, and the participant is of its kind."""
    cluster = deployment.cluster
    token = api.AccessToken(livekit_key(cluster), livekit_secret(cluster)).with_identity(f"sip_{NUMBER}")
    token = token.with_kind("sip").with_attributes({"sip.phoneNumber": NUMBER, "sip.callID": "SCL_test"})
    token = token.with_ttl(datetime.timedelta(minutes=1)).with_grants(api.VideoGrants(room_join=True, room=room))
    return Caller(livekit_url(cluster), token.to_jwt())


def dialled(prefix: str) -> str:
    """A room's name as a dispatch rule makes it for each call."""
    return f"{prefix}_{NUMBER}_{secrets.token_hex(6)}"


async def names(livekit: api.LiveKitAPI) -> set[str]:
    return {room.name for room in (await livekit.room.list_rooms(api.ListRoomsRequest())).rooms}


async def line_is_cut(caller: Caller) -> None:
    """Return when the caller's connection was ended. Raises TimeoutError."""
    async with asyncio.timeout(HANG_UP_SECONDS):
        while "disconnected" not in caller.timeline:  # noqa: ASYNC110 -- the SDK tells it by a callback
            await asyncio.sleep(0.1)


async def test_a_caller_by_telephone_hears_an_agent_and_the_line_is_cut_when_the_agent_has_ended(
    deployment: Deployment, make_pool: MakePool, livekit: api.LiveKitAPI
) -> None:
    pool = await make_pool("inbound", light(), inbound={"roomPrefix": "e2e-inbound-"})
    room = dialled("e2e-inbound-")

    def bound() -> list[Json]:
        pods = deployment.pods_of(pool)
        return [pod for pod in pods if pod["metadata"]["annotations"].get("voicepool.dev/room") == room]

    async with telephone(deployment, room) as caller:
        assert (await caller.hear(timeout_seconds=60)).seconds > 0.5
        (pod,) = await asyncio.to_thread(bound)
        session = pod["metadata"]["labels"]["voicepool.dev/session"]
        assert (await deployment.session(pool, session)).room_name == room
        async with deployment.client() as voicepool:
            await voicepool.end(pool, session)
        await line_is_cut(caller)
    assert room not in await names(livekit)
    assert len(await asyncio.to_thread(bound)) == 1


async def test_a_caller_for_whom_there_is_no_agent_is_hung_up_on(
    deployment: Deployment, make_pool: MakePool, livekit: api.LiveKitAPI
) -> None:
    await make_pool(
        "inbound-empty",
        light(),
        wait=False,
        replicas=0,
        inbound={"roomPrefix": "e2e-empty-"},
        onEmpty={"policy": "Queue", "timeoutSeconds": 3},
    )
    room = dialled("e2e-empty-")
    async with telephone(deployment, room) as caller:
        await line_is_cut(caller)
    assert room not in await names(livekit)


async def test_a_client_of_livekits_sdks_gets_an_agent_from_the_token_endpoint(
    deployment: Deployment, make_pool: MakePool
) -> None:
    pool = await make_pool("token", light())
    async with deployment.client() as voicepool:
        answer = await voicepool.livekit_token(pool, participant_identity="ada")
    async with Caller(answer.server_url, answer.participant_token) as caller:
        assert (await caller.hear(timeout_seconds=60)).seconds > 0.5


async def test_a_pool_whose_caller_has_hung_up_is_warm_again(
    deployment: Deployment, make_pool: MakePool, livekit: api.LiveKitAPI
) -> None:
    pool = await make_pool(
        "inbound-again", light(), inbound={"roomPrefix": "e2e-again-"}, session={"retentionSeconds": 0}
    )
    room = dialled("e2e-again-")
    async with telephone(deployment, room) as caller:
        await caller.hear(timeout_seconds=60)

    def only_a_warm_pod() -> bool:
        pods = deployment.pods_of(pool)
        return len(pods) == 1 and is_ready(pods[0])

    await until("the call's pod to be gone", only_a_warm_pod, deadline_seconds=120)
    assert room not in await names(livekit)
