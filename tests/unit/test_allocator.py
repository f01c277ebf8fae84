"""Which warm pod a gateway gives to whom, and what it counts for that."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import example
from hypothesis import given as given_these
from hypothesis import strategies as st
from tests.unit.facts import bound, ended, pool, ready

from voicepool.gateway.allocator import LOST_SECONDS, Allocator
from voicepool.gateway.view import ClusterView
from voicepool.model import PodFact

KEY = ("calls", "demo")


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
        (ready(1, node="a"), {}),
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
        view.pod_seen(ready(number, node="ab"[number % 2]))
    view.pod_seen(bound(9, node="b"))
    assert given(allocator(view), 1) == {"b": 1}


def test_spread_counts_what_it_is_about_to_bind(view: ClusterView) -> None:
    for number in range(18):
        view.pod_seen(ready(number, node="abc"[number % 3]))
    view.pod_seen(bound(18, node="a"))
    assert given(allocator(view, placement="Spread"), 2) == {"b": 1, "c": 1}


def test_a_pool_that_is_not_known_yet_is_packed(view: ClusterView) -> None:
    view.pod_seen(ready(1, node="a"))
    assert given(Allocator(view, monotonic=lambda: 0.0, identity="one"), 2) == {"a": 1}


STATES = {
    "warm": lambda number: ready(number, node="ab"[number % 2]),
    "for a session": lambda number: replace(ready(number, node="a"), cold_start="s-1"),
    "not ready": lambda number: replace(ready(number, node="a"), ready=False),
    "bound": lambda number: bound(number, node="a"),
}
STEPS = st.tuples(st.sampled_from([*STATES, "gone", "take", "take", "release", "lose", "wait"]), st.integers(0, 99))


LOST_TWICE = [("warm", 0), ("warm", 1), ("take", 0), ("take", 1)]
LOST_TWICE += [("lose", 0), ("wait", 40), ("lose", 1), ("wait", 40), ("lose", 0), ("wait", 90)]


LOST_WHEN_GONE = [("for a session", 0), ("take", 1), ("gone", 0), ("lose", 0), ("gone", 0), ("for a session", 0)]


@example(LOST_TWICE)
@example(LOST_WHEN_GONE)
@given_these(st.lists(STEPS, min_size=30, max_size=60))
def test_free_is_what_is_warm_and_neither_reserved_nor_lost(steps: list[tuple[str, int]]) -> None:
    view, now = ClusterView(), 0.0
    here = Allocator(view, monotonic=lambda: now, identity="one")
    taken: list[PodFact] = []
    reserved: set[str] = set()
    lost: dict[str, float] = {}

    def take(session: str) -> PodFact | None:
        expected = {
            uid
            for uid, pod in view.warm(KEY).items()
            if uid not in reserved and now >= lost.get(uid, 0.0) and pod.cold_start in (None, session)
        }
        pod = here.take(KEY, session)
        assert (pod.uid in expected) if pod is not None else not expected
        if pod is not None:
            taken.append(pod)
            reserved.add(pod.uid)
        return pod

    for what, number in steps:
        if what in STATES or what == "gone":
            pod = STATES.get(what, STATES["warm"])(number % 4)
            # That a pod is gone is told once.
            told = what != "gone" or pod.uid in {known.uid for known in view.pods(KEY)}
            if what == "gone":
                view.pod_gone(pod.namespace, pod.name)
            else:
                view.pod_seen(pod)
            if told and pod.uid not in view.warm(KEY):
                # What was remembered of it has come true.
                reserved.discard(pod.uid)
                lost.pop(pod.uid, None)
        elif what == "take":
            take(f"s-{number % 3}")
        elif what == "wait":
            now += number / 4
        elif taken:
            pod = taken[number % len(taken)]
            reserved.discard(pod.uid)
            if what == "release":
                here.release(pod)
            else:
                here.lost(pod)
                lost[pod.uid] = now + LOST_SECONDS
    while take("s-1") is not None:
        pass
