"""What people said, left out of what others write."""

from __future__ import annotations

import pytest

from voicepool_agent.speech import MAX_QUOTATIONS, MAX_WAITING, Speech


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


def test_pieces_that_come_after_a_line_go_on_with_those_before_it(speech: Speech) -> None:
    for piece in ("It", " is", " a", " very", " small", " king"):
        speech.hear_piece(piece)
    assert speech.hide("it is a") == "[...]"
    speech.hear_piece("fish of mine")
    assert speech.hide("very small kingfish of mine") == "[...]"
    assert speech.hide("small king of") == "small king of"


def test_what_was_said_long_ago_is_forgotten(speech: Speech) -> None:
    for generation in range(3):
        assert speech.hide("my secret word") == ("[...]" if generation < 2 else "my secret word")
        speech.hear(" ".join(f"{generation}-{number}" for number in range(MAX_QUOTATIONS)))
        speech.hide("")
    assert speech.hide("2 49998 2") == "[...]"


def test_nothing_piles_up_when_there_is_no_line_to_compare_with(speech: Speech) -> None:
    for number in range(3 * MAX_WAITING):
        speech.hear(f"saying {number} of many")
        speech.hear_piece(f" piece{number}")
    assert len(speech._heard) + len(speech._stream) < 2 * MAX_WAITING
    assert speech.hide("saying 1 of piece1 piece2 piece3") == "[...]"
