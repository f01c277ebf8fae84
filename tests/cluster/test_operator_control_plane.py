"""The operator process and the CustomResourceDefinition on a real API server. The tests play the kubelet: they write the pods' status."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import sys
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from tests.cluster.errors import ClusterError
from tests.cluster.tool import Cluster
from tests.ports import free_port
from voicepool.binding import active_deadline_seconds, bind_patch
from voicepool.kube.api import (
    BUDGETS,
    PODS,
    POOLS,
    Json,
    KubeApiError,
    NotFound,
    Resource,
    TooManyRequests,
    Unprocessable,
)
from voicepool.kube.client import AiohttpKubeApi, load_connection
from voicepool.kube.convert import pod_from_json
from voicepool.model import LABEL_STATE, PodFact

pytestmark = pytest.mark.control_plane

CRDS = Path(__file__).parents[2] / "crds"
WAIT_SECONDS = 30.0
ACCOUNTS = Resource("", "v1", "serviceaccounts")


@pytest.fixture
def namespace(control_plane: Cluster) -> Iterator[str]:
    control_plane.kubectl("apply", "--filename", str(CRDS))
    control_plane.kubectl("wait", "--for=condition=Established", "crd/voiceagentpools.voicepool.dev", "--timeout=30s")
    name = f"calls-{uuid.uuid4().hex[:8]}"
    control_plane.kubectl("create", "namespace", name)
    yield name
    control_plane.kubectl("delete", "namespace", name, "--wait=false")


@pytest.fixture
async def api(control_plane: Cluster) -> AsyncIterator[AiohttpKubeApi]:
    async with AiohttpKubeApi.connect(load_connection(control_plane.kubeconfig)) as client:
        yield client


def manifest(namespace: str, name: str = "demo", container: str = "agent", **spec: Any) -> Json:
    template = {"spec": {"containers": [{"name": container, "image": "localhost/agent:1"}]}}
    return {
        "apiVersion": "voicepool.dev/v1alpha1",
        "kind": "VoiceAgentPool",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {"template": template, **spec},
    }


class Operator:
    """The operator's process, and what its pods look like from outside."""

    def __init__(
        self,
        control_plane: Cluster,
        api: AiohttpKubeApi,
        namespace: str,
        folder: Path,
        settings: Mapping[str, str] | None = None,
    ) -> None:
        folder.mkdir(exist_ok=True)
        self.api = api
        self.namespace = namespace
        self.port = free_port()
        public = Ed25519PrivateKey.generate().public_key()
        self._key = folder / "public.pem"
        self._key.write_bytes(public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
        self._control_plane = control_plane
        self._log = (folder / "operator.log").open("ab")
        self.process: asyncio.subprocess.Process | None = None
        self._settings = settings or {}

    async def start(self) -> None:
        environment = {
            **os.environ,
            "VOICEPOOL_KUBECONFIG": str(self._control_plane.kubeconfig),
            "VOICEPOOL_NAMESPACE": self.namespace,
            "VOICEPOOL_ASSIGNMENT_PUBLIC_KEY_FILE": str(self._key),
            "VOICEPOOL_HEALTH_HOST": "127.0.0.1",
            "VOICEPOOL_HEALTH_PORT": str(self.port),
            **self._settings,
        }
        self.process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "voicepool.main", "operator", env=environment, stdout=self._log, stderr=self._log
        )
        await until(self.ready)

    async def ready(self) -> bool:
        return await self.fetch("/readyz") is not None

    async def fetch(self, path: str) -> str | None:
        try:
            async with aiohttp.ClientSession() as session, session.get(f"http://127.0.0.1:{self.port}{path}") as answer:
                return await answer.text() if answer.status == 200 else None
        except aiohttp.ClientError:
            return None

    async def stop(self, how: signal.Signals = signal.SIGTERM) -> int:
        if self.process is None:
            return 0
        if self.process.returncode is None:
            self.process.send_signal(how)
        return await self.process.wait()

    async def close(self) -> None:
        await self.stop(signal.SIGKILL)
        self._log.close()

    # What a user does.

    async def apply(self, name: str = "demo", **spec: Any) -> None:
        await self.api.create(POOLS, self.namespace, manifest(self.namespace, name, **spec))

    async def patch(self, name: str = "demo", **spec: Any) -> None:
        await self.api.merge_patch(POOLS, self.namespace, name, {"spec": spec})

    # What the kubelet does.

    async def set_status(self, name: str, **status: Any) -> None:
        await self.api.merge_patch(PODS, self.namespace, name, {"status": status}, subresource="status")

    async def become_warm(self, *names: str) -> None:
        for name in names:
            agent = {
                "name": "agent",
                "ready": True,
                "restartCount": 0,
                "image": "localhost/agent:1",
                "imageID": "",
                "state": {"running": {"startedAt": moment()}},
            }
            await self.set_status(
                name,
                phase="Running",
                podIP="10.1.2.3",
                startTime=moment(),
                containerStatuses=[agent],
                conditions=[{"type": "Ready", "status": "True", "lastTransitionTime": moment()}],
            )

    async def end(self, name: str, exit_code: int = 0, message: str = "") -> None:
        agent = {
            "name": "agent",
            "ready": False,
            "restartCount": 0,
            "image": "localhost/agent:1",
            "imageID": "",
            "state": {"terminated": {"exitCode": exit_code, "message": message, "finishedAt": moment()}},
        }
        await self.set_status(name, phase="Failed" if exit_code else "Succeeded", containerStatuses=[agent])

    # What a drain does.

    async def evict(self, name: str) -> str:
        """Ask for an eviction; returns what the API server says against it."""
        eviction = {
            "apiVersion": "policy/v1",
            "kind": "Eviction",
            "metadata": {"name": name, "namespace": self.namespace},
        }
        path = f"/api/v1/namespaces/{self.namespace}/pods/{name}/eviction"
        file = self._key.with_name("eviction.json")
        file.write_text(json.dumps(eviction))
        try:
            await asyncio.to_thread(self._control_plane.kubectl, "create", "--raw", path, "--filename", str(file))
        except ClusterError as error:
            return f"{error} {error.detail}"
        return ""

    # What the gateway does.

    async def bind(self, name: str, session: str, drain_seconds: int = 0) -> Json:
        pod = pod_from_json(await self.api.get(PODS, self.namespace, name))
        assert pod is not None
        now = datetime.now(UTC)
        patch = bind_patch(
            pod,
            session_id=session,
            room=session,
            bound_at=now,
            bound_by="test",
            active_deadline_seconds=active_deadline_seconds(pod, 60, now),
            drain_seconds=drain_seconds,
        )
        return await self.api.json_patch(PODS, self.namespace, name, patch)

    # What can be seen.

    async def pods(self) -> dict[str, PodFact]:
        page = await self.api.list_page(PODS, self.namespace)
        facts = [pod_from_json(item) for item in page["items"]]
        return {fact.name: fact for fact in facts if fact is not None}

    async def unbound(self) -> list[str]:
        return sorted(pod.name for pod in unbound_of(await self.pods()))

    async def status(self, name: str = "demo") -> Json:
        return dict((await self.api.get(POOLS, self.namespace, name)).get("status") or {})

    async def condition(self, kind: str, name: str = "demo") -> Json:
        found = [entry for entry in (await self.status(name)).get("conditions", []) if entry["type"] == kind]
        return found[0] if found else {}

    async def wait_for_unbound(self, count: int) -> list[str]:
        async def there() -> bool:
            return len(await self.unbound()) == count

        await until(there)
        return await self.unbound()

    async def wait_for_condition(self, kind: str, status: str, reason: str | None = None) -> Json:
        async def there() -> bool:
            found = await self.condition(kind)
            return found.get("status") == status and reason in (None, found.get("reason"))

        await until(there)
        return await self.condition(kind)

    async def fill(self, count: int) -> list[str]:
        """Wait for that many pods, and make all of them warm."""
        names = await self.wait_for_unbound(count)
        await self.become_warm(*names)
        await self.wait_for_condition("WarmTargetMet", "True")
        return names


