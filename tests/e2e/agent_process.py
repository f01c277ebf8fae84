"""An agent as a process, without a cluster: started as the operator would, bound as the gateway binds."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import re
import sys
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import jwt
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key
from tests.ports import free_port

import voicepool_agent

SOURCES = Path(voicepool_agent.__file__).parents[1]
"""Of the very package that the tests import, wherever another one is installed."""

BOTS = Path(__file__).parents[2] / "agent-image" / "bots"
PARKED_SECONDS = 60.0


class Gateway:
    """Signs orders, as the gateway does, with its private key in PEM or one of its own."""

    def __init__(self, private_key: str | None = None) -> None:
        key = load_pem_private_key(private_key.encode(), None) if private_key else Ed25519PrivateKey.generate()
        assert isinstance(key, Ed25519PrivateKey)
        self._key = key

    @property
    def public_key(self) -> str:
        """In PEM."""
        return self._key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()

    def sign(self, pod_uid: str, **claims: Any) -> str:
        """One order; every standard claim can be given otherwise, or left out with None."""
        now = time.time()
        standard = {"iss": "voicepool-gateway", "aud": pod_uid, "iat": now, "exp": now + 10, "jti": str(uuid.uuid4())}
        return jwt.encode(
            {name: value for name, value in {**standard, **claims}.items() if value is not None},
            self._key,
            algorithm="EdDSA",
        )


def orders_to_refuse(gateway: Gateway, pod_uid: str, **claims: Any) -> list[tuple[str | bytes, int, str]]:
    """Orders that no agent takes, of a gateway whose orders with these claims it would; each with the status and the code of its answer."""

    def sign(**changes: Any) -> str:
        return gateway.sign(pod_uid, **{**claims, **changes})

    return [
        (b"nonsense", 400, "MALFORMED"),
        (sign(room=None), 400, "MALFORMED"),
        (Gateway().sign(pod_uid, **claims), 401, "INVALID_ASSIGNMENT"),
        (gateway.sign("another-pod", **claims), 401, "INVALID_ASSIGNMENT"),
        (sign(exp=time.time() - 1), 401, "INVALID_ASSIGNMENT"),
        (sign(body="x" * 6_000_000), 413, "TOO_LARGE"),
    ]


async def post_order(http: aiohttp.ClientSession, url: str, order: str | bytes) -> tuple[int, Any]:
    """Send an order as the gateway does; status and JSON of the answer."""
    body = io.BytesIO(order if isinstance(order, bytes) else order.encode())
    async with http.post(url, data=body, headers={"Content-Type": "application/jwt"}) as response:
        return response.status, await response.json()


@dataclass(slots=True)
class AgentProcess:
    """A running agent."""

    pod_uid: str
    port: int
    process: asyncio.subprocess.Process
    gateway: Gateway
    http: aiohttp.ClientSession
    folder: Path

    async def get(self, path: str) -> tuple[int, Any]:
        """Status and JSON of a route."""
        async with self.http.get(f"http://127.0.0.1:{self.port}{path}") as response:
            return response.status, await response.json()

    async def post(self, path: str, order: str | bytes) -> tuple[int, Any]:
        """Send an order; status and JSON of the answer."""
        return await post_order(self.http, f"http://127.0.0.1:{self.port}{path}", order)

    async def bind(self, **claims: Any) -> tuple[int, Any]:
        """Sign an assignment and send it."""
        return await self.post("/bind", self.gateway.sign(self.pod_uid, **claims))

    async def end(self, session: str, action: str) -> tuple[int, Any]:
        """Sign an end and send it."""
        return await self.post("/end", self.gateway.sign(self.pod_uid, session=session, action=action))

    async def wait_until_ready(self) -> None:
        """Return when /readyz is 200.

        Raises:
            RuntimeError: the process has exited, or the time is over.
        """
        await self._wait_until("/readyz", lambda status, _: status == 200)

    async def wait_until_state(self, state: str) -> None:
        """Return when /status says so; raises as `wait_until_ready`."""
        await self._wait_until("/status", lambda _, answer: answer["state"] == state)

    async def _wait_until(self, path: str, good: Callable[[int, Any], bool]) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(PARKED_SECONDS):
                while self.process.returncode is None:
                    with contextlib.suppress(aiohttp.ClientError):
                        if good(*await self.get(path)):
                            return
                    await asyncio.sleep(0.02)
        raise RuntimeError(f"the agent did not come so far; its log:\n{self.log}")

    async def metric(self, name: str) -> float:
        """One sample of /metrics, by name and labels as they are written there."""
        async with self.http.get(f"http://127.0.0.1:{self.port}/metrics") as response:
            text = await response.text()
        found = re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
        if found is None:
            raise KeyError(name)
        return float(found[1])

    async def exit_code(self, timeout_seconds: float = 30.0) -> int:
        """Wait for the process to exit.

        Raises:
            TimeoutError: it does not.
        """
        async with asyncio.timeout(timeout_seconds):
            return await self.process.wait()

    @property
    def log(self) -> str:
        """Everything that it has written."""
        return (self.folder / "agent.log").read_text()

    @property
    def termination_message(self) -> str:
        """What the kubelet would show."""
        return (self.folder / "termination").read_text()

    @property
    def summary(self) -> dict[str, Any]:
        """The termination message of a session."""
        read: dict[str, Any] = json.loads(self.termination_message)
        return read

    @property
    def resident_bytes(self) -> int:
        """Its memory now."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")


@contextlib.asynccontextmanager
async def run_agent(
    bot: Path | str, folder: Path, environment: Mapping[str, str] | None = None, *, through: Sequence[str] = ()
) -> AsyncIterator[AgentProcess]:
    """Start an agent around a bot, `through` a program that runs others; it is killed at the end if it still runs."""
    gateway, pod_uid, port = Gateway(), str(uuid.uuid4()), free_port()
    ours = {
        "PATH": os.environ["PATH"],
        "HOME": str(folder),
        "PYTHONPATH": str(SOURCES),
        "BOT": str(bot),
        "PORT": str(port),
        "VOICEPOOL_LISTEN_ADDRESS": "127.0.0.1",
        "VOICEPOOL_POD_NAME": "demo-0a1b2c3d-0",
        "VOICEPOOL_POD_UID": pod_uid,
        "VOICEPOOL_POD_NAMESPACE": "default",
        "VOICEPOOL_POOL": "demo",
        "VOICEPOOL_ASSIGNMENT_PUBLIC_KEY": gateway.public_key,
        "VOICEPOOL_TERMINATION_MESSAGE_PATH": str(folder / "termination"),
    }
    with (folder / "agent.log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            *through,
            sys.executable,
            "-m",
            "voicepool_agent.main",
            env={**ours, **(environment or {})},
            stdout=log,
            stderr=log,
            cwd=folder,
        )
    async with aiohttp.ClientSession() as http:
        try:
            yield AgentProcess(pod_uid, port, process, gateway, http, folder)
        finally:
            if process.returncode is None:
                process.kill()
            await process.wait()
