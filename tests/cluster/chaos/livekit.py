"""A LiveKit server as the gateway sees it: it makes every room that it is asked for, knows who is in it, and lets nobody in whose token is over.

It can be away in the two ways in which a server is: nobody listens, or somebody listens and never answers.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
from collections.abc import Callable
from datetime import timedelta

import jwt
from aiohttp import web
from google.protobuf.json_format import MessageToJson
from livekit import api
from livekit.protocol.webhook import WebhookEvent

from tests.ports import free_port

TOKEN_LEEWAY = timedelta(seconds=60)
"""`tokenLeeway` in `auth/verifier.go` of LiveKit's protocol module."""
API_KEY = "devkey"
_SERVICE = "/twirp/livekit.RoomService"


class LiveKit:
    """One server on a loopback port. An async context manager.

    Args:
        secret: what tokens are signed with.
        present: room to the identities in it.
    """

    def __init__(self, secret: str, present: Callable[[str], list[str]]) -> None:
        self.rooms: set[str] = set()
        """All that were ever made."""
        self.callers_rooms: dict[str, str] = {}
        """Rooms that callers brought along, with LiveKit's own ids of them. Others are taken to be gone with their calls."""
        self._secret = secret
        self._present = present
        self._port = free_port()
        self._site: web.TCPSite | None = None
        self._answers = asyncio.Event()
        self._answers.set()

    @property
    def address(self) -> str:
        """Where gateways and agents find it."""
        return f"ws://127.0.0.1:{self._port}"

    async def __aenter__(self) -> LiveKit:
        application = web.Application()
        application.add_routes(
            [
                web.post(f"{_SERVICE}/CreateRoom", self._create),
                web.post(f"{_SERVICE}/ListRooms", self._list),
                web.post(f"{_SERVICE}/DeleteRoom", self._delete),
                web.post(f"{_SERVICE}/ListParticipants", self._participants),
                web.get("/rtc/validate", self._validate),
            ]
        )
        self._runner = web.AppRunner(application, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        await self._listen()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._answers.set()
        await self._runner.cleanup()

    async def go_away(self) -> None:
        """Nobody listens any more; what is connected is cut off."""
        if self._site is not None:
            await self._site.stop()
            self._site = None
        for connection in list(self._runner.server.connections if self._runner.server else ()):
            connection.force_close()
            if connection.transport is not None:
                connection.transport.abort()

    def fall_silent(self) -> None:
        """Take every request and answer none."""
        self._answers.clear()

    async def come_back(self) -> None:
        """Work again."""
        self._answers.set()
        if self._site is None:
            await self._listen()

    def webhook(self, room: str) -> tuple[str, dict[str, str]]:
        """What it tells when a telephone has joined a room that its caller brought along: body and headers, signed."""
        told = WebhookEvent(event="participant_joined", id="EV_1", created_at=1)
        told.room.name, told.room.sid = room, self.callers_rooms[room]
        told.participant.identity, told.participant.kind = "sip_1", api.ParticipantInfo.Kind.SIP
        body = str(MessageToJson(told))
        digest = base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()
        token = api.AccessToken(API_KEY, self._secret).with_sha256(digest).to_jwt()
        return body, {"Authorization": token, "Content-Type": "application/webhook+json"}

    async def _listen(self) -> None:
        self._site = web.TCPSite(self._runner, "127.0.0.1", self._port)
        await self._site.start()

    async def _create(self, request: web.Request) -> web.Response:
        wanted = api.CreateRoomRequest.FromString(await request.read())
        await self._answers.wait()
        self.rooms.add(wanted.name)
        return _protobuf(api.Room(name=wanted.name).SerializeToString())

    async def _list(self, request: web.Request) -> web.Response:
        wanted = api.ListRoomsRequest.FromString(await request.read())
        await self._answers.wait()
        found = [
            api.Room(name=name, sid=self.callers_rooms[name]) for name in wanted.names if name in self.callers_rooms
        ]
        return _protobuf(api.ListRoomsResponse(rooms=found).SerializeToString())

    async def _delete(self, request: web.Request) -> web.Response:
        wanted = api.DeleteRoomRequest.FromString(await request.read())
        await self._answers.wait()
        self.callers_rooms.pop(wanted.room, None)
        return _protobuf(api.DeleteRoomResponse().SerializeToString())

    async def _participants(self, request: web.Request) -> web.Response:
        wanted = api.ListParticipantsRequest.FromString(await request.read())
        await self._answers.wait()
        found = [api.ParticipantInfo(identity=identity) for identity in self._present(wanted.room)]
        return _protobuf(api.ListParticipantsResponse(participants=found).SerializeToString())

    async def _validate(self, request: web.Request) -> web.Response:
        await self._answers.wait()
        try:
            jwt.decode(request.query["access_token"], self._secret, algorithms=["HS256"], leeway=TOKEN_LEEWAY)
        except jwt.InvalidTokenError:
            return web.Response(status=401)
        return web.Response(text="success")


def _protobuf(body: bytes) -> web.Response:
    return web.Response(body=body, content_type="application/protobuf")
