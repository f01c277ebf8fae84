"""A gateway as it runs, but for two doubles: LiveKit's rooms, which need no time, and the port that agents listen on."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

from tests.unit.fakes import FakeRooms
from tests.unit.gateways import settings
from voicepool.gateway.assignments import Signer
from voicepool.gateway.options import GatewayOptions
from voicepool.gateway.server import running
from voicepool.gateway.services import Services
from voicepool.kube.client import AiohttpKubeApi, load_connection
from voicepool.kube.clock import utc_now

CONNECTIONS = 128
"""As many as the gateway's own process opens to the API server."""


@contextlib.asynccontextmanager
async def gateway(kubeconfig: Path, folder: Path, namespace: str, agent_port: int) -> AsyncIterator[Services]:
    """The parts of a gateway for one namespace; `folder` holds its files."""
    async with (
        AiohttpKubeApi.connect(load_connection(kubeconfig), connections=CONNECTIONS) as kube,
        running(
            kube,
            settings(folder).model_copy(update={"namespace": namespace}),
            Signer.from_file(folder / "private.pem", utc_now),
            GatewayOptions(default_namespace=namespace, agent_port=agent_port),
            now=utc_now,
            logs=kube,
            rooms=FakeRooms(),
        ) as services,
    ):
        yield services
