"""A whole voicepool in a cluster, as a user would install it: a LiveKit server, our chart, pools; and sessions over HTTP.

Shared by the demo and by the tests. Invariants: installing twice changes nothing; keys are made once per cluster, stay in Secrets, and are in no
command line, no output and no annotation; every wait has a deadline, and its error says what was waited for and what to do.
"""

from __future__ import annotations

import base64
import hashlib
import json
import secrets
import socket
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import httpx2
import yaml
import yarl
from tests.cluster.errors import ClusterError
from tests.cluster.images import IMAGES, LIVEKIT
from tests.cluster.progress import Progress
from tests.cluster.tool import Cluster

from voicepool.client import AsyncVoicepool, Refused, VoicepoolError
from voicepool.session_api import SessionRecord

Json = dict[str, Any]

ROOT = Path(__file__).parents[2]
MANIFESTS = Path(__file__).parent / "manifests"
RELEASE = "voicepool"
NAMESPACE = "voicepool"
LIVEKIT_NAMESPACE = "livekit"
LIVEKIT_SECRET = "livekit-server"
LIVEKIT_PORT = 7880
GATEWAY_PORT = 30080
"""Of the node."""
GATEWAY_POD_PORT = 8080
API_KEY_SECRET = f"{RELEASE}-first-api-key"

OPERATOR_IMAGE = IMAGES["operator"].name
AGENT_IMAGE = IMAGES["agent"].name
KEYLESS_IMAGE = IMAGES["keyless"].name
LIVEKIT_IMAGE = LIVEKIT

_LOAD_SECONDS = {OPERATOR_IMAGE: 9.0, AGENT_IMAGE: 15.0, KEYLESS_IMAGE: 28.0, LIVEKIT_IMAGE: 2.0}
_GATEWAY_DEADLINE_SECONDS = 30.0
_KEY_DEADLINE_SECONDS = 120.0


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of a start: a session, or a refusal.

    Attributes:
        status: of HTTP.
        requested: when the request was sent, on the caller's clock.
        requested_at: the same moment on the wall clock, to lay beside what the cluster has written down.
        seconds: how long the answer took.
        code: which error; empty where there is none.
        words: what the error says.
    """

    status: int
    requested: float
    requested_at: float
    seconds: float
    session_id: str = ""
    url: str = ""
    room: str = ""
    token: str = field(default="", repr=False)
    cold_start: bool = False
    code: str = ""
    words: str = ""
    retry_after_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class Deployment:
    """An installed voicepool.

    Attributes:
        cluster: where it is.
        gateway_url: the session API.
        api_key: for it.
    """

    cluster: Cluster
    gateway_url: str
    api_key: str = field(repr=False)

    async def start(self, pool: str, *, body: object = None, timeout_seconds: float = 60) -> Answer:
        """Ask for a session, as any caller's program does.

        Args:
            pool: a pool of the gateway's default namespace.
            body: given to the bot.
            timeout_seconds: for the whole request.

        Raises:
            ClusterError: no answer came, or none that can be understood.
        """
        async with self.client() as voicepool:
            requested, requested_at = time.monotonic(), time.time()
            try:
                session = await voicepool.start(pool, body=body or {}, timeout_seconds=timeout_seconds)
            except Refused as error:
                return Answer(
                    error.status,
                    requested,
                    requested_at,
                    time.monotonic() - requested,
                    code=error.code,
                    words=error.detail,
                    retry_after_seconds=error.retry_after_seconds,
                )
            except VoicepoolError as error:
                raise ClusterError(
                    str(error),
                    f"see what the gateways say: kubectl logs --namespace {NAMESPACE} "
                    "--selector app.kubernetes.io/component=gateway",
                ) from None
            return Answer(
                200,
                requested,
                requested_at,
                time.monotonic() - requested,
                session_id=session.session_id,
                url=session.url,
                room=session.room_name,
                token=session.token,
                cold_start=session.cold_start,
            )

    async def ask(
        self, path: str, *, method: str = "GET", body: object = None, api_key: str | None = None
    ) -> tuple[int, Json]:
        """Ask a path of the gateway, which goes out as it stands; status and JSON."""
        url = yarl.URL(self.gateway_url + path, encoded=True)
        headers = {"Authorization": f"Bearer {self.api_key if api_key is None else api_key}"}
        async with (
            aiohttp.ClientSession() as http,
            http.request(method, url, headers=headers, json=body) as response,
        ):
            return response.status, await response.json()

    async def session(self, pool: str, session_id: str) -> SessionRecord:
        """What the gateway knows of a session. Raises VoicepoolError."""
        async with self.client() as voicepool:
            return await voicepool.session(pool, session_id)

    @asynccontextmanager
    async def client(self) -> AsyncIterator[AsyncVoicepool]:
        """The session API as any caller's program has it. A refusal is told as it comes."""
        # Nothing here is encrypted, and to read the certificates of a machine takes longer than a start.
        async with (
            httpx2.AsyncClient(verify=False) as http,
            AsyncVoicepool(self.gateway_url, api_key=self.api_key, retry=False, http_client=http) as voicepool,
        ):
            yield voicepool

    def apply_pool(self, manifest: str | Json) -> str:
        """Apply a VoiceAgentPool and give its name.

        Raises:
            ClusterError: the API server refuses it.
        """
        pool = yaml.safe_load(manifest) if isinstance(manifest, str) else manifest
        self.cluster.apply(json.dumps(pool))
        return str(pool["metadata"]["name"])

    def wait_until_ready(self, pool: str, deadline_seconds: float = 180) -> None:
        """Wait for the pool's condition Ready.

        Raises:
            ClusterError: it is not in time; with the conditions, which say why.
        """
        try:
            self.cluster.kubectl(
                *("wait", "--for=condition=Ready", f"vpool/{pool}", f"--timeout={deadline_seconds:g}s"),
                deadline_seconds=deadline_seconds + 10,
            )
        except ClusterError:
            conditions = {}
            with suppress(ClusterError):
                conditions = self.conditions(pool)
            said = [
                f"{kind}={one['status']} {one['reason']}: {one['message']}" for kind, one in sorted(conditions.items())
            ]
            raise ClusterError(
                f"the pool {pool} is not Ready after {deadline_seconds:g} s",
                f"read its conditions above, or: kubectl describe vpool {pool}; kubectl get pods",
                "\n".join(said) or "it has no conditions yet: does the operator run?",
            ) from None

    def conditions(self, pool: str) -> dict[str, Json]:
        """The pool's conditions by type. Raises ClusterError."""
        status = self.get("vpool", pool).get("status") or {}
        return {one["type"]: one for one in status.get("conditions") or ()}

    def get(self, kind: str, name: str) -> Json:
        """One object of the namespace default. Raises ClusterError."""
        found: Json = json.loads(self.cluster.kubectl("get", kind, name, "--output", "json"))
        return found

    def pods(self, selector: str, namespace: str = "default") -> list[Json]:
        """Pods by label. Raises ClusterError."""
        output = self.cluster.kubectl(
            "get", "pods", "--namespace", namespace, "--selector", selector, "--output", "json"
        )
        found: list[Json] = json.loads(output)["items"]
        return found

    def pods_of(self, pool: str) -> list[Json]:
        """All pods of a pool. Raises ClusterError."""
        return self.pods(f"voicepool.dev/pool={pool}")

    def pod_of_session(self, session_id: str) -> Json:
        """The pod that carries a session. Raises ClusterError."""
        found = self.pods(f"voicepool.dev/session={session_id}")
        if len(found) != 1:
            raise ClusterError(
                f"{len(found)} pods carry the session {session_id}; there must be one", "kubectl get pods --show-labels"
            )
        return found[0]


