"""Who may be bound, in which order, with which patch."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from tests.unit.facts import NOW, OLD, TEMPLATE, bound, pod, warm

from voicepool.binding import active_deadline_seconds, bind_patch, candidates
from voicepool.model import PodFact


def ready(number: int, **changes: Any) -> PodFact:
    return warm(number, **({"agent_status_index": 0} | changes))


def names(pods: list[PodFact], session: str = "s1", template_hash: str | None = TEMPLATE.hash) -> list[str]:
    return [one.name for one in candidates(pods, session, namespace="calls", pool="demo", template_hash=template_hash)]


def patch_of(one: PodFact) -> list[dict[str, Any]]:
    return bind_patch(one, session_id="s1", room="r1", bound_at=NOW, bound_by="gateway-1", active_deadline_seconds=7290)


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
        ready(1, namespace="elsewhere"),
        ready(1, pool="other"),
        ready(1, cold_start="another-session"),
    ],
)
def test_only_a_ready_unbound_pod_of_the_pool_is_a_candidate(unfit: PodFact) -> None:
    assert names([unfit]) == []
    assert names([unfit, ready(2)]) == [ready(2).name]


def test_a_pod_started_for_a_session_comes_first_for_that_session() -> None:
    mine = ready(7, cold_start="s1", template=OLD)
    assert names([*(ready(number) for number in range(5)), mine])[0] == mine.name


def test_the_newest_template_comes_first() -> None:
    pods = [ready(number, template=OLD) for number in range(10)] + [ready(1)]
    assert names(pods)[0] == ready(1).name


def test_each_session_has_its_own_order_which_does_not_depend_on_the_other_pods() -> None:
    pods = [ready(number) for number in range(20)]
    assert names(pods) == names(list(reversed(pods)))
    assert len({names(pods, f"s{number}")[0] for number in range(50)}) > 10
    second = names(pods)[1]
    assert names([one for one in pods if one.name != names(pods)[0]])[0] == second


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
    assert "/metadata/ownerReferences" in changes


def test_a_pod_without_an_owner_has_none_to_remove() -> None:
    assert all(operation["op"] != "remove" for operation in patch_of(ready(1, owned=False)))


def test_there_is_no_patch_for_a_pod_that_is_not_ready() -> None:
    with pytest.raises(ValueError, match="not a Ready unbound pod"):
        patch_of(pod(1))


def test_the_deadline_counts_from_the_start_of_the_pod() -> None:
    old = ready(1, started_at=NOW - timedelta(hours=3))
    fresh = replace(old, started_at=NOW)
    assert active_deadline_seconds(old, 600, NOW) - active_deadline_seconds(fresh, 600, NOW) == 3 * 3600
    assert active_deadline_seconds(fresh, 600, NOW) > 600


def test_a_clock_that_is_behind_does_not_shorten_a_session() -> None:
    ahead = ready(1, started_at=NOW + timedelta(minutes=5))
    assert active_deadline_seconds(ahead, 600, NOW) > 600
