"""The words of voicepool: the custom resource as pydantic models, and the facts that decisions are made from.

The pydantic models are the source of ``crds/``. The frozen dataclasses are what the informers keep of an object and what
``plan()`` and ``binding`` work on: small, typed, and free of I/O.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel

GROUP = "voicepool.dev"
VERSION = "v1alpha1"
KIND = "VoiceAgentPool"
PLURAL = "voiceagentpools"

LABEL_POOL = "voicepool.dev/pool"
LABEL_STATE = "voicepool.dev/state"
LABEL_SESSION = "voicepool.dev/session"
LABEL_TEMPLATE = "voicepool.dev/template"

ANNOTATION_BOUND_AT = "voicepool.dev/bound-at"
ANNOTATION_BOUND_BY = "voicepool.dev/bound-by"
ANNOTATION_ROOM = "voicepool.dev/room"
ANNOTATION_WAITED_SECONDS = "voicepool.dev/waited-seconds"
"""Written by the bind: how long the caller had waited for it."""
ANNOTATION_CALLER = "voicepool.dev/caller"
"""Written by the bind: the mark of who asked for the session, by which all gateways count a caller's sessions."""
ANNOTATION_COLD_START = "voicepool.dev/cold-start"
ANNOTATION_DRAIN_SECONDS = "voicepool.dev/drain-seconds"
"""Written by the bind: how long this call may go on after its pool is gone. A deleted pool can no longer say."""
ANNOTATION_DRAIN_UNTIL = "voicepool.dev/drain-until"
"""Written by the operator when it finds that the pool is gone: the moment at which it ends this call."""
ANNOTATION_START_ATTEMPT = "voicepool.dev/start-attempt"

AGENT_CONTAINER = "agent"
AGENT_PORT = 8080
"""Port of the agent's own routes: ``/readyz``, ``/livez``, ``/bind``, ``/status``, ``/metrics``."""


Key = tuple[str, str]
"""Namespace and name."""


class BindState(StrEnum):
    """Value of the state label: the only thing about a pod that voicepool itself decides."""

    WARM = "warm"
    BOUND = "bound"


class _SpecModel(BaseModel):
    model_config = ConfigDict(
        alias_generator=to_camel, populate_by_name=True, frozen=True, extra="forbid", use_attribute_docstrings=True
    )


class RecordingSpec(_SpecModel):
    """What is written down of every session; nothing unless somebody asks for it."""

    audio: bool = False
    """Write what is heard to NAME.wav: the caller left, the agent right, 16-bit samples at 16 kHz. NAME is the session's id."""
    transcript: bool = False
    """Write what is said to NAME.jsonl: a line for each turn, with speaker, time and text."""
    path: Annotated[str, Field(pattern=r"^/.", max_length=1024)] = "/recordings"
    """The folder for both, on a volume that the template mounts there. An agent that cannot write to it is never Ready."""


class SessionSpec(_SpecModel):
    """Rules of every session of the pool."""

    max_duration_seconds: Annotated[int, Field(ge=60, le=86_400)] = 7200
    """The longest a session may last, in seconds. The agent ends it then. If it does not, the kubelet sends SIGTERM a minute later; the pod has its grace."""
    join_timeout_seconds: Annotated[int, Field(ge=5, le=3600)] = 30
    """How long the agent waits for the caller in the room, in seconds. Then the session ends with that reason."""
    idle_timeout_seconds: Annotated[int, Field(ge=10, le=86_400)] = 300
    """How long both sides may be silent, in seconds, before the session ends."""
    retention_seconds: Annotated[int, Field(ge=0, le=86_400)] = 300
    """How long an ended pod is kept for its logs and its summary, in seconds."""
    recording: RecordingSpec = RecordingSpec()
    """What is written down of every session; nothing unless somebody asks for it."""


class StartupSpec(_SpecModel):
    """How long an agent may take to become warm."""

    deadline_seconds: Annotated[int, Field(ge=5, le=3600)] = 120
    """A pod that is not Ready after so many seconds is replaced; repeated failure backs off, from 10 to 300 seconds."""


IntOrPercent = Annotated[
    Annotated[int, Field(ge=0, le=100_000)] | Annotated[str, Field(pattern=r"^(100|[1-9]?[0-9])%$", max_length=4)],
    Field(),
]
"""A number of pods, or a share of the warm target such as ``25%``."""


class RollingUpdateSpec(_SpecModel):
    """How far a rollout may leave the warm target, in unbound pods."""

    max_surge: IntOrPercent = "25%"
    """How many unbound pods may exist above the warm target: a number, or a percentage of it (rounded up)."""
    max_unavailable: IntOrPercent = 0
    """How many warm pods may be missing from the warm target: a number, or a percentage of it (rounded down)."""


