"""Who may be bound, and with which patch."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from tests.unit.facts import NOW, bound, pod, ready

from voicepool.binding import (
    active_deadline_seconds,
    bind_patch,
    drain_patch,
    is_candidate,
    take_over_patch,
)
from voicepool.model import Disruption, PodFact


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
