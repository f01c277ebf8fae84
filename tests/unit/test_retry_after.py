"""When a caller is told to come again."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

import pytest
from tests.unit.facts import NOW, bound, ended, pod, pool, warm

from voicepool.gateway.retry_after import retry_after_seconds
from voicepool.model import PodFact

# Became Ready 7 s after their creation; Kubernetes' whole seconds make 8 of it.
SHOWS_THE_LEAD = warm(90, age_seconds=100, ready_since=NOW - timedelta(seconds=93))


def told(pods: Sequence[PodFact], *, waiting: int = 0, replicas: int = 0, max_pods: int = 50) -> int:
    return retry_after_seconds(pool(replicas=replicas, max_pods=max_pods), pods, waiting=waiting, now=NOW)


def test_the_next_caller_gets_the_next_pod_that_starts() -> None:
    starting = [SHOWS_THE_LEAD, pod(0, age_seconds=5.5), pod(1, age_seconds=1)]
    assert [told(starting, waiting=waiting) for waiting in (0, 1)] == [3, 7]


def test_a_pod_that_the_operator_is_about_to_create_counts_from_now() -> None:
    assert told([SHOWS_THE_LEAD], replicas=2) == 8
    assert told([SHOWS_THE_LEAD], replicas=2, max_pods=1) == 60


def test_a_pod_that_is_ready_again_after_a_while_does_not_show_how_long_a_start_takes() -> None:
    again = warm(91, age_seconds=10_000, ready_since=NOW - timedelta(seconds=5))
    assert told([SHOWS_THE_LEAD, again], replicas=3) == 8


def test_a_pod_that_is_late_is_expected_as_much_later_as_it_is_late() -> None:
    assert told([SHOWS_THE_LEAD, pod(0, age_seconds=28)]) == 20


def test_a_pod_that_is_in_trouble_is_not_expected() -> None:
    in_trouble = pod(0, waiting_reason="ErrImagePull")
    for_another = pod(1, cold_start="another")
    assert told([in_trouble, for_another, pod(2, deleting=True)]) == 60


def test_more_callers_than_pods_that_start_wait_for_calls_to_end() -> None:
    # 12 in the last minute: one in 5 s.
    calls = [ended(number, 10 + number) for number in range(12)]
    assert [told(calls, waiting=waiting) for waiting in (0, 3, 50)] == [5, 20, 60]


def test_calls_that_begin_show_how_often_an_agent_becomes_free_as_well() -> None:
    calls = [bound(number, bound_at=NOW - timedelta(seconds=number)) for number in range(30)]
    assert told(calls) == 2


def test_where_nothing_is_known_to_come_it_is_the_longest_time() -> None:
    assert told([]) == 60


@pytest.mark.parametrize("waiting", [0, 1, 5, 100])
def test_it_is_never_less_the_more_wait(waiting: int) -> None:
    pods = [SHOWS_THE_LEAD, pod(0, age_seconds=1), *(ended(number, number + 1) for number in range(5, 40))]
    assert 1 <= told(pods, waiting=waiting) <= told(pods, waiting=waiting + 1) <= 60