@dataclass(frozen=True, slots=True)
class Key:
    """An API key that is good for some pools only."""

    name: str
    value: str = field(repr=False)


def add_key(deployment: Deployment, name: str, pools: str) -> Key:
    """Add an API key to those of the gateways, as the chart's notes say; returns when each of them knows it.

    Args:
        deployment: an installed voicepool.
        name: of the key.
        pools: for which it is, as `<namespace>/<pool>,...`.

    Raises:
        ClusterError: they do not in time.
    """
    kubectl, where = deployment.cluster.kubectl, ("--namespace", NAMESPACE)
    value = secrets.token_urlsafe(24)
    entry = f"sha256:{hashlib.sha256(value.encode()).hexdigest()} pools={pools}"
    patch = {"data": {name: base64.b64encode(entry.encode()).decode()}}
    kubectl("patch", "secret", f"{RELEASE}-api-keys", *where, "--type=merge", f"--patch={json.dumps(patch)}")
    gateways = deployment.pods("app.kubernetes.io/component=gateway", NAMESPACE)
    # The kubelet brings a Secret up to date when it looks at a pod, which it does about once a minute, and when the pod has changed.
    names = [pod["metadata"]["name"] for pod in gateways]
    kubectl("annotate", "pods", *names, *where, "--overwrite", f"voicepool.test/keys={name}-{secrets.token_hex(4)}")
    deadline = time.monotonic() + _KEY_DEADLINE_SECONDS
    for pod in gateways:
        url = f"http://{pod['status']['podIP']}:{GATEWAY_POD_PORT}/v1/organizations/default/services"
        while not _lets_in(url, value):
            if time.monotonic() > deadline:
                raise ClusterError(
                    f"{pod['metadata']['name']} does not know the API key {name} after {_KEY_DEADLINE_SECONDS:g} s",
                    f"see the Secret {RELEASE}-api-keys, and what the gateway says: kubectl logs --namespace {NAMESPACE}",
                )
            time.sleep(0.2)
    return Key(name, value)


