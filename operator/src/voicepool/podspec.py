"""Builds the agent pod from a pool: pure, no I/O, no clock.

Invariants: what the template sets itself is kept; only names, state labels and ``restartPolicy`` are ours. The template hash covers everything that
makes a difference to the agent, also what is added here, so that a change of either is rolled out like a change of the template.
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from voicepool.disruption import SAFE_TO_EVICT
from voicepool.model import (
    AGENT_CONTAINER,
    AGENT_PORT,
    ANNOTATION_COLD_START,
    ANNOTATION_START_ATTEMPT,
    GROUP,
    KIND,
    LABEL_POOL,
    LABEL_STATE,
    LABEL_TEMPLATE,
    VERSION,
    BindState,
    PoolFact,
    RecordingSpec,
)

Json = dict[str, Any]

TEMPORARY_FOLDER = "/tmp"  # noqa: S108 - the folder inside the agent's container
TEMPORARY_VOLUME = "voicepool-tmp"
STOP_DELAY_SECONDS = 1
"""From a pod's deletion to the agent's SIGTERM. The kubelet may send it in the moment in which the container starts; the kernel drops it, since
process 1 has no handler yet, and the pod of a deleted pool would stay for its whole grace, which is as long as a call."""
STOP_DELAY = {"sleep": {"seconds": STOP_DELAY_SECONDS}}
GOODBYE_SECONDS = 60
"""Past the maximum duration of a session, for the agent to end it by itself."""


@dataclass(frozen=True, slots=True)
class PodSettings:
    """What every agent pod of this installation gets."""

    assignment_public_key: str
    """PEM of the Ed25519 key that assignments are verified with."""


def template_hash(pool: PoolFact, settings: PodSettings) -> str:
    """Eight hexadecimal digits that change when a new pod would differ from an old one."""
    pod = _body(pool, settings)
    canonical = json.dumps(pod, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:8]


_NUMBERED = re.compile(r".+-[0-9a-f]{8}-([0-9]{1,12})")


def pod_name(pool_name: str, hash_: str, number: int | str) -> str:
    """A name that two writers with the same view both choose, so that the second create is a harmless 409."""
    return f"{pool_name}-{hash_}-{number}"


def number_of(name: str) -> int | None:
    """The number in a pod's name; None for that of a cold start, and for a pod that somebody else has made."""
    found = _NUMBERED.fullmatch(name)
    return int(found[1]) if found else None


def cold_start_number(session_id: str, attempt: int = 0) -> str:
    """What stands for the number in the name of a pod that is started for one session, on each attempt another."""
    number = f"c{hashlib.sha256(session_id.encode()).hexdigest()[:10]}"
    return f"{number}x{attempt}" if attempt else number


def agent_image(pool: PoolFact) -> str:
    """The image of the container ``agent``, or an empty string."""
    for container in (pool.spec.template.get("spec") or {}).get("containers") or ():
        if container.get("name") == AGENT_CONTAINER:
            return str(container.get("image") or "")
    return ""


def build_pod(
    pool: PoolFact,
    number: int | str,
    hash_: str,
    settings: PodSettings,
    *,
    start_attempt: int = 0,
    cold_start: str | None = None,
) -> Json:
    """The pod to create.

    Args:
        pool: whose template it is.
        number: one that no pod of this pool has had; :func:`cold_start_number` for a cold start.
        hash_: from :func:`template_hash`.
        settings: what this installation adds.
        start_attempt: how many starts of this template failed in a row before this one.
        cold_start: the session that it is started for, when the pool was empty.
    """
    pod = _body(pool, settings)
    metadata = pod["metadata"]
    metadata["name"] = pod_name(pool.name, hash_, number)
    metadata["namespace"] = pool.namespace
    metadata["labels"][LABEL_TEMPLATE] = hash_
    # One annotation always: a JSON patch cannot add the first to a pod that has none.
    metadata["annotations"][ANNOTATION_START_ATTEMPT] = str(start_attempt)
    if cold_start is not None:
        metadata["annotations"][ANNOTATION_COLD_START] = cold_start
    metadata["ownerReferences"] = [
        {
            "apiVersion": f"{GROUP}/{VERSION}",
            "kind": KIND,
            "name": pool.name,
            "uid": pool.uid,
            "controller": True,
            "blockOwnerDeletion": False,
        }
    ]
    return pod


def _body(pool: PoolFact, settings: PodSettings) -> Json:
    """The pod without what tells it from its siblings."""
    template = copy.deepcopy(dict(pool.spec.template))
    template_metadata: Mapping[str, Any] = template.get("metadata") or {}
    spec: Json = template.get("spec") or {}
    spec["restartPolicy"] = "Never"
    spec.setdefault("automountServiceAccountToken", False)
    # A bound agent that is told to stop (a drain, kubectl delete) finishes its call first; an unbound one stops at once.
    if spec.get("terminationGracePeriodSeconds") is None:
        spec["terminationGracePeriodSeconds"] = pool.spec.session.max_duration_seconds + GOODBYE_SECONDS
    containers: list[Json] = spec.get("containers") or []
    for container in containers:
        if container.get("name") == AGENT_CONTAINER:
            _complete_agent(container, spec, pool, settings)
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "labels": {
                **(template_metadata.get("labels") or {}),
                LABEL_POOL: pool.name,
                LABEL_STATE: BindState.WARM.value,
            },
            # An agent that waits must not keep a node; its /tmp alone would, as far as the Cluster Autoscaler knows. The bind turns this round.
            "annotations": {SAFE_TO_EVICT: "true", **(template_metadata.get("annotations") or {})},
        },
        "spec": spec,
    }