def unbound_of(pods: Mapping[str, PodFact]) -> list[PodFact]:
    return [pod for pod in pods.values() if pod.state == "warm" and not pod.deleting and not pod.finished]


def moment() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


async def until(holds: Callable[[], Any]) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not await holds():
        if time.monotonic() > deadline:
            raise AssertionError(f"{getattr(holds, '__qualname__', holds)} did not come true in {WAIT_SECONDS} s")
        await asyncio.sleep(0.05)


@pytest.fixture
async def operator(
    control_plane: Cluster, api: AiohttpKubeApi, namespace: str, tmp_path: Path
) -> AsyncIterator[Operator]:
    running = Operator(control_plane, api, namespace, tmp_path)
    try:
        await running.start()
        yield running
    finally:
        await running.close()


class TestRefusals:
    """What the API server refuses by itself, in words that a user can act on."""

    def refused(self, control_plane: Cluster, document: Json) -> str:
        with pytest.raises(ClusterError) as caught:
            control_plane.apply(json.dumps(document))
        return f"{caught.value} {caught.value.detail}"

    def test_a_wrong_field(self, control_plane: Cluster, namespace: str) -> None:
        assert 'unknown field "spec.replica"' in self.refused(control_plane, manifest(namespace, replica=3))

    def test_a_negative_number(self, control_plane: Cluster, namespace: str) -> None:
        words = self.refused(control_plane, manifest(namespace, replicas=-1))
        assert "spec.replicas" in words
        assert "should be greater than or equal to 0" in words

    @pytest.mark.parametrize("surge", [0, "0%"])
    def test_a_rollout_without_a_first_step(self, control_plane: Cluster, namespace: str, surge: int | str) -> None:
        strategy = {"rollingUpdate": {"maxSurge": surge, "maxUnavailable": 0}}
        words = self.refused(control_plane, manifest(namespace, updateStrategy=strategy))
        assert "maxSurge and maxUnavailable must not both be 0" in words

    def test_a_share_that_is_no_percentage(self, control_plane: Cluster, namespace: str) -> None:
        strategy = {"rollingUpdate": {"maxSurge": "half"}}
        words = self.refused(control_plane, manifest(namespace, updateStrategy=strategy))
        assert "spec.updateStrategy.rollingUpdate.maxSurge" in words

    def test_a_template_without_the_container_agent(self, control_plane: Cluster, namespace: str) -> None:
        words = self.refused(control_plane, manifest(namespace, container="main"))
        assert "spec.template.spec.containers must have a container named 'agent', which runs the agent image" in words

    def test_a_template_without_containers(self, control_plane: Cluster, namespace: str) -> None:
        assert "a container named 'agent'" in self.refused(control_plane, manifest(namespace, template={"spec": {}}))

    def test_no_template(self, control_plane: Cluster, namespace: str) -> None:
        document = manifest(namespace)
        del document["spec"]["template"]
        assert "spec.template: Required value" in self.refused(control_plane, document)

    @pytest.mark.parametrize("field", ["ports", "env", "volumeMounts", "lifecycle", "securityContext"])
    def test_a_part_of_the_agents_container_that_is_of_the_wrong_kind(
        self, control_plane: Cluster, namespace: str, field: str
    ) -> None:
        agent = {"name": "agent", "image": "localhost/agent:1", field: "8080"}
        words = self.refused(control_plane, manifest(namespace, template={"spec": {"containers": [agent]}}))
        assert f"spec.template.spec.containers[0].{field}" in words

    @pytest.mark.parametrize("field", ["volumes", "securityContext", "terminationGracePeriodSeconds"])
    def test_a_part_of_the_template_that_is_of_the_wrong_kind(
        self, control_plane: Cluster, namespace: str, field: str
    ) -> None:
        document = manifest(namespace)
        document["spec"]["template"]["spec"][field] = "many"
        assert f"spec.template.spec.{field}" in self.refused(control_plane, document)

    async def test_nothing_at_all_is_as_if_it_had_been_left_out(self, api: AiohttpKubeApi, namespace: str) -> None:
        document = manifest(namespace)
        spec = document["spec"]["template"]["spec"]
        spec.update(volumes=None, securityContext=None, terminationGracePeriodSeconds=None)
        spec["containers"][0].update(ports=None, env=None, volumeMounts=None, lifecycle=None, securityContext=None)
        stored = await api.create(POOLS, namespace, document)
        assert stored["spec"]["template"]["spec"] == manifest(namespace)["spec"]["template"]["spec"]

    def test_a_restart_policy(self, control_plane: Cluster, namespace: str) -> None:
        document = manifest(namespace)
        document["spec"]["template"]["spec"]["restartPolicy"] = "Always"
        assert "restartPolicy must be Never or left out" in self.refused(control_plane, document)

    def test_a_label_of_ours(self, control_plane: Cluster, namespace: str) -> None:
        document = manifest(namespace)
        document["spec"]["template"]["metadata"] = {"labels": {LABEL_STATE: "bound"}}
        assert "must not begin with voicepool.dev/" in self.refused(control_plane, document)

    def test_a_recording_to_no_certain_place(self, control_plane: Cluster, namespace: str) -> None:
        session = {"recording": {"audio": True, "path": "recordings"}}
        assert "spec.session.recording.path" in self.refused(control_plane, manifest(namespace, session=session))

    def test_a_name_that_would_not_fit(self, control_plane: Cluster, namespace: str) -> None:
        assert "at most 40 characters" in self.refused(control_plane, manifest(namespace, name="x" * 41))

    async def test_a_template_alone_is_enough_and_gets_all_defaults(self, api: AiohttpKubeApi, namespace: str) -> None:
        stored = await api.create(POOLS, namespace, manifest(namespace))
        assert stored["spec"]["replicas"] == 1
        assert stored["spec"]["session"]["maxDurationSeconds"] == 7200
        nothing = {"audio": False, "transcript": False, "path": "/recordings"}
        assert stored["spec"]["session"]["recording"] == nothing
        assert stored["spec"]["onEmpty"] == {"policy": "Queue", "timeoutSeconds": 20}
        assert stored["status"] == {"observedGeneration": -1}


