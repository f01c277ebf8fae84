"""The judge of the storms: each fault is found in a log that has it, and none in a log of a good day."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from tests.cluster.chaos.audit import AuditReader
from tests.cluster.chaos.judge import (
    Acceptance,
    FaultKind,
    Rules,
    Verdict,
    Write,
    judge,
    write_from_audit,
    writes_without_cause,
)

OPERATOR = "system:serviceaccount:calls:voicepool-operator"
GATEWAY = "system:serviceaccount:calls:voicepool-gateway"
KUBELET = "system:node:one"
BEGIN = datetime(2026, 1, 1, tzinfo=UTC)
PRECONDITIONS = {"preconditions": {"uid": "a", "resourceVersion": "7"}}

Json = dict[str, Any]


def moment(seconds: float) -> datetime:
    return BEGIN + timedelta(seconds=seconds)


class Log:
    """Writes an audit log, one second and one version a line."""

    def __init__(self) -> None:
        self.events: list[Json] = []
        self.pods: dict[str, Json] = {}

    def add(self, actor: str, verb: str, resource: str, name: str, **more: Any) -> Json:
        number = len(self.events) + 1
        plural, _, subresource = resource.partition("/")
        reference = {"resource": plural, "namespace": "calls", "name": name}
        event: Json = {
            "stage": "ResponseComplete",
            "requestReceivedTimestamp": moment(number - 0.5).isoformat(timespec="microseconds"),
            "stageTimestamp": moment(number).isoformat(timespec="microseconds"),
            "requestURI": f"/api/v1/namespaces/calls/{plural}/{name}",
            "verb": verb,
            "user": {"username": actor},
            "objectRef": reference | ({"subresource": subresource} if subresource else {}),
            "responseStatus": {"code": 201 if verb == "create" else 200},
            **more,
        }
        self.events.append(event)
        return event

    def answer(self, name: str) -> Json:
        pod = self.pods[name]
        pod["metadata"]["resourceVersion"] = str(len(self.events) + 1)
        copy: Json = json.loads(json.dumps(pod))
        return copy

    def create(self, name: str, actor: str = OPERATOR, uid: str = "") -> None:
        labels = {"voicepool.dev/pool": "demo", "voicepool.dev/state": "warm"}
        self.pods[name] = {"kind": "Pod", "metadata": {"name": name, "uid": uid or name, "labels": labels}}
        self.add(actor, "create", "pods", name, responseObject=self.answer(name))

    def status(self, name: str, *, ready: bool = True, phase: str = "Running") -> None:
        self.pods[name]["status"] = {"phase": phase, "containerStatuses": [{"name": "agent", "ready": ready}]}
        self.add(KUBELET, "patch", "pods/status", name, responseObject=self.answer(name))

    def bind(self, name: str, session: str, actor: str = GATEWAY) -> None:
        self.pods[name]["metadata"]["labels"] |= {"voicepool.dev/state": "bound", "voicepool.dev/session": session}
        path = "/metadata/labels/voicepool.dev~1state"
        patch = [{"op": "test", "path": path, "value": "warm"}, {"op": "replace", "path": path, "value": "bound"}]
        self.add(actor, "patch", "pods", name, requestObject=patch, responseObject=self.answer(name))

    def delete(self, name: str, actor: str = OPERATOR, request: Json | None = None) -> None:
        request = PRECONDITIONS if request is None else request
        self.add(actor, "delete", "pods", name, requestObject=request, responseObject=self.answer(name))

    def session(self, name: str, session: str) -> None:
        self.create(name)
        self.status(name)
        self.bind(name, session)
        self.status(name, ready=False, phase="Succeeded")
        self.delete(name)

    def writes(self) -> list[Write]:
        return [write for event in self.events if (write := write_from_audit(event)) is not None]

    def verdict(self, *, max_pods: int = 10, overshoot: int = 0, **sessions: str) -> Verdict:
        """Each agent accepted its session a moment after the bind."""
        bound = {event["objectRef"]["name"]: number for number, event in enumerate(self.events) if binds(event)}
        accepted = {uid: Acceptance(session, moment(bound.get(uid, 0) + 1.1)) for uid, session in sessions.items()}
        return judge(self.writes(), Rules(frozenset({OPERATOR}), frozenset({GATEWAY}), max_pods, overshoot, accepted))


def binds(event: Json) -> bool:
    return isinstance(event.get("requestObject"), list)


@pytest.fixture
def log() -> Log:
    return Log()


def kinds(verdict: Verdict) -> list[FaultKind]:
    return [fault.kind for fault in verdict.faults]


def test_a_good_day(log: Log) -> None:
    log.session("a", "s1")
    log.create("b")
    log.delete("b")
    verdict = log.verdict(a="s1")
    assert verdict.faults == ()
    assert (verdict.creates, verdict.binds, verdict.calls, verdict.ended, verdict.deletes) == (2, 1, 1, 1, 2)
    assert (verdict.most_writes, verdict.most_over, verdict.undelivered) == (3, -9, 0)
    assert "0 lost calls, 0 double binds" in verdict.words()


def test_a_call_that_is_cut_off_is_lost(log: Log) -> None:
    log.create("a")
    log.status("a")
    log.bind("a", "s1")
    log.delete("a")
    verdict = log.verdict(a="s1")
    assert kinds(verdict) == [FaultKind.LOST_CALL]
    assert verdict.faults[0].words == f"{OPERATOR} deleted a with the session s1, which had not ended"


def test_a_call_is_lost_whoever_deletes_it(log: Log) -> None:
    log.create("a")
    log.status("a")
    log.bind("a", "s1")
    log.delete("a", actor="system:serviceaccount:kube-system:generic-garbage-collector", request={})
    assert kinds(log.verdict(a="s1")) == [FaultKind.LOST_CALL]
    assert kinds(log.verdict()) == [FaultKind.LOST_CALL]


def test_a_bind_that_never_came_to_its_agent_may_be_undone(log: Log) -> None:
    log.create("a")
    log.status("a")
    log.bind("a", "s1")
    log.delete("a", actor=GATEWAY)
    verdict = log.verdict()
    assert verdict.faults == ()
    assert verdict.undelivered == 1


def test_two_binds_of_one_pod(log: Log) -> None:
    log.create("a")
    log.status("a")
    log.bind("a", "s1")
    log.bind("a", "s2")
    assert set(kinds(log.verdict(a="s1"))) == {FaultKind.DOUBLE_BIND}


def test_the_same_bind_twice_is_two_binds(log: Log) -> None:
    log.create("a")
    log.status("a")
    log.bind("a", "s1")
    log.bind("a", "s1")
    assert kinds(log.verdict(a="s1")) == [FaultKind.DOUBLE_BIND]


def test_a_refused_bind_is_none(log: Log) -> None:
    log.session("a", "s1")
    refused = log.add(GATEWAY, "patch", "pods", "a", requestObject=log.events[2]["requestObject"])
    refused["responseStatus"] = {"code": 422}
    verdict = log.verdict(a="s1")
    assert verdict.faults == ()
    assert verdict.refused == {422: 1}


def test_a_second_agent_while_the_first_one_is_there(log: Log) -> None:
    for name in ("a", "b"):
        log.create(name)
        log.status(name)
        log.bind(name, "s1")
    assert kinds(log.verdict(a="s1", b="s1")) == [FaultKind.SECOND_AGENT]


def test_a_second_agent_while_the_first_one_is_kept_for_its_logs(log: Log) -> None:
    log.create("a")
    log.status("a")
    log.bind("a", "s1")
    log.status("a", phase="Succeeded", ready=False)
    log.session("b", "s1")
    assert kinds(log.verdict(a="s1", b="s1")) == [FaultKind.SECOND_AGENT]


def test_of_two_gateways_one_may_yield(log: Log) -> None:
    for name in ("a", "b"):
        log.create(name)
        log.status(name)
        log.bind(name, "s1")
    log.delete("b", actor=GATEWAY)
    assert log.verdict(a="s1").faults == ()


def test_nothing_tells_of_a_session_any_more_when_its_pod_is_gone(log: Log) -> None:
    log.session("a", "s1")
    log.session("b", "s1")
    assert log.verdict(a="s1", b="s1").faults == ()


def test_a_pod_that_was_not_ready(log: Log) -> None:
    log.create("a")
    log.status("a", ready=False)
    log.bind("a", "s1")
    assert kinds(log.verdict(a="s1")) == [FaultKind.NOT_READY]


def test_that_a_pod_became_ready_is_seen_by_its_bind_where_the_log_has_lost_it(log: Log) -> None:
    log.create("a")
    log.pods["a"]["status"] = {"phase": "Running", "containerStatuses": [{"name": "agent", "ready": True}]}
    log.bind("a", "s1")
    log.status("a", ready=False, phase="Succeeded")
    assert log.verdict(a="s1").faults == ()


@pytest.mark.parametrize("request_", [{}, {"preconditions": {"uid": "a"}}, {"preconditions": {"resourceVersion": "1"}}])
def test_a_delete_without_both_preconditions(log: Log, request_: Json) -> None:
    log.create("a")
    log.delete("a", request=request_)
    assert kinds(log.verdict()) == [FaultKind.NO_PRECONDITIONS]


def test_a_delete_that_was_refused_before_it_was_read(log: Log) -> None:
    log.create("a")
    log.delete("a", request={})
    log.events[1]["responseStatus"] = {"code": 409}
    assert kinds(log.verdict()) == [FaultKind.NO_PRECONDITIONS]
    del log.events[1]["requestObject"]
    assert log.verdict().faults == ()
    log.events[1]["responseStatus"] = {"code": 200}
    assert kinds(log.verdict()) == [FaultKind.NO_PRECONDITIONS]


def test_more_pods_than_allowed(log: Log) -> None:
    for name in ("a", "b", "c"):
        log.create(name)
    assert kinds(log.verdict(max_pods=2)) == [FaultKind.TOO_MANY_PODS]
    assert log.verdict(max_pods=2, overshoot=1).faults == ()
    assert log.verdict(max_pods=2, overshoot=1).most_over == 1


def test_ended_and_deleted_pods_leave_room(log: Log) -> None:
    log.create("a")
    log.status("a", phase="Succeeded", ready=False)
    log.create("b")
    log.delete("b")
    log.create("c")
    assert log.verdict(max_pods=1).faults == ()


def test_a_name_that_is_used_again_is_another_pod(log: Log) -> None:
    log.create("a", uid="first")
    log.status("a")
    log.bind("a", "s1")
    log.status("a", phase="Succeeded", ready=False)
    log.delete("a")
    log.create("a", uid="second")
    log.delete("a")
    assert log.verdict(first="s1").faults == ()


def test_a_fourth_write(log: Log) -> None:
    log.create("a")
    log.status("a")
    log.bind("a", "s1")
    log.add(OPERATOR, "patch", "pods", "a", responseObject=log.answer("a"))
    log.status("a", phase="Succeeded", ready=False)
    log.delete("a")
    verdict = log.verdict(a="s1")
    assert kinds(verdict) == [FaultKind.TOO_MANY_WRITES]
    assert verdict.most_writes == 4


def test_answers_that_were_logged_the_other_way_round(log: Log) -> None:
    log.create("a")
    log.status("a")
    log.bind("a", "s1")
    log.status("a", phase="Succeeded", ready=False)
    log.delete("a")
    ended, deleted = log.events[3], log.events[4]
    ended["stageTimestamp"], deleted["stageTimestamp"] = deleted["stageTimestamp"], ended["stageTimestamp"]
    assert log.verdict(a="s1").faults == ()


def test_a_bind_whose_line_is_missing_is_seen_all_the_same(log: Log) -> None:
    log.create("a")
    log.status("a")
    log.bind("a", "s1")
    log.status("a", ready=False)
    log.delete("a")
    del log.events[2]
    assert kinds(log.verdict(a="s1")) == [FaultKind.LOST_CALL]


def test_a_delete_that_is_answered_without_the_pod(log: Log) -> None:
    log.create("a")
    log.status("a")
    log.bind("a", "s1")
    log.delete("a")
    log.events[3]["responseObject"] = {"kind": "Status", "status": "Success", "details": {"uid": "a"}}
    assert kinds(log.verdict(a="s1")) == [FaultKind.LOST_CALL]


def test_a_dry_run_changes_nothing(log: Log) -> None:
    log.create("a")
    log.events[0]["requestURI"] += "?dryRun=All"
    verdict = log.verdict(max_pods=0)
    assert verdict.faults == ()
    assert verdict.creates == 0


def test_what_a_converged_pool_does_not_need(log: Log) -> None:
    log.add(OPERATOR, "patch", "leases", "voicepool-operator")
    log.add(OPERATOR, "patch", "voiceagentpools/status", "demo")
    log.add(KUBELET, "patch", "pods/status", "a")
    log.add(OPERATOR, "get", "voiceagentpools", "demo")
    found = writes_without_cause(log.writes(), frozenset({OPERATOR, GATEWAY}))
    assert [write.resource for write in found] == ["voiceagentpools/status"]
    assert log.verdict().other_writes == {"leases": 1, "voiceagentpools/status": 1}


class TestReader:
    """The log while it grows."""

    def line(self, namespace: str) -> str:
        log = Log()
        event = log.add(OPERATOR, "patch", "leases", "one")
        event["objectRef"]["namespace"] = namespace
        return json.dumps(event, separators=(",", ":")) + "\n"

    def test_it_reads_from_now_on_and_of_one_namespace(self, tmp_path: Path) -> None:
        path = tmp_path / "audit.log"
        path.write_text(self.line("calls"))
        reader = AuditReader(path, "calls")
        with path.open("a") as file:
            file.write(self.line("other") + self.line("calls"))
        reader.read()
        reader.close()
        assert len(reader.writes) == 1

    def test_a_line_may_come_in_two_pieces(self, tmp_path: Path) -> None:
        path = tmp_path / "audit.log"
        path.touch()
        reader = AuditReader(path, "calls")
        line = self.line("calls")
        for piece in (line[:20], line[20:]):
            with path.open("a") as file:
                file.write(piece)
            reader.read()
        reader.close()
        assert len(reader.writes) == 1

    def test_a_rotation_loses_nothing(self, tmp_path: Path) -> None:
        path = tmp_path / "audit.log"
        path.touch()
        reader = AuditReader(path, "calls")
        path.write_text(self.line("calls"))
        path.rename(tmp_path / "audit-old.log")
        path.write_text(self.line("calls"))
        reader.read()
        reader.close()
        assert len(reader.writes) == 2
