"""The termination message."""

from __future__ import annotations

import json
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from voicepool_agent.summary import MAX_BYTES, Reason, Summary, Usage, write_termination_message


def summary(errors: tuple[str, ...] = ()) -> Summary:
    return Summary("s-1", Reason.CALLER_LEFT, 61.23456, 3, 0.2, None, errors, 1, Usage(20, 8, 60))


def test_a_summary_is_json_with_the_agreed_names() -> None:
    assert json.loads(summary(("one",)).as_json()) == {
        "session": "s-1",
        "reason": "caller-left",
        "durationSeconds": 61.235,
        "turns": 3,
        "joinedSeconds": 0.2,
        "firstAudioSeconds": None,
        "interruptions": 1,
        "usage": {"llmPromptTokens": 20, "llmCompletionTokens": 8, "ttsCharacters": 60, "sttAudioSeconds": None},
        "errors": ["one"],
    }


@given(st.lists(st.text(st.characters(), max_size=2000), max_size=20))
def test_a_summary_is_always_whole_json_that_kubernetes_keeps(errors: list[str]) -> None:
    text = summary(tuple(errors)).as_json()
    assert len(text.encode()) <= MAX_BYTES
    assert json.loads(text)["session"] == "s-1"


def test_errors_that_do_not_fit_are_counted() -> None:
    errors = json.loads(summary(tuple(f"{number} " + "x" * 900 for number in range(10))).as_json())["errors"]
    assert errors[0].startswith("0 ")
    assert errors[-1] == f"and {10 - (len(errors) - 1)} more"


def test_an_error_in_any_script_has_the_room_of_its_letters() -> None:
    shown = json.loads(summary(("я" * 200,) * 9).as_json())["errors"]
    assert shown == ["я" * 200] * 9


def test_a_message_that_cannot_be_written_is_reported_and_not_raised(tmp_path: Path) -> None:
    assert "cannot write" in (write_termination_message(tmp_path / "missing" / "file", "words") or "")
    assert write_termination_message(tmp_path / "file", "words") is None
    assert (tmp_path / "file").read_text() == "words"
    assert write_termination_message(tmp_path / "file", "half a pair: \ud83d") is None
