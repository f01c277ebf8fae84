"""How many agents to keep warm."""

from __future__ import annotations

import dataclasses
import math
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.unit.facts import NOW, bound, ended, pod, warm

from voicepool.model import HeadroomSpec, PodFact
from voicepool.sizing import MOST, NOBODY, Recommendation, Unmet, lead_time_seconds, recommend, service_times, warm_for


def advice(
    pods: list[PodFact],
    now: datetime = NOW,
    *,
    unmet: Unmet = NOBODY,
    deadline_seconds: float = math.inf,
    **headroom: Any,
) -> Recommendation:
    return recommend(HeadroomSpec(**headroom), pods, now, unmet, deadline_seconds=deadline_seconds)


def at(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


def calls(*seconds_ago: float, **changes: Any) -> list[PodFact]:
    return [bound(n, bound_at=NOW - timedelta(seconds=ago), **changes) for n, ago in enumerate(seconds_ago)]


def started_in(*seconds: float) -> list[PodFact]:
    return [
        warm(100 + number, age_seconds=600, ready_since=NOW - timedelta(seconds=600 - took))
        for number, took in enumerate(seconds)
    ]


def chance_of_more_than(number: int, expected: float) -> float:
    return 1 - sum(expected**k * math.exp(-expected) / math.factorial(k) for k in range(number + 1))


class TestRule:
    """Callers who come while a pod starts find one."""

    @given(st.floats(0.001, 60), st.floats(0.0001, 0.5))
    def test_it_is_the_smallest_number_that_keeps_the_miss_rate(self, expected: float, miss_rate: float) -> None:
        number = warm_for(expected, miss_rate)
        assert chance_of_more_than(number, expected) <= miss_rate + 1e-9
        assert number == 0 or chance_of_more_than(number - 1, expected) > miss_rate - 1e-9

    def test_without_demand_nobody_is_needed(self) -> None:
        assert warm_for(0, 0.01) == 0

    def test_great_demand_needs_little_more_than_its_mean_and_has_an_end(self) -> None:
        assert 5000 < warm_for(5000, 0.01) < 5200
        assert warm_for(1e6, 0.01) == MOST

    @pytest.mark.parametrize(
        ("ago", "rate"),
        [((10, 20, 30), 3 / 60), ((100, 200, 290), 3 / 300), ((10, 100, 299), 1 / 60), ((301, 1000), 0)],
    )
    def test_starts_are_counted_over_a_minute_and_over_five(self, ago: tuple[float, ...], rate: float) -> None:
        assert advice(calls(*ago)).starts_per_second == pytest.approx(rate)

    def test_a_session_that_has_ended_was_a_start_too(self) -> None:
        assert advice([ended(0, 1, bound_at=NOW - timedelta(seconds=30))]).starts_per_second > 0

    def test_the_lead_time_is_that_of_95_in_100(self) -> None:
        assert lead_time_seconds(started_in(*[2.0] * 95, *[30.0] * 5), 120) == pytest.approx(3)
        assert lead_time_seconds(started_in(2.0, 30.0), 120) == pytest.approx(31)

    def test_the_status_tells_how_long_callers_and_pods_took(self) -> None:
        waited = [bound(number, waited_seconds=number / 1000) for number in range(1, 201)]
        assert service_times([*waited, *started_in(2.2, 1.0)], 120) == {
            "waitedMillisecondsP50": 100,
            "waitedMillisecondsP99": 198,
            "startupSecondsP95": 4,
        }
        assert service_times([pod(0), bound(1)], 120) == {}

    def test_until_a_start_was_seen_it_is_guessed(self) -> None:
        assert lead_time_seconds([pod(0)], 120) == pytest.approx(10)

    def test_a_pod_that_lost_its_readiness_and_found_it_again_did_not_start_then(self) -> None:
        again = warm(0, age_seconds=86_400, ready_since=NOW - timedelta(seconds=5))
        assert lead_time_seconds([again], 120) == pytest.approx(10)
        assert lead_time_seconds([again, *started_in(2.0)], 120) == pytest.approx(3)
        assert service_times([again, *started_in(2.0)], 120) == {"startupSecondsP95": 3}
        assert advice([again, *calls(*[5.0] * 12)], deadline_seconds=120).replicas < 10

    def test_the_wait_for_a_node_or_an_image_is_part_of_a_start_and_not_of_its_deadline(self) -> None:
        waited = started_in(400.0)[0]
        assert waited.ready_since is not None
        came = dataclasses.replace(waited, progressed_at=waited.ready_since - timedelta(seconds=3))
        assert lead_time_seconds([waited], 120) == pytest.approx(10)
        assert lead_time_seconds([came], 120) == pytest.approx(401)

    def test_it_is_asked_again_when_a_start_leaves_the_window(self) -> None:
        assert advice(calls(50)).next_at == NOW + timedelta(seconds=10)
        assert advice(calls(100)).next_at == NOW + timedelta(seconds=200)
        assert advice([]).next_at is None


class TestPercentage:
    """So many for each 100 calls."""

    def test_it_is_rounded_up_and_counts_calls_that_go_on(self) -> None:
        pods = [*calls(*[9999.0] * 11), ended(50, 1)]
        assert advice(pods, percentage=20).replicas == 3

    def test_the_largest_wins(self) -> None:
        schedule = {"cron": "0 0 * * *", "warm_pods": 7}
        pods = calls(*[9999.0] * 10)
        assert advice(pods, percentage=50, schedules=[schedule]).replicas == 7
        assert advice(pods, percentage=90, schedules=[schedule]).replicas == 9


class TestUnmet:
    """Callers who were not bound."""

    def test_who_was_rejected_counts_as_a_start_of_that_window(self) -> None:
        assert advice([], unmet=Unmet(rejected=(3, 3))).starts_per_second == pytest.approx(3 / 60)
        assert advice(calls(10), unmet=Unmet(rejected=(0, 9))).starts_per_second == pytest.approx(10 / 300)

    def test_who_waits_counts_as_a_start_and_takes_a_pod_of_its_own(self) -> None:
        waiting = advice([], unmet=Unmet(waiting=6))
        assert waiting.starts_per_second == pytest.approx(6 / 60)
        assert waiting.replicas == 6 + waiting.for_demand
        assert waiting.for_demand == warm_for(6 / 60 * 10, 0.01)

    def test_who_waits_counts_as_a_call_soon(self) -> None:
        assert advice(calls(9999), percentage=100, unmet=Unmet(waiting=2)).for_percentage == 3

    def test_it_does_not_end_where_the_pool_does(self) -> None:
        full = calls(*[5.0] * 50)
        numbers = [advice(full, unmet=Unmet(waiting)).replicas for waiting in (0, 10, 100)]
        assert numbers[0] < numbers[1] - 10
        assert numbers[1] < numbers[2] - 90

    def test_those_of_several_gateways_are_added(self) -> None:
        assert sum([Unmet(1, (2, 3)), Unmet(10, (20, 30))], NOBODY) == Unmet(11, (22, 33))


class TestSchedules:
    """Warm pods by the clock."""

    OFFICE = (
        {"cron": "0 8 * * 1-5", "time_zone": "Europe/Berlin", "warm_pods": 20},
        {"cron": "0 18 * * 1-5", "time_zone": "Europe/Berlin", "warm_pods": 2},
    )

    @pytest.mark.parametrize(
        ("moment", "warm_pods"),
        [
            ("2026-03-02T06:59:59", 2),  # Monday, 7:59:59 in Berlin; Friday evening still holds
            ("2026-03-02T07:00:00", 20),
            ("2026-03-02T16:59:59", 20),
            ("2026-03-02T17:00:00", 2),
            ("2026-03-30T06:00:00", 20),  # the clocks were put forward the day before
            ("2026-03-30T05:59:00", 2),
        ],
    )
    def test_the_one_that_came_last_holds_in_its_own_time_zone(self, moment: str, warm_pods: int) -> None:
        assert advice([], at(moment), schedules=self.OFFICE).replicas == warm_pods

    def test_it_is_asked_again_at_the_next_one(self) -> None:
        assert advice([], at("2026-03-02T10:00:00"), schedules=self.OFFICE).next_at == at("2026-03-02T17:00:00")

    @pytest.mark.parametrize(
        ("moment", "zone", "warm_pods", "next_at"),
        [
            # Clocks are put back from 3 to 2 (Berlin, at 1:00 UTC) and from 2 to 1 (New York, at 6:00 UTC): the first 2:30 or 1:30 counts.
            ("2026-10-25T00:15:00", "Europe/Berlin", 5, "2026-10-25T00:30:00"),
            ("2026-10-25T00:30:00", "Europe/Berlin", 9, "2026-10-25T11:00:00"),
            ("2026-10-25T01:15:00", "Europe/Berlin", 9, "2026-10-25T11:00:00"),
            ("2026-10-25T01:45:00", "Europe/Berlin", 9, "2026-10-25T11:00:00"),
            ("2026-11-01T05:15:00", "America/New_York", 5, "2026-11-01T05:30:00"),
            ("2026-11-01T05:30:00", "America/New_York", 9, "2026-11-01T17:00:00"),
            ("2026-11-01T06:15:00", "America/New_York", 9, "2026-11-01T17:00:00"),
            ("2026-11-01T06:45:00", "America/New_York", 9, "2026-11-01T17:00:00"),
        ],
    )
    def test_an_hour_that_comes_twice_is_read_once(self, moment: str, zone: str, warm_pods: int, next_at: str) -> None:
        night = {"cron": "30 2 * * *" if zone == "Europe/Berlin" else "30 1 * * *", "time_zone": zone, "warm_pods": 9}
        noon = {"cron": "0 12 * * *", "time_zone": zone, "warm_pods": 5}
        told = advice([], at(moment), schedules=[night, noon])
        assert (told.replicas, told.next_at) == (warm_pods, at(next_at))

    @given(
        st.integers(0, 400 * 24 * 60).map(lambda minutes: at("2026-01-01T00:00:30") + timedelta(minutes=minutes)),
        st.sampled_from(["Europe/Berlin", "America/New_York", "Antarctica/Troll", "Australia/Lord_Howe", "UTC"]),
        st.sampled_from(["30 2 * * *", "30 1 * * *", "0 0 * * 0", "*/30 * * * *", "15 */2 * * *", "59 2 25 10 *"]),
    )
    def test_the_next_moment_is_always_to_come_and_the_last_one_has_been(
        self, now: datetime, zone: str, cron: str
    ) -> None:
        told = advice([], now, schedules=[{"cron": cron, "time_zone": zone, "warm_pods": 3}])
        assert told.replicas == 3
        assert told.next_at is not None
        assert told.next_at > now
        # A moment before it nothing has changed, and then it is its turn.
        before = advice(
            [], told.next_at - timedelta(seconds=1), schedules=[{"cron": cron, "time_zone": zone, "warm_pods": 3}]
        )
        assert before.next_at == told.next_at

    def test_of_two_that_come_together_the_larger_holds(self) -> None:
        both = [{"cron": "0 8 * * *", "warm_pods": 3}, {"cron": "0 8 1 * *", "warm_pods": 9}]
        assert advice([], at("2026-03-01T09:00:00"), schedules=both).replicas == 9

    @pytest.mark.parametrize(
        ("bad", "words"),
        [
            ({"cron": "61 8 * * *"}, "'61 8 * * *' is not valid"),
            ({"time_zone": "Europe/Nowhere"}, "no time zone 'Europe/Nowhere'"),
            ({"time_zone": "../etc"}, "no time zone"),
            ({"time_zone": "Europe"}, "no time zone"),
        ],
    )
    def test_one_that_cannot_be_read_is_told_and_the_others_hold(self, bad: dict[str, str], words: str) -> None:
        broken = {"cron": "0 9 * * *", "warm_pods": 99} | bad
        told = advice([], at("2026-03-02T10:00:00"), schedules=[broken, *self.OFFICE])
        assert told.replicas == 20
        assert words in (told.problem or "")

    def test_a_day_that_never_comes_is_told(self) -> None:
        told = advice([], schedules=[{"cron": "0 0 31 2,4 *", "warm_pods": 99}])
        assert told.replicas == 0
        assert "Bad day-of-month" in (told.problem or "")
