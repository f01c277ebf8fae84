"""A pool under load on a real control plane.

Real operator and gateway processes with the rights that the chart gives them, agents that are played, callers, and a reader of the audit log. The
processes have accounts of their own, so that the log tells who did what.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import random
import re
import secrets
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import aiohttp
import yaml
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from tests.cluster.chaos.agents import Agents
from tests.cluster.chaos.audit import AuditReader
from tests.cluster.chaos.callers import Callers
from tests.cluster.chaos.door import Door
from tests.cluster.chaos.judge import Rules, Verdict, judge
from tests.cluster.chaos.livekit import API_KEY, LiveKit
from tests.cluster.chaos.processes import Process
from tests.cluster.tool import Cluster
from tests.ports import free_port
from voicepool.gateway.livekit import agent_identity
from voicepool.kube.api import POOLS, Json, KubeApi, KubeApiError
from voicepool.kube.client import AiohttpKubeApi, load_connection
from voicepool.settings import OperatorSettings

ROOT = Path(__file__).parents[3]
POOL = "demo"
GATEWAYS = 2
LEASE = "voicepool-operator"
REPLICAS = 20
MAX_PODS = 60
CALLS_PER_SECOND = 20.0
SETTLE_SECONDS = 40.0
PARALLEL_WRITES = int(OperatorSettings.model_fields["parallel_writes"].default)


@dataclass(frozen=True, slots=True)
class Accounts:
    """A namespace with the chart's accounts for operator and gateway."""

    namespace: str
    kubeconfigs: dict[str, Path]
    """Role to file."""

    def name(self, role: str) -> str:
        """How the audit log calls a role."""
        return f"system:serviceaccount:{self.namespace}:voicepool-{role}"


@contextlib.contextmanager
def accounts(cluster: Cluster, folder: Path) -> Iterator[Accounts]:
    """Make the custom resource, a namespace, and accounts with the chart's own rights in it."""
    cluster.kubectl("apply", "--filename", str(ROOT / "crds"))
    cluster.kubectl("wait", "--for=condition=Established", "crd/voiceagentpools.voicepool.dev", "--timeout=30s")
    namespace = f"storm-{uuid.uuid4().hex[:8]}"
    cluster.kubectl("create", "namespace", namespace)
    try:
        rights = cluster.helm(
            *("template", "voicepool", str(ROOT / "helm" / "voicepool"), "--namespace", namespace),
            *("--show-only", "templates/rbac.yaml", "--set", f"watchNamespaces={{{namespace}}}"),
            *("--set", "fullnameOverride=voicepool,livekit.url=ws://192.0.2.1,livekit.apiKey=a,livekit.apiSecret=b"),
        )
        cluster.apply(rights)
        kubeconfigs = {}
        for role in ("operator", "gateway"):
            token = cluster.kubectl(
                "create", "token", f"voicepool-{role}", "--namespace", namespace, "--duration=2h"
            ).strip()
            document = yaml.safe_load(cluster.kubeconfig.read_text())
            document["users"][0]["user"] = {"token": token}
            kubeconfigs[role] = folder / f"{role}.kubeconfig"
            kubeconfigs[role].write_text(yaml.safe_dump(document))
        # Without it no pod can be made. kube-controller-manager makes it, which takes up to a minute where the API server was away again and again.
        cluster.kubectl("wait", "--for=create", "serviceaccount/default", "--namespace", namespace, "--timeout=120s")
        yield Accounts(namespace, kubeconfigs)
    finally:
        cluster.kubectl("delete", "namespace", namespace, "--wait=false")


@dataclass
class Company:
    """Everybody but pools and callers."""

    cluster: Cluster
    accounts: Accounts
    api: KubeApi
    http: aiohttp.ClientSession
    agents: Agents
    livekit: LiveKit
    operators: list[Process]
    gateways: list[Process]
    audit: AuditReader
    door: Door | None
    """Where the first gateway goes in and out of the API server; None: it has no such door."""
    api_key: str = field(repr=False)

    @property
    def processes(self) -> list[Process]:
        """All processes of ours."""
        return [*self.operators, *self.gateways]

    def judge(self, pool: str, max_pods: int, overshoot: int) -> Verdict:
        """Judge all that was logged so far about the pods of a pool."""
        self.audit.read()
        rules = Rules(
            operators=frozenset({self.accounts.name("operator")}),
            gateways=frozenset({self.accounts.name("gateway")}),
            max_pods=max_pods,
            overshoot=overshoot,
            accepted=self.agents.accepted,
        )
        others = (write for write in self.audit.writes if write.resource.partition("/")[0] != "pods")
        of_pool = (write for write in self.audit.writes if write.name.startswith(f"{pool}-"))
        return judge([*others, *of_pool], rules)


