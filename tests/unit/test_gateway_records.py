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
    assert (record.state, record.completionStatus, record.reason) == ("bound", None, None)


def test_a_session_that_ended_says_why_in_its_agents_words() -> None:
    record = session_record(ended(0, 5, message=SUMMARY))
    assert (record.state, record.completionStatus, record.reason) == ("ended", "completed", "idle")
    assert record.summary == json.loads(SUMMARY)


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
    assert (record.state, record.completionStatus, record.reason) == ("ended", "dropped", reason)
    assert record.summary is None
