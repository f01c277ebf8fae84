"""A real HorizontalPodAutoscaler and the chart's custom.metrics.k8s.io, on a real control plane.

No node: gateways and operator run here, with the accounts, keys and certificates that the chart gave them; the tests play the kubelet.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import socket
import sys
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import aiohttp
import pytest
import yaml

from tests.cluster.errors import ClusterError
from tests.cluster.test_operator_control_plane import Operator, api, namespace, operator
from tests.cluster.tool import Cluster
from tests.ports import free_port
from tests.unit.documentation import documents
from voicepool.gateway.custom_metrics import API_GROUP, API_VERSION, METRIC, RESOURCE
from voicepool.kube.api import POOLS, Json

pytestmark = pytest.mark.control_plane

__all__ = ["api", "namespace", "operator"]  # fixtures

ROOT = Path(__file__).parents[2]
CHART = ROOT / "helm" / "voicepool"
OPERATIONS = ROOT / "docs" / "operations.md"
WAIT_SECONDS = 120.0
"""kube-controller-manager looks for new kinds of objects each 30 s."""
GATEWAYS = ("gateway-a", "gateway-b")


async def until(holds: Callable[[], Awaitable[bool]]) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not await holds():
        if time.monotonic() > deadline:
            raise AssertionError(f"{getattr(holds, '__qualname__', holds)} did not come true in {WAIT_SECONDS} s")
        await asyncio.sleep(0.1)


def machine_address() -> str:
    """An address of this machine that is not the loopback's, which endpoints may not have. Nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))
        return str(probe.getsockname()[0])


class Release:
    """The chart, installed with custom metrics; its pods are stored, and run nowhere."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.namespace = f"voicepool-{uuid.uuid4().hex[:8]}"

    def upgrade(self, *values: str) -> None:
        sets = [argument for value in values for argument in ("--set", value)]
        self.cluster.helm(
            *("upgrade", "--install", "voicepool", str(CHART), "--namespace", self.namespace, "--take-ownership"),
            *("--create-namespace", "--set", "livekit.url=ws://192.0.2.1:7880", "--set", "livekit.apiKey=devkey"),
            *("--set", "livekit.apiSecret=canary-livekit-secret-0123456789abcdef", *sets),
        )

    def remove(self) -> None:
        self.cluster.helm("uninstall", "voicepool", "--namespace", self.namespace, "--ignore-not-found")
        self.cluster.kubectl("delete", "namespace", self.namespace, "--wait=false", "--ignore-not-found")

    def secret(self, name: str) -> dict[str, bytes]:
        output = self.cluster.kubectl("get", "secret", name, "--namespace", self.namespace, "--output", "json")
        return {key: base64.b64decode(value) for key, value in json.loads(output)["data"].items()}

    def folder(self, name: str, under: Path) -> Path:
        """A Secret as the kubelet would mount it."""
        made = under / name
        made.mkdir()
        for key, value in self.secret(name).items():
            (made / key).write_bytes(value)
        return made

    def kubeconfig(self, account: str, under: Path) -> Path:
        """Speaks as one of the chart's accounts."""
        token = self.cluster.kubectl("create", "token", account, "--namespace", self.namespace).strip()
        config = yaml.safe_load(self.cluster.kubeconfig.read_text())
        for user in config["users"]:
            user["user"] = {"token": token}
        made = under / f"{account}.kubeconfig"
        made.write_text(yaml.safe_dump(config))
        return made

    def writes(self, account: str) -> list[str]:
        """What an account has written, by the audit log."""
        user = f"system:serviceaccount:{self.namespace}:{account}"
        events = [json.loads(line) for line in self.cluster.audit_log.read_text().splitlines()]
        return [
            f"{event['verb']} {event['requestURI']}"
            for event in events
            if event["user"]["username"] == user and event["verb"] not in ("get", "list", "watch")
        ]

    def endpoint(self, service: str, port_name: str, pod: str, port: int) -> None:
        """Have a Service lead here, as the endpoints controller does for a pod that runs."""
        self.cluster.apply(
            json.dumps(
                {
                    "apiVersion": "discovery.k8s.io/v1",
                    "kind": "EndpointSlice",
                    "metadata": {
                        "name": f"{service}-{pod}",
                        "namespace": self.namespace,
                        "labels": {"kubernetes.io/service-name": service},
                    },
                    "addressType": "IPv4",
                    "ports": [{"name": port_name, "port": port}],
                    "endpoints": [
                        {
                            "addresses": [machine_address()],
                            "conditions": {"ready": True},
                            "targetRef": {"kind": "Pod", "name": pod, "namespace": self.namespace},
                        }
                    ],
                }
            )
        )


