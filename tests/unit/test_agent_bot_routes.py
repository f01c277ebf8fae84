"""The bot's own routes: which requests reach them, in what shape, and what comes back."""

from __future__ import annotations

import asyncio
import io
import sys
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import aiohttp
import jwt
import pytest
import yarl
from aiohttp.test_utils import BaseTestServer, TestServer
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from loguru import logger

from voicepool_agent import pipecat_cloud
from voicepool_agent.assignments import MAX_ORDER_BYTES, OrderVerifier
from voicepool_agent.bot_routes import ORDER_HEADER, REFUSED_HEADER, BotRoutes
from voicepool_agent.metrics import Metrics
from voicepool_agent.server import Server
from voicepool_agent.settings import read_settings

KEY = Ed25519PrivateKey.generate()
PUBLIC_KEY = KEY.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()


@pytest.fixture
def app() -> Iterator[FastAPI]:
    """`app` of `pipecatcloud_system`, as a bot imports it; gone when the test is over."""
    finders = sys.meta_path[:]
    pipecat_cloud.install()
    from pipecatcloud_system import app  # type: ignore[import-not-found]

    yield app
    sys.meta_path[:] = finders
    del sys.modules[pipecat_cloud.SYSTEM]


class Agent:
    """The agent's server, around a host that carries session s-1."""

    def __init__(self, server: BaseTestServer, http: aiohttp.ClientSession) -> None:
        self._server, self._http = server, http

    async def ask(self, path: str, method: str = "GET", *, order: str | None = None, **more: Any) -> tuple[int, str]:
        """Send a request; the path goes out as it stands."""
        headers = {ORDER_HEADER: signed() if order is None else order, **more.pop("headers", {})}
        url = yarl.URL(str(self._server.make_url("/")).rstrip("/") + path, encoded=True)
        async with self._http.request(method, url, headers=headers, **more) as answer:
            return answer.status, await answer.text()


def signed(**changes: Any) -> str:
    now = time.time()
    claims = {"iss": "voicepool-gateway", "aud": "uid-1", "iat": now, "exp": now + 10, "jti": str(uuid.uuid4())}
    return jwt.encode({**claims, "session": "s-1", "route": True, **changes}, KEY, algorithm="EdDSA")


@pytest.fixture
async def agent() -> AsyncIterator[Agent]:
    settings = read_settings({"VOICEPOOL_POD_UID": "uid-1", "VOICEPOOL_ASSIGNMENT_PUBLIC_KEY": PUBLIC_KEY})
    host: Any = SimpleNamespace(session_id="s-1")
    verifier = OrderVerifier(PUBLIC_KEY, "uid-1", time.time)
    application = Server(settings, host, verifier, Metrics(["parked"]), BotRoutes()).application()
    async with TestServer(application) as server, aiohttp.ClientSession() as http:
        yield Agent(server, http)


async def test_a_request_reaches_the_bot_as_if_it_served_alone(app: FastAPI, agent: Agent) -> None:
    @app.post("/notes/{name}")
    async def note(name: str, request: Request, colour: str) -> dict[str, Any]:
        seen = {"name": name, "colour": colour, "body": await request.json()}
        return {**seen, "order": ORDER_HEADER in request.headers, "mine": request.headers["x-mine"]}

    status, text = await agent.ask(
        "/sessions/s-1/notes/a%20b?colour=blue", "POST", json={"deep": [1]}, headers={"X-Mine": "yes"}
    )
    assert status == 200
    assert text == ('{"name":"a b","colour":"blue","body":{"deep":[1]},"order":false,"mine":"yes"}')


async def test_a_route_that_is_added_while_the_bot_is_built_is_served_too(app: FastAPI, agent: Agent) -> None:
    assert (await agent.ask("/sessions/s-1/late"))[0] == 404
    app.add_api_route("/late", lambda: "here")
    assert await agent.ask("/sessions/s-1/late") == (200, '"here"')


async def test_an_answer_is_passed_on_while_it_is_made(app: FastAPI, agent: Agent) -> None:
    heard = asyncio.Event()

    @app.get("/stream")
    async def stream() -> StreamingResponse:
        async def parts() -> AsyncIterator[str]:
            yield "first"
            await heard.wait()
            yield "second"

        return StreamingResponse(parts())

    url = agent._server.make_url("/sessions/s-1/stream")
    async with agent._http.get(url, headers={ORDER_HEADER: signed()}) as answer:
        assert await answer.content.readany() == b"first"
        heard.set()
        assert await answer.content.read() == b"second"


