"""The bind on a real API server; the tests play the kubelet by writing the status of pods."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections import Counter
from collections.abc import AsyncIterator
from datetime import UTC, datetime

import pytest

from tests.cluster.tool import Cluster
from voicepool.binding import bind_patch
from voicepool.kube.api import PODS, Conflict, Json, Resource, Unprocessable
from voicepool.kube.client import AiohttpKubeApi, load_connection
from voicepool.kube.convert import pod_from_json
from voicepool.model import PodFact

pytestmark = pytest.mark.control_plane

NAMESPACE = "default"
_CONFIG_MAPS = Resource("", "v1", "configmaps")


@contextlib.asynccontextmanager
async def api_of(cluster: Cluster) -> AsyncIterator[AiohttpKubeApi]:
    async with AiohttpKubeApi.connect(load_connection(cluster.kubeconfig), connections=64) as api:
        yield api


async def warm_pod(api: AiohttpKubeApi, *, finalizers: tuple[str, ...] = ()) -> PodFact:
    owner = await api.get(_CONFIG_MAPS, NAMESPACE, "kube-root-ca.crt")
    reference = {"apiVersion": "v1", "kind": "ConfigMap", "name": "kube-root-ca.crt", "uid": owner["metadata"]["uid"]}
    made = await api.create(
        PODS,
        NAMESPACE,
        {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {
                "name": f"bind-{uuid.uuid4().hex[:8]}",
                "labels": {"voicepool.dev/pool": "demo", "voicepool.dev/state": "warm"},
                "annotations": {"voicepool.dev/start-attempt": "0"},
                "ownerReferences": [reference],
                "finalizers": list(finalizers),
            },
            "spec": {
                "schedulingGates": [{"name": "voicepool.dev/test"}],
                "containers": [{"name": "agent", "image": "localhost/none:1"}],
            },
        },
    )
    return await with_status(api, made["metadata"]["name"], ready=True)


async def with_status(api: AiohttpKubeApi, name: str, *, ready: bool) -> PodFact:
    status: Json = {
        "phase": "Running",
        "podIP": "10.9.9.9",
        "podIPs": [{"ip": "10.9.9.9"}],
        "startTime": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "containerStatuses": [
            {
                "name": "agent",
                "image": "localhost/none:1",
                "imageID": "none",
                "ready": ready,
                "restartCount": 0,
                "state": {"running": {}},
            }
        ],
    }
    fact = pod_from_json(await api.merge_patch(PODS, NAMESPACE, name, {"status": status}, subresource="status"))
    assert fact is not None
    return fact


async def bind(api: AiohttpKubeApi, pod: PodFact, session_id: str) -> Json | None:
    operations = bind_patch(
        pod,
        session_id=session_id,
        room=f"room-{session_id}",
        bound_at=datetime.now(UTC),
        bound_by="test",
        active_deadline_seconds=7260,
    )
    try:
        return await api.json_patch(PODS, NAMESPACE, pod.name, operations)
    except Unprocessable:
        return None


async def test_of_fifty_binds_of_one_pod_one_wins(control_plane: Cluster) -> None:
    async with api_of(control_plane) as api:
        pod = await warm_pod(api)
        answers = await asyncio.gather(*(bind(api, pod, f"s{number}") for number in range(50)))
        (stored,) = [answer for answer in answers if answer is not None]
        assert stored["metadata"]["labels"]["voicepool.dev/state"] == "bound"
        assert stored["spec"]["activeDeadlineSeconds"] == 7260
        assert "ownerReferences" not in stored["metadata"]
        assert stored["metadata"]["annotations"]["karpenter.sh/do-not-disrupt"] == "true"


async def test_a_status_that_changed_meanwhile_is_no_conflict(control_plane: Cluster) -> None:
    async with api_of(control_plane) as api:
        pod = await warm_pod(api)
        newer = await with_status(api, pod.name, ready=True)
        await api.merge_patch(PODS, NAMESPACE, pod.name, {"metadata": {"annotations": {"example.org/touched": "1"}}})
        assert newer.uid == pod.uid
        assert await bind(api, pod, "s1") is not None


async def test_a_pod_that_is_no_longer_ready_cannot_be_bound_from_a_stale_view(control_plane: Cluster) -> None:
    async with api_of(control_plane) as api:
        pod = await warm_pod(api)
        await with_status(api, pod.name, ready=False)
        assert await bind(api, pod, "s1") is None


async def test_a_dying_pod_cannot_be_bound_from_a_stale_view(control_plane: Cluster) -> None:
    async with api_of(control_plane) as api:
        pod = await warm_pod(api, finalizers=("voicepool.dev/test",))
        await api.delete(PODS, NAMESPACE, pod.name, uid=pod.uid, resource_version=pod.resource_version)
        stored = pod_from_json(await api.get(PODS, NAMESPACE, pod.name))
        assert stored is not None
        assert stored.deleting
        assert await bind(api, pod, "s1") is None
        await api.merge_patch(PODS, NAMESPACE, pod.name, {"metadata": {"finalizers": None}})


async def test_whichever_of_bind_and_delete_comes_second_is_refused(control_plane: Cluster) -> None:
    async def delete(api: AiohttpKubeApi, pod: PodFact) -> bool:
        try:
            await api.delete(PODS, NAMESPACE, pod.name, uid=pod.uid, resource_version=pod.resource_version)
        except Conflict:
            return False
        return True

    async def attempt(api: AiohttpKubeApi, pod: PodFact, session_id: str) -> bool:
        try:
            return await bind(api, pod, session_id) is not None
        except Conflict:
            return False

    async with api_of(control_plane) as api:
        pods = [await warm_pod(api, finalizers=("voicepool.dev/test",)) for _ in range(20)]
        results = await asyncio.gather(
            *(asyncio.gather(attempt(api, pod, f"r{n}"), delete(api, pod)) for n, pod in enumerate(pods))
        )
        assert Counter(bool(bound) + bool(deleted) for bound, deleted in results) == {1: 20}
        for pod in pods:
            await api.merge_patch(PODS, NAMESPACE, pod.name, {"metadata": {"finalizers": None}})
