"""Which warm pod a gateway gives to whom, and what it counts for that."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from tests.unit.facts import bound, ended, pool, warm

from voicepool.gateway.allocator import Allocator
from voicepool.gateway.view import ClusterView
from voicepool.model import PodFact

KEY = ("calls", "demo")


def ready(number: int, node: str) -> PodFact:
    return warm(number, node=node, agent_status_index=0)


@pytest.fixture
def view() -> ClusterView:
    return ClusterView()


def allocator(view: ClusterView, **spec: Any) -> Allocator:
    view.pool_seen(pool(**spec))
    return Allocator(view, monotonic=lambda: 0.0, identity="one")


def given(allocator: Allocator, count: int) -> Counter[str | None]:
    pods = [allocator.take(KEY, f"session-{number}") for number in range(count)]
    return Counter(pod.node for pod in pods if pod is not None)


def test_a_nodes_calls_are_counted_from_the_bind_to_the_end(view: ClusterView) -> None:
    for seen, expected in (
        (ready(1, "a"), {}),
        (bound(1, node="a"), {"a": 1}),
        (bound(1, node="a", resource_version="900"), {"a": 1}),
        (ended(1, 1, node="a"), {}),
    ):
        view.pod_seen(seen)
        assert view.bound_on_node(KEY) == expected


def test_a_pod_that_is_gone_has_no_call(view: ClusterView) -> None:
    view.pod_seen(bound(1, node="a"))
    view.pod_seen(bound(2, node="a"))
    view.pod_gone("calls", bound(1).name)
    assert view.bound_on_node(KEY) == {"a": 1}
    view.pod_gone("calls", bound(2).name)
    assert view.bound_on_node(KEY) == {}


def test_packed_goes_on_where_calls_are(view: ClusterView) -> None:
    for number in range(6):
        view.pod_seen(ready(number, "ab"[number % 2]))
    view.pod_seen(bound(9, node="b"))
    assert given(allocator(view), 1) == {"b": 1}


def test_spread_counts_what_it_is_about_to_bind(view: ClusterView) -> None:
    for number in range(18):
        view.pod_seen(ready(number, "abc"[number % 3]))
    view.pod_seen(bound(18, node="a"))
    assert given(allocator(view, placement="Spread"), 2) == {"b": 1, "c": 1}


def test_a_pool_that_is_not_known_yet_is_packed(view: ClusterView) -> None:
    view.pod_seen(ready(1, "a"))
    assert given(Allocator(view, monotonic=lambda: 0.0, identity="one"), 2) == {"a": 1}
