"""Which of the free pods a session gets."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from tests.unit.facts import OLD, TEMPLATE, ready

from voicepool.gateway.free_pods import FreePods
from voicepool.model import Placement, PodFact


def choice(free: FreePods, session: str = "s1", **how: Any) -> PodFact | None:
    ordinary: dict[str, Any] = {
        "template_hash": TEMPLATE.hash,
        "placement": Placement.PACKED,
        "taken_on_node": {},
        "in_flight": 0,
    }
    return free.choose(session, **(ordinary | how))


def chosen(pods: list[PodFact], session: str = "s1", **how: Any) -> PodFact:
    pod = choice(FreePods(pods), session, **how)
    assert pod is not None
    return pod


def test_a_pod_started_for_a_session_comes_first_for_that_session() -> None:
    mine = ready(7, cold_start="s1", template=OLD)
    assert chosen([*(ready(number) for number in range(5)), mine]) == mine


def test_the_newest_template_comes_first() -> None:
    pods = [ready(number, template=OLD) for number in range(10)] + [ready(1)]
    assert chosen(pods) == ready(1)


def test_without_a_pod_of_the_newest_template_or_without_knowing_it_any_will_do() -> None:
    old = [ready(number, template=OLD) for number in range(3)]
    assert chosen(old) in old
    pods = [*old, ready(9)]
    assert {chosen(pods, f"s{number}", template_hash=None).template_hash for number in range(50)} == {
        OLD,
        TEMPLATE.hash,
    }


def test_sessions_choose_differently_and_the_order_in_which_pods_came_does_not_matter() -> None:
    pods = [ready(number, node="ab"[number % 2]) for number in range(20)]
    for placement in Placement:
        assert chosen(pods, placement=placement) == chosen(list(reversed(pods)), placement=placement)
    assert len({chosen(pods, f"s{number}", placement=Placement.SPREAD).name for number in range(50)}) > 10


def test_each_free_pod_is_as_likely_as_any_other() -> None:
    pods = [ready(number) for number in range(10)]
    counts = Counter(chosen(pods, f"s{number}").uid for number in range(1_000))
    assert set(counts) == {pod.uid for pod in pods}
    assert max(counts.values()) < 2 * min(counts.values())


def test_a_pod_that_has_changed_is_there_once_as_it_is_now() -> None:
    free = FreePods([ready(1, node="a"), ready(2)])
    free.add(ready(1, node="b"))
    assert {pod.node for pod in free if pod.uid == ready(1).uid} == {"b"}
    assert len(free) == 2
    free.discard(ready(2).uid)
    free.discard(ready(2).uid)
    assert list(free) == [ready(1, node="b")]


def test_where_nothing_is_free_for_a_session_it_gets_nothing() -> None:
    free = FreePods([ready(1, cold_start="s1")])
    assert choice(free, "s2") is None
    assert choice(free, "s1") == ready(1, cold_start="s1")
    free.discard(ready(1).uid)
    assert choice(free, "s1") is None
    assert len(free) == 0


def on_nodes(**pods_of_node: int) -> list[PodFact]:
    """Warm pods: ``a=2`` is two on node a."""
    nodes = [node for node, count in pods_of_node.items() for _ in range(count)]
    return [ready(number, node=node) for number, node in enumerate(nodes)]


class TestPlacement:
    """Which node gets the call."""

    def nodes(self, pods: list[PodFact], **how: Any) -> set[str | None]:
        return {chosen(pods, f"s{number}", **how).node for number in range(60)}

    def test_packed_takes_the_node_with_most_calls(self) -> None:
        assert self.nodes(on_nodes(a=5, b=2, c=5), taken_on_node={"a": 1, "b": 3}) == {"b"}

    def test_packed_fills_equal_nodes_one_after_the_other(self) -> None:
        assert self.nodes(on_nodes(b=5, a=5)) == {"a"}

    def test_spread_takes_any_of_the_nodes_with_fewest_calls(self) -> None:
        taken = {"a": 1, "b": 3}
        assert self.nodes(on_nodes(a=5, b=2, c=5, d=5), taken_on_node=taken, placement=Placement.SPREAD) == {"c", "d"}

    def test_a_template_is_worth_more_than_a_place(self) -> None:
        pods = [ready(1, node="a", template=OLD), ready(2, node="b")]
        assert chosen(pods, taken_on_node={"a": 9}).node == "b"

    def test_the_more_binds_are_under_way_the_wider_is_the_choice(self) -> None:
        pods = on_nodes(a=4, b=4, c=4)
        assert [self.nodes(pods, in_flight=count) for count in (0, 1, 2, 9)] == [
            {"a"},
            {"a", "b"},
            {"a", "b", "c"},
            {"a", "b", "c"},
        ]

    @pytest.mark.parametrize("placement", Placement)
    def test_two_gateways_in_a_burst_seldom_choose_the_same_pod(self, placement: Placement) -> None:
        pods = on_nodes(**{f"node-{number}": 10 for number in range(10)})
        strict = sum(self._collisions(pods, placement, seed, widens=False) for seed in range(20))
        met = sum(self._collisions(pods, placement, seed, widens=True) for seed in range(20))
        # 20 bursts of two gateways with 10 calls each, so 200 pairs.
        assert met < 80
        if placement is Placement.PACKED:
            assert strict == 200

    def _collisions(self, pods: list[PodFact], placement: Placement, seed: int, *, widens: bool) -> int:
        taken: list[set[str]] = []
        for gateway in ("one", "two"):
            mine: list[PodFact] = []
            for call in range(10):
                free = [pod for pod in pods if pod not in mine]
                on_node = Counter(pod.node or "" for pod in mine)
                under_way = len(mine) if widens else 0
                how: dict[str, Any] = {"placement": placement, "taken_on_node": on_node, "in_flight": under_way}
                mine.append(chosen(free, f"{seed}-{gateway}-{call}", **how))
            taken.append({pod.uid for pod in mine})
        return len(taken[0] & taken[1])
