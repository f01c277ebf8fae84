"""Says from the API server's audit log what became of every pod: who created, bound and deleted it, and what was wrong with that.

Pure: audit events and what the agents accepted go in, a verdict comes out. It believes the log, not the processes that it judges: a bind is the
write after which a pod is seen bound, a call begins when its agent has accepted it, and all of one pod is put in order by resource version, since
two answers may be logged the other way round. Pods are taken to be gone when their delete is answered, as they are where no node has them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from enum import StrEnum
from typing import Any

from voicepool.model import LABEL_SESSION, LABEL_STATE, BindState

Json = dict[str, Any]

WRITING_VERBS = frozenset({"create", "update", "patch", "delete", "deletecollection"})
WRITES_OF_A_SESSION = 3
"""Create, bind, delete."""
_STATE_PATH = "/metadata/labels/" + LABEL_STATE.replace("/", "~1")


class FaultKind(StrEnum):
    """What may not happen."""

    LOST_CALL = "lost call"
    DOUBLE_BIND = "double bind"
    SECOND_AGENT = "a second agent of one session"
    NOT_READY = "bound while it was not Ready"
    NO_PRECONDITIONS = "delete without preconditions"
    TOO_MANY_PODS = "too many pods"
    TOO_MANY_WRITES = "too many writes of one session"


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that may not happen, in words."""

    kind: FaultKind
    words: str


@dataclass(frozen=True, slots=True)
class PodSeen:
    """A pod as the API server answered it."""

    uid: str
    bound: bool
    session: str | None
    ready: bool
    finished: bool
    dying: bool


@dataclass(frozen=True, slots=True)
class Write:
    """One request that was to change something, and its answer."""

    asked: datetime
    moment: datetime
    """When it was answered."""
    actor: str
    """The account."""
    verb: str
    resource: str
    """With its subresource: ``pods``, ``pods/status``, ``voiceagentpools/status``."""
    namespace: str
    name: str
    code: int
    dry_run: bool
    version: int
    """Resource version of the answered object; 0 where the answer has none."""
    pod: PodSeen | None
    """The pod that was answered."""
    is_bind: bool
    has_preconditions: bool
    """A delete names the uid and the version of what it deletes."""
    was_read: bool
    """The API server read what was asked: not where it refused the account, or was going down."""

    @property
    def succeeded(self) -> bool:
        """Whether something is different now."""
        return 200 <= self.code < 300 and not self.dry_run


def write_from_audit(event: Json) -> Write | None:
    """The write that a line of the audit log tells of; None for a read, and for a request that has not been answered."""
    verb = event.get("verb")
    if verb not in WRITING_VERBS or event.get("stage") != "ResponseComplete":
        return None
    reference = event.get("objectRef") or {}
    resource = reference.get("resource", "")
    subresource = reference.get("subresource", "")
    answer = event.get("responseObject")
    answer = answer if isinstance(answer, dict) else {}
    request = event.get("requestObject")
    code = int((event.get("responseStatus") or {}).get("code") or 0)
    is_pod = resource == "pods" and 200 <= code < 300 and subresource in ("", "status")
    return Write(
        asked=datetime.fromisoformat(event["requestReceivedTimestamp"]),
        moment=datetime.fromisoformat(event["stageTimestamp"]),
        actor=(event.get("user") or {}).get("username", ""),
        verb=verb,
        resource=f"{resource}/{subresource}" if subresource else resource,
        namespace=reference.get("namespace", ""),
        name=reference.get("name") or (answer.get("metadata") or {}).get("name", ""),
        code=code,
        dry_run="dryRun=" in event.get("requestURI", ""),
        version=int((answer.get("metadata") or {}).get("resourceVersion") or 0),
        pod=_pod_seen(answer) if is_pod else None,
        is_bind=resource == "pods" and not subresource and _binds(request),
        has_preconditions=_names_a_version(request),
        was_read=request is not None,
    )


def _pod_seen(answer: Json) -> PodSeen | None:
    if answer.get("kind") == "Status":
        uid = (answer.get("details") or {}).get("uid")
        return PodSeen(uid, False, None, False, False, True) if uid else None
    metadata = answer.get("metadata") or {}
    labels = metadata.get("labels") or {}
    status = answer.get("status") or {}
    agents = [one for one in status.get("containerStatuses") or () if one.get("name") == "agent"]
    exited = any("terminated" in (agent.get("state") or {}) for agent in agents)
    return PodSeen(
        uid=metadata.get("uid", ""),
        bound=labels.get(LABEL_STATE) == BindState.BOUND,
        session=labels.get(LABEL_SESSION),
        ready=any(agent.get("ready") is True for agent in agents),
        finished=exited or status.get("phase") in ("Succeeded", "Failed"),
        dying="deletionTimestamp" in metadata,
    )


