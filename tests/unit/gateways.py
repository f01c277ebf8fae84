"""Makes gateways for tests: the real parts around a fake API server, fake agents and fake rooms."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from tests.unit.fakes import NAMESPACE, POOL, Agents, FakeKube, FakeRooms, pod_object, pool_object

from voicepool.gateway.app import create_app
from voicepool.gateway.assignments import Signer
from voicepool.gateway.options import GatewayOptions
from voicepool.gateway.server import running
from voicepool.gateway.services import Services
from voicepool.gateway.tracing import Tracing
from voicepool.kube.api import PODS, POOLS, KubeApi
from voicepool.kube.clock import utc_now
from voicepool.settings import GatewaySettings

API_KEY = "canary-api-key-for-all-pools"
SCOPED_KEY = "canary-api-key-for-another-pool"
LIVEKIT_SECRET = "canary-livekit-secret-0123456789abcdef"
AUTHORIZED = {"Authorization": f"Bearer {API_KEY}"}


@dataclass
class Gateway:
    services: Services
    client: httpx.AsyncClient

    async def start(self, headers: dict[str, str] | None = None, **body: Any) -> httpx.Response:
        return await self.client.post(
            "/start", json={"transport": "livekit", **body}, headers=AUTHORIZED | (headers or {})
        )

    def waiting(self, pool: str = POOL) -> float:
        """How many callers its metrics show in a pool's queue."""
        labels = {"namespace": NAMESPACE, "pool": pool}
        return self.services.metrics.registry.get_sample_value("voicepool_gateway_queue_waiters", labels) or 0.0


class World:
    """A cluster with one pool, its agents, LiveKit, and as many gateways as a test asks for."""

    def __init__(self, folder: Path, kube: FakeKube, agents: Agents, rooms: FakeRooms) -> None:
        self.folder = folder
        self.kube = kube
        self.agents = agents
        self.rooms = rooms
        self._stack = contextlib.AsyncExitStack()

    def pool(self, **spec: Any) -> None:
        self.kube.put(POOLS, pool_object(**spec))

    def pods(self, count: int, *, ready: bool = True, first: int = 0) -> list[str]:
        made = [self.kube.put(PODS, pod_object(number, ready=ready)) for number in range(first, first + count)]
        return [pod["metadata"]["name"] for pod in made]

    async def gateway(
        self,
        kube: KubeApi | None = None,
        *,
        tracing: Tracing | None = None,
        set_to: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Gateway:
        """`set_to`: settings that are not as they are by default."""
        chosen = {
            "default_namespace": NAMESPACE,
            "agent_port": self.agents.port,
            "status_interval_seconds": 0.05,
            **options,
        }
        services = await self._stack.enter_async_context(
            running(
                kube or self.kube,
                settings(self.folder).model_copy(update=dict(set_to or {})),
                Signer.from_file(self.folder / "private.pem", utc_now),
                GatewayOptions(**chosen),
                now=utc_now,
                logs=self.kube,
                rooms=self.rooms,
                tracing=tracing,
            )
        )
        while not services.synced():  # noqa: ASYNC110 -- what is waited for has no event of its own
            await asyncio.sleep(0)
        transport = httpx.ASGITransport(create_app(services), raise_app_exceptions=False)
        client = httpx.AsyncClient(transport=transport, base_url="http://gateway")
        return Gateway(services, await self._stack.enter_async_context(client))

    async def close(self) -> None:
        await self._stack.aclose()


def settings(folder: Path) -> GatewaySettings:
    return GatewaySettings(
        assignment_private_key_file=folder / "private.pem",
        api_keys_folder=folder / "keys",
        livekit_folder=folder / "livekit",
    )


def write_files(folder: Path) -> Ed25519PrivateKey:
    key = Ed25519PrivateKey.generate()
    (folder / "private.pem").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    (folder / "keys").mkdir()
    (folder / "keys" / "everything").write_text(hashed(API_KEY))
    (folder / "keys" / "narrow").write_text(f"{hashed(SCOPED_KEY)} pools={NAMESPACE}/other")
    (folder / "livekit").mkdir()
    for name, value in {"url": "ws://livekit.example:7880", "api-key": "devkey", "api-secret": LIVEKIT_SECRET}.items():
        (folder / "livekit" / name).write_text(value + "\n")
    return key


def hashed(key: str) -> str:
    return f"sha256:{hashlib.sha256(key.encode()).hexdigest()}"


@contextlib.asynccontextmanager
async def world(folder: Path) -> AsyncIterator[World]:
    key = write_files(folder)
    kube = FakeKube()
    async with Agents(kube, key.public_key()) as agents:
        made = World(folder, kube, agents, FakeRooms())
        try:
            yield made
        finally:
            await made.close()


async def until(condition: Any) -> None:
    """Let the others work until something holds."""
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 -- what is waited for has no event of its own
            await asyncio.sleep(0.005)