class Gateway:
    """A gateway's process."""

    def __init__(self, name: str, release: Release, key: str, process: asyncio.subprocess.Process, port: int) -> None:
        self.name, self.release, self.process, self.port = name, release, process, port
        self.headers = {"Authorization": f"Bearer {key}"}
        self.http = aiohttp.ClientSession(f"http://127.0.0.1:{port}")

    async def ready(self) -> bool:
        with contextlib.suppress(aiohttp.ClientError):
            async with self.http.get("/readyz") as answer:
                return answer.status == 200
        return False

    async def start(self, namespace: str, pool: str) -> int:
        async with self.http.post(f"/v1/public/{namespace}.{pool}/start", headers=self.headers) as answer:
            return answer.status

    async def knows(self, namespace: str, pool: str) -> bool:
        """Whether it has seen the pool."""
        path = f"/metrics/v1/namespaces/{namespace}/pools/{pool}"
        async with self.http.get(path, headers=self.headers) as answer:
            return answer.status == 200

    async def metrics(self, namespace: str, pool: str) -> Json:
        path = f"/metrics/v1/namespaces/{namespace}/pools/{pool}"
        async with self.http.get(path, headers=self.headers) as answer:
            assert answer.status == 200, await answer.text()
            found: Json = await answer.json()
            return found

    async def close(self) -> None:
        await self.http.close()
        if self.process.returncode is None:
            self.process.terminate()
        await self.process.wait()


@pytest.fixture(scope="module")
def release(control_plane: Cluster) -> Iterator[Release]:
    made = Release(control_plane)
    try:
        made.upgrade("customMetrics.enabled=true")
        yield made
    finally:
        made.remove()


@pytest.fixture
async def gateways(release: Release, namespace: str, tmp_path: Path) -> AsyncIterator[list[Gateway]]:
    settings = {
        "VOICEPOOL_NAMESPACE": namespace,
        "VOICEPOOL_KUBECONFIG": str(release.kubeconfig("voicepool-gateway", tmp_path)),
        "VOICEPOOL_ASSIGNMENT_PRIVATE_KEY_FILE": str(release.folder("voicepool-assignment", tmp_path) / "private.pem"),
        "VOICEPOOL_API_KEYS_FOLDER": str(release.folder("voicepool-api-keys", tmp_path)),
        "VOICEPOOL_LIVEKIT_FOLDER": str(release.folder("voicepool-livekit", tmp_path)),
        "VOICEPOOL_CUSTOM_METRICS_FOLDER": str(release.folder("voicepool-custom-metrics", tmp_path)),
        "VOICEPOOL_PEERS_SERVICE": "voicepool-gateway",
        "VOICEPOOL_PEERS_NAMESPACE": release.namespace,
    }
    key = release.secret("voicepool-first-api-key")["api-key"].decode()
    started: list[Gateway] = []
    try:
        for name in GATEWAYS:
            port, metrics_port = free_port(), free_port()
            own = {
                "HOSTNAME": name,
                "VOICEPOOL_LISTEN_PORT": str(port),
                "VOICEPOOL_CUSTOM_METRICS_PORT": str(metrics_port),
            }
            with (tmp_path / f"{name}.log").open("wb") as log:
                process = await asyncio.create_subprocess_exec(
                    *(sys.executable, "-m", "voicepool.main", "gateway"),
                    env={**os.environ, **settings, **own},
                    stdout=log,
                    stderr=log,
                )
            started.append(Gateway(name, release, key, process, port))
            release.endpoint("voicepool-gateway", "http", name, port)
            if name == GATEWAYS[0]:
                release.endpoint("voicepool-custom-metrics", "https", name, metrics_port)
        for gateway in started:
            await until(gateway.ready)
        name = f"{API_VERSION}.{API_GROUP}"
        await asyncio.to_thread(
            release.cluster.kubectl, "wait", "--for=condition=Available", f"apiservice/{name}", "--timeout=60s"
        )
        yield started
    finally:
        for gateway in started:
            await gateway.close()


