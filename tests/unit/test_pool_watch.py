"""What the watch of the pools owes."""

from __future__ import annotations

import pytest
from tests.unit.clocks import Clock

from voicepool.pool_watch import PoolWatch

ONE, OTHER = ("calls", "one"), ("calls", "other")


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def watch(clock: Clock) -> PoolWatch:
    return PoolWatch(clock)


def test_a_watch_that_tells_what_lists_show_owes_nothing(watch: PoolWatch, clock: Clock) -> None:
    watch.told(ONE, 5)
    watch.listed({ONE: 5, OTHER: 7}, position=8)
    clock.now += 1
    watch.told(OTHER, 7)
    watch.told(ONE, 9)
    clock.now += 60
    watch.listed({ONE: 9, OTHER: 7}, position=20)
    assert watch.owed_for_seconds() == 0


def test_what_a_list_shows_and_the_watch_never_tells_is_owed_from_then_on(watch: PoolWatch, clock: Clock) -> None:
    watch.told(ONE, 5)
    watch.listed({ONE: 5, OTHER: 7}, position=8)
    clock.now += 60
    watch.listed({ONE: 5, OTHER: 30}, position=40)
    clock.now += 30
    assert watch.owed_for_seconds() == 90


def test_an_older_version_pays_nothing_and_a_newer_one_pays_it(watch: PoolWatch, clock: Clock) -> None:
    watch.listed({ONE: 7}, position=8)
    clock.now += 60
    watch.told(ONE, 6)
    assert watch.owed_for_seconds() == 60
    watch.told(ONE, 9)
    assert watch.owed_for_seconds() == 0


def test_a_watch_that_is_always_a_little_late_owes_what_it_does_for_a_little_while(
    watch: PoolWatch, clock: Clock
) -> None:
    for version in range(10, 20):
        watch.listed({ONE: version}, position=version)
        clock.now += 0.1
        watch.told(ONE, version)
        clock.now += 60
    assert watch.owed_for_seconds() == 0


def test_of_a_pool_that_is_gone_nothing_is_owed(watch: PoolWatch, clock: Clock) -> None:
    watch.listed({ONE: 7}, position=8)
    clock.now += 60
    watch.listed({}, position=9)
    assert watch.owed_for_seconds() == 0


def test_a_pool_that_is_told_of_before_an_older_list_is_not_owed_later(watch: PoolWatch, clock: Clock) -> None:
    watch.told(ONE, 10)
    watch.listed({}, position=9)
    watch.listed({ONE: 10}, position=11)
    clock.now += 60
    assert watch.owed_for_seconds() == 0


def test_a_pool_that_is_made_anew_is_told_of_anew(watch: PoolWatch, clock: Clock) -> None:
    watch.told(ONE, 10)
    watch.listed({}, position=12)
    watch.listed({ONE: 20}, position=21)
    clock.now += 60
    assert watch.owed_for_seconds() == 60
