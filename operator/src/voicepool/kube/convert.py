"""From the API server's JSON to facts. Total: whatever the API server stores becomes a fact, or None where it does not concern us."""

from __future__ import annotations

import dataclasses
import logging
import re
import sys
from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any, Required, TypedDict

from pydantic import ValidationError

from voicepool.disruption import BudgetFact, budget_name, budget_spec
from voicepool.kube.api import PODS, Json
from voicepool.model import (
    AGENT_CONTAINER,
    ANNOTATION_BOUND_AT,
    ANNOTATION_BOUND_BY,
    ANNOTATION_CALLER,
    ANNOTATION_COLD_START,
    ANNOTATION_DRAIN_SECONDS,
    ANNOTATION_DRAIN_UNTIL,
    ANNOTATION_ROOM,
    ANNOTATION_START_ATTEMPT,
    ANNOTATION_WAITED_SECONDS,
    LABEL_POOL,
    LABEL_SESSION,
    LABEL_STATE,
    LABEL_TEMPLATE,
    BindState,
    PodFact,
    PoolFact,
    VoiceAgentPoolSpec,
)

logger = logging.getLogger(__name__)

Conditions = Mapping[Any, Mapping[str, Any]]
"""The conditions of a pod by their types."""

ORDINARY_WAITING = frozenset({"ContainerCreating", "PodInitializing"})
"""Waiting reasons of a start that goes well."""

COMPLETED = "Completed"
GENERAL_REASONS = frozenset({COMPLETED, "Error", "ContainerStatusUnknown"})
"""A container's reasons for its end that say no more than its exit code."""

MAX_MESSAGE_CHARACTERS = 1024
SUMMARY_BEGINS = '{"session":'
"""A session's summary is kept whole: the gateway shows it, and Kubernetes lets it have 4096 bytes at most."""


class _Metadata(TypedDict, total=False):
    name: Any
    namespace: Any
    uid: Any
    resourceVersion: Any
    creationTimestamp: Any
    deletionTimestamp: Any
    labels: Any
    annotations: Any
    ownerReferences: Any


class _Spec(TypedDict, total=False):
    nodeName: Any


class _ContainerStatus(TypedDict, total=False):
    name: Any
    image: Any
    ready: Any
    restartCount: Any
    state: Any


class _Status(TypedDict, total=False):
    phase: Any
    reason: Any
    message: Any
    podIP: Any
    startTime: Any
    conditions: Any
    initContainerStatuses: list[_ContainerStatus] | None
    containerStatuses: list[_ContainerStatus] | None


class PodFields(TypedDict, total=False):
    """What :func:`pod_from_json` reads of a pod; the rest is skipped, and nothing of it is checked.

    Most of a pod is its containers and its ``managedFields``, which nobody here reads.
    """

    metadata: Required[_Metadata]
    spec: _Spec | None
    status: _Status | None


AGENT_PODS = dataclasses.replace(PODS, fields=PodFields)
"""Pods whose lists and watches hold the fields of :class:`PodFields`."""


def pool_from_json(obj: Json) -> PoolFact | None:
    """The fact of a ``VoiceAgentPool``; None (and a warning) where its spec cannot be read by this version of voicepool."""
    metadata = obj["metadata"]
    try:
        spec = VoiceAgentPoolSpec.model_validate(obj.get("spec") or {})
    except ValidationError as error:
        first = error.errors()[0]
        logger.warning(
            "this version of voicepool cannot read the pool and leaves it alone; install its CRD anew or upgrade",
            extra={
                "namespace": metadata.get("namespace"),
                "pool": metadata.get("name"),
                "field": ".".join(str(part) for part in first["loc"]),
                "error": first["msg"],
            },
        )
        return None
    return PoolFact(
        namespace=metadata["namespace"],
        name=metadata["name"],
        uid=metadata["uid"],
        resource_version=metadata["resourceVersion"],
        generation=metadata.get("generation", 0),
        spec=spec,
        status=obj.get("status") or {},
        deleting="deletionTimestamp" in metadata,
        labels=metadata.get("labels") or {},
    )