class Autoscaler:
    """A HorizontalPodAutoscaler as docs/operations.md shows it, and what it does."""

    def __init__(self, cluster: Cluster, operator: Operator) -> None:
        self.cluster, self.operator = cluster, operator

    def apply(self, pool: str = "demo") -> None:
        [document] = [item for item in documents(OPERATIONS) if item.get("kind") == "HorizontalPodAutoscaler"]
        document["metadata"] |= {"name": pool, "namespace": self.operator.namespace}
        spec = document["spec"]
        for target in (spec["scaleTargetRef"], spec["metrics"][0]["object"]["describedObject"]):
            target["name"] = pool
        spec["behavior"]["scaleDown"]["stabilizationWindowSeconds"] = 0
        self.cluster.apply(json.dumps(document))

    async def replicas(self, pool: str = "demo") -> int:
        return int((await self.operator.api.get(POOLS, self.operator.namespace, pool))["spec"]["replicas"])

    async def wait_for(self, fits: Callable[[int], bool]) -> int:
        async def there() -> bool:
            return fits(await self.replicas())

        try:
            await until(there)
        except AssertionError as error:
            told = self.cluster.kubectl("describe", "hpa", "--namespace", self.operator.namespace)
            raise AssertionError(f"spec.replicas is {await self.replicas()}\n{told}") from error
        return await self.replicas()


@pytest.fixture
def autoscaler(control_plane: Cluster, operator: Operator) -> Autoscaler:
    return Autoscaler(control_plane, operator)


async def test_an_autoscaler_follows_the_calls_up_and_down_and_ends_none(
    gateways: list[Gateway], operator: Operator, autoscaler: Autoscaler
) -> None:
    await operator.apply(replicas=3, headroom={"percentage": 200})
    names = await operator.fill(3)
    for name in names:
        await operator.bind(name, f"session-{name[-1]}")
    autoscaler.apply()
    # Two warm pods for each call: the starts of the last minute ask for less.
    await autoscaler.wait_for(lambda replicas: replicas == 6)
    await operator.wait_for_unbound(6)
    metrics = await gateways[1].metrics(operator.namespace, "demo")
    assert (metrics["recommendedReplicas"], metrics["bound"]) == (6, 3)
    for name in names[1:]:
        await operator.end(name)
    few = await autoscaler.wait_for(lambda replicas: replicas < 6)
    await operator.wait_for_unbound(few)
    calls = [pod for pod in (await operator.pods()).values() if pod.session]
    assert sorted(pod.name for pod in calls) == names
    assert [pod.name for pod in calls if not pod.finished and not pod.deleting] == names[:1]


