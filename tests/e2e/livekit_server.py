"""A real LiveKit server for a test: on free loopback ports, with keys of its own, gone when the test is over."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import json
import secrets
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
from livekit import api
from tests.ports import free_port

READY_SECONDS = 15.0


@dataclass(frozen=True, slots=True)
class LiveKit:
    """Where it is, and how to make tokens for it."""

    url: str
    api_key: str
    api_secret: str = field(repr=False)

    def token(self, identity: str, room: str, *, agent: bool = False) -> str:
        """A token for one room, valid for a minute."""
        grants = api.VideoGrants(room_join=True, room=room, can_publish=True, can_subscribe=True, agent=agent)
        token = api.AccessToken(self.api_key, self.api_secret).with_identity(identity).with_grants(grants)
        return token.with_kind("agent" if agent else "standard").with_ttl(datetime.timedelta(minutes=1)).to_jwt()


@contextlib.asynccontextmanager
async def run_livekit(program: Path, folder: Path, *, again: LiveKit | None = None) -> AsyncIterator[LiveKit]:
    """Run a LiveKit server; its log goes to `folder`. It is killed at the end, without a word to those in its rooms.

    Args:
        program: the compiled server.
        folder: for its log.
        again: one that has ended; this one has its address and its keys.

    Raises:
        RuntimeError: it does not answer in time; the message has the end of its log.
    """
    signal_port = int(again.url.rpartition(":")[2]) if again else free_port()
    tcp_port, udp_port = free_port(), free_port(socket.SOCK_DGRAM)
    key, secret = (again.api_key, again.api_secret) if again else ("test", secrets.token_hex(24))
    configuration = {
        "port": signal_port,
        "bind_addresses": ["127.0.0.1"],
        "keys": {key: secret},
        "rtc": {
            "tcp_port": tcp_port,
            "udp_port": udp_port,
            "node_ip": "127.0.0.1",
            "use_external_ip": False,
            "enable_loopback_candidate": True,
            "interfaces": {"includes": ["lo"]},
        },
        "logging": {"level": "info"},
    }
    log = folder / "livekit.log"
    with log.open("wb") as output:
        server = await asyncio.create_subprocess_exec(
            program, "--config-body", json.dumps(configuration), stdout=output, stderr=output
        )
    try:
        await _wait_until_it_answers(f"http://127.0.0.1:{signal_port}/", server, log)
        yield LiveKit(f"ws://127.0.0.1:{signal_port}", key, secret)
    finally:
        if server.returncode is None:
            server.kill()
        await server.wait()


async def _wait_until_it_answers(url: str, server: asyncio.subprocess.Process, log: Path) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(READY_SECONDS), aiohttp.ClientSession() as http:
            while server.returncode is None:
                try:
                    async with http.get(url) as response:
                        if response.status == 200:
                            return
                except aiohttp.ClientError:
                    pass
                await asyncio.sleep(0.05)
    said = await asyncio.to_thread(log.read_text)
    raise RuntimeError(f"the LiveKit server does not answer at {url}; the end of its log:\n{said[-2000:]}")
