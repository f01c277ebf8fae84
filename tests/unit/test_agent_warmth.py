"""How far an agent goes before it waits, as a process on loopback: what has happened, and what has not, at the bind."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from tests.e2e.agent_process import AgentProcess, run_agent
from tests.e2e.bound import QUIET_BOT
from websockets.asyncio.server import Server, ServerConnection, serve

NOWHERE = "ws://127.0.0.1:9"
"""Port 9 of the loopback address: nobody listens."""

CLAIMS: dict[str, Any] = {"session": "s-1", "room": "r-1", "url": NOWHERE, "token": "a-token", "pool": "demo"}

TELLS = """
from loguru import logger
logger.info("the module is imported")
""" + QUIET_BOT.replace(
    "    transport =",
    '    logger.info(f"built for {runner_args.body} in {runner_args.room_name!r}")\n    transport =',
    1,
)

CONNECTS = """
import os
from pipecat.processors.frame_processor import FrameProcessor
from pipecat.services.websocket_service import WebsocketService

class Service(FrameProcessor, WebsocketService):
    def __init__(self):
        FrameProcessor.__init__(self)
        WebsocketService.__init__(self)

    async def setup(self, setup):
        await super().setup(setup)
        await self._connect()

    async def _connect(self):
        await super()._connect()
        await self._connect_websocket()
        self._receiving = self.create_task(self._receive_task_handler(self.push_error_frame))

    async def _connect_websocket(self):
        try:
            self._websocket = await self._websocket_connect(os.environ["PROVIDER"])
        except Exception as error:
            await self.push_error(f"cannot connect with {os.environ['API_KEY']}: {type(error).__name__}", exception=error)

    async def _disconnect_websocket(self):
        if self._websocket:
            await self._websocket.close()
        self._websocket = None

    async def _receive_messages(self):
        async for message in self._websocket:
            pass

    async def process_frame(self, frame, direction):
        await super().process_frame(frame, direction)
        print(f"saw {type(frame).__name__}")
        await self.push_frame(frame, direction)
