"""What an attacker writes to the gateway's socket, byte by byte, to a server that is set up as the real one is."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from aiohttp import web
from tests.unit.fakes import FakeAgent
from tests.unit.gateways import API_KEY, World, settings, world

from voicepool.gateway.server import http_config

KEY = f"X-API-Key: {API_KEY}\r\n"
ANSWER_SECONDS = 10.0
WAITS_SECONDS = 0.5
"""A gateway that has answered and says no more for so long waits for the next request."""


class Target:
    """A gateway on a real socket, and a session that runs."""

    def __init__(self, port: int, session: str, agent: FakeAgent) -> None:
        self.port, self.session, self.agent = port, session, agent

    async def send(self, request: str) -> bytes:
        """Everything that comes back until the gateway closes the connection, or has answered once and waits."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        answer = b""
        try:
            writer.write(request.encode("latin-1"))
            with contextlib.suppress(TimeoutError, ConnectionResetError):
                while part := await asyncio.wait_for(reader.read(65536), WAITS_SECONDS if answer else ANSWER_SECONDS):
                    answer += part
        finally:
            writer.close()
        return answer

    async def get(self, target: str, headers: str = "", *, method: str = "GET", host: str = "gateway") -> bytes:
        return await self.send(f"{method} {target} HTTP/1.1\r\nHost: {host}\r\n{KEY}{headers}Connection: close\r\n\r\n")


@contextlib.asynccontextmanager
async def target_of(here: World, *, set_to: dict[str, Any] | None = None, **options: Any) -> AsyncIterator[Target]:
    here.pool()
    here.pods(1)
    gateway = await here.gateway(set_to=set_to, **options)
    started = (await gateway.start()).json()
    config = http_config(gateway.services, settings(here.folder).model_copy(update=set_to or {}))
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        config.load()
        server.lifespan = config.lifespan_class(config)
        await server.startup(sockets=[listener])
        try:
            yield Target(listener.getsockname()[1], started["sessionId"], here.agents.of(started["agent"]["pod"]))
        finally:
            await server.shutdown(sockets=[listener])


@pytest.fixture
async def here(tmp_path: Path) -> AsyncIterator[World]:
    async with world(tmp_path) as made:
        yield made


@pytest.fixture
async def target(here: World) -> AsyncIterator[Target]:
    async with target_of(here) as made:
        yield made