def _binds(request: Any) -> bool:
    operations = request if isinstance(request, list) else ()
    return any(
        one.get("path") == _STATE_PATH and one.get("op") != "test" and one.get("value") == BindState.BOUND
        for one in operations
    )


def _names_a_version(request: Any) -> bool:
    wanted = (request.get("preconditions") if isinstance(request, dict) else None) or {}
    return bool(wanted.get("uid") and wanted.get("resourceVersion"))


@dataclass(frozen=True, slots=True)
class Acceptance:
    """An agent took a session."""

    session: str
    moment: datetime


@dataclass(frozen=True, slots=True)
class Rules:
    """What the judge has to know besides the log."""

    operators: frozenset[str]
    """Accounts of the operator."""
    gateways: frozenset[str]
    """Accounts of the gateway."""
    max_pods: int
    overshoot: int
    """How many pods above ``maxPods`` are allowed for: those that writers with an old view may have under way."""
    accepted: Mapping[str, Acceptance]
    """What the agents accepted, by their own word and by the uid of their pod."""

    @property
    def ours(self) -> frozenset[str]:
        """All accounts of voicepool."""
        return self.operators | self.gateways


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the log says."""

    faults: tuple[Fault, ...]
    creates: int
    binds: int
    calls: int
    """Bound pods whose agent accepted the session."""
    ended: int
    """Of the calls, those that ended by themselves."""
    deletes: int
    undelivered: int
    """Bound pods that their gateway deleted again, since no agent ever had the session."""
    most_over: int
    """The most live pods above ``maxPods`` that a create of ours made; negative where there was always room."""
    most_writes: int
    """The most writes that any session cost, on its pod."""
    refused: Mapping[int, int]
    """Our writes that were refused, by status code."""
    other_writes: Mapping[str, int]
    """Our writes to anything but pods, by resource."""

    def count(self, kind: FaultKind) -> int:
        """How often a thing happened that may not."""
        return sum(fault.kind is kind for fault in self.faults)

    def words(self) -> str:
        """The verdict in one line."""
        other = ", ".join(f"{count} {resource}" for resource, count in sorted(self.other_writes.items())) or "none"
        refused = ", ".join(f"{count} with {code}" for code, count in sorted(self.refused.items())) or "none"
        return (
            f"{self.creates} creates, {self.binds} binds, {self.calls} calls ({self.ended} ended), {self.deletes} deletes, "
            f"{self.undelivered} undelivered; {self.count(FaultKind.LOST_CALL)} lost calls, {self.count(FaultKind.DOUBLE_BIND)} double binds; "
            f"most pods over maxPods {self.most_over}; most writes of a session {self.most_writes}; refused: {refused}; other writes: {other}"
        )


@dataclass(slots=True)
class _Life:
    """One pod, as far as the log has been read."""

    uid: str
    name: str
    seen: PodSeen | None = None
    bound_at: int = 0
    bound_by: str = ""
    session: str = ""
    ended_at: int = 0
    deleted_at: int = 0
    delete_asked: datetime | None = None
    binds: int = 0
    our_writes: list[str] = field(default_factory=list)

    @property
    def live(self) -> bool:
        return not (self.deleted_at or (self.seen is not None and self.seen.finished))


def judge(writes: Iterable[Write], rules: Rules) -> Verdict:
    """Judge all writes of one pool's namespace."""
    court = _Court(rules)
    for write in in_order(writes):
        court.hear(write)
    return court.verdict()


def in_order(writes: Iterable[Write]) -> list[Write]:
    """By resource version; a write whose answer has none stands where the clock puts it."""
    version = 0
    placed = []
    for write in sorted(writes, key=lambda one: one.moment):
        version = max(version, write.version)
        placed.append(write if write.version else replace(write, version=version))
    return sorted(placed, key=lambda one: one.version)


def writes_without_cause(writes: Iterable[Write], accounts: frozenset[str]) -> list[Write]:
    """What accounts wrote, refused or not, that a converged pool does not need: everything but the renewal of a Lease."""
    return [write for write in writes if write.actor in accounts and write.resource != "leases"]


