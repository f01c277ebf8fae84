"""What has happened, told from two looks at the same thing, and how Kubernetes is told of it. Pure.

Invariants: only a change is a happening, so whoever looks twice tells once; a pod that is seen for the first time has no history here; reasons
are from fixed, small sets, so that they may be labels of metrics; what people said in a session never appears, as the agent's summary has none of it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, Literal

from voicepool.model import GROUP, KIND, VERSION, BindState, PodFact, PoolFact, conditions_of

Json = dict[str, Any]

CONTROLLER = f"{GROUP}/operator"
HIT_SECONDS = 1.0
"""A caller who was bound within this time found a warm agent; whoever waits longer was in a queue, or had one started."""
MAX_NOTE_BYTES = 1000
"""The API server takes 1024."""

OTHER = "other"
UNDELIVERED = "undelivered"
"""The reason of a session that was bound and never reached its agent; no caller was in it."""
SUMMARY_REASONS = frozenset(
    {
        "caller-left",
        "bot-ended",
        "bot-failed",
        "max-duration",
        "nobody-joined",
        "idle",
        "drained",
        "cancelled",
        "not-joined",
        "livekit-lost",
        "room-closed",
        "replaced",
        "provider-failed",
        "stuck",
    }
)
"""Reasons in the agent's summary of a session; anything else counts as ``other``."""

DROP_REASONS: Mapping[str, str] = {
    "OOMKilled": "out-of-memory",
    "Evicted": "evicted",
    "Preempting": "evicted",
    "DeadlineExceeded": "deadline",
    "NodeLost": "node-lost",
    "NodeShutdown": "node-lost",
    "Terminated": "node-lost",
    "DeletionByPodGC": "node-lost",
    "DeletionByTaintManager": "node-lost",
    "EvictionByEvictionAPI": "evicted",
    "PreemptionByScheduler": "evicted",
    "TerminationByKubelet": "evicted",
}
"""From Kubernetes' words for an end to ours: the kubelet's, and those of whoever else had the pod go."""


class Kind(StrEnum):
    """What can happen to a pod."""

    BECAME_WARM = "became_warm"
    SESSION_STARTED = "session_started"
    SESSION_ENDED = "session_ended"
    SESSION_DROPPED = "session_dropped"
    SESSION_UNDELIVERED = "session_undelivered"
    """A bound pod was deleted whose agent never got its session."""
    START_FAILED = "start_failed"
    WARM_POD_DIED = "warm_pod_died"


@dataclass(frozen=True, slots=True)
class Happening:
    """Something that happened to a pod."""

    kind: Kind
    pod: PodFact
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Note:
    """What an Event on a pool says."""

    type: Literal["Normal", "Warning"]
    reason: str
    action: str
    message: str


def reason_of_vanishing(pod: PodFact) -> str:
    """Why a bound pod is gone of which no end was seen, by what was last seen of it."""
    return DROP_REASONS.get(pod.end_reason or "", "deleted")


def happenings(old: PodFact | None, new: PodFact | None) -> tuple[Happening, ...]:
    """What happened between two looks at one pod; None is "not there"."""
    if old is None or (new is not None and new.uid != old.uid):
        return ()
    if new is None:
        if old.state is BindState.BOUND and not old.finished:
            return (Happening(Kind.SESSION_DROPPED, old, reason_of_vanishing(old)),)
        return ()
    result: list[Happening] = []
    if new.once_ready and not old.once_ready:
        result.append(Happening(Kind.BECAME_WARM, new))
    if new.state is BindState.BOUND and old.state is BindState.WARM:
        result.append(Happening(Kind.SESSION_STARTED, new))
    if new.finished and not old.finished:
        if new.state is BindState.BOUND:
            result.append(end_of_session(new))
        elif not (new.deleting or old.deleting):
            kind = Kind.WARM_POD_DIED if old.once_ready else Kind.START_FAILED
            result.append(Happening(kind, new, _drop_reason(new)))
    return tuple(result)


def end_of_session(pod: PodFact) -> Happening:
    """How the session of a bound pod that has finished came to its end: by its agent's summary, dropped without one, or never begun."""
    if pod.deleting and pod.exit_code == 0 and not pod.message:
        # An agent that has a session leaves a summary; this one was parked when it was told to stop, for instance by a gateway that gave it up.
        return Happening(Kind.SESSION_UNDELIVERED, pod, UNDELIVERED)
    reason = _summary_reason(pod.message)
    if reason is None and pod.exit_code != 0 and pod.phase != "Succeeded":
        return Happening(Kind.SESSION_DROPPED, pod, _drop_reason(pod))
    return Happening(Kind.SESSION_ENDED, pod, reason if reason in SUMMARY_REASONS else OTHER)


def _summary_reason(message: str | None) -> str | None:
    """The reason in the agent's summary; None where the message is none."""
    try:
        summary = json.loads(message or "")
    except (ValueError, RecursionError):
        return _reason_of_cut_summary(message or "")
    reason = summary.get("reason") if isinstance(summary, dict) else None
    return reason if isinstance(reason, str) else None


def _reason_of_cut_summary(message: str) -> str | None:
    # Facts keep the beginning of a message only, and a summary begins with its session and its reason.
    if not message.startswith('{"session":'):
        return None
    _, found, rest = message.partition('"reason":"')
    return rest.partition('"')[0] if found else None


def _drop_reason(pod: PodFact) -> str:
    known = DROP_REASONS.get(pod.end_reason or "")
    if known is not None:
        return known
    return "crashed" if pod.exit_code else OTHER


