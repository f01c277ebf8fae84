"""What the simulated API server does beyond what is the same on a real one (``tests/cluster/test_conformance.py``)."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest

from voicepool.kube.api import PODS, POOLS, Gone, Json

from .server import Server

NOW = datetime(2026, 1, 1, tzinfo=UTC)
SPACE = "calls"


@pytest.fixture
def server() -> Server:
    return Server(lambda: NOW)


def put(server: Server, name: str = "one") -> Json:
    body = {"metadata": {"name": name, "annotations": {"kept": "yes"}}, "spec": {"containers": []}}
    return server.create(PODS, SPACE, body, "test")


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
