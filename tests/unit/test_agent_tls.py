"""One TLS context for all connections of a bot's services, made before the bind."""

from __future__ import annotations

import ssl
from pathlib import Path

import pytest
from pipecat.pipeline.pipeline import Pipeline
from pipecat.pipeline.worker import PipelineWorker
from pipecat.services.assemblyai.stt import AssemblyAISTTService
from tests.unit.authority import Authority
from websockets.asyncio.server import Server, ServerConnection, serve

from voicepool_agent import pipecat_private


def address(server: Server) -> str:
    """Where it listens."""
    host, port = next(iter(server.sockets)).getsockname()[:2]
    return f"{host}:{port}"


async def accept(connection: ServerConnection) -> None:
    """Keep a connection for as long as the other side does."""
    await connection.wait_closed()


async def test_a_service_connects_with_the_context_that_it_was_given_and_without_tls_as_before(tmp_path: Path) -> None:
    authority, service = Authority(tmp_path), AssemblyAISTTService(api_key="a-key")
    worker = PipelineWorker(Pipeline([service]))
    async with (
        serve(accept, "127.0.0.1", 0, ssl=authority.server) as secure,
        serve(accept, "127.0.0.1", 0) as plain,
    ):
        with pytest.raises(ssl.SSLCertVerificationError):
            await service._websocket_connect(f"wss://{address(secure)}")
        pipecat_private.share_tls_context(worker, authority.client)
        for url in (f"wss://{address(secure)}", f"ws://{address(plain)}"):
            connection = await service._websocket_connect(url)
            await connection.close()


async def test_a_context_of_the_services_own_is_kept(tmp_path: Path) -> None:
    authority, service = Authority(tmp_path), AssemblyAISTTService(api_key="a-key")
    pipecat_private.share_tls_context(PipelineWorker(Pipeline([service])), ssl.create_default_context())
    async with serve(accept, "127.0.0.1", 0, ssl=authority.server) as secure:
        connection = await service._websocket_connect(f"wss://{address(secure)}", ssl=authority.client)
        await connection.close()
