"""Pools and pods for the tests of what is decided from them."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from voicepool.model import BindState, PodFact, PoolFact, VoiceAgentPoolSpec
from voicepool.plan import Plan, PodDelete, Template
from voicepool.podspec import pod_name

NOW = datetime(2026, 3, 1, 12, 0, 0, tzinfo=UTC)
TEMPLATE = Template("aaaaaaaa")
OLD = "bbbbbbbb"
POD_TEMPLATE: Mapping[str, Any] = {"spec": {"containers": [{"name": "agent", "image": "example.org/agent:1"}]}}


def pool(
    status: Mapping[str, Any] | None = None, *, deleting: bool = False, generation: int = 1, **spec: Any
) -> PoolFact:
    return PoolFact(
        namespace="calls",
        name="demo",
        uid="pool-uid",
        resource_version="1",
        generation=generation,
        spec=VoiceAgentPoolSpec(**{"template": POD_TEMPLATE, **spec}),
        status=status or {},
        deleting=deleting,
    )


def pod(
    number: int,
    *,
    template: str = TEMPLATE.hash,
    age_seconds: float = 10.0,
    finished_seconds_ago: float | None = None,
    **changes: Any,
) -> PodFact:
    """An unbound pod that is starting; ``changes`` are fields of the fact."""
    values: dict[str, Any] = {
        "namespace": "calls",
        "name": pod_name("demo", template, number),
        "uid": f"uid-{template}-{number}",
        "resource_version": str(100 + number),
        "pool": "demo",
        "state": BindState.WARM,
        "session": None,
        "template_hash": template,
        "phase": "Pending",
        "ready": False,
        "agent_status_index": None,
        "deleting": False,
        "owned": True,
        "created_at": NOW - timedelta(seconds=age_seconds),
        "started_at": None,
        "finished_at": None if finished_seconds_ago is None else NOW - timedelta(seconds=finished_seconds_ago),
        "pod_ip": None,
        "node": None,
        "room": None,
        "bound_at": None,
        "cold_start": None,
        "start_attempt": 0,
        "waiting_reason": None,
        "message": None,
        "exit_code": None,
    }
    return PodFact(**(values | changes))


def warm(number: int, **changes: Any) -> PodFact:
    ordinary: dict[str, Any] = {"phase": "Running", "ready": True, "once_ready": True, "pod_ip": "10.1.0.1"}
    return pod(number, **(ordinary | changes))


def ready(number: int, **changes: Any) -> PodFact:
    """One that can be bound."""
    return warm(number, **({"agent_status_index": 0} | changes))


def bound(number: int, **changes: Any) -> PodFact:
    ordinary = {"state": BindState.BOUND, "session": f"session-{number}", "owned": False, "ready": False}
    return warm(number, **(ordinary | changes))


def ended(number: int, seconds_ago: float, **changes: Any) -> PodFact:
    return bound(number, **({"phase": "Succeeded", "exit_code": 0, "finished_seconds_ago": seconds_ago} | changes))


def failed(number: int, seconds_ago: float = 1.0, **changes: Any) -> PodFact:
    ordinary: dict[str, Any] = {"phase": "Failed", "exit_code": 1, "finished_seconds_ago": seconds_ago}
    return pod(number, **(ordinary | changes))


def deleted_names(plan: Plan) -> list[str]:
    return sorted(delete.name for delete in plan.deletes)


def by_name(plan: Plan, name: str) -> PodDelete:
    (delete,) = (delete for delete in plan.deletes if delete.name == name)
    return delete


def condition(plan: Plan, kind: str) -> Mapping[str, Any] | None:
    found: list[Mapping[str, Any]] = [entry for entry in plan.status["conditions"] if entry["type"] == kind]
    return found[0] if found else None