def status(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


@pytest.mark.parametrize(
    "path",
    [
        "/sessions/{0}/../../status",
        "/sessions/{0}/..%2f..%2fstatus",
        "/sessions/{0}/%2e%2e/%2e%2e/status",
        "/sessions/{0}/a/./b",
        "/sessions/{0}/..\\status",
        "/sessions/{0}/a%0d%0aX-Evil:%201",
        "/sessions/{0}%2f..%2f..%2fstatus",
        "/sessions/..%2fbind/x",
        "/sessions/%2e%2e/bind",
        "//sessions/{0}/say",
        "/sessions//{0}/say",
        "http:///sessions/{0}/say",
        "evil.example/sessions/{0}/say",
        "*",
    ],
)
async def test_a_path_that_could_lead_elsewhere_reaches_no_agent(target: Target, path: str) -> None:
    answer = await target.get(path.format(target.session))
    assert 400 <= status(answer) < 500
    assert not target.agent.routed


async def test_an_absolute_url_is_answered_by_the_session_and_fetched_nowhere(target: Target) -> None:
    answer = await target.get(f"http://evil.example/sessions/{target.session}/say")
    assert status(answer) == 200
    assert target.agent.routed[0].raw_path == f"/sessions/{target.session}/say"
    assert target.agent.routed[0].host.startswith("127.")


async def test_an_encoded_slash_stays_encoded(target: Target) -> None:
    answer = await target.get(f"/sessions/{target.session}/a%2Fb%252e%252e")
    assert status(answer) == 200
    assert target.agent.routed[0].raw_path == f"/sessions/{target.session}/a%2Fb%252e%252e"


async def test_no_header_takes_away_or_changes_what_the_gateway_itself_says_to_the_agent(target: Target) -> None:
    headers = (
        "Voicepool-Order: forged\r\nvoicepool-order: forged\r\nVOICEPOOL-ORDER : forged\r\n".replace(" :", ":")
        + "Proxy-Connection: keep-alive\r\nX-Secret-Hop: 1\r\n"
        + "Connection: Voicepool-Order, Host, Content-Length, X-Secret-Hop\r\n"
    )
    answer = await target.get(f"/sessions/{target.session}/say", headers, host="evil.example")
    assert status(answer) == 200
    (seen,) = target.agent.routed
    assert seen.host.startswith("127.")
    assert len(seen.headers.getall("Voicepool-Order")) == 1
    assert "forged" not in str(seen.raw_headers)
    for name in ("X-Secret-Hop", "Proxy-Connection", "X-API-Key"):
        assert name not in seen.headers


@pytest.mark.parametrize(
    "headers",
    [
        "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n",
        "Upgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\nConnection: Upgrade, HTTP2-Settings\r\n",
    ],
    ids=["websocket", "h2c"],
)
async def test_a_connection_is_never_upgraded(target: Target, headers: str) -> None:
    answer = await target.get(f"/sessions/{target.session}/say", headers)
    assert status(answer) != 101
    for seen in target.agent.routed:
        assert "Upgrade" not in seen.headers
        assert "HTTP2-Settings" not in seen.headers


@pytest.mark.parametrize(
    "request_",
    [
        # Who believes the length sees one more request in the body; who believes the chunks does not.
        "POST /sessions/{0}/say HTTP/1.1\r\nHost: a\r\n{1}Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n"
        "2c\r\nGET /sessions/{0}/smuggled HTTP/1.1\r\nHost: a\r\n\r\n\r\n0\r\n\r\n",
        "POST /sessions/{0}/say HTTP/1.1\r\nHost: a\r\n{1}Content-Length: 0\r\nContent-Length: 30\r\n\r\n"
        "GET /sessions/{0}/smuggled HTTP/1.1\r\n\r\n",
        "POST /sessions/{0}/say HTTP/1.1\r\nHost: a\r\n{1}Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        "GET /sessions/{0}/say HTTP/1.1\r\nHost: a\r\nHost: b\r\n{1}\r\n",
        "GET /sessions/{0}/say HTTP/1.1\r\n{1}\r\n",
        "GET /sessions/{0}/say HTTP/1.1\r\nHost: a\r\n{1}X: a\r\n folded\r\n\r\n",
        "GET /sessions/{0}/say HTTP/1.1\r\nHost: a\r\n{1}X : a\r\n\r\n",
        "CONNECT evil.example:443 HTTP/1.1\r\nHost: evil.example\r\n{1}\r\n",
        "TRACE /sessions/{0}/say HTTP/1.1\r\nHost: a\r\n{1}\r\n",
    ],
    ids=["length-and-chunks", "two-lengths", "coding", "two-hosts", "no-host", "folded", "space", "connect", "trace"],
)
async def test_a_request_that_can_be_read_in_two_ways_is_not_two_requests(target: Target, request_: str) -> None:
    await target.send(request_.format(target.session, KEY))
    assert not [seen for seen in target.agent.routed if "smuggled" in seen.path]
    assert len(target.agent.routed) <= 1


async def test_huge_headers_are_refused_before_anybody_reads_them(target: Target) -> None:
    answer = await target.get(f"/sessions/{target.session}/say", f"X-Huge: {'x' * 200_000}\r\n")
    assert answer == b"" or status(answer) in (400, 431)
    answer = await target.get(f"/sessions/{target.session}/say", f"X-Large: {'x' * 20_000}\r\n")
    assert status(answer) < 600
    assert not target.agent.routed


async def test_a_body_that_comes_too_slowly_is_given_up(here: World) -> None:
    async with target_of(here, body_timeout_seconds=0.2) as target:
        answer = await target.send(f"POST /start HTTP/1.1\r\nHost: a\r\n{KEY}Content-Length: 100\r\n\r\n{{")
    assert status(answer) == 408
    assert b"BODY_TIMEOUT" in answer


@pytest.mark.parametrize(
    ("trusted", "answered"), [((), [401, 429, 429]), (("127.0.0.0/8",), [401, 401, 401])], ids=["nobody", "a-proxy"]
)
async def test_a_header_chooses_no_address_unless_its_proxy_is_trusted(
    here: World, trusted: tuple[str, ...], answered: list[int]
) -> None:
    request = (
        "POST /start HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\nConnection: close\r\n"
        "X-Forwarded-For: 192.0.2.{}\r\nAuthorization: Bearer wrong\r\n\r\n"
    )
    set_to = {"failed_authentications_per_minute": 1, "trusted_proxies": trusted}
    async with target_of(here, set_to=set_to) as target:
        assert [status(await target.send(request.format(number))) for number in range(3)] == answered


async def test_a_bot_s_answer_orders_neither_the_browser_nor_a_proxy_about(here: World, target: Target) -> None:
    async def bot(_request: web.Request) -> web.StreamResponse:
        names = (
            "Clear-Site-Data",
            "Alt-Svc",
            "Strict-Transport-Security",
            "X-Accel-Redirect",
            "Service-Worker-Allowed",
        )
        return web.Response(
            headers={**dict.fromkeys(names, "canary"), "Access-Control-Allow-Origin": "*", "X-Mine": "1"}
        )

    here.agents.bot = bot
    answer = (await target.get(f"/sessions/{target.session}/say")).lower()
    assert b"x-mine: 1" in answer
    assert b"canary" not in answer
    assert b"access-control" not in answer
