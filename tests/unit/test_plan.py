"""plan() decides what a pool needs: these are its rules, one by one, and its properties over all inputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from datetime import datetime, timedelta
from random import Random
from types import MappingProxyType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.unit.facts import (
    NOW,
    OLD,
    TEMPLATE,
    bound,
    by_name,
    condition,
    deleted_names,
    ended,
    failed,
    pod,
    pool,
    warm,
)

from voicepool.model import BindState, PodFact, PoolFact
from voicepool.numbers import UsedNumbers
from voicepool.plan import HELD_REASONS, DeleteReason, Drain, Plan, Template, backoff_seconds, drain, plan, taken_over
from voicepool.podspec import pod_name


def settled(**spec: Any) -> Mapping[str, Any]:
    """The status of a pool that has reached its target."""
    replicas = spec.get("replicas", 1)
    return plan(pool(**spec), [warm(number) for number in range(replicas)], NOW - timedelta(hours=1), TEMPLATE).status


class TestFilling:
    """Missing pods are created."""

    def test_an_empty_pool_gets_its_pods(self) -> None:
        decided = plan(pool(replicas=3), [], NOW, TEMPLATE)
        assert [create.number for create in decided.creates] == [0, 1, 2]
        assert not decided.deletes

    def test_a_full_pool_gets_nothing(self) -> None:
        decided = plan(pool(replicas=2), [warm(0), pod(1)], NOW, TEMPLATE)
        assert not decided.creates
        assert not decided.deletes

    def test_a_bound_pod_is_replaced_at_once_under_another_number(self) -> None:
        decided = plan(pool(replicas=2), [bound(0), warm(2)], NOW, TEMPLATE)
        assert [create.number for create in decided.creates] == [1]

    def test_a_pod_that_is_going_away_is_replaced_and_keeps_its_name(self) -> None:
        decided = plan(pool(replicas=1), [warm(0, deleting=True)], NOW, TEMPLATE)
        assert [create.number for create in decided.creates] == [1]

    def test_max_pods_counts_bound_and_leaving_pods(self) -> None:
        decided = plan(pool(replicas=3, max_pods=4), [bound(0), warm(1), warm(2, deleting=True)], NOW, TEMPLATE)
        assert len(decided.creates) == 1
        at_capacity = condition(decided, "AtCapacity")
        assert at_capacity is not None
        assert at_capacity["status"] == "True"
        assert "maxPods 4" in at_capacity["message"]

    def test_an_ended_pod_takes_no_room(self) -> None:
        decided = plan(pool(replicas=1, max_pods=1), [ended(0, 1)], NOW, TEMPLATE)
        assert len(decided.creates) == 1

    def test_a_refused_template_creates_nothing_and_says_why(self) -> None:
        decided = plan(pool(replicas=1), [], NOW, Template("cccccccc", "spec.containers[0].imagee: unknown field"))
        assert not decided.creates
        for kind, status in (("TemplateValid", "False"), ("Ready", "False"), ("Stalled", "True")):
            found = condition(decided, kind)
            assert found is not None
            assert found["status"] == status
            assert "imagee" in found["message"]

    def test_a_pool_that_is_being_deleted_gets_nothing(self) -> None:
        decided = plan(pool(deleting=True, replicas=5), [warm(0), bound(1)], NOW, TEMPLATE)
        assert not decided.creates
        assert not decided.deletes


class TestScalingDown:
    """Pods that are too many go, in an order."""

    def test_starting_pods_go_first(self) -> None:
        decided = plan(pool(replicas=1), [warm(0), pod(1), pod(2)], NOW, TEMPLATE)
        assert deleted_names(decided) == ["demo-aaaaaaaa-1", "demo-aaaaaaaa-2"]

    def test_of_warm_pods_the_newest_goes_first(self) -> None:
        pods = [warm(0, age_seconds=5), warm(1, age_seconds=500)]
        assert deleted_names(plan(pool(replicas=1), pods, NOW, TEMPLATE)) == ["demo-aaaaaaaa-0"]

    def test_packed_empties_the_node_with_fewest_pods(self) -> None:
        pods = [warm(0, node="a"), bound(1, node="a"), bound(2, node="a"), warm(3, node="b"), warm(4, node="b")]
        for target, gone in ((2, [3]), (1, [3, 4]), (0, [0, 3, 4])):
            decided = plan(pool(replicas=target, placement="Packed"), pods, NOW, TEMPLATE)
            assert deleted_names(decided) == [f"demo-aaaaaaaa-{number}" for number in gone]

    def test_spread_takes_from_the_node_that_is_the_fullest_at_that_moment(self) -> None:
        pods = [warm(number, node=node) for number, node in enumerate("aaaabbc")]
        remaining = []
        for target in range(6, 2, -1):
            gone = deleted_names(plan(pool(replicas=target, placement="Spread"), pods, NOW, TEMPLATE))
            remaining.append("".join(sorted(one.node or "" for one in pods if one.name not in gone)))
        assert remaining == ["aaabbc", "aabbc", "abbc", "abc"]

    def test_spread_counts_calls_too(self) -> None:
        pods = [warm(0, node="a"), bound(1, node="a"), bound(2, node="a"), warm(3, node="b"), warm(4, node="b")]
        decided = plan(pool(replicas=2, placement="Spread"), pods, NOW, TEMPLATE)
        assert deleted_names(decided) == ["demo-aaaaaaaa-0"]

    def test_a_starting_pod_goes_before_a_warm_one_wherever_they_are(self) -> None:
        pods = [warm(0, node="b"), pod(1, node="a"), warm(2, node="a"), warm(3, node="a")]
        for placement in ("Packed", "Spread"):
            decided = plan(pool(replicas=3, placement=placement), pods, NOW, TEMPLATE)
            assert deleted_names(decided) == ["demo-aaaaaaaa-1"]

    def test_a_pod_that_no_node_has_taken_goes_first(self) -> None:
        pods = [pod(0, node="a"), pod(1, age_seconds=100), pod(2, node="a")]
        for placement in ("Packed", "Spread"):
            decided = plan(pool(replicas=2, placement=placement), pods, NOW, TEMPLATE)
            assert deleted_names(decided) == ["demo-aaaaaaaa-1"]

    def test_to_zero_only_unbound_pods_go(self) -> None:
        decided = plan(pool(replicas=0), [warm(0), bound(1), bound(2, deleting=True), pod(3)], NOW, TEMPLATE)
        assert deleted_names(decided) == ["demo-aaaaaaaa-0", "demo-aaaaaaaa-3"]

    def test_a_delete_names_the_version_that_was_judged(self) -> None:
        victim = by_name(plan(pool(replicas=0), [warm(7)], NOW, TEMPLATE), "demo-aaaaaaaa-7")
        assert (victim.uid, victim.resource_version) == ("uid-aaaaaaaa-7", "107")
        assert victim.reason is DeleteReason.SCALE_DOWN

    def test_a_pod_in_an_unknown_state_counts_as_bound(self) -> None:
        decided = plan(pool(replicas=0), [dataclasses.replace(warm(0), state=BindState.BOUND)], NOW, TEMPLATE)
        assert not decided.deletes


class TestFailing:
    """Failed starts are replaced, slower and slower."""

    def test_the_first_failure_is_replaced_at_once_and_kept_for_its_words(self) -> None:
        decided = plan(pool(replicas=1), [failed(0)], NOW, TEMPLATE)
        assert [(create.number, create.start_attempt) for create in decided.creates] == [(1, 1)]
        assert not decided.deletes

    def test_the_second_failure_waits_and_only_the_newest_is_kept(self) -> None:
        pods = [failed(0, 30), failed(1, 4, start_attempt=1)]
        decided = plan(pool(replicas=1), pods, NOW, TEMPLATE)
        assert not decided.creates
        assert deleted_names(decided) == ["demo-aaaaaaaa-0"]
        assert decided.requeue_after_seconds == pytest.approx(6)

    def test_after_the_wait_one_pod_finds_out_for_all(self) -> None:
        decided = plan(pool(replicas=10), [failed(1, 11, start_attempt=1)], NOW, TEMPLATE)
        assert [create.start_attempt for create in decided.creates] == [2]

    def test_while_it_finds_out_no_more_are_started(self) -> None:
        pods = [failed(1, 60, start_attempt=1), pod(2, start_attempt=2)]
        assert not plan(pool(replicas=10), pods, NOW, TEMPLATE).creates

    def test_a_success_after_the_failure_ends_the_back_off(self) -> None:
        pods = [failed(1, 5, age_seconds=60, start_attempt=4), warm(2, age_seconds=3)]
        decided = plan(pool(replicas=4), pods, NOW, TEMPLATE)
        assert len(decided.creates) == 3
        assert {create.start_attempt for create in decided.creates} == {0}
        assert deleted_names(decided) == ["demo-aaaaaaaa-1"]

    def test_a_new_template_does_not_pay_for_the_old_one(self) -> None:
        decided = plan(pool(replicas=1), [failed(0, template=OLD, start_attempt=6)], NOW, TEMPLATE)
        assert [create.start_attempt for create in decided.creates] == [0]
        assert deleted_names(decided) == ["demo-bbbbbbbb-0"]

    def test_a_pod_that_was_warm_for_long_and_died_is_no_failed_start(self) -> None:
        died = failed(0, once_ready=True, age_seconds=3600, start_attempt=3)
        decided = plan(pool(replicas=1), [died], NOW, TEMPLATE)
        assert [create.start_attempt for create in decided.creates] == [0]
        assert deleted_names(decided) == [died.name]

    def test_a_late_pod_stays_until_its_successor_may_start(self) -> None:
        late = pod(0, age_seconds=125, start_attempt=1)
        waiting = plan(pool(replicas=1), [late], NOW, TEMPLATE)
        assert not waiting.creates
        assert not waiting.deletes
        assert waiting.requeue_after_seconds == pytest.approx(5)
        decided = plan(pool(replicas=1), [late], NOW + timedelta(seconds=5), TEMPLATE)
        assert len(decided.creates) == 1
        assert by_name(decided, late.name).reason is DeleteReason.STARTUP_DEADLINE

    def test_a_failed_pod_goes_when_nothing_is_missing(self) -> None:
        made = plan(pool(replicas=1), [warm(0, age_seconds=60), failed(1)], NOW, TEMPLATE)
        assert deleted_names(made) == ["demo-aaaaaaaa-1"]

    def test_a_late_pod_goes_when_nothing_is_missing(self) -> None:
        made = plan(pool(replicas=1), [warm(0, age_seconds=600), pod(1, age_seconds=300)], NOW, TEMPLATE)
        assert deleted_names(made) == ["demo-aaaaaaaa-1"]

    def test_a_late_pod_makes_room_for_its_successor(self) -> None:
        made = plan(pool(replicas=2, max_pods=2), [warm(0, age_seconds=600), pod(1, age_seconds=300)], NOW, TEMPLATE)
        assert deleted_names(made) == ["demo-aaaaaaaa-1"]
        assert not made.creates

    def test_a_late_pod_that_had_to_go_first_counts_for_its_successor(self) -> None:
        late = pod(0, age_seconds=300, start_attempt=3)
        gone = plan(pool(replicas=1, max_pods=1), [late], NOW, TEMPLATE)
        assert deleted_names(gone) == [late.name]
        assert not gone.creates
        after = plan(pool(gone.status, replicas=1, max_pods=1), [], NOW, TEMPLATE)
        assert [create.start_attempt for create in after.creates] == [4]

    def test_while_a_late_pods_successor_finds_out_no_more_are_started(self) -> None:
        status = plan(pool(replicas=10), [pod(0, age_seconds=300, start_attempt=1)], NOW, TEMPLATE).status
        assert not plan(pool(status, replicas=10), [pod(1, start_attempt=2)], NOW, TEMPLATE).creates

    def test_a_warm_pod_ends_what_the_status_remembers_of_failed_starts(self) -> None:
        status = plan(pool(replicas=10), [pod(0, age_seconds=300, start_attempt=4)], NOW, TEMPLATE).status
        decided = plan(pool(status, replicas=10), [warm(1, start_attempt=5)], NOW, TEMPLATE)
        assert len(decided.creates) == 9
        assert {create.start_attempt for create in decided.creates} == {0}
        assert decided.status["failedStarts"] == 0

    def test_what_the_status_remembers_of_another_template_counts_for_nothing(self) -> None:
        status = plan(pool(replicas=1), [pod(0, age_seconds=300, start_attempt=4)], NOW, TEMPLATE).status
        decided = plan(pool(status, replicas=1), [], NOW, Template("cccccccc"))
        assert [create.start_attempt for create in decided.creates] == [0]

    def test_a_starting_pod_is_looked_at_again_at_its_deadline(self) -> None:
        assert plan(pool(), [pod(0, age_seconds=100)], NOW, TEMPLATE).requeue_after_seconds == pytest.approx(20)

    def test_a_pod_that_lost_its_readiness_has_the_whole_deadline_to_find_it_again(self) -> None:
        lost = pod(0, age_seconds=3600, phase="Running", not_ready_since=NOW - timedelta(seconds=3), once_ready=True)
        decided = plan(pool(), [lost], NOW, TEMPLATE)
        assert not decided.deletes
        assert decided.requeue_after_seconds == pytest.approx(117)

    def test_a_pod_that_is_no_longer_held_up_has_the_whole_deadline_from_then_on(self) -> None:
        went_on = pod(0, age_seconds=3600, progressed_at=NOW - timedelta(seconds=3))
        decided = plan(pool(), [went_on], NOW, TEMPLATE)
        assert not decided.deletes
        assert decided.requeue_after_seconds == pytest.approx(117)
        late = plan(pool(), [went_on], NOW + timedelta(seconds=118), TEMPLATE)
        assert by_name(late, went_on.name).reason is DeleteReason.STARTUP_DEADLINE

    def test_warm_pods_whose_node_is_lost_are_replaced_after_the_deadline_and_did_not_fail_to_start(self) -> None:
        lost_at = NOW - timedelta(seconds=119)
        gone = [
            pod(number, age_seconds=3600, phase="Running", not_ready_since=lost_at, once_ready=True, node="a")
            for number in range(2)
        ]
        of = pool(settled(replicas=3), replicas=3)
        there = warm(2, age_seconds=7200)
        assert not plan(of, [*gone, there], NOW, TEMPLATE).deletes
        decided = plan(of, [*gone, there], NOW + timedelta(seconds=1), TEMPLATE)
        assert deleted_names(decided) == [entry.name for entry in gone]
        assert [create.start_attempt for create in decided.creates] == [0, 0]
        assert decided.status["failedStarts"] == 0
        assert (condition(decided, "Ready") or {})["status"] == "True"

    @pytest.mark.parametrize("reason", sorted(HELD_REASONS))
    def test_what_a_new_pod_would_wait_for_too_is_held(self, reason: str) -> None:
        decided = plan(pool(replicas=1), [pod(0, age_seconds=9999, waiting_reason=reason)], NOW, TEMPLATE)
        assert not decided.creates
        assert not decided.deletes

    def test_the_back_off_doubles_from_10_to_300_seconds(self) -> None:
        assert [backoff_seconds(n) for n in (1, 2, 3, 4, 5, 6, 7, 10_000)] == [0, 10, 20, 40, 80, 160, 300, 300]


class TestRollout:
    """A new template."""

    def test_one_surplus_pod_is_created_first(self) -> None:
        decided = plan(pool(replicas=2), [warm(0, template=OLD), warm(1, template=OLD)], NOW, TEMPLATE)
        assert len(decided.creates) == 1
        assert not decided.deletes

    def test_an_old_pod_goes_when_the_new_one_is_ready(self) -> None:
        decided = plan(pool(replicas=2), [warm(0, template=OLD), warm(1, template=OLD), warm(0)], NOW, TEMPLATE)
        assert len(decided.deletes) == 1
        assert decided.deletes[0].reason is DeleteReason.ROLLOUT
        assert decided.deletes[0].name.startswith("demo-bbbbbbbb")

    def test_an_old_pod_that_is_still_starting_goes_at_once(self) -> None:
        decided = plan(pool(replicas=1), [pod(0, template=OLD)], NOW, TEMPLATE)
        assert deleted_names(decided) == ["demo-bbbbbbbb-0"]
        assert len(decided.creates) == 1

    def test_the_surplus_pod_goes_with_the_last_of_the_old_ones(self) -> None:
        pods = [pod(0, template=OLD), warm(0), warm(1, age_seconds=5)]
        decided = plan(pool(replicas=1), pods, NOW, TEMPLATE)
        assert deleted_names(decided) == [f"demo-{TEMPLATE.hash}-1", f"demo-{OLD}-0"]

    def test_bound_pods_of_the_old_template_are_left_alone(self) -> None:
        assert not plan(pool(replicas=1), [bound(0, template=OLD), warm(0)], NOW, TEMPLATE).deletes

    def test_without_room_for_a_surplus_one_old_pod_makes_room(self) -> None:
        decided = plan(pool(replicas=2, max_pods=2), [warm(0, template=OLD), warm(1, template=OLD)], NOW, TEMPLATE)
        assert len(decided.deletes) == 1
        assert not decided.creates

    def test_a_new_template_that_fails_takes_no_warm_pod_away(self) -> None:
        pods = [warm(0, template=OLD), failed(0, 5, start_attempt=2)]
        assert not plan(pool(replicas=1, max_pods=1), pods, NOW, TEMPLATE).deletes


def rolling(**steps: Any) -> dict[str, Any]:
    return {"update_strategy": {"rolling_update": steps}}


class TestUpdateStrategy:
    """How fast, and in which direction, a rollout leaves the warm target."""

    def old_pods(self, count: int) -> list[PodFact]:
        return [warm(number, template=OLD) for number in range(count)]

    @pytest.mark.parametrize(
        ("replicas", "surge", "created"), [(10, "25%", 3), (1, "25%", 1), (10, 4, 4), (2, 9, 2), (4, "100%", 4)]
    )
    def test_so_many_surplus_pods_are_created_at_once(self, replicas: int, surge: int | str, created: int) -> None:
        of = pool(replicas=replicas, **rolling(max_surge=surge))
        decided = plan(of, self.old_pods(replicas), NOW, TEMPLATE)
        assert len(decided.creates) == created
        assert not decided.deletes

    @pytest.mark.parametrize(("unavailable", "deleted"), [(3, 3), ("30%", 3), ("25%", 2), ("5%", 1), (0, 1)], ids=str)
    def test_without_a_surplus_so_many_old_pods_make_room(self, unavailable: int | str, deleted: int) -> None:
        of = pool(replicas=10, **rolling(max_surge=0, max_unavailable=unavailable))
        decided = plan(of, self.old_pods(10), NOW, TEMPLATE)
        assert len(decided.deletes) == deleted
        assert len(decided.creates) == deleted

    def test_no_more_than_max_unavailable_are_missing_at_any_time(self) -> None:
        of = pool(replicas=4, **rolling(max_surge=0, max_unavailable=1))
        assert not plan(of, [*self.old_pods(3), pod(0)], NOW, TEMPLATE).deletes
        assert len(plan(of, [*self.old_pods(3), warm(0)], NOW, TEMPLATE).deletes) == 1

    def test_a_new_template_that_fails_or_is_refused_takes_no_warm_pod_away(self) -> None:
        of = pool(replicas=4, **rolling(max_surge=0, max_unavailable="50%"))
        assert not plan(of, [*self.old_pods(4), failed(0)], NOW, TEMPLATE).deletes
        assert not plan(of, self.old_pods(4), NOW, Template("cccccccc", "refused")).deletes

    def test_on_replenish_old_pods_stay(self) -> None:
        of = pool(settled(replicas=2), replicas=2, update_strategy={"type": "OnReplenish"})
        decided = plan(of, [pod(0, template=OLD), warm(1, template=OLD), warm(2, template=OLD)], NOW, TEMPLATE)
        assert deleted_names(decided) == [f"demo-{OLD}-0"]
        assert decided.deletes[0].reason is DeleteReason.SCALE_DOWN
        assert not decided.creates

    def test_on_replenish_a_pool_with_old_pods_is_ready_and_says_so(self) -> None:
        of = pool(settled(replicas=2), replicas=2, update_strategy={"type": "OnReplenish"})
        decided = plan(of, [warm(1, template=OLD), warm(2, template=OLD)], NOW, TEMPLATE)
        ready = condition(decided, "Ready") or {}
        assert ready["status"] == "True"
        assert "2 of its unbound pods are of an older template" in ready["message"]
        assert condition(decided, "Reconciling") is None

    def test_on_replenish_what_is_taken_or_fails_is_replaced_with_the_new_template(self) -> None:
        of = pool(replicas=3, update_strategy={"type": "OnReplenish"})
        pods = [bound(0, template=OLD), failed(1, template=OLD), warm(2, template=OLD)]
        decided = plan(of, pods, NOW, TEMPLATE)
        assert len(decided.creates) == 2
        assert deleted_names(decided) == [f"demo-{OLD}-1"]
        assert decided.status["updatedReplicas"] == 0

    def test_the_conditions_tell_how_far_a_rollout_has_come(self) -> None:
        before = plan(pool(replicas=2), self.old_pods(2), NOW, Template(OLD)).status
        decided = plan(pool(before, replicas=2), [*self.old_pods(2), warm(0)], NOW, TEMPLATE)
        for kind in ("Ready", "Reconciling"):
            found = condition(decided, kind) or {}
            assert found["reason"] == "RollingOut"
            assert found["message"] == (
                "1 unbound pods are of the current template (1 of them warm, of 2 wanted); "
                "2 of an older one are still to be replaced."
            )
        done = plan(pool(decided.status, replicas=2), [warm(0), warm(1)], NOW, TEMPLATE)
        assert (condition(done, "Ready") or {})["reason"] == "TargetReached"
        assert condition(done, "Reconciling") is None


class TestEndedAndColdStarts:
    """Pods that are not counted."""

    def test_an_ended_pod_is_kept_for_its_retention(self) -> None:
        decided = plan(pool(replicas=0), [ended(0, 100)], NOW, TEMPLATE)
        assert not decided.deletes
        assert decided.requeue_after_seconds == pytest.approx(200)

    def test_and_then_deleted(self) -> None:
        decided = plan(pool(replicas=0), [ended(0, 300)], NOW, TEMPLATE)
        assert by_name(decided, "demo-aaaaaaaa-0").reason is DeleteReason.ENDED

    def test_also_when_the_pool_is_being_deleted(self) -> None:
        assert deleted_names(plan(pool(deleting=True), [ended(0, 301)], NOW, TEMPLATE)) == ["demo-aaaaaaaa-0"]

    def test_one_that_is_going_away_already_is_left_alone(self) -> None:
        assert not plan(pool(replicas=0), [ended(0, 999, deleting=True)], NOW, TEMPLATE).deletes

    def test_a_session_ends_with_its_agent_even_if_another_container_goes_on(self) -> None:
        decided = plan(pool(replicas=0), [ended(0, 301, phase="Running")], NOW, TEMPLATE)
        assert deleted_names(decided) == ["demo-aaaaaaaa-0"]

    def test_without_any_time_of_its_end_the_bind_counts(self) -> None:
        lost = bound(0, phase="Failed", bound_at=NOW - timedelta(seconds=301))
        assert deleted_names(plan(pool(replicas=0), [lost], NOW, TEMPLATE)) == [lost.name]

    def test_a_cold_start_that_failed_takes_no_place_from_a_pod_that_was_created_in_it(self) -> None:
        others = [failed(0, cold_start="session-1"), bound(1)]
        assert len(plan(pool(replicas=1, max_pods=2), others, NOW, TEMPLATE).creates) == 1
        assert not plan(pool(replicas=1, max_pods=2), [*others, pod(2)], NOW, TEMPLATE).deletes

    def test_a_cold_start_is_neither_counted_nor_a_victim(self) -> None:
        decided = plan(pool(replicas=1), [warm(0, cold_start="session-1")], NOW, TEMPLATE)
        assert len(decided.creates) == 1
        assert not decided.deletes
        assert not plan(pool(replicas=0), [pod(0, cold_start="session-1")], NOW, TEMPLATE).deletes

    def test_but_takes_room(self) -> None:
        assert not plan(pool(replicas=1, max_pods=1), [pod(0, cold_start="session-1")], NOW, TEMPLATE).creates

    def test_and_goes_when_nobody_has_bound_it_by_the_deadline(self) -> None:
        decided = plan(pool(replicas=0), [warm(0, cold_start="session-1", age_seconds=121)], NOW, TEMPLATE)
        assert by_name(decided, "demo-aaaaaaaa-0").reason is DeleteReason.COLD_START_UNUSED


class TestHeadroom:
    """Warm pods that demand or a schedule asks for."""

    TEN = MappingProxyType({"schedules": [{"cron": "0 8 * * *", "warm_pods": 10}]})

    def test_without_it_nothing_is_recommended(self) -> None:
        assert plan(pool(), [warm(0)], NOW, TEMPLATE).status["recommendedReplicas"] is None

    def test_advice_is_told_and_not_followed(self) -> None:
        decided = plan(pool(headroom=self.TEN), [warm(0)], NOW, TEMPLATE)
        assert decided.status["recommendedReplicas"] == 10
        assert not decided.creates
        # The schedule comes again tomorrow at 8.
        assert decided.requeue_after_seconds == pytest.approx(20 * 3600)

    def test_native_follows_it_and_never_goes_below_replicas(self) -> None:
        for replicas, wanted in ((3, 10), (12, 12)):
            decided = plan(pool(replicas=replicas, headroom={"mode": "Native", **self.TEN}), [], NOW, TEMPLATE)
            assert decided.warm_target == max(replicas, 10)
            assert len(decided.creates) == wanted
        assert len(plan(pool(replicas=0, headroom={"mode": "Native", **self.TEN}), [], NOW, TEMPLATE).creates) == 10

    def test_native_asks_for_no_more_pods_since_one_lost_its_readiness_for_a_moment(self) -> None:
        of = pool(replicas=1, headroom={"mode": "Native"})
        callers = [bound(number, bound_at=NOW - timedelta(seconds=5)) for number in range(1, 7)]
        again = warm(0, age_seconds=86_400, ready_since=NOW - timedelta(seconds=5))
        assert plan(of, [again, *callers], NOW, TEMPLATE).warm_target < 10

    def test_native_keeps_to_max_pods_and_says_so(self) -> None:
        of = pool(replicas=1, max_pods=4, headroom={"mode": "Native", **self.TEN})
        decided = plan(of, [bound(0)], NOW, TEMPLATE)
        assert len(decided.creates) == 3
        assert (condition(decided, "AtCapacity") or {})["status"] == "True"
        assert decided.status["recommendedReplicas"] == 10

    def test_a_schedule_that_cannot_be_read_is_told(self) -> None:
        bad = {"schedules": [{"cron": "99 8 * * *", "warm_pods": 10}]}
        told = condition(plan(pool(headroom=bad), [warm(0)], NOW, TEMPLATE), "HeadroomValid") or {}
        assert (told["status"], told["reason"]) == ("False", "BadSchedule")
        assert "'99 8 * * *'" in told["message"]
        assert condition(plan(pool(headroom=self.TEN), [warm(0)], NOW, TEMPLATE), "HeadroomValid") is None


class TestDrain:
    """Calls of a pool that is gone."""

    def test_a_call_without_a_limit_goes_on(self) -> None:
        assert drain([bound(0)], NOW) == Drain((), (), None)

    def test_a_call_with_a_limit_is_told_its_end_first_and_ended_then(self) -> None:
        call = bound(0, drain_seconds=60)
        assert drain([call], NOW) == Drain((call,), (), None)
        until = NOW + timedelta(seconds=60)
        told = dataclasses.replace(call, drain_until=until)
        assert drain([told], NOW) == Drain((), (), until)
        assert drain([told], until) == Drain((), (told,), None)

    def test_what_is_no_call_is_left_alone(self) -> None:
        limits: dict[str, Any] = {"drain_seconds": 60, "drain_until": NOW}
        assert drain([ended(0, 1, **limits), warm(2, **limits)], NOW) == Drain((), (), None)

    def test_a_call_in_a_pod_that_is_being_deleted_has_no_more_time_than_any_other(self) -> None:
        evicted = bound(0, drain_seconds=60, drain_until=NOW, deleting=True)
        assert drain([evicted], NOW) == Drain((), (evicted,), None)

    def test_a_pool_that_is_there_again_takes_over_the_calls_whose_end_is_written_down(self) -> None:
        limits: dict[str, Any] = {"drain_seconds": 60, "drain_until": NOW}
        call = bound(0, **limits)
        pods = [call, bound(1, drain_seconds=60), ended(2, 1, **limits), warm(3)]
        assert taken_over(pool(), pods) == [call]
        assert taken_over(dataclasses.replace(pool(), deleting=True), pods) == []


class TestStatus:
    """What a pool tells."""

    def test_counts(self) -> None:
        pods = [warm(0), pod(1), bound(2), ended(3, 1), failed(4), warm(5, deleting=True), warm(6, cold_start="s")]
        status = plan(pool(replicas=2), pods, NOW, TEMPLATE).status
        assert {name: status[name] for name in status if name.endswith("eplicas")} == {
            "replicas": 2,
            "readyReplicas": 1,
            "startingReplicas": 1,
            "boundReplicas": 1,
            "endedReplicas": 1,
            "updatedReplicas": 2,
            "failedReplicas": 1,
            "recommendedReplicas": None,
        }
        assert status["selector"] == "voicepool.dev/pool=demo,voicepool.dev/state=warm"
        assert status["templateHash"] == TEMPLATE.hash
        assert status["observedGeneration"] == 1

    def test_a_new_pool_is_reconciling_and_not_ready(self) -> None:
        decided = plan(pool({"observedGeneration": -1}), [], NOW, TEMPLATE)
        assert (condition(decided, "Ready") or {})["status"] == "False"
        assert (condition(decided, "Reconciling") or {})["status"] == "True"
        assert condition(decided, "Stalled") is None

    def test_a_call_does_not_make_a_pool_unready(self) -> None:
        decided = plan(pool(settled()), [bound(0), pod(1)], NOW, TEMPLATE)
        assert (condition(decided, "Ready") or {})["status"] == "True"
        assert condition(decided, "Reconciling") is None
        assert (condition(decided, "WarmTargetMet") or {})["status"] == "False"

    def test_an_image_that_does_not_exist_is_named_with_the_pod_and_the_kubelets_words(self) -> None:
        waiting = pod(0, waiting_reason="ErrImagePull", message="not found: example.org/agent:1")
        decided = plan(pool(), [waiting], NOW, TEMPLATE)
        ready = condition(decided, "Ready") or {}
        assert ready["status"] == "False"
        assert ready["reason"] == "ImagePullFailed"
        for words in ("example.org/agent:1", waiting.name, "not found"):
            assert words in ready["message"]
        assert condition(decided, "Stalled") is not None
        assert condition(decided, "Reconciling") is None

    def test_the_image_that_is_named_is_that_of_the_container_that_waits(self) -> None:
        waiting = pod(0, waiting_reason="ErrImagePull", waiting_image="example.org/proxy:2", message="not found")
        ready = condition(plan(pool(), [waiting], NOW, TEMPLATE), "Ready") or {}
        assert ready["message"] == f"Pod {waiting.name} cannot get its image 'example.org/proxy:2': not found"

    def test_a_failed_build_is_told_by_the_first_line_of_its_termination_message(self) -> None:
        decided = plan(pool(), [failed(0, message="GROQ_API_KEY is not set\nmore")], NOW, TEMPLATE)
        ready = condition(decided, "Ready") or {}
        assert ready["reason"] == "AgentFailed"
        assert ready["message"].endswith("exit code 1 before a caller came: GROQ_API_KEY is not set")

    def test_a_failed_build_without_words_points_to_the_log(self) -> None:
        ready = condition(plan(pool(), [failed(0, exit_code=None)], NOW, TEMPLATE), "Ready") or {}
        assert "its log may say why" in ready["message"]

    def test_a_pod_that_never_becomes_ready_is_told_with_the_limit(self) -> None:
        ready = condition(plan(pool(), [pod(0, age_seconds=130)], NOW, TEMPLATE), "Ready") or {}
        assert ready["reason"] == "StartupDeadlineExceeded"
        assert "120 s" in ready["message"]

    def test_a_pool_goes_on_telling_of_a_late_pod_when_its_successor_has_just_started(self) -> None:
        told = plan(pool(), [pod(0, age_seconds=130)], NOW, TEMPLATE).status
        after = plan(pool(told), [pod(1, start_attempt=1)], NOW, TEMPLATE)
        assert condition(after, "Ready") == next(one for one in told["conditions"] if one["type"] == "Ready")
        assert condition(after, "Stalled") is None
        again = plan(pool(after.status), [pod(1, age_seconds=130, start_attempt=1)], NOW, TEMPLATE).status
        later = plan(pool(again), [pod(2, start_attempt=2)], NOW, TEMPLATE)
        assert (condition(later, "Ready") or {})["message"].startswith(f"Pod {pod(1).name} was not Ready")
        assert condition(later, "Stalled") is not None

    def test_a_failed_start_of_which_the_condition_no_longer_tells_is_left_out(self) -> None:
        told = plan(pool(), [pod(0, age_seconds=130)], NOW, TEMPLATE).status
        held = plan(pool(told), [pod(1, waiting_reason="ErrImagePull", message="away")], NOW, TEMPLATE).status
        assert held["failedStarts"] == 1
        ready = condition(plan(pool(held), [pod(1)], NOW, TEMPLATE), "Ready") or {}
        assert ready["reason"] == "Starting"

    def test_an_unschedulable_pod_is_told_in_the_schedulers_words_and_not_stalled(self) -> None:
        waiting = pod(0, waiting_reason="Unschedulable", message="0/3 nodes are available: insufficient cpu")
        decided = plan(pool(), [waiting], NOW, TEMPLATE)
        ready = condition(decided, "Ready") or {}
        assert ready["reason"] == "Unschedulable"
        assert "insufficient cpu" in ready["message"]
        assert condition(decided, "Stalled") is None

    def test_a_missing_secret_is_told(self) -> None:
        waiting = pod(0, waiting_reason="CreateContainerConfigError", message='secret "keys" not found')
        ready = condition(plan(pool(), [waiting], NOW, TEMPLATE), "Ready") or {}
        assert ready["reason"] == "ContainerConfigFailed"
        assert 'secret "keys" not found' in ready["message"]

    def test_one_failure_beside_warm_pods_is_no_reason_to_be_unready(self) -> None:
        status = settled(replicas=2)
        decided = plan(pool(status, replicas=2), [warm(0, age_seconds=60), failed(1)], NOW, TEMPLATE)
        assert (condition(decided, "Ready") or {})["status"] == "True"

    def test_nothing_wanted_is_ready(self) -> None:
        ready = condition(plan(pool(replicas=0), [], NOW, TEMPLATE), "Ready") or {}
        assert (ready["status"], ready["reason"]) == ("True", "ScaledToZero")

    def test_a_transition_time_moves_only_with_the_status(self) -> None:
        first = plan(pool(), [pod(0)], NOW, TEMPLATE)
        again = plan(pool(first.status), [pod(0)], NOW + timedelta(seconds=9), TEMPLATE)
        assert again.status == first.status
        after = plan(pool(again.status), [warm(0)], NOW + timedelta(seconds=20), TEMPLATE)
        assert (condition(after, "Ready") or {})["lastTransitionTime"] == "2026-03-01T12:00:20Z"


@st.composite
def pod_lists(draw: st.DrawFn) -> list[PodFact]:
    result = []
    for number in range(draw(st.integers(0, 12))):
        kind = draw(st.sampled_from(["starting", "warm", "bound", "failed", "ended"]))
        changes: dict[str, Any] = {
            "template": draw(st.sampled_from([TEMPLATE.hash, OLD])),
            "age_seconds": draw(st.integers(0, 1000)),
            "deleting": draw(st.booleans()),
            "start_attempt": draw(st.integers(0, 9)),
            "node": draw(st.sampled_from([None, "a", "b", "c"])),
        }
        if kind == "ended":
            result.append(ended(number, draw(st.integers(0, 600)), **changes))
        elif kind == "bound":
            result.append(bound(number, **changes))
        elif kind == "failed":
            result.append(failed(number, draw(st.integers(0, 600)), **changes))
        else:
            changes["cold_start"] = draw(st.sampled_from([None, None, "session-x"]))
            if kind == "warm":
                result.append(warm(number, **changes))
            else:
                reason = draw(st.sampled_from([None, "ErrImagePull", "Unschedulable", "Whatever"]))
                ago = draw(st.integers(0, 1000))
                changes["progressed_at"] = draw(st.sampled_from([None, NOW - timedelta(seconds=ago)]))
                result.append(pod(number, waiting_reason=reason, **changes))
    return result


@st.composite
def pools(draw: st.DrawFn) -> PoolFact:
    share = st.one_of(st.integers(0, 9), st.integers(0, 100).map(lambda percent: f"{percent}%"))
    return pool(
        replicas=draw(st.integers(0, 8)),
        max_pods=draw(st.integers(1, 10)),
        deleting=draw(st.booleans()),
        placement=draw(st.sampled_from(["Packed", "Spread"])),
        update_strategy={
            "type": draw(st.sampled_from(["RollingUpdate", "OnReplenish"])),
            "rolling_update": {"max_surge": draw(share), "max_unavailable": draw(share)},
        },
    )


templates = st.sampled_from([TEMPLATE, Template(TEMPLATE.hash, "refused")])


def live(pods: list[PodFact]) -> int:
    return sum(not entry.finished for entry in pods)


def carried_out(decided: Plan, pods: list[PodFact], of: PoolFact, now: datetime) -> list[PodFact]:
    """The pods after the plan: deleted ones are gone, created ones are starting."""
    gone = {delete.name for delete in decided.deletes}
    created = [
        dataclasses.replace(pod(create.number, start_attempt=create.start_attempt), created_at=now)
        for create in decided.creates
    ]
    return [entry for entry in pods if entry.name not in gone] + created


class TestProperties:
    """What holds for any input."""

    @given(pools(), pod_lists(), templates)
    def test_a_bound_pod_that_has_not_finished_is_never_a_victim(
        self, of: PoolFact, pods: list[PodFact], template: Template
    ) -> None:
        victims = {delete.name for delete in plan(of, pods, NOW, template).deletes}
        assert not [
            entry for entry in pods if entry.name in victims and entry.state is BindState.BOUND and not entry.finished
        ]

    @given(pools(), pod_lists(), templates)
    def test_creates_never_pass_max_pods_nor_take_a_name_twice(
        self, of: PoolFact, pods: list[PodFact], template: Template
    ) -> None:
        decided = plan(of, pods, NOW, template)
        if decided.creates:
            assert live(pods) + len(decided.creates) <= of.spec.max_pods
        names = [pod_name(of.name, template.hash, create.number) for create in decided.creates]
        assert len(set(names) | {entry.name for entry in pods}) == len(names) + len(pods)

    @given(pools(), pod_lists(), templates, st.randoms(use_true_random=False))
    def test_no_name_is_given_again_whatever_becomes_of_its_pod(
        self, of: PoolFact, pods: list[PodFact], template: Template, chance: Random
    ) -> None:
        names = [entry.name for entry in pods]
        used = UsedNumbers.up_to(names)
        for _ in range(8):
            used = used.and_of(entry.name for entry in pods)
            decided = plan(of, pods, NOW, template, used)
            names += [pod_name(of.name, template.hash, create.number) for create in decided.creates]
            pods = [entry for entry in carried_out(decided, pods, of, NOW) if chance.random() < 0.5]
            used = used.and_of(pod_name(of.name, template.hash, create.number) for create in decided.creates)
        assert len(names) == len(set(names))

    @given(pools(), pod_lists(), templates)
    def test_no_pod_is_deleted_twice_nor_one_that_is_going_away(
        self, of: PoolFact, pods: list[PodFact], template: Template
    ) -> None:
        names = [delete.name for delete in plan(of, pods, NOW, template).deletes]
        assert len(names) == len(set(names))
        assert not [entry for entry in pods if entry.name in names and entry.deleting]

    @given(pools(), pod_lists(), templates)
    def test_no_pod_is_late_before_its_deadline_has_passed_since_its_last_step(
        self, of: PoolFact, pods: list[PodFact], template: Template
    ) -> None:
        late = {
            one.name for one in plan(of, pods, NOW, template).deletes if one.reason is DeleteReason.STARTUP_DEADLINE
        }
        began = NOW - timedelta(seconds=of.spec.startup.deadline_seconds)
        assert not [entry for entry in pods if entry.name in late and (entry.progressed_at or entry.created_at) > began]

    @given(pools(), pod_lists(), templates)
    def test_carried_out_again_and_again_it_comes_to_rest(
        self, of: PoolFact, pods: list[PodFact], template: Template
    ) -> None:
        for _ in range(30):
            decided = plan(of, pods, NOW, template)
            if not decided.creates and not decided.deletes:
                break
            pods = carried_out(decided, pods, of, NOW)
        else:
            pytest.fail(f"still busy: {decided}")

    @given(pools(), pod_lists())
    def test_when_all_pods_become_warm_the_pool_has_exactly_what_it_wants(
        self, of: PoolFact, pods: list[PodFact]
    ) -> None:
        of = dataclasses.replace(of, deleting=False)
        now = NOW
        for _ in range(80):
            decided = plan(of, pods, now, TEMPLATE)
            of = dataclasses.replace(of, status=decided.status)
            now += timedelta(seconds=400 if not decided.creates and not decided.deletes else 1)
            pods = [
                entry if entry.finished or entry.state is BindState.BOUND else warm_now(entry)
                for entry in carried_out(decided, pods, of, now)
                if not entry.deleting
            ]
        unbound = [entry for entry in pods if entry.state is BindState.WARM and not entry.finished]
        busy = live(pods) - len(unbound)
        assert len(unbound) == min(of.spec.replicas, max(0, of.spec.max_pods - busy))
        final = plan(of, pods, now, TEMPLATE)
        assert not final.creates
        assert not final.deletes
        if live(pods) >= of.spec.max_pods and any(is_failed_start(entry) for entry in pods):
            # A start of the new template failed, and a second one would take a warm pod's place: what callers have stays.
            return
        if of.spec.update_strategy.type == "RollingUpdate":
            assert {entry.template_hash for entry in unbound} <= {TEMPLATE.hash}
        assert (condition(final, "Ready") or {})["status"] == "True"


def is_failed_start(entry: PodFact) -> bool:
    return entry.state is BindState.WARM and entry.finished and entry.template_hash == TEMPLATE.hash


def warm_now(entry: PodFact) -> PodFact:
    return dataclasses.replace(entry, ready=True, phase="Running", waiting_reason=None, once_ready=True)