class TestClient:
    """The client against the real API server."""

    async def test_a_missing_object(self, api: AiohttpKubeApi, namespace: str) -> None:
        with pytest.raises(NotFound, match="nobody"):
            await api.get(PODS, namespace, "nobody")

    async def test_a_watch_from_a_position_that_never_was(self, api: AiohttpKubeApi, namespace: str) -> None:
        told: list[int] = []

        async def answered() -> bool:
            try:
                event = await anext(api.watch(POOLS, namespace, resource_version="1", timeout_seconds=5))
            except TooManyRequests:
                # The API server is still getting ready to serve a resource that was defined a moment ago.
                return False
            except KubeApiError as error:
                told.append(error.status)
            else:
                told.append(event.object["code"])
            return True

        await until(answered)
        assert told == [410]

    async def test_an_object_that_is_not_valid(self, api: AiohttpKubeApi, namespace: str) -> None:
        with pytest.raises(Unprocessable, match=r"spec\.replicas"):
            await api.create(POOLS, namespace, manifest(namespace, replicas=-1))


class TestOperator:
    """The process, from outside."""

    async def test_it_fills_a_pool_and_the_usual_commands_see_it(
        self, operator: Operator, control_plane: Cluster
    ) -> None:
        await operator.apply(replicas=3)
        await operator.fill(3)
        in_namespace = ("--namespace", operator.namespace)
        control_plane.kubectl("wait", "--for=condition=Ready", "vpool/demo", "--timeout=30s", *in_namespace)
        table = control_plane.kubectl("get", "vpool", "--output", "wide", *in_namespace)
        header, row = table.rstrip("\n").splitlines()
        # By position: a column without a value is empty.
        starts = [match.start() for match in re.finditer(r"\S+", header)]
        columns = pairwise([*starts, None])
        shown = {header[begin:end].strip(): row[begin:end].strip() for begin, end in columns}
        del shown["AGE"]
        assert shown == {
            "NAME": "demo",
            "DESIRED": "3",
            "WARM": "3",
            "STARTING": "0",
            "BOUND": "0",
            "READY": "True",
            "REASON": "TargetReached",
            "IMAGE": "localhost/agent:1",
            "RECOMMENDED": "",
            "HIT": "",
            "MESSAGE": "The pool has reached its warm target.",
        }

    async def test_kubectl_scale(self, operator: Operator, control_plane: Cluster) -> None:
        await operator.apply(replicas=1)
        await operator.fill(1)
        in_namespace = ("--namespace", operator.namespace)
        control_plane.kubectl("scale", "vpool", "demo", "--replicas=4", *in_namespace)
        await operator.fill(4)
        scale = json.loads(
            control_plane.kubectl(
                "get",
                "--raw",
                f"/apis/voicepool.dev/v1alpha1/namespaces/{operator.namespace}/voiceagentpools/demo/scale",
            )
        )

        async def counted() -> bool:
            return bool((await operator.status())["replicas"] == 4)

        await until(counted)
        assert scale["status"]["selector"] == "voicepool.dev/pool=demo,voicepool.dev/state=warm"
        control_plane.kubectl("scale", "vpool", "demo", "--replicas=0", *in_namespace)
        await operator.wait_for_unbound(0)

    async def test_a_bound_pod_is_replaced_and_survives_scaling_and_the_end_of_its_pool(
        self, operator: Operator
    ) -> None:
        await operator.apply(replicas=2, session={"retentionSeconds": 0})
        first, _ = await operator.fill(2)
        await operator.bind(first, "session-1")
        await operator.fill(2)
        await operator.patch(replicas=0)
        await operator.wait_for_unbound(0)
        assert (await operator.pods())[first].session == "session-1"
        pool = await operator.api.get(POOLS, operator.namespace, "demo")
        metadata = pool["metadata"]
        await operator.api.delete(
            POOLS, operator.namespace, "demo", uid=metadata["uid"], resource_version=metadata["resourceVersion"]
        )

        async def pool_is_gone() -> bool:
            return f'voicepool_warm_target_pods{{namespace="{operator.namespace}"' not in str(
                await operator.fetch("/metrics")
            )

        await until(pool_is_gone)
        assert not (await operator.pods())[first].deleting

    async def test_no_eviction_ends_a_call_also_when_its_pool_is_gone(self, operator: Operator) -> None:
        strategy = {"rollingUpdate": {"maxSurge": 1, "maxUnavailable": "50%"}}
        await operator.apply(replicas=1, session={"retentionSeconds": 0}, updateStrategy=strategy)
        (name,) = await operator.fill(1)
        await operator.bind(name, "session-1")

        async def protected() -> bool:
            status = (await operator.api.get(BUDGETS, operator.namespace, "demo-bound")).get("status") or {}
            return status.get("expectedPods") == 1

        await until(protected)
        assert "Cannot evict pod" in await operator.evict(name)
        pool = (await operator.api.get(POOLS, operator.namespace, "demo"))["metadata"]
        await operator.api.delete(
            POOLS, operator.namespace, "demo", uid=pool["uid"], resource_version=pool["resourceVersion"]
        )
        await operator.wait_for_unbound(0)
        assert "Cannot evict pod" in await operator.evict(name)
        await operator.end(name)
        pod = (await operator.pods())[name]
        await operator.api.delete(PODS, operator.namespace, name, uid=pod.uid, resource_version=pod.resource_version)

        async def unprotected() -> bool:
            return not (await operator.api.list_page(BUDGETS, operator.namespace))["items"]

        await until(unprotected)

    async def test_a_deleted_pool_ends_the_calls_that_have_a_limit_and_no_other(self, operator: Operator) -> None:
        await operator.apply(replicas=2)
        limited, unlimited = await operator.fill(2)
        await operator.bind(limited, "session-1", drain_seconds=2)
        await operator.bind(unlimited, "session-2")
        pool = (await operator.api.get(POOLS, operator.namespace, "demo"))["metadata"]
        await operator.api.delete(
            POOLS, operator.namespace, "demo", uid=pool["uid"], resource_version=pool["resourceVersion"]
        )

        async def only_the_other_is_left() -> bool:
            return set(await operator.pods()) == {unlimited}

        await until(only_the_other_is_left)

    async def test_native_headroom_keeps_what_a_schedule_asks_for(self, operator: Operator) -> None:
        schedules = [{"cron": "* * * * *", "warmPods": 3}]
        await operator.apply(replicas=1, headroom={"mode": "Native", "schedules": schedules})
        await operator.fill(3)
        assert (await operator.status())["recommendedReplicas"] == 3
        await operator.patch(headroom=None)
        await operator.wait_for_unbound(1)

        async def no_longer_told() -> bool:
            return "recommendedReplicas" not in await operator.status()

        await until(no_longer_told)

    async def test_an_ended_pod_goes_after_its_retention(self, operator: Operator) -> None:
        await operator.apply(replicas=1, session={"retentionSeconds": 0})
        (name,) = await operator.fill(1)
        await operator.bind(name, "session-1")
        await operator.end(name)

        async def gone() -> bool:
            return name not in await operator.pods()

        await until(gone)

    async def test_unbound_pods_go_with_their_pool(self, operator: Operator, control_plane: Cluster) -> None:
        await operator.apply(replicas=2)
        await operator.fill(2)
        control_plane.kubectl("delete", "vpool", "demo", "--namespace", operator.namespace)
        await operator.wait_for_unbound(0)

    async def test_an_image_that_does_not_exist_is_told(self, operator: Operator) -> None:
        await operator.apply(replicas=1)
        (name,) = await operator.wait_for_unbound(1)
        waiting = {"reason": "ErrImagePull", "message": 'failed to pull image "localhost/agent:1": not found'}
        agent = {"name": "agent", "ready": False, "restartCount": 0, "image": "", "imageID": "", "state": {}}
        await operator.set_status(name, containerStatuses=[agent | {"state": {"waiting": waiting}}])
        told = await operator.wait_for_condition("Ready", "False", "ImagePullFailed")
        assert told["message"] == f"Pod {name} cannot get its image 'localhost/agent:1': {waiting['message']}"
        assert (await operator.condition("Stalled"))["status"] == "True"

    async def test_an_agent_that_cannot_be_built_is_told_and_backed_off(self, operator: Operator) -> None:
        await operator.apply(replicas=1)
        for attempt in (0, 1):
            (name,) = await operator.wait_for_unbound(1)
            assert (await operator.pods())[name].start_attempt == attempt
            await operator.end(name, exit_code=1, message="GROQ_API_KEY is not set: add it to the Secret agent-keys")
        await operator.wait_for_condition("Stalled", "True", "AgentFailed")
        told = await operator.condition("Ready")
        assert told["message"].endswith("GROQ_API_KEY is not set: add it to the Secret agent-keys")
        assert await operator.unbound() == []

    async def test_what_happened_is_told_in_events(self, operator: Operator, control_plane: Cluster) -> None:
        await operator.apply(replicas=1)
        (name,) = await operator.fill(1)
        await operator.bind(name, "session-1")
        await operator.fill(1)
        await operator.end(name, exit_code=137)
        words = f"Session session-1 was dropped with pod {name} (crashed, exit code 137)"

        async def told() -> bool:
            described = control_plane.kubectl("describe", "vpool", "demo", "--namespace", operator.namespace)
            return words in described and "TargetReached" in described and "SessionDropped" in described

        await until(told)
        metrics = str(await operator.fetch("/metrics"))
        pool = f'namespace="{operator.namespace}",pool="demo"'
        assert f'voicepool_sessions_dropped_total{{{pool},reason="crashed"}} 1.0' in metrics
        assert 'voicepool_events_total{outcome="failed"}' not in metrics

    async def test_a_template_that_the_api_server_refuses_is_told(self, operator: Operator) -> None:
        agent = {"name": "agent", "image": "localhost/agent:1", "imagePullPolice": "Always"}
        await operator.apply(replicas=1, template={"spec": {"containers": [agent]}})
        told = await operator.wait_for_condition("TemplateValid", "False")
        assert "imagePullPolice" in told["message"]
        assert (await operator.pods()) == {}
        del agent["imagePullPolice"]
        await operator.patch(template={"spec": {"containers": [agent]}})
        await operator.fill(1)
        await operator.wait_for_condition("Ready", "True")

    async def test_a_service_account_that_comes_after_its_pool_is_found(self, operator: Operator) -> None:
        template = manifest(operator.namespace)["spec"]["template"]
        template["spec"]["serviceAccountName"] = "late"
        await operator.apply(replicas=1, template=template)
        refused = await operator.wait_for_condition("TemplateValid", "False")
        assert 'serviceaccount "late" not found' in refused["message"]
        await operator.api.create(ACCOUNTS, operator.namespace, {"metadata": {"name": "late"}})
        await operator.fill(1)
        await operator.wait_for_condition("TemplateValid", "True")

    async def test_a_new_template_replaces_unbound_pods_one_by_one_and_no_bound_one(self, operator: Operator) -> None:
        await operator.apply(replicas=2)
        old = await operator.fill(2)
        await operator.bind(old[0], "session-1")
        await operator.fill(2)
        await operator.patch(template={"spec": {"containers": [{"name": "agent", "image": "localhost/agent:2"}]}})

        async def rolled() -> bool:
            hash_ = (await operator.status())["templateHash"]
            unbound = unbound_of(await operator.pods())
            assert sum(pod.ready for pod in unbound) >= 2
            assert len(unbound) <= 3
            await operator.become_warm(*(pod.name for pod in unbound if not pod.ready))
            return len(unbound) == 2 and {pod.template_hash for pod in unbound} == {hash_}

        await until(rolled)
        assert (await operator.pods())[old[0]].session == "session-1"

    async def test_killed_it_goes_on_where_it_was(self, operator: Operator) -> None:
        await operator.apply(replicas=2)
        first, _ = await operator.fill(2)
        await operator.stop(signal.SIGKILL)
        await operator.bind(first, "session-1")
        await operator.start()
        await operator.fill(2)
        assert len(await operator.pods()) == 3

    async def test_it_ends_at_once_when_told_to(self, operator: Operator) -> None:
        await operator.apply(replicas=1)
        await operator.fill(1)
        assert await asyncio.wait_for(operator.stop(), 4) == 0

    async def test_a_converged_pool_is_not_written_to(self, operator: Operator) -> None:
        await operator.apply(replicas=2)
        await operator.fill(2)
        await operator.wait_for_condition("Ready", "True")

        async def settled() -> bool:
            before = await versions()
            await asyncio.sleep(3)
            return before == await versions()

        async def versions() -> list[str]:
            pool = await operator.api.get(POOLS, operator.namespace, "demo")
            budget = await operator.api.get(BUDGETS, operator.namespace, "demo-bound")
            pods = (await operator.pods()).values()
            objects = [pool["metadata"]["resourceVersion"], budget["metadata"]["resourceVersion"]]
            return [*objects, *(pod.resource_version for pod in pods)]

        await until(settled)
        pool = await operator.api.get(POOLS, operator.namespace, "demo")
        assert "annotations" not in pool["metadata"]
        assert "finalizers" not in pool["metadata"]