@dataclass
class Stage(Company):
    """What a storm can shake."""

    callers: Callers
    told: set[str] = field(default_factory=set)
    """What the pool's conditions said meanwhile."""

    def full(self) -> bool:
        """Whether nobody waits, and as many agents are warm as are wanted."""
        return not self.callers.waiting and len(self.agents.warm()) >= REPLICAS

    async def pool(self) -> Json:
        """The pool as it is."""
        return await self.api.get(POOLS, self.accounts.namespace, POOL)

    async def scale(self, replicas: int) -> None:
        """What `kubectl scale` and an autoscaler do."""
        await self._patch({"spec": {"replicas": replicas}}, subresource="scale")

    async def build(self, number: int) -> None:
        """What a release does: another template."""
        annotations = {"example.org/build": str(number)}
        await self._patch({"spec": {"template": {"metadata": {"annotations": annotations}}}})

    async def _patch(self, body: Json, **options: str) -> None:
        await self.api.merge_patch(POOLS, self.accounts.namespace, POOL, body, **options)

    async def listen(self) -> None:
        """Note what the conditions say, until cancelled."""
        while True:
            with contextlib.suppress(KubeApiError):
                for one in (await self.pool()).get("status", {}).get("conditions", ()):
                    self.told.add(f"{one['type']}={one['status']} {one['reason']}")
            await asyncio.sleep(0.5)

    async def settled(self) -> bool:
        """Whether pods and status are as they should be, with no call going on, and nothing left of those that were."""
        if self.agents.in_calls() or self.agents.ended() or len(self.agents.warm()) != REPLICAS:
            return False
        if len(self.agents.unbound()) != REPLICAS:
            return False
        try:
            status = (await self.pool())["status"]
        except KubeApiError:
            return False
        conditions = {one["type"]: (one["status"], one["reason"]) for one in status["conditions"]}
        return bool(
            status["readyReplicas"] == status["updatedReplicas"] == REPLICAS
            and status["boundReplicas"] == len(self.agents.undelivered())
            and conditions["Ready"] == ("True", "TargetReached")
            and conditions["WarmTargetMet"][0] == "True"
            and "Stalled" not in conditions
            and "Reconciling" not in conditions
        )

    async def settle(self) -> None:
        """Wait until that is so. Raises AssertionError, which shows what each operator makes of it."""
        try:
            await until(self.settled, SETTLE_SECONDS)
        except AssertionError as error:
            told = [await one.ask("/metrics") or "" for one in self.operators]
            counted = [
                [line for line in text.splitlines() if re.match("voicepool_(?!.*_bucket)", line)] for text in told
            ]
            pods = f"{len(self.agents.warm())} warm, {len(self.agents.unbound())} unbound, {self.agents.in_calls()} in calls"
            raise AssertionError(f"{error}: {pods}; {(await self.pool()).get('status')}; {counted}") from None

    def verdict(self, overshoot: int) -> Verdict:
        """Judge all that was logged so far."""
        return self.judge(POOL, MAX_PODS, overshoot)


def pool_manifest(namespace: str, name: str = POOL, **spec: Any) -> Json:
    """A pool, as it is in storms unless said otherwise: its ceiling is about what the load needs, so that it is reached now and then."""
    return {
        "apiVersion": "voicepool.dev/v1alpha1",
        "kind": "VoiceAgentPool",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {
            "replicas": REPLICAS,
            "maxPods": MAX_PODS,
            "session": {"retentionSeconds": 1},
            "template": {"spec": {"containers": [{"name": "agent", "image": "localhost/agent:1"}]}},
            **spec,
        },
    }


