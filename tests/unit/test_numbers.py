"""The numbers of a pool's pods: each is given once."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from voicepool.numbers import NONE_USED, UsedNumbers
from voicepool.podspec import cold_start_number, number_of, pod_name


def names(*numbers: int) -> list[str]:
    return [pod_name("demo", "0a1b2c3d", number) for number in numbers]


def test_a_number_stays_used_when_its_pod_is_gone() -> None:
    used = NONE_USED.and_of(names(0, 1, 2)).and_of(names(1))
    assert [number in used for number in range(4)] == [True, True, True, False]


def test_a_number_that_nobody_has_had_is_free_also_between_others() -> None:
    used = NONE_USED.and_of(names(0, 2))
    assert [number in used for number in range(4)] == [True, False, True, False]
    assert used.and_of(names(1)) == UsedNumbers(3)


def test_who_sees_a_pool_for_the_first_time_takes_what_is_missing_for_gone() -> None:
    assert UsedNumbers.up_to(names(2, 5)) == UsedNumbers(6)
    assert UsedNumbers.up_to([]) == NONE_USED


@pytest.mark.parametrize(
    "name",
    [
        "demo-0a1b2c3d-dry-run",
        "somebodys-own-7",
        "demo",
        f"demo-0a1b2c3d-{cold_start_number('s-1')}",
        "demo-0a1b2c3d-٣",
    ],
)
def test_other_pods_have_no_number(name: str) -> None:
    assert number_of(name) is None
    assert UsedNumbers.up_to([name]).and_of([name]) == NONE_USED


def test_each_attempt_at_a_cold_start_has_a_name_of_its_own_that_fits() -> None:
    tried = [cold_start_number(session, attempt) for session in ("s-1", "s-2") for attempt in range(3)]
    assert len(set(tried)) == 6
    assert all(len(pod_name("p" * 40, "0a1b2c3d", one)) <= 63 for one in tried)


@given(st.lists(st.sets(st.integers(0, 40))))
def test_what_is_used_is_what_was_seen(seen: list[set[int]]) -> None:
    used = NONE_USED
    for numbers in seen:
        used = used.and_of(names(*numbers))
    assert {number for number in range(50) if number in used} == set().union(*seen)
    assert all(number > used.below for number in used.others), "kept as few as can be"
