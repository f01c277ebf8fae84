"""Serves a gateway on a real socket, for what a client in the same process cannot show: streams, and clients of other people."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator

import uvicorn
from tests.unit.gateways import Gateway

from voicepool.gateway.app import create_app


@contextlib.asynccontextmanager
async def served(gateway: Gateway) -> AsyncIterator[str]:
    """The address of the gateway, without a slash at the end."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        config = uvicorn.Config(
            create_app(gateway.services), access_log=False, log_config=None, ws="none", lifespan="off"
        )
        server = uvicorn.Server(config)
        # Signals are pytest's.
        server.capture_signals = contextlib.nullcontext  # type: ignore[assignment, method-assign]
        task = asyncio.create_task(server.serve([listening]))
        while not server.started:  # noqa: ASYNC110 -- what is waited for has no event of its own
            await asyncio.sleep(0)
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = server.force_exit = True
            await task