def pod_from_json(obj: Json) -> PodFact | None:
    """The fact of an agent pod; None for a pod without our pool label."""
    metadata = obj["metadata"]
    labels: Mapping[str, str] = metadata.get("labels") or {}
    annotations: Mapping[str, str] = metadata.get("annotations") or {}
    if LABEL_POOL not in labels:
        return None
    status = obj.get("status") or {}
    conditions = {condition.get("type"): condition for condition in status.get("conditions") or ()}
    container_statuses = status.get("containerStatuses") or []
    containers = [*(status.get("initContainerStatuses") or ()), *container_statuses]
    index = next((i for i, entry in enumerate(container_statuses) if entry.get("name") == AGENT_CONTAINER), None)
    agent = container_statuses[index] if index is not None else {}
    terminated = (agent.get("state") or {}).get("terminated")
    phase = status.get("phase", "Pending")
    # A pod that waits for one of its containers does not run, whatever the others do.
    ready = bool(agent.get("ready")) and phase == "Running" and not _is_cut_off(conditions)
    not_ready_since = _changed(conditions, "Ready", "False", "Unknown")
    agent_started_at = _time((terminated or (agent.get("state") or {}).get("running") or {}).get("startedAt"))
    waiting_reason, message, waiting_image = _waiting(conditions, containers)
    if terminated or phase in ("Failed", "Succeeded"):
        waiting_reason, message, waiting_image = None, _last_words(status, containers, terminated), None
    return PodFact(
        namespace=metadata["namespace"],
        name=metadata["name"],
        uid=metadata["uid"],
        resource_version=metadata["resourceVersion"],
        pool=labels[LABEL_POOL],
        # An unknown state is treated as bound: the safe side, since a bound pod is never touched.
        state=BindState.WARM if labels.get(LABEL_STATE) == BindState.WARM else BindState.BOUND,
        session=labels.get(LABEL_SESSION),
        template_hash=labels.get(LABEL_TEMPLATE, ""),
        phase=phase,
        ready=ready,
        agent_status_index=index,
        deleting="deletionTimestamp" in metadata,
        owned=bool(metadata.get("ownerReferences")),
        created_at=datetime.fromisoformat(metadata["creationTimestamp"]),
        started_at=_time(status.get("startTime")),
        finished_at=_finished_at(conditions, terminated, phase),
        pod_ip=status.get("podIP") or None,
        node=(obj.get("spec") or {}).get("nodeName"),
        room=annotations.get(ANNOTATION_ROOM),
        bound_by=annotations.get(ANNOTATION_BOUND_BY),
        bound_at=_time(annotations.get(ANNOTATION_BOUND_AT)),
        drain_seconds=_count(annotations.get(ANNOTATION_DRAIN_SECONDS)),
        drain_until=_time(annotations.get(ANNOTATION_DRAIN_UNTIL)),
        waited_seconds=_seconds(annotations.get(ANNOTATION_WAITED_SECONDS)),
        # Thousands of pods have one and the same.
        caller=sys.intern(annotations[ANNOTATION_CALLER]) if ANNOTATION_CALLER in annotations else None,
        cold_start=annotations.get(ANNOTATION_COLD_START),
        start_attempt=_count(annotations.get(ANNOTATION_START_ATTEMPT)),
        waiting_reason=waiting_reason,
        message=_shortened(message) if message else None,
        exit_code=terminated.get("exitCode") if terminated else None,
        not_ready_since=not_ready_since,
        ready_since=_changed(conditions, "Ready", "True"),
        agent_started_at=agent_started_at,
        # A pod that was never Ready has had the condition at False since before its containers started.
        once_ready=ready or bool(not_ready_since and agent_started_at and not_ready_since > agent_started_at),
        end_reason=_end_reason(status, conditions, terminated),
        progressed_at=_progressed_at(conditions, containers),
        waiting_image=waiting_image,
    )


def budget_from_json(obj: Json) -> BudgetFact | None:
    """The fact of a pool's PodDisruptionBudget; None for any other."""
    metadata = obj["metadata"]
    pool = (metadata.get("labels") or {}).get(LABEL_POOL)
    if pool is None or metadata["name"] != budget_name(pool):
        return None
    return BudgetFact(
        namespace=metadata["namespace"],
        name=metadata["name"],
        uid=metadata["uid"],
        resource_version=metadata["resourceVersion"],
        pool=pool,
        as_wanted=obj.get("spec") == budget_spec(pool),
    )