def remove_key(deployment: Deployment, key: Key) -> None:
    """Take an API key away again. Raises ClusterError."""
    patch = {"data": {key.name: None}}
    where = ("--namespace", NAMESPACE)
    deployment.cluster.kubectl(
        "patch", "secret", f"{RELEASE}-api-keys", *where, "--type=merge", f"--patch={json.dumps(patch)}"
    )


def _lets_in(url: str, key: str) -> bool:
    request = urllib.request.Request(url, headers={"X-API-Key": key})  # noqa: S310 - an http:// address of ours
    try:
        with urllib.request.urlopen(request, timeout=2) as response:  # noqa: S310
            return bool(response.status == 200)
    except OSError:
        return False


def load(cluster: Cluster, progress: Progress, images: Iterable[str]) -> set[str]:
    """Give images to the cluster's node; returns those that it did not have. Raises ClusterError."""
    changed = set()
    for image in images:
        with progress.step(f"loading {image}", _LOAD_SECONDS[image]):
            if cluster.load_image(image):
                changed.add(image)
    return changed


def install(cluster: Cluster, progress: Progress, changed: Iterable[str] = ()) -> Deployment:
    """Install LiveKit and our chart, or bring them up to date.

    Args:
        cluster: it runs and has the images.
        progress: told about each step.
        changed: images whose content the node has only now; what runs from an older one under the same name is restarted.

    Raises:
        ClusterError: with what the failing part says.
    """
    with progress.step("installing the LiveKit server", 3):
        _install_livekit(cluster, restart=LIVEKIT_IMAGE in set(changed))
    with progress.step(f"helm upgrade --install {RELEASE}", 6):
        _install_chart(cluster, restart=OPERATOR_IMAGE in set(changed))
    api_key = next(iter(secret_values(cluster, API_KEY_SECRET, NAMESPACE).values()), "")
    if not api_key:
        raise ClusterError(
            f"the chart made no API key: the Secret {NAMESPACE}/{API_KEY_SECRET} is not there or empty",
            f"see `helm get notes {RELEASE} --namespace {NAMESPACE}`",
        )
    gateway_url = f"http://{cluster.node_address}:{GATEWAY_PORT}"
    _wait_for_gateway(gateway_url)
    return Deployment(cluster, gateway_url, api_key)


def find(cluster: Cluster) -> Deployment:
    """What an earlier `install` has made. Raises ClusterError where there is nothing."""
    values = secret_values(cluster, API_KEY_SECRET, NAMESPACE)
    if not values:
        raise ClusterError(f"voicepool is not installed in the cluster {cluster.name!r}", "make demo")
    return Deployment(cluster, f"http://{cluster.node_address}:{GATEWAY_PORT}", next(iter(values.values())))


def livekit_url(cluster: Cluster) -> str:
    """Where callers and agents find the LiveKit server."""
    return f"ws://{cluster.node_address}:{LIVEKIT_PORT}"


def own_address(cluster: Cluster) -> str:
    """The address of this machine at which pods reach it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as route:
        route.connect((cluster.node_address, LIVEKIT_PORT))  # sends nothing
        return str(route.getsockname()[0])


def livekit_key(cluster: Cluster) -> str:
    """The LiveKit server's own key. Raises ClusterError."""
    return secret_values(cluster, LIVEKIT_SECRET, LIVEKIT_NAMESPACE)["api-key"]


def livekit_secret(cluster: Cluster) -> str:
    """The LiveKit server's own secret. Raises ClusterError."""
    return secret_values(cluster, LIVEKIT_SECRET, LIVEKIT_NAMESPACE)["api-secret"]


def _install_livekit(cluster: Cluster, *, restart: bool) -> None:
    namespace, deployment = yaml.safe_load_all((MANIFESTS / "livekit.yaml").read_text())
    cluster.apply(json.dumps(namespace))
    made = secret_values(cluster, LIVEKIT_SECRET, LIVEKIT_NAMESPACE)
    if made and "webhook" not in json.loads(made["livekit.yaml"]):
        # A cluster from before LiveKit told the gateway of its rooms.
        cluster.kubectl("delete", "secret", LIVEKIT_SECRET, "--namespace", LIVEKIT_NAMESPACE)
        made, restart = {}, True
    if not made:
        _make_livekit_secret(cluster)
    cluster.apply(json.dumps(deployment))
    where = ("deployment/livekit", "--namespace", LIVEKIT_NAMESPACE)
    if restart:
        cluster.kubectl("rollout", "restart", *where)
    try:
        cluster.kubectl("rollout", "status", *where, "--timeout=60s")
    except ClusterError as error:
        raise ClusterError(
            "the LiveKit server is not Ready after 60 s",
            "read the lines above; often another program has one of its ports (7880 to 7882) on the node",
            f"{error.detail}\n{state_of(cluster, LIVEKIT_NAMESPACE)}",
        ) from None


