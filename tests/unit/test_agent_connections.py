"""The connections of a started agent, in this process: what makes it unfit for a caller, and when."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from pipecat.pipeline.pipeline import Pipeline
from pipecat.pipeline.service_switcher import ServiceSwitcher, ServiceSwitcherStrategyFailover
from pipecat.pipeline.worker import PipelineWorker
from pipecat.processors.frame_processor import FrameProcessor, FrameProcessorSetup
from pipecat.services.websocket_service import WebsocketService
from pipecat.workers.runner import WorkerRunner
from websockets.asyncio.server import ServerConnection, serve

from voicepool_agent import pipecat_private
from voicepool_agent.connections import Connections


class Service(FrameProcessor, WebsocketService):
    """Connects when it is set up, and says so when it cannot."""

    def __init__(self, url: str) -> None:
        FrameProcessor.__init__(self)
        WebsocketService.__init__(self)
        self._url = url

    async def setup(self, setup: FrameProcessorSetup) -> None:  # type: ignore[override]  # as Pipecat's own
        await super().setup(setup)
        await self._connect_websocket()

    async def _connect_websocket(self) -> None:
        try:
            self._websocket = await self._websocket_connect(self._url)
        except OSError as error:
            await self.push_error("cannot connect", exception=error, force_treat_as_permanent=True)

    async def _disconnect_websocket(self) -> None:
        if self._websocket is not None:
            await self._websocket.close()

    async def _receive_messages(self) -> None:
        raise NotImplementedError


class Agent:
    """A pipeline of services, held as a started agent holds it."""

    def __init__(self, *processors: FrameProcessor) -> None:
        self.worker = PipelineWorker(Pipeline(list(processors)))
        self.release = asyncio.Event()
        self.lost: list[str] = []
        self.connections = Connections([self.worker], self.release, self.lost.append)
        self.running: asyncio.Task[None] | None = None
        self._runner = WorkerRunner(handle_sigint=False)

    async def __aenter__(self) -> Agent:
        self.connections.hold(self.worker)
        await self._runner.add_workers(self.worker)
        self.running = asyncio.create_task(self._runner.run())
        async with asyncio.timeout(10):
            await self.connections.established()
        return self

    async def __aexit__(self, *_: object) -> None:
        self.connections.let_go()
        self.release.set()
        await self._runner.cancel()
        if self.running is not None:
            await self.running


class Provider:
    """A server of WebSockets."""

    def __init__(self) -> None:
        self.url = ""
        self.connections: list[ServerConnection] = []

    async def serve(self, connection: ServerConnection) -> None:
        """One connection."""
        self.connections.append(connection)
        await connection.wait_closed()


@pytest.fixture
async def provider() -> AsyncIterator[Provider]:
    one = Provider()
    async with serve(one.serve, "127.0.0.1", 0) as server:
        one.url = f"ws://127.0.0.1:{next(iter(server.sockets)).getsockname()[1]}"
        yield one


@pytest.fixture
def nowhere() -> str:
    """Port 9 of the loopback address: nobody listens."""
    return "ws://127.0.0.1:9"


def socket_of(service: FrameProcessor) -> Any:
    """Its connection."""
    return pipecat_private.socket(service)


async def test_connected_services_are_no_problem(provider: Provider) -> None:
    async with Agent(Service(provider.url), Service(provider.url)) as agent:
        assert (agent.connections.problem, agent.connections.missing, agent.lost) == (None, "", [])
        assert len(provider.connections) == 2


async def test_a_closed_connection_is_a_problem_from_that_moment_on_even_if_nobody_has_been_told_yet(
    provider: Provider,
) -> None:
    service = Service(provider.url)
    async with Agent(service) as agent:
        agent.connections.let_go()
        await provider.connections[0].close()
        await socket_of(service).wait_closed()
        assert agent.lost == []
        assert agent.connections.problem == "Service: the connection is closed"


async def test_two_closed_connections_are_told_once(provider: Provider) -> None:
    services = Service(provider.url), Service(provider.url)
    async with Agent(*services) as agent:
        for connection in provider.connections:
            await connection.close()
        for service in services:
            await socket_of(service).wait_closed()
        await asyncio.sleep(0)  # the watches are next in the event loop
        assert len(agent.lost) == 1
        assert agent.lost[0].startswith("Service: the provider has closed the connection (1000")


async def test_a_connection_that_closes_after_the_release_is_the_sessions_affair(provider: Provider) -> None:
    service = Service(provider.url)
    async with Agent(service) as agent:
        agent.release.set()
        await provider.connections[0].close()
        await socket_of(service).wait_closed()
        await asyncio.sleep(0)
        assert agent.lost == []


async def test_a_service_that_cannot_connect_is_told_unless_its_switcher_has_another_one(
    provider: Provider, nowhere: str
) -> None:
    def switcher(*urls: str) -> ServiceSwitcher[Any]:
        return ServiceSwitcher([Service(url) for url in urls], ServiceSwitcherStrategyFailover)

    async with Agent(Service(nowhere)) as agent:
        assert agent.lost == ["Service: cannot connect"]
    async with Agent(switcher(nowhere, provider.url)) as agent:
        assert agent.lost == []
    async with Agent(switcher(nowhere, nowhere)) as agent:
        assert agent.lost == ["Service: cannot connect"]
