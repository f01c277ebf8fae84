"""A LiveKit server as the gateway sees it: it makes every room that it is asked for, and knows who is in it."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable

from aiohttp import web
from livekit import api


@contextlib.asynccontextmanager
async def livekit(present: Callable[[str], list[str]]) -> AsyncIterator[str]:
    """Run one on a free loopback port; its address.

    Args:
        present: room to the identities in it.
    """

    def protobuf(body: bytes) -> web.Response:
        return web.Response(body=body, content_type="application/protobuf")

    async def create(request: web.Request) -> web.Response:
        wanted = api.CreateRoomRequest.FromString(await request.read())
        return protobuf(api.Room(name=wanted.name).SerializeToString())

    async def participants(request: web.Request) -> web.Response:
        wanted = api.ListParticipantsRequest.FromString(await request.read())
        found = [api.ParticipantInfo(identity=identity) for identity in present(wanted.room)]
        return protobuf(api.ListParticipantsResponse(participants=found).SerializeToString())

    application = web.Application()
    service = "/twirp/livekit.RoomService"
    application.add_routes(
        [web.post(f"{service}/CreateRoom", create), web.post(f"{service}/ListParticipants", participants)]
    )
    runner = web.AppRunner(application, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"ws://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()