def _make_livekit_secret(cluster: Cluster) -> None:
    # `create` and not `apply`, which would repeat the values in an annotation; files, since a command line can be read by all.
    key, secret = f"key-{secrets.token_hex(8)}", secrets.token_urlsafe(36)
    configuration = {
        "port": LIVEKIT_PORT,
        "keys": {key: secret},
        "rtc": {
            "tcp_port": 7881,
            "udp_port": 7882,
            "use_external_ip": False,
            # On the node each pod has an interface, and all of these have one address: listening on them fails from the second on.
            "ips": {"includes": [f"{cluster.node_address}/32"]},
        },
        "webhook": {
            "api_key": key,
            "urls": [f"http://{cluster.node_address}:{GATEWAY_PORT}/livekit/webhook"],
        },
        "logging": {"level": "info", "json": True},
    }
    values = {"api-key": key, "api-secret": secret, "livekit.yaml": json.dumps(configuration)}
    with tempfile.TemporaryDirectory(prefix="voicepool-") as folder:
        for name, value in values.items():
            Path(folder, name).write_text(value)
        cluster.kubectl(
            "create", "secret", "generic", LIVEKIT_SECRET, "--namespace", LIVEKIT_NAMESPACE, f"--from-file={folder}"
        )


def _install_chart(cluster: Cluster, *, restart: bool) -> None:
    livekit = secret_values(cluster, LIVEKIT_SECRET, LIVEKIT_NAMESPACE)
    repository, _, tag = OPERATOR_IMAGE.rpartition(":")
    values = {
        "image": {"repository": repository, "tag": tag},
        "livekit": {
            "url": livekit_url(cluster),
            "apiKey": livekit["api-key"],
            "apiSecret": livekit["api-secret"],
        },
        "gateway": {"service": {"type": "NodePort", "nodePort": GATEWAY_PORT}, "webClient": True},
    }
    existed = bool(cluster.helm("list", "--namespace", NAMESPACE, "--filter", f"^{RELEASE}$", "--short").strip())
    with tempfile.TemporaryDirectory(prefix="voicepool-") as folder:
        file = Path(folder, "values.json")
        file.write_text(json.dumps(values))
        try:
            cluster.helm(
                *("upgrade", "--install", RELEASE, str(ROOT / "helm" / "voicepool")),
                *("--namespace", NAMESPACE, "--create-namespace", "--values", str(file), "--wait", "--timeout", "120s"),
            )
        except ClusterError as error:
            raise ClusterError(
                "helm could not install the chart helm/voicepool",
                f"read the lines above; the processes' own words: kubectl logs --namespace {NAMESPACE} --all-pods",
                f"{error.detail}\n{state_of(cluster, NAMESPACE)}",
            ) from None
    if restart and existed:
        # The image changed under the same name, which no Deployment notices.
        cluster.kubectl("rollout", "restart", "deployment", "--namespace", NAMESPACE)
        cluster.kubectl("rollout", "status", "deployment", "--namespace", NAMESPACE, "--timeout=120s")


def _wait_for_gateway(url: str) -> None:
    """Through the node's port, which the node opens a moment after the pods are Ready."""
    deadline = time.monotonic() + _GATEWAY_DEADLINE_SECONDS
    last = ""
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"{url}/readyz", timeout=2) as response:  # noqa: S310 - an http:// address of ours
                if response.status == 200:
                    return
        except (OSError, urllib.error.URLError) as error:
            last = str(error)
        time.sleep(0.1)
    raise ClusterError(
        f"waited {_GATEWAY_DEADLINE_SECONDS:g} s for the gateway to answer at {url}/readyz",
        f"kubectl get service,pods --namespace {NAMESPACE}",
        last,
    )


def secret_values(cluster: Cluster, name: str, namespace: str) -> dict[str, str]:
    """The values of a Secret; empty where there is none."""
    output = cluster.kubectl("get", "secret", name, "--namespace", namespace, "--ignore-not-found", "--output", "json")
    data: Mapping[str, str] = (json.loads(output).get("data") or {}) if output.strip() else {}
    return {key: base64.b64decode(value).decode() for key, value in data.items()}


def state_of(cluster: Cluster, namespace: str) -> str:
    """The pods of a namespace and the last lines of each, for an error."""
    lines = []
    with suppress(ClusterError):
        lines.append(cluster.kubectl("get", "pods", "--namespace", namespace))
        for name in cluster.kubectl("get", "pods", "--namespace", namespace, "--output", "name").split():
            with suppress(ClusterError):
                lines.append(f"{name}:\n{cluster.kubectl('logs', name, '--namespace', namespace, '--tail=5')}")
    return "\n".join(lines)