class UpdateStrategySpec(_SpecModel):
    """How unbound pods move to a new template. Bound pods never move."""

    type: Literal["RollingUpdate", "OnReplenish"] = "RollingUpdate"
    """RollingUpdate: replace old unbound pods step by step. OnReplenish: keep them until a call takes them or they fail; new pods are of the new template."""
    rolling_update: RollingUpdateSpec = RollingUpdateSpec()
    """The steps of RollingUpdate."""


class Warmth(StrEnum):
    """How far an agent goes before it waits for a caller."""

    IMPORTED = "Imported"
    BUILT = "Built"
    STARTED = "Started"


class Placement(StrEnum):
    """Which nodes calls are given to, and which lose their unbound pods first."""

    PACKED = "Packed"
    SPREAD = "Spread"


class Disruption(StrEnum):
    """By what a pod with a call may be evicted."""

    NEVER = "Never"
    ON_UPGRADE = "OnUpgrade"
    ALWAYS = "Always"


class ScheduleSpec(_SpecModel):
    """From a moment on, so many warm pods; until the moment of the next schedule."""

    cron: Annotated[str, Field(pattern=r"^\S+( \S+){4}$", max_length=100)]
    """When it begins: minute, hour, day of month, month, day of week."""
    time_zone: Annotated[str, Field(min_length=1, max_length=64)] = "UTC"
    """In which the cron expression is read, for example Europe/Berlin."""
    warm_pods: Annotated[int, Field(ge=0, le=100_000)]
    """How many pods to keep warm."""


class HeadroomSpec(_SpecModel):
    """How many pods voicepool recommends to keep warm. Of demand, percentage and schedules the largest wins."""

    mode: Literal["Advise", "Native"] = "Advise"
    """Advise: only say so in status.recommendedReplicas, for an autoscaler. Native: keep that many warm if replicas is less."""
    miss_rate: Annotated[float, Field(ge=0.0001, le=0.5)] = 0.01
    """The chance that more callers come while a pod starts than pods are warm."""
    percentage: Annotated[int, Field(ge=0, le=1000)] = 0
    """So many warm pods for each 100 calls that are going on."""
    schedules: Annotated[tuple[ScheduleSpec, ...], Field(max_length=50)] = ()
    """Warm pods by the time of day, week or year. The schedule that came last holds."""


class OnEmptySpec(_SpecModel):
    """What a caller gets when no warm pod is left."""

    policy: Literal["Queue", "ColdStart", "Reject"] = "Queue"
    """Queue: wait for a warm pod. ColdStart: start a pod for this caller. Reject: refuse at once (429 with Retry-After)."""
    timeout_seconds: Annotated[int, Field(ge=1, le=300)] = 20
    """How long a caller waits for a pod, in seconds, with Queue; a pod of ColdStart has startup.deadlineSeconds."""


class LiveKitSpec(_SpecModel):
    """The LiveKit server of the pool; what is left out comes from the gateway's own settings."""

    url: Annotated[str, Field(pattern=r"^wss?://.+", max_length=2048)] | None = None
    """WebSocket address of the LiveKit server, for example wss://livekit.example.org."""
    secret_name: Annotated[str, Field(min_length=1, max_length=253)] | None = None
    """A Secret in the pool's namespace with the keys api-key and api-secret of that server."""


class InboundSpec(_SpecModel):
    """Which calls come to the pool by themselves, through LiveKit SIP or any other way into a room."""

    room_prefix: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]{2,63}$", max_length=64)] | None = None
    """Whoever joins a room whose name begins so gets an agent of this pool, for example call-. Of several pools the longest prefix wins."""


class VoiceAgentPoolSpec(_SpecModel):
    """What the user asks for: how many agents wait, of which kind, and the rules of their sessions."""

    replicas: Annotated[int, Field(ge=0, le=100_000)] = 1
    """Warm target: number of unbound pods, warm or starting. Set by people, kubectl scale or an autoscaler; never by voicepool."""
    max_pods: Annotated[int, Field(ge=1, le=100_000)] = 50
    """Ceiling for the number of unbound and bound pods of the pool together."""
    template: Mapping[str, Any]
    """A pod template. Its container named agent runs the agent image."""
    warmth: Warmth = Warmth.BUILT
    """How far an agent goes before it waits. Imported: bot() is called at the bind. Built: the pipeline is built. Started: its providers are connected."""
    session: SessionSpec = SessionSpec()
    """Rules of every session of the pool."""
    startup: StartupSpec = StartupSpec()
    """How long an agent may take to become warm."""
    on_empty: OnEmptySpec = OnEmptySpec()
    """What a caller gets when no warm pod is left."""
    update_strategy: UpdateStrategySpec = UpdateStrategySpec()
    """How unbound pods move to a new template. Bound pods never move."""
    placement: Placement = Placement.PACKED
    """Packed: give calls to the nodes that have most of them, so that the others can empty. Spread: to those with fewest, so that a lost node costs few."""
    disruption: Disruption = Disruption.NEVER
    """Never: no eviction ends a call. OnUpgrade: a drain of its node may, saving nodes may not. Always: both may."""
    drain_seconds: Annotated[int, Field(ge=0, le=86_400)] = 0
    """How long calls may go on after the pool is deleted, in seconds; 0 is until they end. What holds for a call is decided when it begins."""
    headroom: HeadroomSpec | None = None
    """How many pods voicepool recommends to keep warm. Off when it is left out; all defaults when it is {}."""
    livekit: LiveKitSpec = LiveKitSpec()
    """The LiveKit server of the pool; what is left out comes from the gateway's own settings."""
    inbound: InboundSpec = InboundSpec()
    """Which calls come to the pool by themselves, through LiveKit SIP or any other way into a room. None unless a prefix is given."""