def _is_cut_off(conditions: Conditions) -> bool:
    """Whether a pod is not Ready although its containers are.

    Where a node is lost, its pods' Ready condition is all that is written of it. A readiness gate that is not met looks the same.
    """
    if conditions.get("Ready", {}).get("status", "True") == "True":
        return False
    return bool(conditions.get("ContainersReady", {}).get("status") == "True")


def _progressed_at(conditions: Conditions, containers: Iterable[Mapping[str, Any]]) -> datetime | None:
    """When a node took the pod or, later than that, the last of its containers began. One that is started again and again is no progress."""
    scheduled = conditions.get("PodScheduled", {})
    moments = [scheduled.get("lastTransitionTime")] if scheduled.get("status") == "True" else []
    for entry in containers:
        if not entry.get("restartCount"):
            state = entry.get("state") or {}
            moments.append((state.get("running") or state.get("terminated") or {}).get("startedAt"))
    # Kubernetes writes all of them alike, so the last one is the greatest text.
    return _time(max(filter(None, moments), default=None))


def _waiting(
    conditions: Conditions, containers: Iterable[Mapping[str, Any]]
) -> tuple[str | None, str | None, str | None]:
    """Why the pod does not start, the words for it, and the image of the container that holds it up, which may be any."""
    for entry in containers:
        waiting = (entry.get("state") or {}).get("waiting") or {}
        reason = waiting.get("reason")
        if reason and reason not in ORDINARY_WAITING:
            return reason, waiting.get("message"), entry.get("image")
    scheduled = conditions.get("PodScheduled", {})
    if scheduled.get("status") == "False":
        return scheduled.get("reason") or "Unschedulable", scheduled.get("message"), None
    return None, None, None


def _shortened(message: str) -> str:
    return message if message.startswith(SUMMARY_BEGINS) else message[:MAX_MESSAGE_CHARACTERS]


def _last_words(
    status: Mapping[str, Any], containers: Iterable[Mapping[str, Any]], terminated: Mapping[str, Any] | None
) -> str | None:
    """What is known of an end: the agent's termination message, another container's, the kubelet's reason, in this order."""
    if terminated and terminated.get("message"):
        return str(terminated["message"])
    for entry in containers:
        other = (entry.get("state") or {}).get("terminated") or {}
        if other.get("exitCode"):
            words = other.get("message") or other.get("reason")
            if words:
                return f"container {entry.get('name')}: {words}"
    own = (terminated or {}).get("reason")
    # Each process that exits with 0 gets that word; it says nothing of one that left none itself.
    return status.get("message") or status.get("reason") or (own if own != COMPLETED else None)


def _end_reason(status: Mapping[str, Any], conditions: Conditions, terminated: Mapping[str, Any] | None) -> str | None:
    """The most telling word: the pod's own, the container's, that of whoever had the pod go (Kubernetes gives such a pod no reason of its own)."""
    own = (terminated or {}).get("reason")
    target = conditions.get("DisruptionTarget", {})
    if target.get("status") == "True" and (own is None or own in GENERAL_REASONS):
        own = target.get("reason") or own
    return status.get("reason") or own


def _changed(conditions: Conditions, kind: str, *to: str) -> datetime | None:
    """When a condition became what it is, if that is one of ``to``."""
    condition = conditions.get(kind, {})
    return _time(condition.get("lastTransitionTime")) if condition.get("status") in to else None


def _finished_at(conditions: Conditions, terminated: Mapping[str, Any] | None, phase: str) -> datetime | None:
    if terminated:
        finished = _time(terminated.get("finishedAt"))
        if finished:
            return finished
    if phase not in ("Failed", "Succeeded"):
        return None
    # Evicted or lost with its node: no container says when, the conditions do.
    changes = [_time(condition.get("lastTransitionTime")) for condition in conditions.values()]
    return max((change for change in changes if change), default=None)


def _time(text: Any) -> datetime | None:
    try:
        moment = datetime.fromisoformat(text) if text else None
    except (TypeError, ValueError):
        return None
    return moment if moment and moment.tzinfo else None


def _count(text: str | None) -> int:
    return int(text) if text and text.isascii() and text.isdigit() and len(text) < 6 else 0


def _seconds(text: str | None) -> float | None:
    return float(text) if text and re.fullmatch(r"\d{1,6}(\.\d{1,6})?", text, re.ASCII) else None
