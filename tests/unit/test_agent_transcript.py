"""Who said what, turn by turn."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta, timezone

from voicepool_agent.transcript import AGENT, CALLER, Turn, Turns

BIND = datetime(2026, 3, 2, 10, 0, 0, tzinfo=UTC)


def at(seconds: float) -> tuple[datetime, float]:
    return BIND + timedelta(seconds=seconds), seconds


def test_a_turn_lasts_until_somebody_else_speaks() -> None:
    turns = Turns()
    assert turns.said(AGENT, "Hello,", *at(1)) is None
    assert turns.said(AGENT, "how can I help you?", *at(2)) is None
    over = turns.said(CALLER, "When do you open?", *at(5), identity="caller-1")
    assert over == Turn(AGENT, None, *at(1), "Hello, how can I help you?")
    assert turns.end() == Turn(CALLER, "caller-1", *at(5), "When do you open?")
    assert turns.end() is None


def test_a_turn_begins_when_its_speaker_does_and_not_when_the_words_are_known() -> None:
    turns = Turns()
    turns.began(CALLER, *at(3))
    turns.began(CALLER, *at(4))
    turns.said(CALLER, "When do you", *at(5))
    turns.said(CALLER, "open?", *at(6))
    turns.began(AGENT, *at(7))
    assert turns.said(AGENT, "At nine.", *at(8)) == Turn(CALLER, None, *at(3), "When do you open?")
    assert turns.end() == Turn(AGENT, None, *at(7), "At nine.")


def test_two_callers_have_turns_of_their_own() -> None:
    turns = Turns()
    turns.said(CALLER, "One.", *at(1), identity="a")
    assert turns.said(CALLER, "Two.", *at(2), identity="b") == Turn(CALLER, "a", *at(1), "One.")


def test_pieces_that_bring_their_spaces_get_no_more() -> None:
    turns = Turns()
    for piece in ("Good", "bye", " now", "."):
        turns.said(AGENT, piece, *at(1), spaced=True)
    turn = turns.end()
    assert turn is not None
    assert turn.text == "Goodbye now."


def test_silence_is_no_turn() -> None:
    turns = Turns()
    assert turns.said(CALLER, "  ", *at(1)) is None
    assert turns.end() is None


def test_a_line_is_json_that_says_who_when_and_what() -> None:
    zone = timezone(timedelta(hours=2))
    line = Turn(CALLER, "caller-1", BIND.astimezone(zone), 1.23456, "Grüße\n").as_line()
    assert line.count("\n") == 1
    assert json.loads(line) == {
        "speaker": "caller",
        "identity": "caller-1",
        "at": "2026-03-02T10:00:00.000Z",
        "seconds": 1.235,
        "text": "Grüße\n",
    }
    assert "identity" not in json.loads(Turn(AGENT, None, BIND, 0.0, "Hello").as_line())
