"""The pod that is made from a pool."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from tests.unit.facts import pool

from voicepool.podspec import PodSettings, agent_image, build_pod, template_hash

SETTINGS = PodSettings(assignment_public_key="-----BEGIN PUBLIC KEY-----")


def template(agent: dict[str, Any] | None = None, **parts: Any) -> dict[str, Any]:
    """A pod template; ``agent`` adds to the container agent, ``spec`` and ``metadata`` to theirs."""
    spec = {"containers": [{"name": "agent", "image": "example.org/agent:1", **(agent or {})}], **parts.pop("spec", {})}
    return {"spec": spec, **parts}


def built(agent: dict[str, Any] | None = None, **parts: Any) -> dict[str, Any]:
    return build_pod(pool(template=template(agent, **parts)), 3, "aaaaaaaa", SETTINGS, start_attempt=2)


def agent_of(pod: dict[str, Any]) -> dict[str, Any]:
    (container,) = (entry for entry in pod["spec"]["containers"] if entry["name"] == "agent")
    return dict(container)


def test_the_whole_pod() -> None:
    assert built() == {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": "demo-aaaaaaaa-3",
            "namespace": "calls",
            "labels": {
                "voicepool.dev/pool": "demo",
                "voicepool.dev/state": "warm",
                "voicepool.dev/template": "aaaaaaaa",
            },
            "annotations": {
                "cluster-autoscaler.kubernetes.io/safe-to-evict": "true",
                "voicepool.dev/start-attempt": "2",
            },
            "ownerReferences": [
                {
                    "apiVersion": "voicepool.dev/v1alpha1",
                    "kind": "VoiceAgentPool",
                    "name": "demo",
                    "uid": "pool-uid",
                    "controller": True,
                    "blockOwnerDeletion": False,
                }
            ],
        },
        "spec": {
            "restartPolicy": "Never",
            "automountServiceAccountToken": False,
            "terminationGracePeriodSeconds": 7260,
            "containers": [
                {
                    "name": "agent",
                    "image": "example.org/agent:1",
                    "ports": [{"name": "agent", "containerPort": 8080, "protocol": "TCP"}],
                    "readinessProbe": {"httpGet": {"path": "/readyz", "port": 8080}, "periodSeconds": 1},
                    "livenessProbe": {
                        "httpGet": {"path": "/livez", "port": 8080},
                        "initialDelaySeconds": 120,
                        "periodSeconds": 10,
                        "timeoutSeconds": 5,
                        "failureThreshold": 3,
                        "terminationGracePeriodSeconds": 10,
                    },
                    "lifecycle": {"preStop": {"sleep": {"seconds": 1}}},
                    "env": [
                        {"name": "VOICEPOOL_POD_NAME", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
                        {"name": "VOICEPOOL_POD_UID", "valueFrom": {"fieldRef": {"fieldPath": "metadata.uid"}}},
                        {
                            "name": "VOICEPOOL_POD_NAMESPACE",
                            "valueFrom": {"fieldRef": {"fieldPath": "metadata.namespace"}},
                        },
                        {"name": "VOICEPOOL_POOL", "value": "demo"},
                        {"name": "VOICEPOOL_ASSIGNMENT_PUBLIC_KEY", "value": "-----BEGIN PUBLIC KEY-----"},
                        {"name": "VOICEPOOL_WARMTH", "value": "Built"},
                        {"name": "VOICEPOOL_SESSION_MAX_DURATION_SECONDS", "value": "7200"},
                        {"name": "VOICEPOOL_SESSION_JOIN_TIMEOUT_SECONDS", "value": "30"},
                        {"name": "VOICEPOOL_SESSION_IDLE_TIMEOUT_SECONDS", "value": "300"},
                        {"name": "VOICEPOOL_TERMINATION_GRACE_SECONDS", "value": "7259"},
                    ],
                    "securityContext": {
                        "runAsNonRoot": True,
                        "allowPrivilegeEscalation": False,
                        "capabilities": {"drop": ["ALL"]},
                        "readOnlyRootFilesystem": True,
                        "seccompProfile": {"type": "RuntimeDefault"},
                    },
                    "volumeMounts": [{"name": "voicepool-tmp", "mountPath": "/tmp"}],
                }
            ],
            "volumes": [{"name": "voicepool-tmp", "emptyDir": {}}],
        },
    }


@pytest.mark.parametrize(("grace", "whole", "told"), [(45, 45, "44"), (None, 7260, "7259"), (0, 0, "0")])
def test_the_agent_is_told_what_is_left_of_the_grace_of_its_template_when_it_is_told_to_stop(
    grace: int | None, whole: int, told: str
) -> None:
    pod = built(spec={"terminationGracePeriodSeconds": grace})
    assert pod["spec"]["terminationGracePeriodSeconds"] == whole
    assert {"name": "VOICEPOOL_TERMINATION_GRACE_SECONDS", "value": told} in agent_of(pod)["env"]


def test_a_handler_of_the_templates_own_is_taken_for_one_that_takes_no_time() -> None:
    own = {"postStart": {"exec": {"command": ["true"]}}, "preStop": {"exec": {"command": ["true"]}}}
    pod = built({"lifecycle": own}, spec={"terminationGracePeriodSeconds": 45})
    assert agent_of(pod)["lifecycle"] == own
    assert {"name": "VOICEPOOL_TERMINATION_GRACE_SECONDS", "value": "45"} in agent_of(pod)["env"]


def test_the_agent_is_told_how_far_to_go_before_it_waits() -> None:
    (agent,) = build_pod(pool(warmth="Imported"), 0, "aaaaaaaa", SETTINGS)["spec"]["containers"]
    assert {"name": "VOICEPOOL_WARMTH", "value": "Imported"} in agent["env"]


def test_the_agent_is_told_what_to_write_down_and_where() -> None:
    recording = {"audio": True, "transcript": False, "path": "/data/calls"}
    pod = build_pod(pool(session={"recording": recording}), 0, "aaaaaaaa", SETTINGS)
    environment = {one["name"]: one.get("value") for one in agent_of(pod)["env"]}
    assert environment["VOICEPOOL_RECORDING_AUDIO"] == "true"
    assert environment["VOICEPOOL_RECORDING_TRANSCRIPT"] == "false"
    assert environment["VOICEPOOL_RECORDING_PATH"] == "/data/calls"


def test_a_pool_that_writes_nothing_down_has_the_pods_that_it_had_before_one_could() -> None:
    assert [one["name"] for one in agent_of(built())["env"] if "RECORDING" in one["name"]] == []
    elsewhere = pool(session={"recording": {"path": "/data/calls"}})
    assert template_hash(elsewhere, SETTINGS) == template_hash(pool(), SETTINGS)


def test_a_cold_start_names_its_session() -> None:
    pod = build_pod(pool(), 0, "aaaaaaaa", SETTINGS, cold_start="session-1")
    assert pod["metadata"]["annotations"]["voicepool.dev/cold-start"] == "session-1"


def test_what_the_template_sets_is_kept() -> None:
    own: dict[str, Any] = {
        "ports": [{"name": "agent", "containerPort": 8080}],
        "readinessProbe": {"exec": {"command": ["true"]}},
        "livenessProbe": {"exec": {"command": ["true"]}},
        "lifecycle": {"preStop": {"exec": {"command": ["true"]}}},
        "env": [{"name": "VOICEPOOL_SESSION_IDLE_TIMEOUT_SECONDS", "value": "9"}],
        "securityContext": {"readOnlyRootFilesystem": False},
        "volumeMounts": [{"name": "mine", "mountPath": "/tmp"}],
    }
    pod = built(own, spec={"automountServiceAccountToken": True})
    agent = agent_of(pod)
    for field in ("ports", "readinessProbe", "livenessProbe", "lifecycle", "volumeMounts"):
        assert agent[field] == own[field]
    assert [entry["value"] for entry in agent["env"] if entry["name"].endswith("IDLE_TIMEOUT_SECONDS")] == ["9"]
    assert agent["securityContext"]["readOnlyRootFilesystem"] is False
    assert agent["securityContext"]["runAsNonRoot"] is True
    assert pod["spec"]["automountServiceAccountToken"] is True
    assert "volumes" not in pod["spec"]


def test_a_security_setting_of_the_whole_pod_is_not_overridden() -> None:
    pod = built(spec={"securityContext": {"runAsNonRoot": False}})
    assert "runAsNonRoot" not in agent_of(pod)["securityContext"]


def test_a_volume_of_that_name_is_used() -> None:
    volume = {"name": "voicepool-tmp", "emptyDir": {"medium": "Memory"}}
    assert built(spec={"volumes": [volume]})["spec"]["volumes"] == [volume]


def test_labels_and_annotations_of_the_template_are_added() -> None:
    pod = built(metadata={"labels": {"team": "sales"}, "annotations": {"note": "x"}})
    assert pod["metadata"]["labels"]["team"] == "sales"
    assert pod["metadata"]["annotations"]["note"] == "x"


def test_other_containers_are_left_as_they_are() -> None:
    sidecar = {"name": "proxy", "image": "example.org/proxy:1"}
    pod = built(spec={"containers": [sidecar, {"name": "agent", "image": "example.org/agent:1"}]})
    assert pod["spec"]["containers"][0] == sidecar


def test_building_does_not_touch_the_pool() -> None:
    of = pool(template=template({"env": []}))
    before = repr(of.spec.template)
    build_pod(of, 0, "aaaaaaaa", SETTINGS)
    assert repr(of.spec.template) == before


def test_the_hash_is_eight_digits_and_stays() -> None:
    first = template_hash(pool(), SETTINGS)
    assert len(first) == 8
    assert int(first, 16) >= 0
    assert template_hash(pool(replicas=7, max_pods=9, on_empty={"timeout_seconds": 9}), SETTINGS) == first


@pytest.mark.parametrize(
    "changes",
    [
        {"template": template({"image": "example.org/agent:2"})},
        {"template": template(metadata={"annotations": {"a": "b"}})},
        {"session": {"max_duration_seconds": 61}},
        {"session": {"join_timeout_seconds": 61}},
        {"session": {"idle_timeout_seconds": 61}},
        {"session": {"recording": {"transcript": True}}},
        {"warmth": "Started"},
    ],
)
def test_the_hash_changes_with_whatever_the_agent_would_notice(changes: dict[str, Any]) -> None:
    assert template_hash(pool(**changes), SETTINGS) != template_hash(pool(), SETTINGS)


def test_the_hash_changes_with_the_key() -> None:
    other = dataclasses.replace(SETTINGS, assignment_public_key="other")
    assert template_hash(pool(), other) != template_hash(pool(), SETTINGS)


def test_the_image_is_that_of_the_agent() -> None:
    assert agent_image(pool()) == "example.org/agent:1"
    assert agent_image(pool(template={"spec": {"containers": [{"name": "other", "image": "x"}]}})) == ""
    assert agent_image(pool(template={"spec": {"containers": [{"name": "agent"}]}})) == ""
