"""What has happened, from two looks, and the Events that tell of it."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from tests.unit.api_server import ApiServer
from tests.unit.facts import NOW, bound, ended, failed, pod, pool, warm
from tests.unit.test_lease import virtual

from voicepool.events import (
    SUMMARY_REASONS,
    Kind,
    Note,
    build_event,
    condition_notes,
    deadline_note,
    happenings,
    note_of,
    startup_phases_seconds,
)
from voicepool.kube.api import EVENTS, Forbidden, Json
from voicepool.model import PodFact
from voicepool.recorder import INTERVAL_SECONDS, EventRecorder
from voicepool_agent.summary import Reason, Summary

SUMMARY = '{"session":"session-0","reason":"caller-left","durationSeconds":61.2,"turns":4}'
NOTE = Note("Warning", "StartFailed", "Start", "Pod demo-0 failed")


def kinds(old: PodFact | None, new: PodFact | None) -> list[tuple[Kind, str]]:
    return [(happening.kind, happening.reason) for happening in happenings(old, new)]


class TestHappenings:
    def test_a_pod_that_is_seen_for_the_first_time_has_no_history(self) -> None:
        for first in (warm(0), bound(0), ended(0, 5), failed(0)):
            assert kinds(None, first) == []

    def test_nothing_happens_twice(self) -> None:
        for same in (pod(0), warm(0), bound(0), ended(0, 5), failed(0)):
            assert kinds(same, replace(same, resource_version="999")) == []

    def test_a_pod_becomes_warm_once(self) -> None:
        assert kinds(pod(0), warm(0)) == [(Kind.BECAME_WARM, "")]
        assert kinds(warm(0, ready=False), warm(0)) == []

    def test_a_start_has_phases_as_far_as_kubernetes_tells_them(self) -> None:
        def at(seconds: float) -> datetime:
            return NOW + timedelta(seconds=seconds)

        whole = warm(0, created_at=NOW, started_at=at(1), agent_started_at=at(3), ready_since=at(7))
        assert startup_phases_seconds(whole) == {"scheduling": 1, "containers": 2, "agent": 4}
        assert startup_phases_seconds(replace(whole, agent_started_at=None)) == {"scheduling": 1}
        assert startup_phases_seconds(replace(whole, created_at=at(2))) == {
            "scheduling": 0,
            "containers": 2,
            "agent": 4,
        }

    def test_a_bind_starts_a_session(self) -> None:
        assert kinds(warm(0), bound(0)) == [(Kind.SESSION_STARTED, "")]

    def test_a_session_ends_with_the_reason_of_its_summary(self) -> None:
        assert kinds(bound(0), ended(0, 0, message=SUMMARY)) == [(Kind.SESSION_ENDED, "caller-left")]

    def test_a_session_that_began_and_ended_between_two_looks_did_both(self) -> None:
        assert [kind for kind, _ in kinds(warm(0), ended(0, 0, message=SUMMARY))] == [
            Kind.SESSION_STARTED,
            Kind.SESSION_ENDED,
        ]

    def test_a_summary_that_was_cut_still_tells_its_reason(self) -> None:
        errors = tuple("x" * 90 for _ in range(40))
        whole = Summary("session-0", Reason.LIVEKIT_LOST, 5, 0, None, None, errors).as_json()
        assert kinds(bound(0), ended(0, 0, message=whole[:1024])) == [(Kind.SESSION_ENDED, "livekit-lost")]

    @pytest.mark.parametrize(
        "message", [None, "", "not JSON", "[]", "[" * 2000, "{}", '{"reason":7}', '{"reason":"something new"}']
    )
    def test_a_reason_that_nobody_knows_is_other(self, message: str | None) -> None:
        assert kinds(bound(0), ended(0, 0, message=message)) == [(Kind.SESSION_ENDED, "other")]

    def test_the_reasons_are_those_of_the_agent(self) -> None:
        assert {reason.value for reason in Reason} == SUMMARY_REASONS

    @pytest.mark.parametrize(
        ("changes", "reason"),
        [
            ({"exit_code": 137, "end_reason": "OOMKilled"}, "out-of-memory"),
            ({"exit_code": None, "end_reason": "Evicted"}, "evicted"),
            ({"exit_code": 137, "end_reason": "DeadlineExceeded"}, "deadline"),
            ({"exit_code": None, "end_reason": "DeletionByPodGC"}, "node-lost"),
            ({"exit_code": None, "end_reason": "DeletionByTaintManager"}, "node-lost"),
            ({"exit_code": 137, "end_reason": "EvictionByEvictionAPI"}, "evicted"),
            ({"exit_code": 137, "end_reason": "PreemptionByScheduler"}, "evicted"),
            ({"exit_code": 1, "end_reason": "Error"}, "crashed"),
            ({"exit_code": None, "end_reason": None}, "other"),
        ],
    )
    def test_a_session_without_a_summary_was_dropped(self, changes: dict[str, Any], reason: str) -> None:
        gone = ended(0, 0, phase="Failed", **changes)
        assert kinds(bound(0), gone) == [(Kind.SESSION_DROPPED, reason)]

    def test_a_summary_with_an_exit_code_is_an_end_all_the_same(self) -> None:
        gone = ended(0, 0, phase="Failed", exit_code=1, message=SUMMARY)
        assert kinds(bound(0), gone) == [(Kind.SESSION_ENDED, "caller-left")]

    def test_a_bound_pod_that_is_deleted_and_leaves_without_a_word_never_had_its_session(self) -> None:
        gone = ended(0, 0, message=None, deleting=True)
        assert kinds(bound(0), gone) == [(Kind.SESSION_UNDELIVERED, "undelivered")]

    @pytest.mark.parametrize("facts", [{"message": "bye"}, {"exit_code": 137}, {"deleting": False}], ids=str)
    def test_another_end_is_not_taken_for_a_session_that_never_was(self, facts: dict[str, Any]) -> None:
        gone = ended(0, 0, **{"message": None, "deleting": True, **facts})
        assert Kind.SESSION_UNDELIVERED not in dict(kinds(bound(0), gone))

    def test_a_bound_pod_that_vanishes_drops_its_session(self) -> None:
        assert kinds(bound(0), None) == [(Kind.SESSION_DROPPED, "deleted")]

    def test_one_that_vanishes_with_its_node_says_so(self) -> None:
        marked = bound(0, deleting=True, end_reason="DeletionByTaintManager")
        assert kinds(marked, None) == [(Kind.SESSION_DROPPED, "node-lost")]

    def test_what_has_ended_or_is_unbound_vanishes_in_silence(self) -> None:
        for gone in (ended(0, 5), failed(0), warm(0)):
            assert kinds(gone, None) == []

    def test_a_start_that_fails(self) -> None:
        assert kinds(pod(0), failed(0)) == [(Kind.START_FAILED, "crashed")]

    def test_a_warm_pod_that_dies(self) -> None:
        assert kinds(warm(0), failed(0)) == [(Kind.WARM_POD_DIED, "crashed")]

    def test_a_pod_that_was_told_to_go_did_not_fail(self) -> None:
        assert kinds(warm(0, deleting=True), failed(0, deleting=True)) == []

    def test_another_pod_of_the_same_name_has_nothing_to_do_with_it(self) -> None:
        assert kinds(bound(0), warm(0, uid="another")) == []


class TestNotes:
    def test_a_dropped_session_is_told_with_pod_and_cause(self) -> None:
        gone = ended(0, 0, phase="Failed", exit_code=137, end_reason="OOMKilled", message="OOMKilled")
        [happening] = happenings(bound(0), gone)
        note = note_of(happening)
        assert note is not None
        assert (note.type, note.reason) == ("Warning", "SessionDropped")
        assert note.message == (
            f"Session session-0 was dropped with pod {gone.name} (out-of-memory, exit code 137): OOMKilled"
        )

    def test_the_ordinary_course_of_things_is_not_told(self) -> None:
        for old, new in ((pod(0), warm(0)), (warm(0), bound(0)), (bound(0), ended(0, 0, message=SUMMARY))):
            assert [note_of(happening) for happening in happenings(old, new)] == [None]

    def test_a_failed_start_is_told_in_the_agents_own_words(self) -> None:
        [happening] = happenings(pod(0), failed(0, message="GROQ_API_KEY is not set\nmore"))
        note = note_of(happening)
        assert note is not None
        assert note.message.endswith("(crashed, exit code 1): GROQ_API_KEY is not set")

    def test_a_deadline_is_told_with_what_to_look_at(self) -> None:
        assert "readiness probe, or its log" in deadline_note("demo-0", 120, was_warm=False).message

    def test_a_pod_that_was_warm_and_is_not_again_in_time_is_no_failed_start(self) -> None:
        note = deadline_note("demo-0", 120, was_warm=True)
        assert (note.reason, note.message.startswith("Warm pod demo-0 has not been Ready")) == ("WarmPodDied", True)


def status(**conditions: str) -> Json:
    return {
        "conditions": [
            {"type": kind, "status": value, "reason": "Because", "message": "of this."}
            for kind, value in conditions.items()
        ]
    }


def reasons(before: Json, after: Json) -> list[str]:
    return [note.reason for note in condition_notes(before, after)]


class TestConditions:
    def test_only_steps_are_told(self) -> None:
        states = [status(Ready=a, TemplateValid=b) for a in ("True", "False") for b in ("True", "False")]
        for same in (*states, status(Stalled="True", Ready="False")):
            assert reasons(same, same) == []

    def test_a_new_pool_that_is_on_its_way_is_not_told(self) -> None:
        assert reasons({}, status(Ready="False", TemplateValid="True", Reconciling="True")) == []

    def test_ready_and_no_longer_ready(self) -> None:
        assert reasons(status(Ready="False"), status(Ready="True")) == ["Ready"]
        [note] = condition_notes(status(Ready="True"), status(Ready="False"))
        assert (note.type, note.reason, note.message) == ("Warning", "NotReady", "Because: of this.")

    def test_stalled_and_resumed(self) -> None:
        assert reasons(status(Ready="False"), status(Ready="False", Stalled="True")) == ["Stalled"]
        assert reasons(status(Ready="False", Stalled="True"), status(Ready="True")) == ["Ready", "Resumed"]

    def test_a_template_that_is_refused_and_mended(self) -> None:
        assert reasons({}, status(TemplateValid="False")) == ["TemplateInvalid"]
        assert reasons(status(TemplateValid="False"), status(TemplateValid="True")) == ["TemplateValid"]


class TestEvent:
    def test_it_is_about_the_pool(self) -> None:
        event = build_event(pool(), NOTE, datetime(2026, 3, 1, 12, 0, 0, 5, tzinfo=UTC), "operator-a")
        assert event["regarding"] == {
            "apiVersion": "voicepool.dev/v1alpha1",
            "kind": "VoiceAgentPool",
            "namespace": "calls",
            "name": "demo",
            "uid": "pool-uid",
        }
        assert event["eventTime"] == "2026-03-01T12:00:00.000005Z"
        assert (event["reportingController"], event["reportingInstance"]) == ("voicepool.dev/operator", "operator-a")
        assert event["metadata"]["name"].startswith("demo.")

    def test_what_is_too_long_is_cut_between_characters(self) -> None:
        note = Note("Warning", "Stalled", "Reconcile", "ü" * 2000)
        event = build_event(pool(), note, NOW, "x" * 300)
        assert len(event["note"].encode()) <= 1024
        assert set(event["note"]) == {"ü"}
        assert len(event["reportingInstance"]) == 128

    def test_many_are_told_as_one_with_their_number(self) -> None:
        event = build_event(pool(), NOTE, NOW, "operator-a", count=12)
        assert event["note"] == "12 times, the first: Pod demo-0 failed"


class Recorded:
    """A recorder at work on an API server in memory."""

    def __init__(self) -> None:
        self.server = ApiServer()
        self.outcomes: list[str] = []
        self.recorder = EventRecorder(self.server, "operator-a", lambda: NOW, on_written=self.outcomes.append)
        self.task = asyncio.create_task(self.recorder.run())

    def notes(self) -> list[str]:
        return [obj["note"] for (plural, *_), obj in self.server.objects.items() if plural == EVENTS.plural]

    async def stop(self) -> None:
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)


class TestRecorder:
    @virtual
    async def test_the_first_is_written_at_once_and_those_that_follow_become_one(self) -> None:
        it = Recorded()
        it.recorder.note(pool(), NOTE)
        await asyncio.sleep(0.001)
        assert it.notes() == [NOTE.message]
        for number in range(50):
            it.recorder.note(pool(), replace(NOTE, message=f"Pod demo-{number} failed"))
        await asyncio.sleep(INTERVAL_SECONDS / 2)
        assert len(it.notes()) == 1
        await asyncio.sleep(INTERVAL_SECONDS)
        assert it.notes() == [NOTE.message, "50 times, the first: Pod demo-0 failed"]
        await it.stop()

    @virtual
    async def test_another_pool_and_another_reason_do_not_wait(self) -> None:
        it = Recorded()
        it.recorder.note(pool(), NOTE)
        it.recorder.note(pool(), replace(NOTE, reason="Stalled", message="b"))
        it.recorder.note(replace(pool(), uid="another"), replace(NOTE, message="c"))
        await asyncio.sleep(0.001)
        assert sorted(it.notes()) == sorted([NOTE.message, "b", "c"])
        await it.stop()

    @virtual
    async def test_a_failure_is_counted_and_the_next_is_written(self) -> None:
        it = Recorded()
        it.server.failures["create"] = [Forbidden("events is forbidden", status=403)]
        it.recorder.note(pool(), NOTE)
        await asyncio.sleep(0.001)
        assert (it.notes(), it.outcomes) == ([], ["failed"])
        it.recorder.note(pool(), replace(NOTE, reason="Ready"))
        await asyncio.sleep(0.001)
        assert it.outcomes == ["failed", "ok"]
        await it.stop()

    @virtual
    async def test_a_slow_api_server_does_not_let_notes_pile_up(self) -> None:
        it = Recorded()
        await it.stop()
        for number in range(1500):
            it.recorder.note(replace(pool(), uid=str(number)), NOTE)
        assert it.outcomes == ["dropped"] * 500