@contextlib.asynccontextmanager
async def company(
    cluster: Cluster, accounts: Accounts, folder: Path, operators: int, *, with_door: bool = False
) -> AsyncIterator[Company]:
    """Bring everybody together: all run, and there is no pool yet.

    Args:
        cluster: a control plane.
        accounts: who the processes are.
        folder: for keys and logs.
        operators: how many; more than one have a Lease.
        with_door: the first gateway has a door, and agents ask LiveKit to be let in.
    """
    namespace = accounts.namespace
    key = Ed25519PrivateKey.generate()
    private, public, keys, secret = (folder / name for name in ("private.pem", "public.pem", "keys", "livekit"))
    private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    public.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    api_key = secrets.token_urlsafe(24)
    keys.mkdir()
    (keys / "everybody").write_text(f"sha256:{hashlib.sha256(api_key.encode()).hexdigest()}")
    secret.mkdir()
    # A network of its own for each run: other programs may listen on the agents' port of 127.0.0.1.
    network = f"127.{20 + os.getpid() % 200}"
    async with contextlib.AsyncExitStack() as stack:
        connection = load_connection(cluster.kubeconfig)
        api = await stack.enter_async_context(AiohttpKubeApi.connect(connection, request_timeout_seconds=5))
        http = await stack.enter_async_context(aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)))
        audit = AuditReader(cluster.audit_log, namespace)
        stack.callback(audit.close)
        await stack.enter_async_context(running(audit.follow()))
        agents = await stack.enter_async_context(
            Agents(api, namespace, key.public_key(), network, random.Random(), http if with_door else None)
        )

        def present(room: str) -> list[str]:
            session = room.rpartition("_")[2]
            return [agent_identity(session) for agent in agents.with_session(session) if agent.in_call]

        livekit_secret = secrets.token_hex(24)
        livekit = await stack.enter_async_context(LiveKit(livekit_secret, present))
        for name, value in {"url": livekit.address, "api-key": API_KEY, "api-secret": livekit_secret}.items():
            (secret / name).write_text(value)
        kubeconfigs = {("operator", number): accounts.kubeconfigs["operator"] for number in range(operators)}
        kubeconfigs |= {("gateway", number): accounts.kubeconfigs["gateway"] for number in range(GATEWAYS)}
        door = None
        if with_door:
            assert connection.ssl_context is not None
            door = await stack.enter_async_context(Door(connection.server, connection.ssl_context))
            kubeconfigs["gateway", 0] = door.kubeconfig(accounts.kubeconfigs["gateway"], folder / "door.kubeconfig")

        def process(role: str, number: int, settings: dict[str, str], port: int) -> Process:
            ours = {"VOICEPOOL_KUBECONFIG": str(kubeconfigs[role, number]), "VOICEPOOL_NAMESPACE": namespace}
            return Process(role, ours | settings, port, folder / f"{role}-{number}.log", http)

        def operator(number: int) -> Process:
            port = free_port()
            lease = {
                "VOICEPOOL_LEASE_NAME": LEASE,
                "VOICEPOOL_LEASE_NAMESPACE": namespace,
                "VOICEPOOL_LEASE_IDENTITY": f"operator-{number}",
            }
            settings = {
                "VOICEPOOL_ASSIGNMENT_PUBLIC_KEY_FILE": str(public),
                "VOICEPOOL_HEALTH_HOST": "127.0.0.1",
                "VOICEPOOL_HEALTH_PORT": str(port),
            }
            return process("operator", number, settings | (lease if operators > 1 else {}), port)

        def gateway(number: int) -> Process:
            port = free_port()
            settings = {
                "HOSTNAME": f"gateway-{number}",
                "VOICEPOOL_ASSIGNMENT_PRIVATE_KEY_FILE": str(private),
                "VOICEPOOL_API_KEYS_FOLDER": str(keys),
                "VOICEPOOL_LIVEKIT_FOLDER": str(secret),
                "VOICEPOOL_LISTEN_HOST": "127.0.0.1",
                "VOICEPOOL_LISTEN_PORT": str(port),
            }
            return process("gateway", number, settings, port)

        made = [operator(number) for number in range(operators)]
        gates = [gateway(number) for number in range(GATEWAYS)]
        for one in (*made, *gates):
            await stack.enter_async_context(one)
        await asyncio.gather(*(one.ready() for one in (*made, *gates)))
        yield Company(cluster, accounts, api, http, agents, livekit, made, gates, audit, door, api_key)


@contextlib.asynccontextmanager
async def stage(cluster: Cluster, accounts: Accounts, folder: Path, operators: int) -> AsyncIterator[Stage]:
    """Raise the curtain: everything runs and the pool is full. See `company`."""
    async with company(cluster, accounts, folder, operators) as all_:
        await all_.api.create(POOLS, accounts.namespace, pool_manifest(accounts.namespace))
        callers = Callers(
            all_.http, [one.address for one in all_.gateways], all_.api_key, f"{accounts.namespace}.{POOL}"
        )
        here = Stage(**{one.name: getattr(all_, one.name) for one in fields(all_)}, callers=callers)
        await here.settle()
        async with running(here.listen()):
            yield here


@contextlib.asynccontextmanager
async def running(work: Any) -> AsyncIterator[asyncio.Task[None]]:
    task: asyncio.Task[None] = asyncio.create_task(work)
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def until(holds: Callable[[], Awaitable[bool]], seconds: float) -> float:
    """Wait until something holds; how long that took. Raises AssertionError."""
    loop = asyncio.get_running_loop()
    began = loop.time()
    while not await holds():
        if loop.time() - began > seconds:
            raise AssertionError(f"{getattr(holds, '__qualname__', holds)} did not come true in {seconds} s")
        await asyncio.sleep(0.02)
    return loop.time() - began
