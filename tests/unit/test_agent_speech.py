"""What people said, left out of what others write."""

from __future__ import annotations

import pytest

from voicepool_agent.speech import MAX_CHARACTERS, Speech


@pytest.fixture
def speech() -> Speech:
    heard = Speech()
    heard.hear("My secret word is kookaburra.")
    heard.hear("Kingfisher!")
    heard.hear("Yes")
    heard.hear("Thank you")
    return heard


@pytest.mark.parametrize(
    ("line", "left"),
    [
        ("cannot say 'my secret word is kookaburra', giving up", "cannot say '[...]', giving up"),
        ("MY SECRET WORD", "[...]"),
        ("my\nsecret\nword", "[...]"),
        ("a secret word is what it was", "a [...] what it was"),
        ("secret word", "secret word"),
        ("no kingfisher", "no [...]"),
        ("yes, thank you", "yes, [...]"),
        ("Error code: 401 - invalid API key", "Error code: 401 - invalid API key"),
        ("secret word is: word is kookaburra; is kookaburra", "[...]; is kookaburra"),
        ("", ""),
    ],
)
def test_three_words_in_a_row_or_a_short_saying_are_left_out(speech: Speech, line: str, left: str) -> None:
    assert speech.hide(line) == left


def test_pieces_of_a_model_make_words_together(speech: Speech) -> None:
    for piece in ("It", " is", " a", " king", "fish"):
        speech.hear_piece(piece)
    assert speech.hide("it is a kingfish") == "[...]"


def test_nothing_is_left_out_before_anything_is_said() -> None:
    assert Speech().hide("it is a kingfish") == "it is a kingfish"


def test_what_was_said_long_ago_is_forgotten(speech: Speech) -> None:
    for _ in range(MAX_CHARACTERS // 1000 + 1):
        speech.hear("word " * 200)
    assert speech.hide("my secret word") == "my secret word"
    assert speech.hide("word word word") == "[...]"