""" + QUIET_BOT.replace("transport.input(), transport.output()", "transport.input(), Service(), transport.output()")


class Provider:
    """A WebSocket server that says nothing and remembers its connections."""

    def __init__(self) -> None:
        self.open: list[ServerConnection] = []
        self.server: Server | None = None

    @property
    def environment(self) -> dict[str, str]:
        """For the bot that connects."""
        assert self.server is not None
        port = next(iter(self.server.sockets)).getsockname()[1]
        return {"VOICEPOOL_WARMTH": "Started", "PROVIDER": f"ws://127.0.0.1:{port}", "API_KEY": "a-secret-key"}

    async def serve(self, connection: ServerConnection) -> None:
        """One connection, for as long as the other side keeps it."""
        self.open.append(connection)
        await connection.wait_closed()
        self.open.remove(connection)


@pytest.fixture
async def provider() -> AsyncIterator[Provider]:
    one = Provider()
    async with serve(one.serve, "127.0.0.1", 0) as one.server:
        yield one


async def started(agent: AgentProcess) -> None:
    await agent.wait_until_ready()
    assert (await agent.get("/status"))[1]["state"] == "parked"


# Imported


async def test_a_bot_that_is_only_imported_is_built_at_the_bind_with_the_body(tmp_path: Path) -> None:
    (tmp_path / "bot.py").write_text(TELLS)
    async with run_agent(
        "bot.py", tmp_path, {"VOICEPOOL_WARMTH": "Imported", "VOICEPOOL_SESSION_CONNECT_TIMEOUT_SECONDS": "1.5"}
    ) as agent:
        await agent.wait_until_ready()
        assert "the module is imported" in agent.log
        assert "built for" not in agent.log
        assert (await agent.bind(**CLAIMS, body={"name": "Ada"}))[0] == 202
        assert await agent.exit_code() == 0
        assert "built for {'name': 'Ada'} in 'r-1'" in agent.log
        assert agent.summary["reason"] == "not-joined"
        assert "waiting for LiveKit" in agent.summary["errors"][0]


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("async def bot(runner_args): raise ValueError('no voice')", "ValueError: no voice (line 1 of bot.py)"),
        ("async def bot(runner_args): ...", "returned without running a pipeline"),
        (QUIET_BOT.replace("transport.input(), transport.output()", ""), "without a LiveKit transport"),
    ],
    ids=["raises", "returns", "no LiveKit"],
)
async def test_a_bot_that_fails_when_it_is_built_at_the_bind_ends_the_session_with_that_reason(
    tmp_path: Path, source: str, words: str
) -> None:
    (tmp_path / "bot.py").write_text(source)
    async with run_agent("bot.py", tmp_path, {"VOICEPOOL_WARMTH": "Imported"}) as agent:
        await agent.wait_until_ready()
        assert (await agent.bind(**CLAIMS))[0] == 202
        assert await agent.exit_code() == 0
        assert agent.summary["reason"] == "bot-failed"
        assert words in agent.summary["errors"][0]


async def test_a_bot_that_does_not_come_to_an_end_of_its_building_ends_the_session_in_bounded_time(
    tmp_path: Path,
) -> None:
    (tmp_path / "bot.py").write_text("import asyncio\nasync def bot(runner_args): await asyncio.Event().wait()")
    async with run_agent(
        "bot.py", tmp_path, {"VOICEPOOL_WARMTH": "Imported", "VOICEPOOL_SESSION_CONNECT_TIMEOUT_SECONDS": "0.5"}
    ) as agent:
        await agent.wait_until_ready()
        await agent.bind(**CLAIMS)
        assert await agent.exit_code() == 0
        assert agent.summary["reason"] == "not-joined"
        assert "waiting for the bot to build its pipeline" in agent.summary["errors"][0]


# Started


async def test_a_bot_that_is_started_waits_with_its_providers_connected_and_without_a_start(
    provider: Provider, tmp_path: Path
) -> None:
    (tmp_path / "bot.py").write_text(CONNECTS)
    more = {"VOICEPOOL_SESSION_CONNECT_TIMEOUT_SECONDS": "2"}
    async with run_agent("bot.py", tmp_path, {**provider.environment, **more}) as agent:
        await started(agent)
        assert len(provider.open) == 1
        assert await agent.metric('voicepool_agent_startup_seconds{phase="connections"}') > 0
        assert (await agent.bind(**CLAIMS))[0] == 202
        assert len(provider.open) == 1
        assert await agent.exit_code() == 0
        assert agent.summary["reason"] == "not-joined"
        assert "waiting for LiveKit" in agent.summary["errors"][0]
        assert "saw StartFrame" not in agent.log


async def test_waiting_longer_than_pipecats_limits_on_setting_up_and_on_idling_is_no_harm(
    provider: Provider, tmp_path: Path
) -> None:
    short = CONNECTS.replace(
        "idle_timeout_secs=", "setup_timeout_secs=0.2, start_timeout_secs=0.2, idle_timeout_secs=0.2 or "
    )
    assert short != CONNECTS
    (tmp_path / "bot.py").write_text(short)
    async with run_agent("bot.py", tmp_path, provider.environment) as agent:
        await started(agent)
        _, status = await agent.get("/status?wait=joined&timeout=1")
        assert status["state"] == "parked"
        assert status["since_seconds"] >= 1
        assert (await agent.get("/readyz"))[0] == 200


async def test_a_provider_that_closes_the_connection_makes_the_agent_exit(provider: Provider, tmp_path: Path) -> None:
    (tmp_path / "bot.py").write_text(CONNECTS)
    async with run_agent("bot.py", tmp_path, provider.environment) as agent:
        await started(agent)
        await provider.open[0].close(1013, "try again later")
        assert await agent.exit_code() == 1
        assert "Service: the provider has closed the connection (1013 try again later)" in agent.termination_message


async def test_a_provider_that_cannot_be_reached_fails_the_build_and_keeps_the_key(tmp_path: Path) -> None:
    (tmp_path / "bot.py").write_text(CONNECTS)
    environment = {"VOICEPOOL_WARMTH": "Started", "PROVIDER": NOWHERE, "API_KEY": "a-secret-key"}
    async with run_agent("bot.py", tmp_path, environment) as agent:
        assert await agent.exit_code() == 1
        assert "Service: cannot connect with" in agent.termination_message
        assert "a-secret-key" not in agent.termination_message + agent.log


async def test_a_provider_that_does_not_answer_fails_the_build_and_is_named(tmp_path: Path) -> None:
    (tmp_path / "bot.py").write_text(CONNECTS)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        environment = {
            "VOICEPOOL_WARMTH": "Started",
            "VOICEPOOL_SESSION_CONNECT_TIMEOUT_SECONDS": "1",
            "PROVIDER": f"ws://127.0.0.1:{silent.getsockname()[1]}",
            "API_KEY": "a-secret-key",
        }
        async with run_agent("bot.py", tmp_path, environment) as agent:
            assert await agent.exit_code() == 1
            assert "not connected within 1 s: Service" in agent.termination_message


async def test_a_started_agent_that_is_told_to_stop_exits_and_closes_its_connections(
    provider: Provider, tmp_path: Path
) -> None:
    (tmp_path / "bot.py").write_text(CONNECTS)
    async with run_agent("bot.py", tmp_path, provider.environment) as agent:
        await started(agent)
        agent.process.terminate()
        assert await agent.exit_code() == 0
        assert not (agent.folder / "termination").exists()
