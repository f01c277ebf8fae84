"""A real API server with pools and pods in it. The benchmarks play the kubelet: they write the pods' status."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from tests.bench.gateway import CONNECTIONS
from tests.bench.processes import Child
from tests.cluster.progress import Progress
from tests.cluster.tool import Cluster
from tests.ports import free_port
from tests.unit.gateways import write_files
from voicepool.kube.api import PODS, POOLS, Json, NotFound, Resource
from voicepool.kube.client import AiohttpKubeApi, load_connection
from voicepool.kube.convert import pod_from_json, pool_from_json
from voicepool.model import AGENT_CONTAINER, PodFact, PoolFact
from voicepool.podspec import PodSettings, build_pod, template_hash

CRDS = Path(__file__).parents[2] / "crds"
NAMESPACES = Resource("", "v1", "namespaces")
SERVICE_ACCOUNTS = Resource("", "v1", "serviceaccounts")
WAIT_SECONDS = 120.0
PARALLEL = 64
IMAGE = "localhost/agent:1"

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class World:
    """What a benchmark works in."""

    cluster: Cluster
    api: AiohttpKubeApi
    folder: Path
    """Keys, and the logs of child processes."""
    public_key: str
    """PEM of the key that assignments are verified with."""
    progress: Progress

    @property
    def pod_settings(self) -> PodSettings:
        """What the operator adds to each pod."""
        return PodSettings(assignment_public_key=self.public_key)

    async def namespace(self, name: str) -> str:
        """Make a namespace and wait until pods can be created in it."""
        await self.api.create(NAMESPACES, "", {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})

        async def usable() -> bool:
            try:
                await self.api.get(SERVICE_ACCOUNTS, name, "default")
            except NotFound:
                return False
            return True

        await until(usable)
        return name

    async def pool(self, namespace: str, name: str, **spec: Any) -> PoolFact:
        """Create a pool whose status tells its template's hash, as the operator writes it."""
        stored = await self.api.create(POOLS, namespace, pool_object(namespace, name, **spec))
        pool = _known(pool_from_json(stored))
        status = {"templateHash": template_hash(pool, self.pod_settings)}
        stored = await self.api.merge_patch(POOLS, namespace, name, {"status": status}, subresource="status")
        return _known(pool_from_json(stored))

    async def warm_pods(self, pool: PoolFact, numbers: Iterable[int], *, address: str = "127.0.0.1") -> list[PodFact]:
        """Create pods of a pool as the operator does, and make them Ready as a kubelet does."""
        hash_ = template_hash(pool, self.pod_settings)

        async def make(number: int) -> PodFact:
            body = build_pod(pool, number, hash_, self.pod_settings)
            await self.api.create(PODS, pool.namespace, body)
            return await self.make_ready(pool.namespace, body["metadata"]["name"], address=address)

        return await in_parallel(make, numbers)

    async def make_ready(self, namespace: str, name: str, *, address: str = "127.0.0.1") -> PodFact:
        """Write the status of a pod that has just become Ready."""
        stored = await self.api.merge_patch(
            PODS, namespace, name, {"status": ready_status(address)}, subresource="status"
        )
        return _known(pod_from_json(stored))

    async def touch(self, namespace: str, name: str, uid: str, turn: int) -> None:
        """The bare patch that a bind is measured beside: of two operations, a test and a label."""
        operations = [
            {"op": "test", "path": "/metadata/uid", "value": uid},
            {"op": "add", "path": "/metadata/labels/turn", "value": str(turn)},
        ]
        await self.api.json_patch(PODS, namespace, name, operations)

    @contextlib.asynccontextmanager
    async def gateway(self, namespace: str, agent_port: int) -> AsyncIterator[Child]:
        """A gateway's process for one namespace, when it is ready; its agents listen on that port."""
        port = free_port()
        arguments = (
            *("-m", "tests.bench.gateway_process", "--kubeconfig", str(self.cluster.kubeconfig)),
            *("--folder", str(self.folder), "--namespace", namespace),
            *("--agent-port", str(agent_port), "--port", str(port)),
        )
        async with Child(arguments, self.folder / f"gateway-{port}.log", f"http://127.0.0.1:{port}") as child:
            await child.answers("/readyz", 200)
            yield child

    @contextlib.asynccontextmanager
    async def operator(self, namespace: str) -> AsyncIterator[Child]:
        """The operator's process for one namespace, just started; it answers at its `url`."""
        port = free_port()
        environment = {
            "VOICEPOOL_KUBECONFIG": str(self.cluster.kubeconfig),
            "VOICEPOOL_NAMESPACE": namespace,
            "VOICEPOOL_ASSIGNMENT_PUBLIC_KEY_FILE": str(self.folder / "public.pem"),
            "VOICEPOOL_HEALTH_HOST": "127.0.0.1",
            "VOICEPOOL_HEALTH_PORT": str(port),
        }
        log = self.folder / f"operator-{namespace}.log"
        arguments = ("-m", "voicepool.main", "operator")
        async with Child(arguments, log, f"http://127.0.0.1:{port}", environment) as child:
            yield child