def _complete_agent(container: Json, spec: Json, pool: PoolFact, settings: PodSettings) -> None:
    ports: list[Json] = container.setdefault("ports", [])
    if not any(port.get("containerPort") == AGENT_PORT or port.get("name") == "agent" for port in ports):
        ports.append({"name": "agent", "containerPort": AGENT_PORT, "protocol": "TCP"})
    container.setdefault("readinessProbe", {"httpGet": {"path": "/readyz", "port": AGENT_PORT}, "periodSeconds": 1})
    container.setdefault(
        "livenessProbe",
        {
            "httpGet": {"path": "/livez", "port": AGENT_PORT},
            # Until then the deadline decides: a bot may load its models without answering.
            "initialDelaySeconds": pool.spec.startup.deadline_seconds,
            "periodSeconds": 10,
            "timeoutSeconds": 5,
            "failureThreshold": 3,
            # An agent that hangs cannot finish a call: the pod's long grace is not for it. Where the pod has no other container the
            # kubelet takes that grace all the same; the agent's own watchdog is quicker.
            "terminationGracePeriodSeconds": 10,
        },
    )
    before_stop = container.setdefault("lifecycle", {}).setdefault("preStop", STOP_DELAY)
    # Kubernetes counts it into the grace; how long another handler takes is not known.
    grace_seconds = spec["terminationGracePeriodSeconds"] - (STOP_DELAY_SECONDS if before_stop == STOP_DELAY else 0)
    environment: list[Json] = container.setdefault("env", [])
    own = {variable.get("name") for variable in environment}
    environment.extend(
        variable for variable in _environment(pool, grace_seconds, settings) if variable["name"] not in own
    )
    security: Json = container.setdefault("securityContext", {})
    pod_security: Mapping[str, Any] = spec.get("securityContext") or {}
    for field, value in (
        ("runAsNonRoot", True),
        ("allowPrivilegeEscalation", False),
        ("capabilities", {"drop": ["ALL"]}),
        ("readOnlyRootFilesystem", True),
        ("seccompProfile", {"type": "RuntimeDefault"}),
    ):
        # A container's value would override the pod's, which the user has set on purpose.
        if field not in pod_security:
            security.setdefault(field, value)
    mounts: list[Json] = container.setdefault("volumeMounts", [])
    if not any(mount.get("mountPath") == TEMPORARY_FOLDER for mount in mounts):
        mounts.append({"name": TEMPORARY_VOLUME, "mountPath": TEMPORARY_FOLDER})
        volumes: list[Json] = spec.setdefault("volumes", [])
        if not any(volume.get("name") == TEMPORARY_VOLUME for volume in volumes):
            volumes.append({"name": TEMPORARY_VOLUME, "emptyDir": {}})


def _environment(pool: PoolFact, grace_seconds: int, settings: PodSettings) -> list[Json]:
    def from_field(name: str, path: str) -> Json:
        return {"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}}

    session = pool.spec.session
    return [
        from_field("VOICEPOOL_POD_NAME", "metadata.name"),
        from_field("VOICEPOOL_POD_UID", "metadata.uid"),
        from_field("VOICEPOOL_POD_NAMESPACE", "metadata.namespace"),
        {"name": "VOICEPOOL_POOL", "value": pool.name},
        {"name": "VOICEPOOL_ASSIGNMENT_PUBLIC_KEY", "value": settings.assignment_public_key},
        {"name": "VOICEPOOL_WARMTH", "value": pool.spec.warmth.value},
        {"name": "VOICEPOOL_SESSION_MAX_DURATION_SECONDS", "value": str(session.max_duration_seconds)},
        {"name": "VOICEPOOL_SESSION_JOIN_TIMEOUT_SECONDS", "value": str(session.join_timeout_seconds)},
        {"name": "VOICEPOOL_SESSION_IDLE_TIMEOUT_SECONDS", "value": str(session.idle_timeout_seconds)},
        {"name": "VOICEPOOL_TERMINATION_GRACE_SECONDS", "value": str(max(0, grace_seconds))},
        *_recording(session.recording),
    ]


def _recording(recording: RecordingSpec) -> list[Json]:
    if not recording.audio and not recording.transcript:
        return []
    return [
        {"name": "VOICEPOOL_RECORDING_AUDIO", "value": str(recording.audio).lower()},
        {"name": "VOICEPOOL_RECORDING_TRANSCRIPT", "value": str(recording.transcript).lower()},
        {"name": "VOICEPOOL_RECORDING_PATH", "value": recording.path},
    ]
