"""From the API server's JSON to facts."""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from voicepool.binding import is_candidate
from voicepool.kube.convert import PodFields, pod_from_json, pool_from_json
from voicepool.model import BindState, PodFact

CREATED = "2026-03-01T12:00:00Z"


def agent(state: dict[str, Any], *, ready: bool = False) -> dict[str, Any]:
    return {"name": "agent", "ready": ready, "state": state}


def read(whole: dict[str, Any]) -> dict[str, Any]:
    """What a list or watch keeps of an object."""
    return dict(msgspec.json.decode(json.dumps(whole), type=PodFields))


def pod(
    *statuses: dict[str, Any],
    labels: dict[str, str] | None = None,
    annotations: dict[str, str] | None = None,
    **status: Any,
) -> PodFact:
    whole = {
        "metadata": {
            "name": "demo-aaaaaaaa-0",
            "namespace": "calls",
            "uid": "u",
            "resourceVersion": "7",
            "creationTimestamp": CREATED,
            "labels": {"voicepool.dev/pool": "demo", "voicepool.dev/state": "warm"} | (labels or {}),
            "annotations": annotations or {},
            "managedFields": [{"manager": "kubelet", "operation": "Update"}],
        },
        "spec": {"containers": [{"name": "agent", "image": "agent:1"}], "nodeName": "n1"},
        "status": {"containerStatuses": list(statuses), **status},
    }
    fact = pod_from_json(whole)
    assert fact is not None
    assert pod_from_json(read(whole)) == fact, "what a watch reads of a pod must be all that the fact is made of"
    return fact


def test_a_pod_without_our_label_does_not_concern_us() -> None:
    assert pod_from_json({"metadata": {"name": "other"}}) is None


def test_a_warm_pod() -> None:
    running = {"running": {"startedAt": "2026-03-01T12:00:02Z"}}
    fact = pod(
        {"name": "proxy", "ready": True},
        agent(running, ready=True),
        phase="Running",
        podIP="10.0.0.1",
        startTime="2026-03-01T12:00:01Z",
        conditions=[{"type": "Ready", "status": "True", "lastTransitionTime": "2026-03-01T12:00:05Z"}],
    )
    assert fact.state is BindState.WARM
    assert (fact.ready, fact.agent_status_index, fact.pod_ip) == (True, 1, "10.0.0.1")
    assert fact.created_at == datetime(2026, 3, 1, 12, tzinfo=UTC)
    assert fact.started_at == datetime(2026, 3, 1, 12, 0, 1, tzinfo=UTC)
    assert fact.not_ready_since is None
    assert fact.ready_since == datetime(2026, 3, 1, 12, 0, 5, tzinfo=UTC)
    assert fact.once_ready
    assert fact.agent_started_at is not None
    assert not fact.finished
    assert (fact.waiting_reason, fact.message, fact.exit_code) == (None, None, None)


def test_a_pod_that_starts_as_it_should_waits_for_nothing() -> None:
    fact = pod(agent({"waiting": {"reason": "ContainerCreating"}}), phase="Pending")
    assert (fact.waiting_reason, fact.message) == (None, None)


def test_a_failed_pull_has_its_reason_and_words() -> None:
    fact = pod(agent({"waiting": {"reason": "ErrImagePull", "message": "not found"}}))
    assert (fact.waiting_reason, fact.message) == ("ErrImagePull", "not found")


def test_an_init_container_may_be_what_holds_it_up() -> None:
    waiting = {"name": "models", "state": {"waiting": {"reason": "ImagePullBackOff", "message": "no such image"}}}
    fact = pod(agent({"waiting": {"reason": "PodInitializing"}}), initContainerStatuses=[waiting])
    assert fact.waiting_reason == "ImagePullBackOff"


def test_the_image_of_the_container_that_waits_is_known() -> None:
    waiting = {"name": "proxy", "image": "proxy:2", "state": {"waiting": {"reason": "ErrImagePull"}}}
    assert pod(agent({"running": {}}, ready=True), waiting, phase="Pending").waiting_image == "proxy:2"
    assert pod(agent({"waiting": {"reason": "ContainerCreating"}}), phase="Pending").waiting_image is None


