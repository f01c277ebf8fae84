"""What the gateway reads out of a LiveKit server's answers about rooms, over HTTP as the server speaks it."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime
from typing import Any, Literal

import aiohttp
import jwt
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from livekit import api as livekit_api

from voicepool.gateway.errors import LiveKitUnavailable
from voicepool.gateway.livekit import LiveKitRooms, LiveKitServer, RoomState, agent_token, caller_token

KINDS = livekit_api.ParticipantInfo.Kind


class Twirp:
    """A LiveKit server with one room, or none."""

    def __init__(self) -> None:
        self.rooms = [livekit_api.Room(name="talk", sid="RM_1", creation_time=1_700_000_000)]
        self.broken = False
        self.foreign = False
        """Something else has its address, and says 200 to everything."""

    async def answer(self, request: web.Request) -> web.Response:
        if self.foreign:
            return web.Response(text="<html>Welcome!</html>", content_type="text/html")
        if self.broken:
            return web.json_response({"code": "internal", "msg": "broken"}, status=500)
        method = request.match_info["method"]
        if method == "ListRooms":
            return proto(livekit_api.ListRoomsResponse(rooms=self.rooms))
        if not self.rooms:
            return web.json_response({"code": "not_found", "msg": "no such room"}, status=404)
        if method == "DeleteRoom":
            self.rooms.clear()
            return proto(livekit_api.DeleteRoomResponse())
        people = {"caller": KINDS.STANDARD, "phone": KINDS.SIP, "agent-1": KINDS.AGENT, "recorder": KINDS.EGRESS}
        found = [livekit_api.ParticipantInfo(identity=name, kind=kind) for name, kind in people.items()]
        return proto(livekit_api.ListParticipantsResponse(participants=found))


def proto(message: Any) -> web.Response:
    return web.Response(body=message.SerializeToString(), content_type="application/protobuf")


@pytest.fixture
async def twirp() -> Twirp:
    return Twirp()


@pytest.fixture
async def server(twirp: Twirp) -> AsyncIterator[LiveKitServer]:
    app = web.Application()
    app.router.add_post("/twirp/livekit.RoomService/{method}", twirp.answer)
    async with TestServer(app) as running:
        yield LiveKitServer(f"ws://127.0.0.1:{running.port}", "key", "a-secret-of-more-than-thirty-two-characters")


@pytest.fixture
async def rooms() -> AsyncIterator[LiveKitRooms]:
    async with aiohttp.ClientSession() as http:
        yield LiveKitRooms(http, timeout_seconds=5)


async def test_a_room_is_found_with_its_id_and_age(rooms: LiveKitRooms, server: LiveKitServer) -> None:
    assert await rooms.find(server, "talk") == RoomState("RM_1", datetime.fromtimestamp(1_700_000_000, UTC))
    assert await rooms.find(server, "tal") is None


async def test_people_count_and_agents_and_recorders_do_not(rooms: LiveKitRooms, server: LiveKitServer) -> None:
    assert await rooms.callers(server, "talk") == 2
    assert await rooms.has(server, "talk", "agent-1")
    assert not await rooms.has(server, "talk", "agent-2")


async def test_a_room_is_deleted_once_and_not_there_afterwards(rooms: LiveKitRooms, server: LiveKitServer) -> None:
    assert await rooms.delete(server, "talk")
    assert not await rooms.delete(server, "talk")
    assert await rooms.callers(server, "talk") == 0
    assert not await rooms.has(server, "talk", "caller")


async def test_a_server_that_fails_is_unavailable_to_every_question(
    rooms: LiveKitRooms, server: LiveKitServer, twirp: Twirp
) -> None:
    twirp.broken = True
    for question in (
        rooms.find(server, "talk"),
        rooms.callers(server, "talk"),
        rooms.delete(server, "talk"),
        rooms.has(server, "talk", "x"),
    ):
        with pytest.raises(LiveKitUnavailable):
            await question


async def test_a_server_that_accepts_and_never_answers_is_not_waited_for(server: LiveKitServer) -> None:
    async def silent(_request: web.Request) -> web.Response:
        await asyncio.Event().wait()
        raise AssertionError

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", silent)
    async with TestServer(app, handler_cancellation=True) as running, aiohttp.ClientSession() as http:
        rooms = LiveKitRooms(http, timeout_seconds=0.1)
        there = dataclasses.replace(server, url=f"ws://127.0.0.1:{running.port}")
        questions: list[Callable[[], Awaitable[Any]]] = [
            lambda: rooms.create(there, "talk", empty_timeout_seconds=5),
            lambda: rooms.find(there, "talk"),
            lambda: rooms.has(there, "talk", "agent-1"),
            lambda: rooms.callers(there, "talk"),
            lambda: rooms.delete(there, "talk"),
        ]
        for ask in questions:
            with pytest.raises(LiveKitUnavailable, match="TimeoutError"):
                async with asyncio.timeout(5):
                    await ask()


async def test_a_server_that_is_none_of_livekits_is_unavailable_to_every_question(
    rooms: LiveKitRooms, server: LiveKitServer, twirp: Twirp
) -> None:
    twirp.foreign = True
    for question in (
        rooms.create(server, "talk", empty_timeout_seconds=5),
        rooms.find(server, "talk"),
        rooms.callers(server, "talk"),
        rooms.delete(server, "talk"),
        rooms.has(server, "talk", "x"),
    ):
        with pytest.raises(LiveKitUnavailable, match="DecodeError"):
            await question


@pytest.mark.parametrize("kind", ["standard", "agent"])
def test_a_token_says_what_livekits_own_library_would_have_it_say(kind: Literal["standard", "agent"]) -> None:
    server = LiveKitServer("ws://livekit.example", "key", "a-secret-of-more-than-thirty-two-characters")
    make = agent_token if kind == "agent" else caller_token
    token = make(server, room="talk", identity="somebody", ttl_seconds=60)
    claims = livekit_api.TokenVerifier(server.api_key, server.api_secret).verify(token)
    grants = claims.video
    assert grants is not None
    ours = jwt.decode(token, options={"verify_signature": False})
    theirs = livekit_api.AccessToken(server.api_key, server.api_secret).with_identity("somebody").with_kind(kind)
    theirs_claims = jwt.decode(theirs.with_grants(grants).to_jwt(), options={"verify_signature": False})
    assert (grants.room, grants.agent) == ("talk", kind == "agent")
    assert ours.pop("exp") - ours["nbf"] == 60
    assert set(theirs_claims) - set(ours) == {"exp"}
    assert {name: theirs_claims[name] for name in ours if name != "nbf"} == {
        name: value for name, value in ours.items() if name != "nbf"
    }