async def test_head_and_an_answer_without_a_body(app: FastAPI, agent: Agent) -> None:
    app.add_api_route("/nothing", lambda: None, methods=["DELETE"], status_code=204)
    app.add_api_route("/head", lambda: "length", methods=["HEAD"])
    assert await agent.ask("/sessions/s-1/nothing", "DELETE") == (204, "")
    assert await agent.ask("/sessions/s-1/head", "HEAD") == (200, "")


@pytest.mark.parametrize("path", ["readyz", "livez", "bot", "ws", "api/offer", "whatsapp", "readyz/", "%72eadyz"])
async def test_a_reserved_path_never_reaches_the_bot(app: FastAPI, agent: Agent, path: str) -> None:
    app.add_api_route("/{rest:path}", lambda: "mine")
    assert await agent.ask("/sessions/s-1/anything") == (200, '"mine"')
    assert (await agent.ask(f"/sessions/s-1/{path}"))[0] == 404


async def test_a_refusal_is_told_from_the_bot_s_own_answer(app: FastAPI, agent: Agent) -> None:
    @app.get("/gone")
    async def gone() -> JSONResponse:
        return JSONResponse({}, status_code=404, headers={REFUSED_HEADER: "FORGED"})

    for path, header in (("gone", None), ("readyz", "NOT_FOUND")):
        url = agent._server.make_url(f"/sessions/s-1/{path}")
        async with agent._http.get(url, headers={ORDER_HEADER: signed()}) as answer:
            assert (answer.status, answer.headers.get(REFUSED_HEADER)) == (404, header)


async def test_a_bot_without_routes_has_none(agent: Agent) -> None:
    status, text = await agent.ask("/sessions/s-1/say")
    assert (status, "NOT_FOUND" in text) == (404, True)


@pytest.mark.parametrize(
    "order",
    [
        "",
        "no-token",
        signed(aud="uid-2"),
        signed(iss="somebody"),
        signed(exp=time.time() - 1),
        signed(route=None),
        signed(route=None, action="cancel"),
    ],
)
async def test_a_request_without_the_gateway_s_order_is_refused(app: FastAPI, agent: Agent, order: str) -> None:
    app.add_api_route("/say", lambda: "said")
    assert (await agent.ask("/sessions/s-1/say", order=order))[0] == 401


async def test_an_order_lets_one_request_through(app: FastAPI, agent: Agent) -> None:
    app.add_api_route("/say", lambda: "said")
    order = signed()
    assert (await agent.ask("/sessions/s-1/say", order=order))[0] == 200
    assert (await agent.ask("/sessions/s-1/say", order=order))[0] == 401


async def test_an_order_is_for_its_session_only(app: FastAPI, agent: Agent) -> None:
    app.add_api_route("/say", lambda: "said")
    assert (await agent.ask("/sessions/s-1/say", order=signed(session="s-2")))[0] == 404
    assert (await agent.ask("/sessions/s-2/say", order=signed(session="s-2")))[0] == 404


async def test_an_order_for_a_route_neither_binds_nor_ends(agent: Agent) -> None:
    for path in ("/bind", "/end"):
        status, text = await agent.ask(path, "POST", data=signed().encode())
        assert (status, "MALFORMED" in text) == (400, True)


async def test_a_route_that_fails_says_so_and_nothing_more(app: FastAPI, agent: Agent) -> None:
    logged: list[str] = []
    sink = logger.add(logged.append, format="{message}")

    @app.get("/broken/{name}")
    async def broken(name: str) -> None:
        raise RuntimeError("canary")

    @app.get("/half")
    async def half() -> StreamingResponse:
        async def parts() -> AsyncIterator[str]:
            yield "half"
            raise RuntimeError("canary")

        return StreamingResponse(parts())

    status, text = await agent.ask("/sessions/s-1/broken/canary")
    logger.remove(sink)
    assert (status, "canary" in text) == (500, False)
    assert [str(line).strip() for line in logged] == ["the bot's own route /broken/{name} failed: RuntimeError"]
    with pytest.raises(aiohttp.ClientPayloadError):
        await agent.ask("/sessions/s-1/half")