def test_a_pod_that_waits_for_another_container_is_not_ready() -> None:
    waiting = {"name": "proxy", "ready": False, "state": {"waiting": {"reason": "ErrImagePull"}}}
    began = {"type": "Ready", "status": "False", "lastTransitionTime": CREATED}
    running = agent({"running": {"startedAt": "2026-03-01T12:00:02Z"}}, ready=True)
    fact = pod(running, waiting, phase="Pending", conditions=[began])
    assert (fact.ready, fact.once_ready, fact.waiting_reason) == (False, False, "ErrImagePull")


RUNNING = agent({"running": {"startedAt": "2026-03-01T12:00:02Z"}}, ready=True)


@pytest.mark.parametrize(
    ("ready", "containers_ready", "is_ready"),
    [
        ("True", "True", True),
        ("False", "True", False),  # the node is lost, or a readiness gate is not met
        ("False", "False", True),  # another container is not ready; agents answer for themselves
        ("False", None, True),
        (None, None, True),
    ],
)
def test_a_pod_is_not_ready_where_only_its_containers_are(
    ready: str | None, containers_ready: str | None, is_ready: bool
) -> None:
    changed = "2026-03-01T12:09:00Z"
    told = (("Ready", ready), ("ContainersReady", containers_ready))
    conditions = [{"type": kind, "status": word, "lastTransitionTime": changed} for kind, word in told if word]
    fact = pod(RUNNING, phase="Running", podIP="10.0.0.1", conditions=conditions)
    assert fact.ready is is_ready
    assert is_candidate(fact) is is_ready
    assert fact.once_ready


def test_a_pod_with_a_readiness_gate_was_not_ready_before_it_opened() -> None:
    words = (("Ready", "False"), ("ContainersReady", "True"))
    conditions = [{"type": kind, "status": word, "lastTransitionTime": CREATED} for kind, word in words]
    assert not pod(RUNNING, phase="Running", conditions=conditions).once_ready


def test_what_brought_a_start_further_is_the_node_and_each_container_that_began() -> None:
    scheduled = {"type": "PodScheduled", "status": "True", "lastTransitionTime": "2026-03-01T12:10:00Z"}
    models = {"name": "models", "state": {"running": {"startedAt": "2026-03-01T12:20:00Z"}}}
    done = {"name": "models", "state": {"terminated": {"exitCode": 0, "startedAt": "2026-03-01T12:20:00Z"}}}
    begun = agent({"running": {"startedAt": "2026-03-01T12:30:00Z"}})
    again = {"name": "proxy", "restartCount": 7, "state": {"running": {"startedAt": "2026-03-01T12:40:00Z"}}}
    facts = [
        pod(conditions=[{**scheduled, "status": "False"}]),
        pod(conditions=[scheduled]),
        pod(conditions=[scheduled], initContainerStatuses=[models]),
        pod(conditions=[scheduled], initContainerStatuses=[done]),
        pod(begun, conditions=[scheduled], initContainerStatuses=[done, again]),
    ]
    minutes = [fact.progressed_at.minute if fact.progressed_at else None for fact in facts]
    assert minutes == [None, 10, 20, 20, 30]
    assert [fact.under_way_since.minute for fact in facts] == [0, 10, 20, 20, 30]


def test_an_unschedulable_pod_has_the_schedulers_words() -> None:
    condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/1 nodes"}
    fact = pod(conditions=[condition])
    assert (fact.waiting_reason, fact.message) == ("Unschedulable", "0/1 nodes")


def test_the_pods_own_reason_for_its_end_goes_before_the_containers() -> None:
    killed = {"exitCode": 137, "reason": "OOMKilled"}
    assert pod(agent({"terminated": killed}), phase="Failed").end_reason == "OOMKilled"
    evicted = pod(agent({"terminated": {"exitCode": 137, "reason": "Error"}}), phase="Failed", reason="Evicted")
    assert evicted.end_reason == "Evicted"
    assert pod(agent({"running": {}})).end_reason is None