class _Court:
    def __init__(self, rules: Rules) -> None:
        self._rules = rules
        self._lives: dict[str, _Life] = {}
        self._faults: list[Fault] = []
        self._refused: Counter[int] = Counter()
        self._other: Counter[str] = Counter()
        self._creates = self._deletes = self._undelivered = 0
        self._most_over = -rules.max_pods

    def hear(self, write: Write) -> None:
        ours = write.actor in self._rules.ours
        if write.dry_run:
            return
        if ours and not write.succeeded:
            self._refused[write.code] += 1
        if ours and write.succeeded and write.resource.partition("/")[0] != "pods":
            self._other[write.resource] += 1
        is_delete = write.verb == "delete" and write.resource == "pods" and (write.succeeded or write.was_read)
        if ours and is_delete and not write.has_preconditions:
            words = f"{write.actor} asked to delete {write.name}, whatever it is by then"
            self._fault(FaultKind.NO_PRECONDITIONS, words)
        if write.pod is None or not write.succeeded:
            return
        life = self._lives.setdefault(write.pod.uid, _Life(write.pod.uid, write.name))
        if ours:
            life.our_writes.append(f"{write.verb} {write.resource}")
        if write.verb == "delete":
            self._deleted(life, write)
            return
        if write.verb == "create" and ours:
            self._created(write, life, write.pod)
        self._changed(life, write, write.pod)

    def _created(self, write: Write, life: _Life, seen: PodSeen) -> None:
        self._creates += 1
        life.seen = seen
        live = sum(one.live for one in self._lives.values())
        over = live - self._rules.max_pods
        self._most_over = max(self._most_over, over)
        if over > self._rules.overshoot:
            self._fault(
                FaultKind.TOO_MANY_PODS,
                f"{write.actor} created {write.name} as live pod {live}; maxPods is {self._rules.max_pods}, and {self._rules.overshoot} more are allowed for",
            )

    def _changed(self, life: _Life, write: Write, seen: PodSeen) -> None:
        if write.is_bind:
            life.binds += 1
            if life.binds > 1:
                self._fault(FaultKind.DOUBLE_BIND, f"{write.actor} bound {life.name} to {seen.session} after a bind")
        if seen.bound and not life.bound_at:
            life.bound_at, life.bound_by, life.session = write.version, write.actor, seen.session or ""
            # By the answer, which has the status that the bind met: what was written before it the API server may have taken with it when it was killed.
            if write.is_bind and (not seen.ready or seen.dying or seen.finished):
                self._fault(
                    FaultKind.NOT_READY, f"{write.actor} bound {life.name} to {seen.session} while it was not Ready"
                )
        elif life.bound_at and (seen.session or "") != life.session:
            self._fault(
                FaultKind.DOUBLE_BIND, f"{write.actor} gave {life.name} of {life.session} to {seen.session or 'nobody'}"
            )
        if seen.finished and not life.ended_at:
            life.ended_at = write.version
        life.seen = seen

    def _deleted(self, life: _Life, write: Write) -> None:
        if life.deleted_at:
            return
        life.deleted_at, life.delete_asked = write.version, write.asked
        self._deletes += write.actor in self._rules.ours
        if not life.bound_at or life.ended_at:
            return
        who = f"{write.actor} deleted {life.name} with the session {life.session}"
        if life.uid in self._rules.accepted:
            self._fault(FaultKind.LOST_CALL, f"{who}, which had not ended")
        elif write.actor in self._rules.ours and write.has_preconditions:
            self._undelivered += 1
        else:
            self._fault(FaultKind.LOST_CALL, f"{who}, which may have been on its way")

    def verdict(self) -> Verdict:
        lives = list(self._lives.values())
        bound = [life for life in lives if life.bound_at]
        calls = [life for life in bound if life.uid in self._rules.accepted]
        for life in bound:
            if len(life.our_writes) > WRITES_OF_A_SESSION:
                words = ", ".join(life.our_writes)
                self._fault(FaultKind.TOO_MANY_WRITES, f"the session {life.session} in {life.name}: {words}")
        self._find_second_agents(calls)
        return Verdict(
            faults=tuple(self._faults),
            creates=self._creates,
            binds=sum(life.binds for life in lives),
            calls=len(calls),
            ended=sum(bool(life.ended_at) for life in calls),
            deletes=self._deletes,
            undelivered=self._undelivered,
            most_over=self._most_over,
            most_writes=max((len(life.our_writes) for life in bound), default=0),
            refused=dict(self._refused),
            other_writes=dict(self._other),
        )

    def _find_second_agents(self, calls: Sequence[_Life]) -> None:
        """No second agent accepts a session while the pod of the first, ended or not, is there to tell of it.

        Two gateways may both bind for one session, as long as one of them yields before it delivers.
        """
        accepted = self._rules.accepted
        first: dict[str, _Life] = {}
        for life in sorted(calls, key=lambda one: accepted[one.uid].moment):
            call = accepted[life.uid]
            before = first.get(call.session)
            if before is not None and (before.delete_asked is None or before.delete_asked > call.moment):
                self._fault(
                    FaultKind.SECOND_AGENT,
                    f"the session {call.session} was accepted in {life.name} while {before.name} had it",
                )
            first[call.session] = life

    def _fault(self, kind: FaultKind, words: str) -> None:
        self._faults.append(Fault(kind, words))
