"""Who may be bound, and with which one patch. Pure: a pod and a session in, a patch out.

Invariants: only a Ready, unbound pod that is not being deleted is a candidate, never "the next best"; the patch itself tests all of that again on
the API server, so a stale view can lose a race but never hand out a pod twice, a dying pod, or one whose agent is not Ready.
"""

from __future__ import annotations

import math
from datetime import UTC, datetime, timedelta
from typing import Any

from voicepool.disruption import protection
from voicepool.model import (
    ANNOTATION_BOUND_AT,
    ANNOTATION_BOUND_BY,
    ANNOTATION_CALLER,
    ANNOTATION_DRAIN_SECONDS,
    ANNOTATION_DRAIN_UNTIL,
    ANNOTATION_ROOM,
    ANNOTATION_WAITED_SECONDS,
    LABEL_SESSION,
    LABEL_STATE,
    BindState,
    Disruption,
    PodFact,
)

Operation = dict[str, Any]

ACTIVE_DEADLINE_MARGIN_SECONDS = 60
"""The agent ends its session by itself at the maximum duration and says goodbye; Kubernetes comes a little later, for an agent that does not."""

DELIVERY_DEADLINE_SECONDS = 20.0
"""No assignment for a pod is good for longer after its bind. From then on an agent that says that it is parked will never have that session, whoever
asks, and whatever a gateway does that was frozen in between. Less than a start may take: a caller with a key whose gateway died waits that long elsewhere."""


def is_candidate(pod: PodFact) -> bool:
    """Whether a pod can take a caller now."""
    return (
        pod.state is BindState.WARM
        and pod.ready
        and pod.phase == "Running"
        and not pod.deleting
        and pod.session is None
        and pod.pod_ip is not None
        and pod.agent_status_index is not None
    )


def active_deadline_seconds(pod: PodFact, max_duration_seconds: int, now: datetime) -> int:
    """``spec.activeDeadlineSeconds`` for a session of at most ``max_duration_seconds`` that begins now.

    Kubernetes counts from ``status.startTime``, not from the bind, so the pod's age is added. A deadline can be lowered later, never raised.
    The age is taken from the creation: ``startTime`` is by the clock of a node, and were that ahead, the deadline would cut the session. What it
    costs is that a pod which waited for a node is stopped that much later, if its agent does not end the session itself.

    Args:
        pod: to be bound.
        max_duration_seconds: of the session.
        now: by the API server's clock, as the creation is.
    """
    age_seconds = max(0.0, (now - pod.created_at).total_seconds())
    return math.ceil(age_seconds) + max_duration_seconds + ACTIVE_DEADLINE_MARGIN_SECONDS


def bind_patch(
    pod: PodFact,
    *,
    session_id: str,
    room: str,
    bound_at: datetime,
    bound_by: str,
    active_deadline_seconds: int,
    disruption: Disruption = Disruption.NEVER,
    drain_seconds: int = 0,
    waited_seconds: float = 0.0,
    caller: str | None = None,
) -> list[Operation]:
    """The one JSON patch (RFC 6902) that turns a warm pod into a bound pod, or fails as a whole with 422.

    Raises:
        ValueError: the pod is no candidate; nothing may be sent for it.
    """
    if not is_candidate(pod):
        raise ValueError(f"pod {pod.namespace}/{pod.name} is not a Ready unbound pod")
    operations: list[Operation] = [
        {"op": "test", "path": "/metadata/uid", "value": pod.uid},
        {"op": "test", "path": _pointer("metadata", "labels", LABEL_STATE), "value": BindState.WARM.value},
        # Null passes where the key is absent, and fails on a pod that is being deleted.
        {"op": "test", "path": "/metadata/deletionTimestamp", "value": None},
        # Whether its node was lost a moment ago is in a condition, and conditions have no fixed places: there the delivery fails.
        {"op": "test", "path": f"/status/containerStatuses/{pod.agent_status_index}/ready", "value": True},
        {"op": "replace", "path": _pointer("metadata", "labels", LABEL_STATE), "value": BindState.BOUND.value},
        {"op": "add", "path": _pointer("metadata", "labels", LABEL_SESSION), "value": session_id},
        {"op": "add", "path": _pointer("metadata", "annotations", ANNOTATION_ROOM), "value": room},
        {"op": "add", "path": _pointer("metadata", "annotations", ANNOTATION_BOUND_AT), "value": timestamp(bound_at)},
        {"op": "add", "path": _pointer("metadata", "annotations", ANNOTATION_BOUND_BY), "value": bound_by},
        {
            "op": "add",
            "path": _pointer("metadata", "annotations", ANNOTATION_WAITED_SECONDS),
            "value": f"{waited_seconds:.3f}",
        },
    ]
    if caller is not None:
        operations.append(
            {"op": "add", "path": _pointer("metadata", "annotations", ANNOTATION_CALLER), "value": caller}
        )
    operations += [
        {"op": "add", "path": _pointer("metadata", "annotations", name), "value": value}
        for name, value in protection(disruption).items()
    ]
    if drain_seconds:
        operations.append(
            {
                "op": "add",
                "path": _pointer("metadata", "annotations", ANNOTATION_DRAIN_SECONDS),
                "value": str(drain_seconds),
            }
        )
    if pod.owned:
        # A remove of what is not there would fail the whole patch.
        operations.append({"op": "remove", "path": "/metadata/ownerReferences"})
    operations.append({"op": "add", "path": "/spec/activeDeadlineSeconds", "value": active_deadline_seconds})
    # Who wrote which field is nearly half of a pod, and to keep account of it a quarter of what the patch costs. One empty entry ends that for good (ADR 17).
    operations.append({"op": "add", "path": "/metadata/managedFields", "value": [{}]})
    return operations


def drain_patch(pod: PodFact, now: datetime) -> list[Operation]:
    """The patch that tells when a call ends whose pool is gone; the first one stands, another's fails with 422 or sets nearly the same."""
    until = now + timedelta(seconds=pod.drain_seconds)
    return [
        {"op": "test", "path": "/metadata/uid", "value": pod.uid},
        {"op": "test", "path": _pointer("metadata", "annotations", ANNOTATION_DRAIN_UNTIL), "value": None},
        {"op": "add", "path": _pointer("metadata", "annotations", ANNOTATION_DRAIN_UNTIL), "value": timestamp(until)},
    ]


def take_over_patch(pod: PodFact, until: datetime) -> list[Operation]:
    """The patch that takes back when a call ends, since its pool is there again; it fails with 422 where another end has been written since."""
    path = _pointer("metadata", "annotations", ANNOTATION_DRAIN_UNTIL)
    return [
        {"op": "test", "path": "/metadata/uid", "value": pod.uid},
        {"op": "test", "path": path, "value": timestamp(until)},
        {"op": "remove", "path": path},
    ]


def timestamp(moment: datetime) -> str:
    """RFC 3339 in UTC with microseconds, as ``bound-at`` holds it."""
    return moment.astimezone(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def _pointer(*parts: str) -> str:
    """A JSON pointer (RFC 6901), with ``~`` and ``/`` escaped."""
    return "".join("/" + part.replace("~", "~0").replace("/", "~1") for part in parts)