@dataclass(frozen=True, slots=True)
class PoolFact:
    """One VoiceAgentPool as last seen."""

    namespace: str
    name: str
    uid: str
    resource_version: str
    generation: int
    spec: VoiceAgentPoolSpec
    status: Mapping[str, Any] = field(default_factory=dict)
    deleting: bool = False
    labels: Mapping[str, str] = field(default_factory=dict)
    """Its own, by which a start may select it."""


@dataclass(frozen=True, slots=True)
class PodFact:
    """What is remembered of one agent pod; everything else of it is thrown away at the door."""

    namespace: str
    name: str
    uid: str
    resource_version: str = field(compare=False)
    """Not compared: a version that differs in nothing else is news for nobody."""
    pool: str
    state: BindState
    session: str | None
    template_hash: str
    phase: str
    """Pending, Running, Succeeded, Failed or Unknown, as the kubelet says."""
    ready: bool
    """The agent container's own readiness (``status.containerStatuses[agent].ready``), in a pod that runs and is not known to be cut off."""
    agent_status_index: int | None
    """Position of the agent container in ``status.containerStatuses``; the bind patch tests that very entry."""
    deleting: bool
    owned: bool
    """Has an owner reference (a warm pod has one; the bind takes it away)."""
    created_at: datetime
    started_at: datetime | None
    """``status.startTime``, by the clock of the node: from here Kubernetes counts ``activeDeadlineSeconds``."""
    finished_at: datetime | None
    pod_ip: str | None
    node: str | None
    room: str | None
    bound_at: datetime | None
    cold_start: str | None
    """The session that this pod was started for when the pool was empty."""
    start_attempt: int
    """How many starts of this template failed in a row before this one."""
    waiting_reason: str | None
    """A container's waiting reason (ErrImagePull, CreateContainerConfigError, ...), or Unschedulable."""
    message: str | None
    """The words that belong to a failure or to waiting: termination message, pull error, scheduler's reason."""
    exit_code: int | None
    not_ready_since: datetime | None = None
    """Since when the pod's Ready condition has been False; None while it is Ready, or before a kubelet has looked at it."""
    drain_seconds: int = 0
    """How long the call may go on after its pool is gone; 0 is until it ends."""
    drain_until: datetime | None = None
    """When the call is ended, since its pool is gone."""
    ready_since: datetime | None = None
    """Since when the pod's Ready condition has been True; None while it is not."""
    waited_seconds: float | None = None
    """How long the caller of this session had waited for the bind."""
    agent_started_at: datetime | None = None
    """When the agent container's process started."""
    once_ready: bool = False
    """The pod is Ready or was so before: its start succeeded."""
    caller: str | None = None
    """The mark of who asked for the session."""
    bound_by: str | None = None
    """The gateway that bound it."""
    end_reason: str | None = None
    """The one word of the kubelet, or of whoever had the pod go, for why it or its agent container ended: OOMKilled, Evicted, DeletionByPodGC, ..."""
    progressed_at: datetime | None = None
    """When its start last came a step further: a node took it, or one of its containers began."""
    waiting_image: str | None = None
    """The image of the container that has the waiting reason."""

    @property
    def under_way_since(self) -> datetime:
        """From when its start is measured by the pool's deadline: what held it up before its last step (no node, no image) is not its fault."""
        return max(self.created_at, self.progressed_at or self.created_at)

    @property
    def finished(self) -> bool:
        """The agent's process has exited, or will never run: no session can be going on in this pod."""
        return self.phase in ("Succeeded", "Failed") or self.exit_code is not None


def conditions_of(status: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The conditions of a pool's status, by type."""
    return {condition["type"]: condition for condition in status.get("conditions") or ()}
