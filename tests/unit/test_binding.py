"""Who may be bound, in which order, with which patch."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from tests.unit.facts import NOW, OLD, TEMPLATE, bound, pod, warm

from voicepool.binding import (
    active_deadline_seconds,
    bind_patch,
    choose,
    drain_patch,
    is_candidate,
    take_over_patch,
)
from voicepool.model import Disruption, Placement, PodFact


def ready(number: int, **changes: Any) -> PodFact:
    return warm(number, **({"agent_status_index": 0} | changes))


def chosen(pods: list[PodFact], session: str = "s1", **how: Any) -> PodFact:
    ordinary: dict[str, Any] = {
        "template_hash": TEMPLATE.hash,
        "placement": Placement.PACKED,
        "taken_on_node": {},
        "in_flight": 0,
    }
    return choose(pods, session, **(ordinary | how))


def patch_of(one: PodFact, **how: Any) -> list[dict[str, Any]]:
    ordinary: dict[str, Any] = {
        "session_id": "s1",
        "room": "r1",
        "bound_at": NOW,
        "bound_by": "g-1",
        "active_deadline_seconds": 7290,
    }
    return bind_patch(one, **(ordinary | how))


@pytest.mark.parametrize(
    "unfit",
    [
        pod(1),
        bound(1),
        ready(1, ready=False),
        ready(1, deleting=True),
        ready(1, pod_ip=None),
        ready(1, agent_status_index=None),
        ready(1, phase="Failed"),
        ready(1, session="another-session"),
    ],
)
def test_only_a_ready_unbound_pod_is_a_candidate(unfit: PodFact) -> None:
    assert not is_candidate(unfit)
    assert is_candidate(ready(1))


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


def test_each_session_has_its_own_order_which_does_not_depend_on_the_other_pods() -> None:
    pods = [ready(number) for number in range(20)]
    assert chosen(pods) == chosen(list(reversed(pods)))
    assert len({chosen(pods, f"s{number}").name for number in range(50)}) > 10
    others = [one for one in pods if one != chosen(pods)]
    assert chosen(others) == chosen(list(reversed(others)))


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


def test_the_patch_tests_before_it_changes_anything() -> None:
    operations = patch_of(ready(1, agent_status_index=2))
    assert [operation["op"] for operation in operations[:4]] == ["test"] * 4
    assert "test" not in [operation["op"] for operation in operations[4:]]
    assert operations[:4] == [
        {"op": "test", "path": "/metadata/uid", "value": ready(1).uid},
        {"op": "test", "path": "/metadata/labels/voicepool.dev~1state", "value": "warm"},
        {"op": "test", "path": "/metadata/deletionTimestamp", "value": None},
        {"op": "test", "path": "/status/containerStatuses/2/ready", "value": True},
    ]


def test_the_patch_protects_the_pod_and_takes_it_from_its_owner() -> None:
    changes = {operation["path"]: operation.get("value") for operation in patch_of(ready(1))[4:]}
    assert changes["/metadata/labels/voicepool.dev~1state"] == "bound"
    assert changes["/metadata/labels/voicepool.dev~1session"] == "s1"
    assert changes["/metadata/annotations/cluster-autoscaler.kubernetes.io~1safe-to-evict"] == "false"
    assert changes["/metadata/annotations/karpenter.sh~1do-not-disrupt"] == "true"
    assert changes["/metadata/annotations/voicepool.dev~1room"] == "r1"
    assert changes["/spec/activeDeadlineSeconds"] == 7290
    assert changes["/metadata/managedFields"] == [{}]
    assert "/metadata/ownerReferences" in changes


def test_the_patch_says_by_what_the_call_may_be_evicted() -> None:
    safe = "/metadata/annotations/cluster-autoscaler.kubernetes.io~1safe-to-evict"
    stay = "/metadata/annotations/karpenter.sh~1do-not-disrupt"
    for policy, expected in (
        (Disruption.NEVER, ("false", "true")),
        (Disruption.ON_UPGRADE, ("false", "true")),
        (Disruption.ALWAYS, ("true", None)),
    ):
        changes = {operation["path"]: operation.get("value") for operation in patch_of(ready(1), disruption=policy)}
        assert (changes[safe], changes.get(stay)) == expected


def test_the_patch_carries_the_limit_for_the_time_when_the_pool_is_gone() -> None:
    path = "/metadata/annotations/voicepool.dev~1drain-seconds"
    assert [entry["value"] for entry in patch_of(ready(1), drain_seconds=90) if entry["path"] == path] == ["90"]
    assert not [entry for entry in patch_of(ready(1)) if entry["path"] == path]


def test_a_call_is_told_once_when_it_ends() -> None:
    path = "/metadata/annotations/voicepool.dev~1drain-until"
    assert drain_patch(bound(1, drain_seconds=90), NOW) == [
        {"op": "test", "path": "/metadata/uid", "value": bound(1).uid},
        {"op": "test", "path": path, "value": None},
        {"op": "add", "path": path, "value": "2026-03-01T12:01:30.000000Z"},
    ]


def test_an_end_is_taken_back_unless_another_one_has_been_written_since() -> None:
    path = "/metadata/annotations/voicepool.dev~1drain-until"
    assert take_over_patch(bound(1), NOW) == [
        {"op": "test", "path": "/metadata/uid", "value": bound(1).uid},
        {"op": "test", "path": path, "value": "2026-03-01T12:00:00.000000Z"},
        {"op": "remove", "path": path},
    ]


def test_a_pod_without_an_owner_has_none_to_remove() -> None:
    assert all(operation["op"] != "remove" for operation in patch_of(ready(1, owned=False)))


def test_there_is_no_patch_for_a_pod_that_is_not_ready() -> None:
    with pytest.raises(ValueError, match="not a Ready unbound pod"):
        patch_of(pod(1))


def test_the_deadline_counts_from_the_creation_of_the_pod() -> None:
    old = ready(1, created_at=NOW - timedelta(hours=3))
    fresh = replace(old, created_at=NOW)
    assert active_deadline_seconds(old, 600, NOW) - active_deadline_seconds(fresh, 600, NOW) == 3 * 3600
    assert active_deadline_seconds(fresh, 600, NOW) > 600


def test_a_clock_that_is_behind_does_not_shorten_a_session() -> None:
    ahead = ready(1, created_at=NOW + timedelta(minutes=5))
    assert active_deadline_seconds(ahead, 600, NOW) > 600


def test_the_patch_says_for_whom_it_is_where_somebody_is_counted() -> None:
    path = "/metadata/annotations/voicepool.dev~1caller"
    told = [operation for operation in patch_of(ready(1), caller="partner") if operation["path"] == path]
    assert told == [{"op": "add", "path": path, "value": "partner"}]
    assert path not in [operation["path"] for operation in patch_of(ready(1))]
