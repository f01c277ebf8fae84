"""When a caller's sound is left out, and above all when it is not."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import pytest

from voicepool_agent.backlog import LIMIT_SECONDS, MUCH_SECONDS, Backlog, Waiting


class Pipeline:
    """Pieces of sound that wait in one place, numbered as they came, and the time."""

    def __init__(self) -> None:
        self.now = 50.0
        self.came = 0
        self.taken = 0
        self.others = 0
        self.backlog = Backlog(lambda: self.now, self.waiting)

    def waiting(self) -> Mapping[str, Waiting]:
        waiting = self.came - self.taken
        frames = waiting + self.others
        return {"place": Waiting(frames, 0.01 * waiting, self.taken if waiting else None)} if frames else {}

    def piece(self, *, takes: int = 0) -> bool:
        """10 ms go by in which so many pieces are taken, and one more comes; whether it is left out."""
        self.now += 0.01
        self.taken = min(self.taken + takes, self.came)
        leaves_out = self.backlog.leaves_out()
        self.came += not leaves_out
        return leaves_out


@pytest.fixture
def pipeline() -> Pipeline:
    return Pipeline()


def test_a_pipeline_that_keeps_up_misses_nothing(pipeline: Pipeline) -> None:
    assert not any(pipeline.piece(takes=1) for _ in range(10_000))


def test_pieces_on_their_way_are_no_backlog(pipeline: Pipeline) -> None:
    pipeline.came = round(100 * MUCH_SECONDS) - 1
    assert not any(pipeline.piece(takes=1) for _ in range(10_000))


def test_a_pipeline_that_is_too_slow_misses_sound_until_none_waits(pipeline: Pipeline) -> None:
    first = next(n for n in range(1_000) if pipeline.piece(takes=n % 2))
    assert LIMIT_SECONDS <= first / 100 <= LIMIT_SECONDS + 1
    waited = pipeline.came - pipeline.taken
    again = next(n for n in range(1_000) if not pipeline.piece(takes=n % 2))
    assert pipeline.came - pipeline.taken == 1
    assert 2 * waited - 2 <= again <= 2 * waited + 2


def test_sound_is_left_out_until_what_waits_behind_it_has_been_taken_as_well(pipeline: Pipeline) -> None:
    pipeline.others = 1
    next(n for n in range(1_000) if pipeline.piece(takes=n % 2))
    assert all(pipeline.piece(takes=1) for _ in range(1_000))
    pipeline.others = 0
    assert not pipeline.piece()


def test_what_is_no_sound_is_no_backlog(pipeline: Pipeline) -> None:
    pipeline.others = 1_000
    assert not any(pipeline.piece(takes=1) for _ in range(1_000))


def test_the_next_piece_that_is_left_out_is_as_late_as_the_first(pipeline: Pipeline) -> None:
    left_out = [pipeline.piece(takes=n % 2) for n in range(5_000)]
    changes = [n for n in range(1, 5_000) if left_out[n] and not left_out[n - 1]]
    assert len(changes) > 5
    assert all(later - sooner > 100 * LIMIT_SECONDS for sooner, later in itertools.pairwise(changes))


def test_sound_that_waits_for_an_answer_is_kept_however_long_it_takes(pipeline: Pipeline) -> None:
    assert not any(pipeline.piece() for _ in range(6_000))
    assert not any(pipeline.piece(takes=200) for _ in range(100))
    assert pipeline.came == pipeline.taken + 1


def test_sound_that_waits_for_an_answer_again_and_again_is_kept(pipeline: Pipeline) -> None:
    for _ in range(100):
        assert not any(pipeline.piece() for _ in range(400))
        assert not any(pipeline.piece(takes=50) for _ in range(20))


def test_sound_that_comes_all_at_once_after_the_loop_was_held_up_is_kept(pipeline: Pipeline) -> None:
    pipeline.now += 10
    for _ in range(1_000):
        assert not pipeline.backlog.leaves_out()
        pipeline.came += 1
    assert not any(pipeline.piece(takes=20) for _ in range(200))


def test_a_pipeline_of_very_slow_steps_misses_sound_as_well(pipeline: Pipeline) -> None:
    assert any(pipeline.piece(takes=1 if n % 300 == 0 else 0) for n in range(3_000))
