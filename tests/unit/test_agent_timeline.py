"""Voices on a timeline: where each piece comes to lie."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from voicepool_agent.timeline import JOINED_SECONDS, RATE, Samples, Voice, interleaved, mixed, mono


def ones(count: int) -> Samples:
    return np.ones(count, np.int16)


def where(samples: Samples) -> list[tuple[int, int]]:
    """From where to where there is sound."""
    edges = np.flatnonzero(np.diff(np.concatenate(([0], (samples != 0).astype(np.int8), [0]))))
    return [(int(start), int(end)) for start, end in edges.reshape(-1, 2)]


def test_pieces_that_follow_each_other_are_one_sound() -> None:
    voice = Voice()
    for at in (0, 320 + 100, 640 - 50, 960):
        voice.add(ones(320), at)
    assert where(voice.take(RATE)) == [(0, 1280)]


def test_a_pause_is_silence_of_its_length() -> None:
    voice = Voice()
    voice.add(ones(320), RATE)
    voice.add(ones(320), 3 * RATE)
    assert where(voice.take(4 * RATE)) == [(RATE, RATE + 320), (3 * RATE, 3 * RATE + 320)]


def test_what_comes_faster_than_it_is_played_lies_one_after_the_other() -> None:
    voice = Voice()
    for _ in range(5):
        voice.add(ones(RATE), RATE)
    assert where(voice.take(10 * RATE)) == [(RATE, 6 * RATE)]


def test_what_was_not_played_is_cut_off_and_the_next_sound_is_where_it_belongs() -> None:
    voice = Voice()
    voice.add(ones(5 * RATE), 0)
    voice.cut(RATE)
    voice.add(ones(RATE), 2 * RATE)
    assert where(voice.take(10 * RATE)) == [(0, RATE), (2 * RATE, 3 * RATE)]


def test_what_was_taken_stays_as_it_is() -> None:
    voice = Voice()
    voice.add(ones(RATE), 0)
    voice.take(2 * RATE)
    voice.cut(RATE)
    voice.add(ones(RATE), RATE)
    assert voice.end == 3 * RATE
    assert len(voice.take(RATE)) == 0


def test_a_voice_that_is_late_catches_up_in_its_pauses_and_loses_no_word() -> None:
    voice, piece = Voice(catches_up=True), RATE // 50
    for at in (*range(0, 7 * RATE, piece), *[10 * RATE] * 150, *range(10 * RATE, 12 * RATE, piece)):
        voice.add(np.full(piece, 1000, np.int16), at)
    assert voice.end == 15 * RATE, "three seconds late"
    for at in range(12 * RATE, 16 * RATE, piece):
        voice.add(np.full(piece, 20, np.int16), at)
    voice.add(np.full(piece, 1000, np.int16), 16 * RATE)
    samples = voice.take(20 * RATE)
    assert (np.abs(samples) == 1000).sum() == 12 * RATE + piece
    assert np.flatnonzero(samples == 1000)[-1] / RATE < 16 + JOINED_SECONDS + 0.1


def test_a_voice_that_is_late_keeps_the_moments_within_a_word_in_which_it_is_quiet() -> None:
    voice, piece = Voice(catches_up=True), RATE // 100
    for _ in range(5):
        for level in (*[1000] * 20, *[20] * 8):
            voice.add(np.full(piece, level, np.int16), 0)
    assert voice.end == 5 * 28 * piece


@given(st.lists(st.tuples(st.integers(1, RATE), st.integers(0, 3 * RATE), st.booleans()), max_size=30))
def test_nothing_is_lost_and_nothing_comes_too_early(pieces: list[tuple[int, int, bool]]) -> None:
    voice, now, given_samples, taken = Voice(), 0, 0, [np.zeros(0, np.int16)]
    for length, passed, takes in pieces:
        now += passed
        before = voice.end
        voice.add(ones(length), now)
        start = voice.end - length
        assert start >= before
        assert start in (before, now)
        assert start > now - JOINED_SECONDS * RATE or start == before
        given_samples += length
        if takes:
            taken.append(voice.take(now))
    taken.append(voice.take(voice.end))
    assert int(np.concatenate(taken).sum()) == given_samples


def test_callers_who_speak_together_are_both_heard_and_never_overflow() -> None:
    loud, other = Voice(), Voice()
    loud.add(np.full(10, 30_000, np.int16), 0)
    other.add(np.full(10, 30_000, np.int16), 0)
    assert mixed([loud, other], 10, 10).tolist() == [32_767] * 10
    assert mixed([], 20, 10).tolist() == [0] * 10


def test_several_channels_become_one() -> None:
    stereo = np.array([[100, 300], [-100, -300]], np.int16).tobytes()
    assert mono(stereo, 2).tolist() == [200, -200]
    assert mono(stereo + b"\x01", 1).tolist() == [100, 300, -100, -300]


def test_left_and_right_alternate() -> None:
    assert (
        interleaved(np.array([1, 2], np.int16), np.array([3, 4], np.int16))
        == np.array([1, 3, 2, 4], np.int16).tobytes()
    )
