"""Sessions as JSON, from their pods."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tests.unit.facts import bound, ended

from voicepool.gateway.records import session_record

SUMMARY = json.dumps({"session": "session-0", "reason": "idle", "errors": ["x" * 200] * 10}, separators=(",", ":"))


def test_a_session_that_goes_on_has_no_end() -> None:
    record = session_record(bound(0))
    assert (record.state, record.completion_status, record.reason) == ("bound", None, None)


def test_a_session_that_ended_says_why_in_its_agents_words() -> None:
    record = session_record(ended(0, 5, message=SUMMARY))
    assert (record.state, record.completion_status, record.reason) == ("ended", "completed", "idle")
    assert record.summary == json.loads(SUMMARY)


@pytest.mark.parametrize(("exit_code", "completion"), [(0, "completed"), (137, "failed")])
@pytest.mark.parametrize("phase", ["Running", "the last one"])
def test_how_a_session_ended_is_known_as_soon_as_its_process_has_ended(
    exit_code: int, completion: str, phase: str
) -> None:
    phase = phase if phase == "Running" else "Failed" if exit_code else "Succeeded"
    record = session_record(ended(0, 5, phase=phase, exit_code=exit_code, message=SUMMARY))
    assert (record.state, record.completion_status, record.reason) == ("ended", completion, "idle")


@pytest.mark.parametrize("reason", ["not-joined", "bot-failed", "provider-failed", "livekit-lost", "stuck"])
def test_a_session_that_came_to_grief_has_failed_though_its_process_ended_in_order(reason: str) -> None:
    message = json.dumps({"session": "session-0", "reason": reason})
    record = session_record(ended(0, 5, message=message))
    assert (record.state, record.completion_status, record.reason) == ("ended", "failed", reason)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"exit_code": 137}, "crashed"),
        ({"exit_code": 137, "end_reason": "OOMKilled"}, "out-of-memory"),
        ({"exit_code": 143, "end_reason": "DeadlineExceeded"}, "deadline"),
    ],
)
def test_a_session_without_a_summary_was_dropped_and_says_why(changes: dict[str, Any], reason: str) -> None:
    record = session_record(ended(0, 5, phase="Failed", **changes))
    assert (record.state, record.completion_status, record.reason) == ("ended", "dropped", reason)
    assert record.summary is None


def test_a_session_that_never_came_to_its_agent_says_so_and_has_no_summary() -> None:
    record = session_record(ended(0, 5, deleting=True, message=None, end_reason="Completed"))
    assert (record.state, record.completion_status, record.reason) == ("ended", "failed", "undelivered")
    assert (record.end_state, record.summary) == ("agent_start_timeout", None)


@pytest.mark.parametrize(
    "message",
    [
        '{"reason": "\\ud800"}',
        '{"turns": NaN}',
        '{"a":' * 300 + "1" + "}" * 300,
        '{"a":' * 700 + "1" + "}" * 700,
        "[" * 2000,
        "[1]",
        "killed",
    ],
)
def test_what_is_no_summary_is_kept_as_words_and_spoils_no_list(message: str) -> None:
    record = session_record(ended(0, 5, message=message))
    assert json.loads(record.model_dump_json(by_alias=True))["summary"] == {"reason": message}


def test_a_summary_of_many_levels_can_be_written() -> None:
    record = session_record(ended(0, 5, message='{"a":' * 150 + "1" + "}" * 150))
    assert json.loads(record.model_dump_json(by_alias=True))["summary"] is not None