async def test_an_application_that_does_not_answer_is_an_error(monkeypatch: pytest.MonkeyPatch, agent: Agent) -> None:
    async def silent(_scope: Any, receive: Any, send: Any) -> None:
        await receive()

    async def raises(_scope: Any, receive: Any, send: Any) -> None:
        raise RuntimeError("canary")

    for broken in (silent, raises):
        broken.routes = [SimpleNamespace(path="/say")]  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, pipecat_cloud.SYSTEM, SimpleNamespace(app=broken))
        status, text = await agent.ask("/sessions/s-1/say")
        assert (status, "BOT_ROUTE_FAILED" in text, "canary" in text) == (500, True, False)


async def test_a_body_over_the_limit_is_refused(app: FastAPI, agent: Agent) -> None:
    app.add_api_route("/say", lambda: "said", methods=["POST"])
    assert (await agent.ask("/sessions/s-1/say", "POST", data=io.BytesIO(bytes(MAX_ORDER_BYTES + 1))))[0] == 413


async def test_an_application_that_waits_learns_that_the_answer_is_complete(app: FastAPI, agent: Agent) -> None:
    seen: asyncio.Queue[str] = asyncio.Queue()

    class Watching:
        def __init__(self, inner: Any) -> None:
            self.inner = inner

        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            await self.inner(scope, receive, send)
            for _ in range(2):
                seen.put_nowait((await receive())["type"])

    app.add_middleware(Watching)
    app.add_api_route("/say", lambda: "said")
    assert (await agent.ask("/sessions/s-1/say"))[0] == 200
    assert [await seen.get(), await seen.get()] == ["http.request", "http.disconnect"]


async def test_lifespans_are_open_while_the_bot_runs(app: FastAPI) -> None:
    from pipecatcloud_system import add_lifespan_to_app

    seen: list[str] = []

    def lifespan(name: str) -> Any:
        @asynccontextmanager
        async def one(_app: FastAPI) -> AsyncIterator[None]:
            seen.append(f"{name} opens")
            yield
            seen.append(f"{name} closes")

        return one

    add_lifespan_to_app(lifespan("first"))
    add_lifespan_to_app(lifespan("second"))
    async with BotRoutes().serving():
        assert seen == ["first opens", "second opens"]
    assert seen[2:] == ["second closes", "first closes"]


async def test_a_bot_without_an_application_is_served_nothing() -> None:
    async with BotRoutes().serving():
        assert pipecat_cloud.SYSTEM not in sys.modules


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process in which nobody has imported Pipecat Cloud's package."""
    for name in [name for name in sys.modules if name.partition(".")[0] == pipecat_cloud.PACKAGE]:
        monkeypatch.delitem(sys.modules, name)


@pytest.mark.usefixtures("fresh")
def test_the_classes_of_pipecat_cloud_can_be_named() -> None:
    finders = sys.meta_path[:]
    pipecat_cloud.install()
    # Before the finder of what is installed: in an agent's image the package is not.
    sys.meta_path.insert(0, sys.meta_path.pop())
    try:
        from pipecat.runner.types import DailyRunnerArguments
        from pipecatcloud.agent import DailySessionArguments

        assert DailySessionArguments is DailyRunnerArguments
        with pytest.raises(ModuleNotFoundError):
            import pipecatcloud.session  # noqa: F401
    finally:
        sys.meta_path[:] = finders
        for name in (pipecat_cloud.AGENT, pipecat_cloud.PACKAGE):
            del sys.modules[name]


@pytest.mark.usefixtures("fresh")
def test_a_package_that_is_installed_goes_before_ours(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    finders = sys.meta_path[:]
    (tmp_path / "pipecatcloud").mkdir()
    (tmp_path / "pipecatcloud" / "__init__.py").write_text("theirs = True")
    (tmp_path / "pipecatcloud_system.py").write_text("app = 'theirs'")
    monkeypatch.syspath_prepend(tmp_path)
    pipecat_cloud.install()
    try:
        import pipecatcloud
        import pipecatcloud_system

        assert (pipecatcloud.theirs, pipecatcloud_system.app) == (True, "theirs")
        with pytest.raises(ModuleNotFoundError):
            import pipecatcloud.agent
    finally:
        sys.meta_path[:] = finders
        for name in (pipecat_cloud.SYSTEM, pipecat_cloud.PACKAGE):
            del sys.modules[name]
