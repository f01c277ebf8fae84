"""Who may be bound, in which order, and with which one patch. Pure: pods and a session in, a choice or a patch out.

Invariants: only a Ready, unbound pod that is not being deleted is a candidate, never "the next best"; the patch itself tests all of that again on
the API server, so a stale view can lose a race but never hand out a pod twice, a dying pod, or one whose agent is not Ready.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from itertools import repeat
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
    Placement,
    PodFact,
)

Operation = dict[str, Any]

ACTIVE_DEADLINE_MARGIN_SECONDS = 60
"""The agent ends its session by itself at the maximum duration and says goodbye; Kubernetes comes a little later, for an agent that does not."""

DELIVERY_DEADLINE_SECONDS = 20.0
"""No assignment for a pod is good for longer after its bind. From then on an agent that says that it is parked will never have that session, whoever
asks, and whatever a gateway does that was frozen in between. Less than a start may take: a caller with a key whose gateway died waits that long elsewhere."""

CHOICE_PER_BIND = 4
"""For each bind under way there are more than so many pods to choose from, if the pool has them: in a burst
of two gateways about every third choice meets the other's, where a strict packing would make all of them meet."""


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


def choose(
    free: Sequence[PodFact],
    session_id: str,
    *,
    template_hash: str | None,
    placement: Placement,
    taken_on_node: Mapping[str, int],
    in_flight: int,
) -> PodFact:
    """The pod that this session should take: its own cold start, else of the newest template, else any; among those by placement.

    Packed prefers the node with most calls, Spread the nodes with fewest. Within that the session's own order of the pods decides (rendezvous
    hashing), so that two gateways that serve two sessions at once seldom choose the same pod. A strict placement would send all gateways to the same
    few pods in a burst, where each patch that loses costs a round trip. So the choice widens node by node with the binds that are under way: one call
    at a time is placed exactly, a burst nearly so. What is under way here is a fair measure of what is under way elsewhere.

    Args:
        free: candidates of the pool, at least one.
        session_id: who asks.
        template_hash: the pool's current template; None when it is not known yet, then all templates are equal.
        placement: of the pool.
        taken_on_node: by node, how many pods of the pool have a call, or are about to.
        in_flight: how many binds of the pool are under way in this process.
    """
    # Asked for hundreds of pods in each bind, so what is done for each of them is little.
    pods = [pod for pod in free if pod.cold_start == session_id]
    pods = pods or [pod for pod in free if pod.template_hash == template_hash] or list(free)
    choice = _by_placement(pods, placement, taken_on_node, at_least=CHOICE_PER_BIND * in_flight + 1)
    session = _number(session_id)
    # The hash of a pair of numbers is the same in every process.
    order = [*map(hash, zip(repeat(session), map(_number_of_pod, [pod.uid for pod in choice]), strict=False))]
    return choice[order.index(min(order))]


def _by_placement(
    pods: Sequence[PodFact], placement: Placement, taken_on_node: Mapping[str, int], *, at_least: int
) -> Sequence[PodFact]:
    """The pods of the nodes that are to be filled first, of so many nodes that there are so many pods."""
    if len({pod.node for pod in pods}) == 1:
        return pods
    by_node: defaultdict[str, list[PodFact]] = defaultdict(list)
    for pod in pods:
        by_node[pod.node or ""].append(pod)
    by_rank: dict[tuple[int, str], list[PodFact]] = {}
    for node, there in by_node.items():
        taken = taken_on_node.get(node, 0)
        # Of nodes with equally many, Packed fills one after the other, Spread treats all alike.
        by_rank.setdefault((-taken, node) if placement is Placement.PACKED else (taken, ""), []).extend(there)
    choice: list[PodFact] = []
    for rank in sorted(by_rank):
        choice += by_rank[rank]
        if len(choice) >= at_least:
            break
    return choice


def _number(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=7).digest())


# Each bind asks for all warm pods, so their numbers are kept, and not for longer than it takes 16,384 others to come: 3 MB.
_number_of_pod = functools.lru_cache(maxsize=1 << 14)(_number)


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