def is_hit(pod: PodFact) -> bool:
    """Whether the caller of a session found a warm agent."""
    return pod.cold_start is None and pod.waited_seconds is not None and pod.waited_seconds <= HIT_SECONDS


def startup_phases_seconds(pod: PodFact) -> dict[str, float]:
    """How long each phase of a start took, by the times that Kubernetes wrote; a phase that it does not tell is left out."""
    ends = (
        ("scheduling", pod.started_at),
        ("containers", pod.agent_started_at),
        ("agent", pod.ready_since),
    )
    result: dict[str, float] = {}
    began: datetime | None = pod.created_at
    for phase, ended in ends:
        if began is not None and ended is not None:
            result[phase] = max(0.0, (ended - began).total_seconds())
        began = ended
    return result


def note_of(happening: Happening) -> Note | None:
    """What people should be told of it; None for the ordinary course of things."""
    pod = happening.pod
    code = "" if pod.exit_code is None else f", exit code {pod.exit_code}"
    words = _first_line(pod.message)
    ending = f": {words}" if words else ""
    match happening.kind:
        case Kind.SESSION_DROPPED:
            message = f"Session {pod.session} was dropped with pod {pod.name} ({happening.reason}{code}){ending}"
            return Note("Warning", "SessionDropped", "Serve", message)
        case Kind.SESSION_UNDELIVERED:
            message = f"Session {pod.session} never reached its agent in pod {pod.name}, which is deleted; no caller was in it"
            return Note("Warning", "SessionUndelivered", "Serve", message)
        case Kind.START_FAILED:
            message = f"Pod {pod.name} failed to start ({happening.reason}{code}){ending}"
            return Note("Warning", "StartFailed", "Start", message)
        case Kind.WARM_POD_DIED:
            message = f"Warm pod {pod.name} ended before a caller came ({happening.reason}{code}){ending}"
            return Note("Warning", "WarmPodDied", "Wait", message)
    return None


def deadline_note(pod_name: str, deadline_seconds: int, *, was_warm: bool) -> Note:
    """A pod was deleted because it did not become Ready in time, or again."""
    if was_warm:
        message = f"Warm pod {pod_name} has not been Ready for {deadline_seconds} s and is replaced; its node, its readiness probe, or its log, says why"
        return Note("Warning", "WarmPodDied", "Wait", message)
    message = f"Pod {pod_name} was not Ready within {deadline_seconds} s and is replaced; its readiness probe, or its log, says why"
    return Note("Warning", "StartupDeadlineExceeded", "Start", message)


def condition_notes(before: Mapping[str, Any], after: Mapping[str, Any]) -> tuple[Note, ...]:
    """What to tell of the step from one status of a pool to the next: Ready, Stalled and TemplateValid, where they change."""
    old, new = conditions_of(before), conditions_of(after)
    notes: list[Note] = []
    ready, was_ready = new.get("Ready", {}), old.get("Ready", {}).get("status")
    if ready.get("status") == "True" and was_ready != "True":
        notes.append(Note("Normal", "Ready", "Reconcile", str(ready.get("message"))))
    if ready.get("status") == "False" and was_ready == "True":
        notes.append(Note("Warning", "NotReady", "Reconcile", f"{ready.get('reason')}: {ready.get('message')}"))
    stalled, was_stalled = new.get("Stalled", {}), old.get("Stalled", {}).get("status") == "True"
    if stalled.get("status") == "True" and not was_stalled:
        notes.append(Note("Warning", "Stalled", "Reconcile", f"{stalled.get('reason')}: {stalled.get('message')}"))
    if stalled.get("status") != "True" and was_stalled:
        notes.append(Note("Normal", "Resumed", "Reconcile", "The pool is not stalled any more."))
    valid, was_valid = new.get("TemplateValid", {}), old.get("TemplateValid", {}).get("status")
    if valid.get("status") == "False" and was_valid != "False":
        notes.append(Note("Warning", "TemplateInvalid", "Validate", str(valid.get("message"))))
    if valid.get("status") == "True" and was_valid == "False":
        notes.append(Note("Normal", "TemplateValid", "Validate", str(valid.get("message"))))
    return tuple(notes)


def build_event(pool: PoolFact, note: Note, now: datetime, instance: str, *, count: int = 1) -> Json:
    """An ``events.k8s.io/v1`` Event on a pool.

    Args:
        pool: what it is about.
        note: what it says.
        now: the time, with a time zone.
        instance: which process says so.
        count: how many such notes this one stands for; the first one's words are told.
    """
    moment = now.astimezone(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
    message = note.message if count == 1 else f"{count} times, the first: {note.message}"
    unique = hashlib.sha256("\0".join((pool.uid, note.reason, message, moment)).encode()).hexdigest()[:16]
    return {
        "apiVersion": "events.k8s.io/v1",
        "kind": "Event",
        "metadata": {"name": f"{pool.name}.{unique}", "namespace": pool.namespace},
        "eventTime": moment,
        "type": note.type,
        "reason": note.reason,
        "action": note.action,
        "note": message.encode()[:MAX_NOTE_BYTES].decode(errors="ignore"),
        "regarding": {
            "apiVersion": f"{GROUP}/{VERSION}",
            "kind": KIND,
            "namespace": pool.namespace,
            "name": pool.name,
            "uid": pool.uid,
        },
        "reportingController": CONTROLLER,
        "reportingInstance": instance[:128],
    }


def _first_line(text: str | None) -> str:
    lines = [line.strip() for line in (text or "").splitlines() if line.strip()]
    return lines[0][:500] if lines else ""