@contextlib.asynccontextmanager
async def world(cluster: Cluster, folder: Path, progress: Progress) -> AsyncIterator[World]:
    """A world in a running cluster, which must not have been used for another one before."""
    key = write_files(folder).public_key()
    public_key = key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()
    (folder / "public.pem").write_text(public_key)
    await asyncio.to_thread(cluster.kubectl, "apply", "--filename", str(CRDS))
    crd = "crd/voiceagentpools.voicepool.dev"
    await asyncio.to_thread(cluster.kubectl, "wait", "--for=condition=Established", crd, "--timeout=30s")
    async with AiohttpKubeApi.connect(load_connection(cluster.kubeconfig), connections=CONNECTIONS) as api:
        yield World(cluster, api, folder, public_key, progress)


def pool_object(namespace: str, name: str, **spec: Any) -> Json:
    """A pool to create."""
    template = {"spec": {"containers": [{"name": AGENT_CONTAINER, "image": IMAGE}]}}
    return {
        "apiVersion": "voicepool.dev/v1alpha1",
        "kind": "VoiceAgentPool",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {"template": template, **spec},
    }


def ready_status(address: str) -> Json:
    """The status of a Ready pod, as complete as a kubelet writes it."""
    now = datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
    agent = {
        "name": AGENT_CONTAINER,
        "image": IMAGE,
        "imageID": "sha256:" + "0" * 64,
        "containerID": "containerd://" + "0" * 64,
        "ready": True,
        "started": True,
        "restartCount": 0,
        "state": {"running": {"startedAt": now}},
    }
    kinds = ("PodReadyToStartContainers", "Initialized", "Ready", "ContainersReady", "PodScheduled")
    return {
        "phase": "Running",
        "qosClass": "BestEffort",
        "podIP": address,
        "podIPs": [{"ip": address}],
        "startTime": now,
        "conditions": [{"type": kind, "status": "True", "lastTransitionTime": now} for kind in kinds],
        "containerStatuses": [agent],
    }


async def in_parallel(do: Callable[[Any], Awaitable[T]], items: Iterable[Any], *, at_once: int = PARALLEL) -> list[T]:
    """Do something with each item, a limited number at a time; the results in the items' order."""
    gate = asyncio.Semaphore(at_once)

    async def one(item: Any) -> T:
        async with gate:
            return await do(item)

    return list(await asyncio.gather(*map(one, items)))


async def until(holds: Callable[[], Awaitable[bool]], *, poll_seconds: float = 0.02) -> None:
    """Wait for something.

    Raises:
        TimeoutError: it did not come.
    """
    deadline = time.perf_counter() + WAIT_SECONDS
    while not await holds():
        if time.perf_counter() > deadline:
            raise TimeoutError(f"{getattr(holds, '__qualname__', holds)} did not come true in {WAIT_SECONDS:.0f} s")
        await asyncio.sleep(poll_seconds)


def load_average() -> float:
    """Of the machine, over the last minute."""
    return os.getloadavg()[0]


def _known(fact: T | None) -> T:
    if fact is None:
        raise ValueError("the API server answered with something else")
    return fact