@pytest.mark.parametrize(
    ("own", "status", "known"),
    [
        (None, "True", "DeletionByPodGC"),
        ("Error", "True", "DeletionByPodGC"),
        ("OOMKilled", "True", "OOMKilled"),
        ("Error", "False", "Error"),
    ],
)
def test_who_had_a_pod_go_is_known_where_the_kubelet_says_no_more_than_an_exit_code(
    own: str | None, status: str, known: str
) -> None:
    target = {"type": "DisruptionTarget", "status": status, "reason": "DeletionByPodGC"}
    state = {"terminated": {"exitCode": 137, "reason": own}} if own else {"running": {}}
    assert pod(agent(state), phase="Failed", conditions=[target]).end_reason == known
    assert pod(agent(state), phase="Failed", reason="Evicted", conditions=[target]).end_reason == "Evicted"


def test_a_process_that_exited_in_order_and_said_nothing_has_no_last_words() -> None:
    done = {"exitCode": 0, "reason": "Completed", "finishedAt": "2026-03-01T12:00:03Z"}
    bound = {"voicepool.dev/state": "bound"}
    assert pod(agent({"terminated": done}), phase="Succeeded", labels=bound).message is None


def test_a_failed_build_has_the_termination_message() -> None:
    terminated = {"exitCode": 1, "message": "GROQ_API_KEY is not set", "finishedAt": "2026-03-01T12:00:03Z"}
    fact = pod(agent({"terminated": terminated}), phase="Failed")
    assert fact.finished
    assert (fact.exit_code, fact.message) == (1, "GROQ_API_KEY is not set")
    assert fact.finished_at == datetime(2026, 3, 1, 12, 0, 3, tzinfo=UTC)
    assert not fact.once_ready


@pytest.mark.parametrize(
    ("status", "words"),
    [
        ({"reason": "Evicted", "message": "The node was low on memory"}, "The node was low on memory"),
        ({"reason": "DeadlineExceeded"}, "DeadlineExceeded"),
        ({}, "OOMKilled"),
    ],
)
def test_without_a_termination_message_the_kubelet_has_the_word(status: dict[str, Any], words: str) -> None:
    fact = pod(agent({"terminated": {"exitCode": 0, "reason": "OOMKilled"}}), phase="Failed", **status)
    assert fact.message == words


def test_a_failed_init_container_is_named() -> None:
    broken = {"name": "models", "state": {"terminated": {"exitCode": 2, "reason": "Error"}}}
    assert pod(initContainerStatuses=[broken], phase="Failed").message == "container models: Error"


def test_the_end_of_a_pod_that_no_container_knows_of_is_its_last_change() -> None:
    conditions = [
        {"type": "Ready", "status": "False", "lastTransitionTime": "2026-03-01T12:07:00Z"},
        {"type": "Initialized", "status": "True", "lastTransitionTime": "2026-03-01T12:00:00Z"},
    ]
    fact = pod(phase="Failed", conditions=conditions)
    assert fact.finished_at == datetime(2026, 3, 1, 12, 7, tzinfo=UTC)


def test_a_pod_whose_readiness_went_after_its_agent_had_started_was_ready() -> None:
    terminated = {"exitCode": 1, "startedAt": "2026-03-01T12:00:01Z", "finishedAt": "2026-03-01T12:30:00Z"}
    conditions = [{"type": "Ready", "status": "False", "lastTransitionTime": "2026-03-01T12:30:00Z"}]
    assert pod(agent({"terminated": terminated}), phase="Failed", conditions=conditions).once_ready


def test_a_pod_whose_readiness_never_changed_was_not() -> None:
    terminated = {"exitCode": 1, "startedAt": "2026-03-01T12:00:01Z", "finishedAt": "2026-03-01T12:00:09Z"}
    conditions = [{"type": "Ready", "status": "False", "lastTransitionTime": "2026-03-01T12:00:00Z"}]
    assert not pod(agent({"terminated": terminated}), phase="Failed", conditions=conditions).once_ready


