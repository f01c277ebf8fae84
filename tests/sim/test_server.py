"""The simulated API server has the semantics that the rest relies on."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest

from voicepool.kube.api import PODS, POOLS, AlreadyExists, Conflict, Gone, Json, NotFound, Unprocessable

from .server import Server, _event

NOW = datetime(2026, 1, 1, tzinfo=UTC)
SPACE = "calls"


@pytest.fixture
def server() -> Server:
    return Server(lambda: NOW)


def put(server: Server, name: str = "one", *, on_node: bool = False, **labels: str) -> Json:
    body = {"metadata": {"name": name, "labels": labels, "annotations": {"kept": "yes"}}, "spec": {"containers": []}}
    made = server.create(PODS, SPACE, body, "test")
    if on_node:
        server.change(
            PODS, (SPACE, name), made["metadata"]["uid"], "test", lambda pod: pod["spec"].update(nodeName="n")
        )
    return server.find(PODS, SPACE, name)


def patch(server: Server, *operations: Any, name: str = "one") -> Json:
    return server.json_patch(PODS, SPACE, name, operations, "test")


def op(kind: str, path: str, value: Any = None) -> dict[str, Any]:
    return {"op": kind, "path": path, "value": value}


def test_every_write_has_a_revision_of_its_own_and_a_write_of_nothing_has_none(server: Server) -> None:
    first = put(server)
    second = put(server, "two")
    assert int(second["metadata"]["resourceVersion"]) == int(first["metadata"]["resourceVersion"]) + 1
    same = patch(server, op("replace", "/metadata/annotations/kept", "yes"))
    assert same["metadata"]["resourceVersion"] == first["metadata"]["resourceVersion"]
    assert server.revision == 2


def test_a_name_is_taken_once_and_a_uid_is_never_used_again(server: Server) -> None:
    first = put(server)
    with pytest.raises(AlreadyExists):
        put(server)
    server.delete(PODS, SPACE, "one", "test")
    assert put(server)["metadata"]["uid"] != first["metadata"]["uid"]


def test_a_dry_run_stores_nothing(server: Server) -> None:
    server.create(PODS, SPACE, {"metadata": {"name": "one"}, "spec": {}}, "test", dry_run=True)
    assert server.revision == 0


def test_a_test_for_null_passes_where_the_key_is_missing_and_fails_on_a_dying_pod(server: Server) -> None:
    put(server, on_node=True)
    patch(server, op("test", "/metadata/deletionTimestamp"))
    server.delete(PODS, SPACE, "one", "test")
    with pytest.raises(Unprocessable):
        patch(server, op("test", "/metadata/deletionTimestamp"))


def test_a_patch_is_done_as_a_whole_or_not_at_all(server: Server) -> None:
    put(server)
    with pytest.raises(Unprocessable):
        patch(server, op("add", "/metadata/annotations/a", "b"), op("test", "/metadata/annotations/kept", "no"))
    assert "a" not in server.find(PODS, SPACE, "one")["metadata"]["annotations"]


@pytest.mark.parametrize("kind", ["replace", "remove"])
def test_what_is_not_there_can_be_neither_replaced_nor_removed(server: Server, kind: str) -> None:
    put(server)
    with pytest.raises(Unprocessable):
        patch(server, op(kind, "/metadata/ownerReferences"))


def test_a_pods_deadline_can_be_set_and_lowered_and_never_raised(server: Server) -> None:
    put(server)
    patch(server, op("add", "/spec/activeDeadlineSeconds", 100))
    patch(server, op("replace", "/spec/activeDeadlineSeconds", 50))
    with pytest.raises(Unprocessable):
        patch(server, op("replace", "/spec/activeDeadlineSeconds", 60))


def test_a_pods_spec_and_status_are_out_of_reach_of_a_patch(server: Server) -> None:
    put(server)
    with pytest.raises(Unprocessable):
        patch(server, op("add", "/spec/nodeName", "elsewhere"))
    assert patch(server, op("replace", "/status/phase", "Running"))["status"]["phase"] == "Pending"


@pytest.mark.parametrize("preconditions", [{"uid": "another"}, {"resource_version": "another"}])
def test_a_delete_with_a_precondition_that_does_not_hold_is_a_conflict(server: Server, preconditions: Any) -> None:
    put(server)
    with pytest.raises(Conflict):
        server.delete(PODS, SPACE, "one", "test", **preconditions)
    server.find(PODS, SPACE, "one")


def test_a_pod_on_a_node_is_told_to_go_and_one_without_is_gone(server: Server) -> None:
    put(server, "placed", on_node=True)
    put(server, "waiting")
    for name in ("placed", "waiting"):
        server.delete(PODS, SPACE, name, "test", grace_period_seconds=30)
    assert "deletionTimestamp" in server.find(PODS, SPACE, "placed")["metadata"]
    with pytest.raises(NotFound):
        server.find(PODS, SPACE, "waiting")


def test_the_garbage_collector_takes_only_what_has_owners_that_are_all_gone(server: Server) -> None:
    pool = server.create(POOLS, SPACE, {"metadata": {"name": "pool"}, "spec": {}}, "test")
    for name, owner in (("owned", pool["metadata"]["uid"]), ("orphan", "gone"), ("free", None)):
        put(server, name)
        if owner:
            patch(server, op("add", "/metadata/ownerReferences", [{"uid": owner}]), name=name)
    server.collect_garbage()
    assert [pod["metadata"]["name"] for pod in server.all(PODS)] == ["owned", "free"]
    server.delete(POOLS, SPACE, "pool", "test")
    server.collect_garbage()
    assert [pod["metadata"]["name"] for pod in server.all(PODS)] == ["free"]


def test_the_status_of_a_pool_is_a_resource_of_its_own(server: Server) -> None:
    server.create(POOLS, SPACE, {"metadata": {"name": "pool"}, "spec": {"replicas": 1}}, "test")
    body = {"spec": {"replicas": 2}, "status": {"replicas": 3}}
    by_status = server.merge_patch(POOLS, SPACE, "pool", body, "test", "status")
    assert (by_status["spec"]["replicas"], by_status["status"]["replicas"]) == (1, 3)
    assert by_status["metadata"]["generation"] == 1
    by_spec = server.merge_patch(POOLS, SPACE, "pool", {"spec": {"replicas": 2}}, "test", None)
    assert by_spec["metadata"]["generation"] == 2
    with pytest.raises(Conflict):
        server.merge_patch(POOLS, SPACE, "pool", {"metadata": {"uid": "another"}}, "test", "status")


def test_all_pages_of_a_list_show_one_moment_until_it_is_compacted(server: Server) -> None:
    for name in ("a", "b", "c"):
        put(server, name)
    page = server.list_page(PODS, SPACE, "", 2, "")
    token = page["metadata"]["continue"]
    server.delete(PODS, SPACE, "c", "test")
    rest = server.list_page(PODS, SPACE, "", 2, token)
    assert [pod["metadata"]["name"] for pod in rest["items"]] == ["c"]
    assert rest["metadata"] == {"resourceVersion": page["metadata"]["resourceVersion"]}
    server.compacted = server.revision
    with pytest.raises(Gone):
        server.list_page(PODS, SPACE, "", 2, token)


def test_an_old_list_shows_what_was(server: Server) -> None:
    put(server, "a")
    put(server, "b")
    server.delete(PODS, SPACE, "a", "test")
    names: Callable[[Json], list[str]] = lambda page: [pod["metadata"]["name"] for pod in page["items"]]  # noqa: E731
    assert names(server.list_page(PODS, SPACE, "", 10, "", at_revision=2)) == ["a", "b"]
    assert names(server.list_page(PODS, SPACE, "", 10, "")) == ["b"]


def test_whoever_watches_a_label_is_told_when_an_object_begins_and_ceases_to_have_it(server: Server) -> None:
    put(server, color="red")
    patch(server, op("replace", "/metadata/labels/color", "blue"))
    patch(server, op("replace", "/metadata/labels/color", "red"))
    server.delete(PODS, SPACE, "one", "test")
    events = [_event(change, PODS, SPACE, "color=red") for change in server.log]
    assert [event.type if event else None for event in events] == ["ADDED", "DELETED", "ADDED", "DELETED"]
    assert _event(server.log[0], PODS, "elsewhere", "") is None