async def test_callers_who_wait_at_any_gateway_are_seen_by_the_autoscaler(
    release: Release, gateways: list[Gateway], operator: Operator, autoscaler: Autoscaler
) -> None:
    await operator.apply(replicas=1, maxPods=4, headroom={}, onEmpty={"policy": "Queue", "timeoutSeconds": 300})
    await operator.wait_for_unbound(1)
    autoscaler.apply()
    # The API server asks the first gateway alone; two of three wait at the second.
    callers = [
        asyncio.create_task(gateway.start(operator.namespace, "demo"))
        for gateway in (gateways[0], gateways[1], gateways[1])
    ]

    async def all_wait() -> bool:
        return bool((await gateways[0].metrics(operator.namespace, "demo"))["waiting"] == len(callers))

    try:
        await until(all_wait)
        metrics = await gateways[0].metrics(operator.namespace, "demo")
        assert metrics["gateways"] == {"known": 2, "answered": 2}
        # Three starts in a minute, ten seconds for a pod to become warm: three more come in that time once in 600 times. That is more than
        # maxPods has room for: demand does not end where the pool does.
        assert metrics["recommendedReplicas"] == 3 + 3
        await autoscaler.wait_for(lambda replicas: replicas == 6)
        assert not [caller for caller in callers if caller.done()]
        assert release.writes("voicepool-gateway") == []
    finally:
        for caller in callers:
            caller.cancel()
        await asyncio.gather(*callers, return_exceptions=True)


async def test_who_has_no_right_to_the_metric_is_refused_by_the_api_server(
    gateways: list[Gateway], control_plane: Cluster, operator: Operator
) -> None:
    await operator.apply(headroom={"schedules": [{"cron": "* * * * *", "warmPods": 2}]})
    path = f"/apis/{API_GROUP}/{API_VERSION}/namespaces/{operator.namespace}/{RESOURCE}/demo/{METRIC}"

    async def known() -> bool:
        return await gateways[0].knows(operator.namespace, "demo") and bool(
            (await gateways[0].metrics(operator.namespace, "demo"))["recommendedReplicas"]
        )

    await until(known)
    controller = "--as=system:serviceaccount:kube-system:horizontal-pod-autoscaler"
    found = json.loads(await asyncio.to_thread(control_plane.kubectl, "get", "--raw", path, controller))
    assert [item["value"] for item in found["items"]] == ["2"]
    with pytest.raises(ClusterError) as caught:
        await asyncio.to_thread(
            control_plane.kubectl, "get", "--raw", path, f"--as=system:serviceaccount:{operator.namespace}:default"
        )
    assert "forbidden" in caught.value.detail.lower()


def foreign(version: str) -> str:
    return json.dumps(
        {
            "apiVersion": "apiregistration.k8s.io/v1",
            "kind": "APIService",
            "metadata": {"name": f"{version}.{API_GROUP}"},
            "spec": {
                "group": API_GROUP,
                "version": version,
                "groupPriorityMinimum": 100,
                "versionPriority": 100,
                "insecureSkipTLSVerify": True,
                "service": {"name": "adapter", "namespace": "monitoring"},
            },
        }
    )


@pytest.mark.parametrize("version", ["v1beta1", "v1beta2"])
def test_the_chart_does_not_take_the_place_of_another_server(release: Release, version: str) -> None:
    release.upgrade()
    release.cluster.apply(foreign(version))
    try:
        with pytest.raises(ClusterError) as caught:
            release.upgrade("customMetrics.enabled=true")
        assert "the Service monitoring/adapter serves custom.metrics.k8s.io here already" in caught.value.detail
        assert f"APIService {version}.{API_GROUP}" in caught.value.detail
        release.upgrade()
    finally:
        release.cluster.kubectl("delete", "apiservice", f"{version}.{API_GROUP}")
        release.upgrade("customMetrics.enabled=true")


def test_an_upgrade_keeps_the_certificate_and_what_is_switched_off_is_gone(release: Release) -> None:
    before = release.secret("voicepool-custom-metrics")
    release.upgrade("customMetrics.enabled=true")
    assert release.secret("voicepool-custom-metrics") == before
    release.upgrade()
    try:
        assert API_GROUP not in release.cluster.kubectl("get", "apiservices", "--output", "name")
    finally:
        release.upgrade("customMetrics.enabled=true")