def test_an_unknown_state_is_treated_as_bound() -> None:
    assert pod(labels={"voicepool.dev/state": "something"}).state is BindState.BOUND


def test_the_limit_of_a_call_whose_pool_is_gone() -> None:
    limits = {"voicepool.dev/drain-seconds": "90", "voicepool.dev/drain-until": "2026-03-01T12:01:30.000000Z"}
    fact = pod(annotations=limits)
    assert fact.drain_seconds == 90
    assert fact.drain_until == datetime(2026, 3, 1, 12, 1, 30, tzinfo=UTC)
    assert (pod().drain_seconds, pod().drain_until) == (0, None)


def test_what_the_bind_wrote() -> None:
    fact = pod(
        labels={"voicepool.dev/state": "bound", "voicepool.dev/session": "s"},
        annotations={"voicepool.dev/bound-at": "2026-03-01T12:00:00.123456Z", "voicepool.dev/room": "r"},
    )
    assert (fact.session, fact.room) == ("s", "r")
    assert fact.bound_at == datetime(2026, 3, 1, 12, 0, 0, 123456, tzinfo=UTC)


@pytest.mark.parametrize("text", ["", "x", "-1", "99999999", "٣"])
def test_a_start_attempt_that_is_no_number_counts_as_none(text: str) -> None:
    assert pod(annotations={"voicepool.dev/start-attempt": text}).start_attempt == 0


@given(st.text(), st.text())
def test_no_annotation_breaks_it(attempt: str, moment: str) -> None:
    fact = pod(annotations={"voicepool.dev/start-attempt": attempt, "voicepool.dev/bound-at": moment})
    assert fact.name == "demo-aaaaaaaa-0"


def test_a_long_message_is_cut() -> None:
    fact = pod(agent({"terminated": {"exitCode": 1, "message": "x" * 5000}}), phase="Failed")
    assert fact.message is not None
    assert len(fact.message) == 1024


def test_a_summary_is_kept_whole() -> None:
    summary = '{"session":"s-1","reason":"idle","errors":["' + "x" * 3000 + '"]}'
    fact = pod(agent({"terminated": {"exitCode": 0, "message": summary}}), phase="Succeeded")
    assert fact.message == summary


def pool_object(**spec: Any) -> dict[str, Any]:
    metadata = {"name": "demo", "namespace": "calls", "uid": "u", "resourceVersion": "7", "generation": 3}
    return {"metadata": metadata, "spec": {"template": {"spec": {}}, **spec}}


def test_a_pool() -> None:
    fact = pool_from_json(pool_object(replicas=4, session={"maxDurationSeconds": 99}))
    assert fact is not None
    assert (fact.spec.replicas, fact.spec.session.max_duration_seconds, fact.generation) == (4, 99, 3)
    assert not fact.deleting


def test_a_pool_of_another_version_is_left_alone_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert pool_from_json(pool_object(replicas=-1)) is None
    (record,) = caplog.records
    assert vars(record)["field"] == "replicas"
    assert json.dumps(vars(record)["pool"]) == '"demo"'


@pytest.mark.parametrize(
    ("written", "read"),
    [("0.012", 0.012), ("3", 3.0), (None, None), ("", None), ("-1", None), ("1e3", None), ("٣", None)],
)
def test_how_long_a_caller_waited_is_a_plain_number_or_not_known(written: str | None, read: float | None) -> None:
    annotations = {} if written is None else {"voicepool.dev/waited-seconds": written}
    fact = pod_from_json(
        {
            "metadata": {
                "namespace": "calls",
                "name": "demo",
                "uid": "u",
                "resourceVersion": "1",
                "creationTimestamp": "2026-03-01T12:00:00Z",
                "labels": {"voicepool.dev/pool": "demo"},
                "annotations": annotations,
            }
        }
    )
    assert fact is not None
    assert fact.waited_seconds == read


def test_callers_of_many_pods_are_kept_once() -> None:
    one, other = (pod(annotations={"voicepool.dev/caller": "-".join(["system", "partner"])}) for _ in range(2))
    assert one.caller == "system-partner"
    assert one.caller is other.caller
    assert pod().caller is None
