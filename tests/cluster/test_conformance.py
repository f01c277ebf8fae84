"""The simulated API server means the same as a real one: each sentence is tried on both.

What is decided by time or by chance on a real server (how long its history is, how old a list may be) is no part of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, cast

import aiohttp
import pytest

from tests.cluster.tool import Cluster
from tests.sim.loop import Process
from tests.sim.server import REFUSED_IMAGE, Change, Client, EventFate, Fate, Server
from voicepool.binding import bind_patch
from voicepool.kube.api import (
    PODS,
    POOLS,
    AlreadyExists,
    Conflict,
    Gone,
    Json,
    KubeApi,
    KubeApiError,
    NotFound,
    Resource,
    Unprocessable,
    WatchEvent,
)
from voicepool.kube.client import AiohttpKubeApi, load_connection
from voicepool.kube.convert import AGENT_PODS, pod_from_json
from voicepool.model import LABEL_POOL

NAMESPACES = Resource("", "v1", "namespaces")
ACCOUNTS = Resource("", "v1", "serviceaccounts")
CRDS = Path(__file__).parents[2] / "crds"
FINALIZER = "example.org/test"
LIMIT_SECONDS = 90.0
"""A garbage collector may need half a minute to learn of a new kind of owner."""


class CalmNetwork:
    """Every call is answered at once."""

    def call(self, process: Process, verb: str, words: str) -> tuple[Fate, float]:
        return Fate.ANSWERED, 0.0

    def event(self, process: Process) -> tuple[EventFate, float]:
        return EventFate.TOLD, 0.0

    def list_age(self, process: Process) -> int:
        return 0

    def down(self) -> bool:
        return False

    def crash(self, process: Process) -> None:
        raise AssertionError("nobody asked for that")


@dataclass(frozen=True)
class Place:
    """A namespace on one of the two."""

    api: KubeApi
    namespace: str
    forget: Callable[[], Awaitable[None]]
    """Has the server compact its history."""

    async def pod(self, name: str = "one", **options: Any) -> Json:
        return await self.api.create(PODS, self.namespace, pod(name, **options))

    async def pool(self, name: str = "pool", **options: Any) -> Json:
        return await self.api.create(POOLS, self.namespace, pool(name, **options))

    async def get(self, name: str = "one", resource: Resource = PODS) -> Json:
        return await self.api.get(resource, self.namespace, name)

    async def is_gone(self, name: str = "one", resource: Resource = PODS) -> bool:
        try:
            await self.get(name, resource)
        except NotFound:
            return True
        return False

    async def patch(self, *operations: Json, name: str = "one", resource: Resource = PODS) -> Json:
        return await self.api.json_patch(resource, self.namespace, name, operations)

    async def merge(self, body: Json, name: str = "one", resource: Resource = PODS, **options: Any) -> Json:
        return await self.api.merge_patch(resource, self.namespace, name, body, **options)

    async def set_status(self, name: str = "one", resource: Resource = PODS, **status: Any) -> Json:
        return await self.merge({"status": status}, name, resource, subresource="status")

    async def delete(self, obj: Json, resource: Resource = PODS, **options: Any) -> None:
        """Delete that very version of an object."""
        metadata = obj["metadata"]
        preconditions = {"uid": metadata["uid"], "resource_version": metadata["resourceVersion"]} | options
        await self.api.delete(resource, self.namespace, metadata["name"], **preconditions)

    async def names(self, selector: str = "", resource: Resource = PODS) -> list[str]:
        found: list[str] = []
        token = ""
        while True:
            page = await self.api.list_page(resource, self.namespace, label_selector=selector, continue_token=token)
            found += names(page)
            token = page["metadata"].get("continue") or ""
            if not token:
                return found

    async def told(self, count: int, since: str, selector: str = "", resource: Resource = PODS) -> list[WatchEvent]:
        """The first so many events after a version, bookmarks left out."""
        events: list[WatchEvent] = []
        watch = self.api.watch(resource, self.namespace, resource_version=since, label_selector=selector)
        async with asyncio.timeout(LIMIT_SECONDS), contextlib.aclosing(cast("AsyncGenerator[WatchEvent, None]", watch)):
            async for event in watch:
                events += [event] if event.type != "BOOKMARK" else []
                if len(events) == count:
                    return events
        raise AssertionError(f"only {events} came")


def pod(
    name: str,
    *,
    node: str | None = None,
    labels: Mapping[str, str] | None = None,
    owner: Json | None = None,
    image: str = "localhost/none:1",
    **metadata: Any,
) -> Json:
    reference = {"apiVersion": "voicepool.dev/v1alpha1", "kind": "VoiceAgentPool"}
    if owner is not None:
        reference |= {"name": owner["metadata"]["name"], "uid": owner["metadata"]["uid"]}
        metadata["ownerReferences"] = [reference]
    # Either on a node (that does not exist), or not to be looked at by any scheduler.
    where: Json = {"nodeName": node} if node else {"schedulingGates": [{"name": "example.org/test"}]}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "labels": dict(labels or {}), "annotations": {"kept": "yes"}, **metadata},
        "spec": {"containers": [{"name": "agent", "image": image}], **where},
    }


def pool(name: str, *, replicas: int = 1, **metadata: Any) -> Json:
    template = {"spec": {"containers": [{"name": "agent", "image": "localhost/none:1"}]}}
    return {
        "apiVersion": "voicepool.dev/v1alpha1",
        "kind": "VoiceAgentPool",
        "metadata": {"name": name, **metadata},
        "spec": {"replicas": replicas, "template": template},
    }


def op(kind: str, path: str, value: Any = None) -> Json:
    return {"op": kind, "path": path} | ({} if kind == "remove" else {"value": value})


def version(obj: Json) -> int:
    return int(obj["metadata"]["resourceVersion"])


def names(page: Json) -> list[str]:
    return [obj["metadata"]["name"] for obj in page["items"]]


def time_of(obj: Json, field: str) -> datetime:
    return datetime.fromisoformat(obj["metadata"][field])


async def first_event(
    watch: AsyncIterator[WatchEvent], fits: Callable[[WatchEvent], bool] = lambda event: event.type == "ADDED"
) -> WatchEvent:
    """The first event that fits."""
    async with asyncio.timeout(LIMIT_SECONDS), contextlib.aclosing(cast("AsyncGenerator[WatchEvent, None]", watch)):
        async for event in watch:
            if fits(event):
                return event
    raise AssertionError("the watch has ended")


@contextlib.asynccontextmanager
async def simulation() -> AsyncIterator[Place]:
    server = Server(lambda: datetime.now(UTC))
    loop = asyncio.get_running_loop()

    def collect_soon(_change: Change) -> None:
        loop.call_soon(server.collect_garbage)

    server.observers.append(collect_soon)

    async def forget() -> None:
        server.compacted = server.revision

    for name in ("a", "b"):
        server.create(PODS, "elsewhere", pod(name), "somebody")
    yield Place(Client(server, CalmNetwork(), Process("test")), "here", forget)


@contextlib.asynccontextmanager
async def real(cluster: Cluster) -> AsyncIterator[Place]:
    async with AiohttpKubeApi.connect(load_connection(cluster.kubeconfig)) as api:
        name = f"conformance-{uuid.uuid4().hex[:8]}"
        made = await api.create(NAMESPACES, "", {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})
        # No pod is admitted before.
        await first_event(api.watch(ACCOUNTS, name, resource_version=made["metadata"]["resourceVersion"]))

        async def forget() -> None:
            latest = await api.list_page(NAMESPACES, None)
            body = {"revision": latest["metadata"]["resourceVersion"], "physical": True}
            async with (
                aiohttp.ClientSession() as session,
                session.post(f"{etcd_of(cluster)}/v3/kv/compaction", json=body) as answer,
            ):
                assert answer.status == 200, await answer.text()

        yield Place(api, name, forget)
        uid = made["metadata"]["uid"]
        latest = await api.get(NAMESPACES, None, name)
        with contextlib.suppress(Conflict):
            await api.delete(NAMESPACES, "", name, uid=uid, resource_version=latest["metadata"]["resourceVersion"])


def etcd_of(cluster: Cluster) -> str:
    """Where the API server finds its etcd."""
    arguments = Path(f"/proc/{cluster.component_pid('kube-apiserver')}/cmdline").read_text().split("\0")
    return next(one for one in arguments if one.startswith("--etcd-servers=")).partition("=")[2]


@pytest.fixture(scope="module")
def with_pools(control_plane: Cluster) -> Cluster:
    """A real API server that knows pools."""
    control_plane.kubectl("apply", "--filename", str(CRDS))
    control_plane.kubectl("wait", "--for=condition=Established", "crd/voiceagentpools.voicepool.dev", "--timeout=30s")
    return control_plane


@pytest.fixture(params=["simulation", pytest.param("real", marks=pytest.mark.control_plane)])
async def place(request: pytest.FixtureRequest) -> AsyncIterator[Place]:
    """A namespace of the simulation, and then one of a real API server."""
    made = simulation() if request.param == "simulation" else real(request.getfixturevalue("with_pools"))
    async with made as one:
        yield one


# -- names, versions, times -----------------------------------------------------------------------------------------------------------


async def test_a_name_is_taken_once(place: Place) -> None:
    await place.pod()
    with pytest.raises(AlreadyExists):
        await place.pod()


async def test_what_is_not_there_is_not_found(place: Place) -> None:
    with pytest.raises(NotFound):
        await place.get()
    with pytest.raises(NotFound):
        await place.patch(op("add", "/metadata/labels", {}))
    for subresource in (None, "status"):
        with pytest.raises(NotFound):
            await place.merge({"status": {"replicas": 1}}, "pool", POOLS, subresource=subresource)
    with pytest.raises(NotFound):
        await place.delete({"metadata": {"name": "one", "uid": "any", "resourceVersion": "1"}})


async def test_a_uid_is_never_used_again(place: Place) -> None:
    first = await place.pod()
    await place.delete(first)
    assert (await place.pod())["metadata"]["uid"] != first["metadata"]["uid"]


async def test_uid_time_generation_and_status_are_set_by_the_server(place: Place) -> None:
    begun = datetime.now(UTC)
    made = await place.pool(uid="mine", creationTimestamp="2001-01-01T00:00:00Z", generation=7)
    assert made["metadata"]["uid"] != "mine"
    assert made["metadata"]["generation"] == 1
    created = time_of(made, "creationTimestamp")
    assert created.microsecond == 0
    assert begun - timedelta(seconds=1) <= created <= datetime.now(UTC)
    made = await place.api.create(POOLS, place.namespace, pool("other") | {"status": {"replicas": 3}})
    assert "replicas" not in made.get("status", {})
    started = await place.api.create(PODS, place.namespace, pod("one") | {"status": {"phase": "Running"}})
    assert started["status"]["phase"] == "Pending"
    assert started["metadata"]["generation"] == 1


async def test_a_dry_run_stores_nothing(place: Place) -> None:
    answer = await place.api.create(PODS, place.namespace, pod("one"), dry_run=True)
    assert answer["metadata"]["uid"]
    assert await place.is_gone()


@pytest.mark.parametrize("dry_run", [True, False])
async def test_a_pod_that_makes_no_sense_is_refused(place: Place, dry_run: bool) -> None:
    with pytest.raises(Unprocessable):
        await place.api.create(PODS, place.namespace, pod("one", image=REFUSED_IMAGE), dry_run=dry_run)
    assert await place.is_gone()


async def test_a_dry_run_of_a_name_that_is_taken_is_refused(place: Place) -> None:
    await place.pod()
    with pytest.raises(AlreadyExists):
        await place.api.create(PODS, place.namespace, pod("one"), dry_run=True)


async def test_every_write_makes_a_larger_version_and_a_write_of_nothing_makes_none(place: Place) -> None:
    first = await place.pod(labels={"color": "red"})
    second = await place.pod("two")
    assert version(second) > version(first)
    same = await place.patch(op("replace", "/metadata/labels/color", "red"))
    assert version(same) == version(first)
    same = await place.merge({"metadata": {"labels": {"color": "red", "absent": None}}})
    assert version(same) == version(first)
    changed = await place.patch(op("replace", "/metadata/labels/color", "blue"))
    assert version(changed) > version(second)


async def test_an_empty_map_or_list_is_none(place: Place) -> None:
    for resource, body in ((PODS, pod("one")), (POOLS, pool("one"))):
        body["metadata"] |= {"annotations": {}, "finalizers": [], "ownerReferences": []}
        made = await place.api.create(resource, place.namespace, body)
        assert {"annotations", "finalizers", "ownerReferences"}.isdisjoint(made["metadata"])
        with pytest.raises(Unprocessable):
            await place.patch(op("add", "/metadata/annotations/a", "b"), resource=resource)
        await place.patch(op("add", "/metadata/annotations", {"a": "b"}), resource=resource)
        emptied = await place.patch(op("remove", "/metadata/annotations/a"), resource=resource)
        assert "annotations" not in emptied["metadata"]


# -- JSON patches ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "operation",
    [
        op("test", "/metadata/labels/color", "red"),
        op("test", "/metadata/labels/absent", None),
        op("test", "/metadata/deletionTimestamp", None),
        op("test", "/spec/containers/0/name", "agent"),
        op("test", "/metadata/annotations/example.org~1path", "a/b"),
        op("add", "/metadata/labels/color", "red"),
        op("replace", "/metadata/labels/color", "red"),
    ],
    ids=lambda operation: f"{operation['op']} {operation['path']}",
)
async def test_an_operation_that_holds_lets_the_patch_through(place: Place, operation: Json) -> None:
    await place.pod(labels={"color": "red"}, annotations={"example.org/path": "a/b"})
    stored = await place.patch(operation, op("add", "/metadata/annotations/new", "here"))
    assert stored["metadata"]["annotations"] == {"example.org/path": "a/b", "new": "here"}
    assert stored["metadata"]["labels"] == {"color": "red"}


@pytest.mark.parametrize(
    "operation",
    [
        op("test", "/metadata/labels/color", "blue"),
        op("test", "/metadata/labels/color", None),
        op("test", "/metadata/labels/absent", "red"),
        op("test", "/metadata/uid", "another"),
        op("test", "/metadata/resourceVersion", "1"),
        op("test", "/status/containerStatuses/0/ready", True),
        op("test", "/status/containerStatuses/0/ready", None),
        op("test", "/spec/containers/1", None),
        op("replace", "/metadata/absent/deeper", "red"),
        op("replace", "/spec/containers/1", {}),
        op("remove", "/metadata/labels/absent"),
        op("remove", "/metadata/ownerReferences"),
        op("remove", "/metadata/annotations/absent"),
        op("add", "/metadata/absent/deeper", "red"),
        op("add", "/spec/nodeName", "elsewhere"),
        op("add", "/spec/containers/0/tty", True),
        op("frobnicate", "/metadata/labels/color", "red"),
    ],
    ids=lambda operation: f"{operation['op']} {operation['path']} {operation.get('value')}",
)
async def test_an_operation_that_fails_fails_the_whole_patch(place: Place, operation: Json) -> None:
    made = await place.pod(labels={"color": "red"})
    for operations in (
        (operation, op("add", "/metadata/annotations/new", "here")),
        (op("add", "/metadata/annotations/new", "here"), operation),
    ):
        with pytest.raises(Unprocessable):
            await place.patch(*operations)
    assert version(await place.get()) == version(made)


async def test_operations_of_one_patch_see_each_other(place: Place) -> None:
    await place.pod(labels={"color": "red"})
    stored = await place.patch(
        op("replace", "/metadata/labels/color", "blue"),
        op("test", "/metadata/labels/color", "blue"),
        op("remove", "/metadata/labels/color"),
        op("test", "/metadata/labels/color", None),
    )
    assert "color" not in (stored["metadata"].get("labels") or {})


async def test_a_replace_of_what_is_absent_adds_it(place: Place) -> None:
    await place.pod()
    stored = await place.patch(op("replace", "/metadata/labels", {"color": "red"}))
    assert stored["metadata"]["labels"] == {"color": "red"}
    stored = await place.patch(op("replace", "/metadata/labels/size", "big"))
    assert stored["metadata"]["labels"] == {"color": "red", "size": "big"}


async def test_an_element_is_added_to_a_list_at_its_place(place: Place) -> None:
    await place.pool(finalizers=["example.org/b"])
    stored = await place.patch(
        op("add", "/metadata/finalizers/0", "example.org/a"),
        op("add", "/metadata/finalizers/-", "example.org/c"),
        name="pool",
        resource=POOLS,
    )
    assert stored["metadata"]["finalizers"] == ["example.org/a", "example.org/b", "example.org/c"]
    with pytest.raises(Unprocessable):
        await place.patch(op("add", "/metadata/finalizers/4", "example.org/d"), name="pool", resource=POOLS)
    stored = await place.patch(op("remove", "/metadata/finalizers/0"), name="pool", resource=POOLS)
    assert stored["metadata"]["finalizers"] == ["example.org/b", "example.org/c"]
    await place.merge({"metadata": {"finalizers": None}}, "pool", POOLS)


# -- merge patches and subresources ---------------------------------------------------------------------------------------------------


async def test_one_empty_entry_ends_the_account_of_who_wrote_which_field_for_good(place: Place) -> None:
    await place.pod()
    stored = await place.patch(op("add", "/metadata/managedFields", [{}]))
    assert "managedFields" not in stored["metadata"]
    for later in (await ready(place, "one", True), await place.patch(op("add", "/metadata/labels", {"later": "1"}))):
        assert "managedFields" not in later["metadata"]


async def test_a_merge_patch_takes_away_what_is_null_and_replaces_lists(place: Place) -> None:
    await place.pool(labels={"a": "1", "b": "2"}, finalizers=["example.org/a", "example.org/b"])
    body = {"metadata": {"labels": {"a": None, "c": "3", "absent": None}, "finalizers": ["example.org/c"]}}
    stored = await place.merge(body, "pool", POOLS)
    assert stored["metadata"]["labels"] == {"b": "2", "c": "3"}
    assert stored["metadata"]["finalizers"] == ["example.org/c"]
    await place.merge({"metadata": {"finalizers": None}}, "pool", POOLS)


@pytest.mark.parametrize("subresource", [None, "status"])
async def test_a_merge_patch_of_another_version_is_a_conflict(place: Place, subresource: str | None) -> None:
    old = await place.pool()
    latest = await place.merge({"metadata": {"labels": {"a": "1"}}}, "pool", POOLS)
    body = {"spec": {"replicas": 5}, "status": {"replicas": 5}}
    wrong = {"resourceVersion": old["metadata"]["resourceVersion"]}
    with pytest.raises(Conflict) as caught:
        await place.merge({"metadata": wrong, **body}, "pool", POOLS, subresource=subresource)
    assert not isinstance(caught.value, AlreadyExists)
    right = {"resourceVersion": latest["metadata"]["resourceVersion"], "uid": latest["metadata"]["uid"]}
    stored = await place.merge({"metadata": right, **body}, "pool", POOLS, subresource=subresource)
    assert version(stored) > version(latest)


async def test_a_uid_guards_an_object_and_not_its_status(place: Place) -> None:
    await place.pool()
    body = {"metadata": {"uid": "another"}, "spec": {"replicas": 5}, "status": {"replicas": 5}}
    with pytest.raises(Unprocessable):
        await place.merge(body, "pool", POOLS)
    assert (await place.merge(body, "pool", POOLS, subresource="status"))["status"]["replicas"] == 5


@pytest.mark.parametrize("subresource", [None, "status"])
async def test_the_version_of_an_object_of_the_same_name_that_is_gone_is_a_conflict(
    place: Place, subresource: str | None
) -> None:
    first = await place.pool()
    await place.delete(first, POOLS)
    await place.pool()
    wrong = {"resourceVersion": first["metadata"]["resourceVersion"]}
    with pytest.raises(Conflict):
        await place.merge({"metadata": wrong, "status": {"replicas": 5}}, "pool", POOLS, subresource=subresource)


async def test_the_status_of_a_pool_is_a_resource_of_its_own(place: Place) -> None:
    await place.pool(replicas=1)
    body = {"spec": {"replicas": 2}, "status": {"replicas": 3}}
    by_status = await place.merge(body, "pool", POOLS, subresource="status")
    assert (by_status["spec"]["replicas"], by_status["status"]["replicas"]) == (1, 3)
    body = {"spec": {"replicas": 2}, "status": {"replicas": 4}}
    by_spec = await place.merge(body, "pool", POOLS)
    assert (by_spec["spec"]["replicas"], by_spec["status"]["replicas"]) == (2, 3)
    nulled: Json = {"status": {"replicas": None, "readyReplicas": 1}}
    cleared = await place.merge(nulled, "pool", POOLS, subresource="status")
    assert "replicas" not in cleared["status"]
    assert cleared["status"]["readyReplicas"] == 1


async def test_only_a_write_of_the_spec_makes_a_new_generation(place: Place) -> None:
    await place.pool(replicas=1)
    assert (await place.set_status("pool", POOLS, replicas=3))["metadata"]["generation"] == 1
    labelled = await place.merge({"metadata": {"labels": {"a": "1"}}}, "pool", POOLS)
    assert labelled["metadata"]["generation"] == 1
    assert (await place.merge({"spec": {"replicas": 2}}, "pool", POOLS))["metadata"]["generation"] == 2
    assert (await place.merge({"spec": {"replicas": 2}}, "pool", POOLS))["metadata"]["generation"] == 2


async def test_scale_reads_and_writes_the_warm_target(place: Place) -> None:
    await place.pool(replicas=1)
    await place.set_status("pool", POOLS, replicas=1, selector="a=b")
    answer = await place.merge({"spec": {"replicas": 4}}, "pool", POOLS, subresource="scale")
    assert (answer["kind"], answer["spec"], answer["status"]) == (
        "Scale",
        {"replicas": 4},
        {"replicas": 1, "selector": "a=b"},
    )
    stored = await place.get("pool", POOLS)
    assert stored["spec"]["replicas"] == 4
    assert stored["metadata"]["generation"] == 2
    assert version(stored) == version(answer)


async def test_the_status_of_a_pod_is_out_of_reach_of_a_patch_of_the_pod(place: Place) -> None:
    made = await place.pod()
    assert (await place.patch(op("replace", "/status/phase", "Running")))["status"]["phase"] == "Pending"
    assert version(await place.merge({"status": {"phase": "Running"}})) == version(made)
    assert (await place.set_status(phase="Running"))["status"]["phase"] == "Running"


async def test_a_pods_deadline_can_be_set_and_lowered_and_neither_raised_nor_taken_away(place: Place) -> None:
    await place.pod()
    with_deadline = await place.patch(op("add", "/spec/activeDeadlineSeconds", 100))
    assert with_deadline["metadata"]["generation"] == 2
    await place.patch(op("replace", "/spec/activeDeadlineSeconds", 50))
    for operation in (op("replace", "/spec/activeDeadlineSeconds", 60), op("remove", "/spec/activeDeadlineSeconds")):
        with pytest.raises(Unprocessable):
            await place.patch(operation)


# -- the bind -------------------------------------------------------------------------------------------------------------------------


async def warm(place: Place, name: str = "one", *, owner: Json | None = None) -> Json:
    labels = {"voicepool.dev/pool": "pool", "voicepool.dev/state": "warm"}
    # With a finalizer it does not go at once when it is deleted.
    await place.pod(name, labels=labels, owner=owner, finalizers=[FINALIZER])
    return await ready(place, name, True)


async def ready(place: Place, name: str, is_ready: bool) -> Json:
    agent = {"name": "agent", "ready": is_ready, "state": {"running": {}}}
    agent |= {"image": "localhost/none:1", "imageID": "", "restartCount": 0}
    return await place.set_status(
        name, phase="Running", podIP="10.9.9.9", podIPs=[{"ip": "10.9.9.9"}], containerStatuses=[agent]
    )


async def bind(place: Place, seen: Json, session: str) -> Json:
    fact = pod_from_json(seen)
    assert fact is not None
    patch = bind_patch(
        fact,
        session_id=session,
        room=session,
        bound_at=datetime.now(UTC),
        bound_by="test",
        active_deadline_seconds=7200,
    )
    return await place.patch(*patch, name=fact.name)


async def test_a_pod_is_bound_once(place: Place) -> None:
    seen = await warm(place)
    bound = await bind(place, seen, "s1")
    assert bound["metadata"]["labels"]["voicepool.dev/state"] == "bound"
    assert bound["spec"]["activeDeadlineSeconds"] == 7200
    with pytest.raises(Unprocessable):
        await bind(place, seen, "s2")


async def test_a_bind_takes_the_owner_away(place: Place) -> None:
    seen = await warm(place, owner=await place.pool())
    assert "ownerReferences" in seen["metadata"]
    assert "ownerReferences" not in (await bind(place, seen, "s1"))["metadata"]


async def test_a_pod_that_is_no_longer_ready_is_not_bound(place: Place) -> None:
    seen = await warm(place)
    await ready(place, "one", False)
    with pytest.raises(Unprocessable):
        await bind(place, seen, "s1")


async def test_a_new_status_or_annotation_is_no_reason_against_a_bind(place: Place) -> None:
    seen = await warm(place)
    await place.set_status(message="still here")
    await place.merge({"metadata": {"annotations": {"touched": "yes"}}})
    await bind(place, seen, "s1")


async def test_whichever_of_bind_and_delete_comes_second_is_refused(place: Place) -> None:
    first = await warm(place, "first")
    await bind(place, first, "s1")
    with pytest.raises(Conflict):
        await place.delete(first)
    second = await warm(place, "second")
    await place.delete(second)
    assert "deletionTimestamp" in (await place.get("second"))["metadata"]
    with pytest.raises(Unprocessable):
        await bind(place, second, "s2")


# -- deletes --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [{"uid": "another"}, {"resource_version": "1"}])
async def test_a_delete_whose_precondition_does_not_hold_is_a_conflict(place: Place, wrong: dict[str, Any]) -> None:
    made = await place.pod()
    with pytest.raises(Conflict) as caught:
        await place.delete(made, **wrong)
    assert not isinstance(caught.value, AlreadyExists)
    assert version(await place.get()) == version(made)


async def test_a_delete_of_an_older_version_is_a_conflict(place: Place) -> None:
    made = await place.pod()
    await place.set_status(message="something happened")
    with pytest.raises(Conflict):
        await place.delete(made)


async def test_a_pod_without_a_node_is_gone_at_once(place: Place) -> None:
    await place.delete(await place.pod(), grace_period_seconds=30)
    assert await place.is_gone()


@pytest.mark.parametrize("phase", ["Succeeded", "Failed"])
async def test_a_pod_that_has_ended_is_gone_at_once(place: Place, phase: str) -> None:
    await place.pod(node="none")
    await place.delete(await place.set_status(phase=phase), grace_period_seconds=30)
    assert await place.is_gone()


async def test_a_pod_on_a_node_is_given_its_grace(place: Place) -> None:
    begun = datetime.now(UTC).replace(microsecond=0)
    await place.delete(await place.pod(node="none"))
    dying = await place.get()
    assert dying["metadata"]["deletionGracePeriodSeconds"] == 30
    assert begun <= time_of(dying, "deletionTimestamp") - timedelta(seconds=30) <= datetime.now(UTC)
    assert dying["metadata"]["generation"] == 2


async def test_a_grace_can_only_be_shortened(place: Place) -> None:
    await place.delete(await place.pod(node="none"), grace_period_seconds=60)
    dying = await place.get()
    for grace in (None, 60, 90):
        await place.delete(dying, grace_period_seconds=grace)
        assert version(await place.get()) == version(dying)
    await place.delete(dying, grace_period_seconds=10)
    shorter = await place.get()
    assert shorter["metadata"]["deletionGracePeriodSeconds"] == 10
    moved = time_of(dying, "deletionTimestamp") - time_of(shorter, "deletionTimestamp")
    assert moved == timedelta(seconds=50)
    assert shorter["metadata"]["generation"] == dying["metadata"]["generation"]
    await place.delete(shorter, grace_period_seconds=0)
    assert await place.is_gone()


@pytest.mark.parametrize("resource", [PODS, POOLS], ids=["pod", "pool"])
async def test_what_has_a_finalizer_is_marked_first_and_goes_with_the_last_one(
    place: Place, resource: Resource
) -> None:
    make: Callable[..., Any] = place.pod if resource == PODS else place.pool
    made = await make("one", finalizers=[FINALIZER, "example.org/second"])
    await place.delete(made, resource)
    dying = await place.get("one", resource)
    assert "deletionTimestamp" in dying["metadata"]
    assert dying["metadata"]["generation"] == 2
    await place.delete(dying, resource)
    assert version(await place.get("one", resource)) == version(dying)
    await place.merge({"metadata": {"finalizers": [FINALIZER]}}, "one", resource)
    assert "deletionTimestamp" in (await place.get("one", resource))["metadata"]
    await place.merge({"metadata": {"finalizers": None}}, "one", resource)
    assert await place.is_gone("one", resource)
    events = await place.told(3, made["metadata"]["resourceVersion"], resource=resource)
    assert [event.type for event in events] == ["MODIFIED", "MODIFIED", "DELETED"]


async def test_what_had_an_owner_goes_with_it_and_what_has_none_stays(place: Place) -> None:
    owner = await place.pool()
    owned = await place.pod("owned", owner=owner)
    await place.pod("released", owner=owner)
    await place.patch(op("remove", "/metadata/ownerReferences"), name="released")
    await place.pod("free")
    await place.delete(await place.get("pool", POOLS), POOLS)
    assert await place.is_gone("pool", POOLS)
    await first_event(
        place.api.watch(PODS, place.namespace, resource_version=owned["metadata"]["resourceVersion"]),
        lambda event: event.type == "DELETED" and event.object["metadata"]["name"] == "owned",
    )
    assert await place.names() == ["free", "released"]


# -- lists and watches ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("selector", "found"),
    [
        ("", "blue none red"),
        ("color=red", "red"),
        ("color==red", "red"),
        ("color!=red", "blue none"),
        ("color in (red,blue)", "blue red"),
        ("color in (red), size=big", "red"),
        ("color notin (red)", "blue none"),
        ("color", "blue red"),
        ("!color", "none"),
        ("color,size", "red"),
        ("color,!size", "blue"),
        ("example.org/name=x", "none"),
        ("color=", ""),
    ],
)
async def test_a_list_takes_a_label_selector(place: Place, selector: str, found: str) -> None:
    await place.pod("red", labels={"color": "red", "size": "big"})
    await place.pod("blue", labels={"color": "blue"})
    await place.pod("none", labels={"example.org/name": "x"})
    assert await place.names(selector) == found.split()


async def test_a_selector_that_is_none_is_refused(place: Place) -> None:
    with pytest.raises(Unprocessable):
        await place.names("color in red")


async def test_all_pages_of_a_list_show_one_moment(place: Place) -> None:
    made = [await place.pod(name) for name in ("a", "b", "c", "d", "e")]
    pages = [await place.api.list_page(PODS, place.namespace, limit=2)]
    await place.delete(made[3])
    await place.pod("f")
    while token := pages[-1]["metadata"].get("continue"):
        pages.append(await place.api.list_page(PODS, place.namespace, limit=2, continue_token=token))
    assert [names(page) for page in pages] == [["a", "b"], ["c", "d"], ["e"]]
    assert len({page["metadata"]["resourceVersion"] for page in pages}) == 1
    assert await place.names() == ["a", "b", "c", "e", "f"]


async def test_a_watch_tells_what_came_after_its_version(place: Place) -> None:
    await place.pool("before")
    page = await place.api.list_page(POOLS, place.namespace)
    made = await place.pool("after")
    changed = await place.set_status("after", POOLS, replicas=1)
    await place.delete(changed, POOLS)
    events = await place.told(3, page["metadata"]["resourceVersion"], resource=POOLS)
    assert [event.type for event in events] == ["ADDED", "MODIFIED", "DELETED"]
    assert {event.object["metadata"]["name"] for event in events} == {"after"}
    versions = [version(event.object) for event in events]
    assert versions[:2] == [version(made), version(changed)]
    assert versions[2] > version(changed)
    (last,) = await place.told(1, changed["metadata"]["resourceVersion"], resource=POOLS)
    assert last == events[2]


async def test_lists_and_watches_of_agent_pods_tell_what_their_facts_are_made_of(place: Place) -> None:
    made = await place.pod(labels={LABEL_POOL: "demo"}, node="n1")
    stored = await ready(place, "one", True)
    (event,) = await place.told(1, made["metadata"]["resourceVersion"], resource=AGENT_PODS)
    [listed] = (await place.api.list_page(AGENT_PODS, place.namespace))["items"]
    fact = pod_from_json(stored)
    assert fact is not None
    assert (fact.ready, fact.node, fact.pod_ip) == (True, "n1", "10.9.9.9")
    assert pod_from_json(event.object) == pod_from_json(listed) == fact


async def test_whoever_watches_a_label_is_told_when_an_object_begins_and_ceases_to_have_it(place: Place) -> None:
    made = await place.pool("one", labels={"color": "green"})
    last = made
    for color in ("red", "red", "blue", "blue", "red"):
        before, last = (
            last,
            await place.merge(
                {"metadata": {"labels": {"color": color, "step": last["metadata"]["resourceVersion"]}}}, "one", POOLS
            ),
        )
        if color == "blue" and before["metadata"]["labels"]["color"] == "red":
            ceased = last
    events = await place.told(4, made["metadata"]["resourceVersion"], "color=red", POOLS)
    assert [event.type for event in events] == ["ADDED", "MODIFIED", "DELETED", "ADDED"]
    assert events[2].object["metadata"]["labels"]["color"] == "red"
    assert version(events[2].object) == version(ceased)


@pytest.mark.parametrize("resource", [POOLS, AGENT_PODS], ids=["all fields", "some fields"])
async def test_a_watch_without_news_is_told_the_version_that_it_has_reached(place: Place, resource: Resource) -> None:
    made = await place.pool()
    told: list[WatchEvent] = []
    async with asyncio.timeout(LIMIT_SECONDS):
        # Shortly before its end; a busy server leaves it out.
        while not told:
            watch = place.api.watch(
                resource, place.namespace, resource_version=made["metadata"]["resourceVersion"], timeout_seconds=4
            )
            told = [event async for event in watch]
    assert {event.type for event in told} == {"BOOKMARK"}
    assert version(told[-1].object) >= version(made)


async def test_a_watch_from_before_the_history_is_gone(place: Place) -> None:
    await place.pool()
    await place.forget()
    watch = place.api.watch(POOLS, place.namespace, resource_version="1", timeout_seconds=4)
    try:
        answers = [(event.type, event.object.get("code")) async for event in watch]
    except Gone as error:
        answers = [("ERROR", error.status)]
    assert answers == [("ERROR", 410)]


async def test_no_error_is_without_its_status(place: Place) -> None:
    made = await place.pod()
    calls: list[tuple[int, Callable[[], Any]]] = [
        (404, lambda: place.get("absent")),
        (409, lambda: place.pod()),
        (409, lambda: place.delete(made, uid="another")),
        (422, lambda: place.patch(op("test", "/metadata/uid", "another"))),
    ]
    for status, call in calls:
        with pytest.raises(KubeApiError) as caught:
            await call()
        assert caught.value.status == status
