"""Pods that become warm while callers wait at several gateways."""

from __future__ import annotations

import asyncio
import dataclasses

from tests.unit.clocks import Clock
from tests.unit.facts import warm
from tests.unit.virtual_time import in_virtual_time

from voicepool.gateway.allocator import Allocator
from voicepool.gateway.turns import ACTIVE_SECONDS, TURN_SECONDS, Turns
from voicepool.gateway.view import ClusterView
from voicepool.model import BindState, PodFact

KEY = ("calls", "demo")


def candidate(number: int) -> PodFact:
    return dataclasses.replace(warm(number), agent_status_index=0)


def bound_by(pod: PodFact, gateway: str) -> PodFact:
    return dataclasses.replace(pod, state=BindState.BOUND, session="s", bound_by=gateway)


def active(identity: str, others: tuple[str, ...], clock: Clock) -> Turns:
    turns = Turns(identity, clock)
    for number, other in enumerate(others):
        turns.seen(f"old-{number}", candidate(900 + number), warm=True)
        turns.seen(f"old-{number}", bound_by(candidate(900 + number), other), warm=False)
    return turns


def test_a_gateway_that_knows_of_no_other_waits_for_nobody() -> None:
    turns = active("one", (), Clock(100.0))
    turns.seen("a", candidate(1), warm=True)
    assert turns.wait_seconds("a") == 0.0


def test_each_pod_is_one_gateways_own_and_everybody_agrees_on_whose() -> None:
    clock, names = Clock(100.0), ("one", "two", "three")
    all_turns = {name: active(name, tuple(other for other in names if other != name), clock) for name in names}
    own = dict.fromkeys(names, 0)
    for number in range(300):
        for turns in all_turns.values():
            turns.seen(f"pod-{number}", candidate(number), warm=True)
        (first,) = [name for name, turns in all_turns.items() if not turns.wait_seconds(f"pod-{number}")]
        own[first] += 1
    assert min(own.values()) > 60


def test_a_turn_is_over_after_a_moment_and_a_gateway_that_binds_no_more_has_none() -> None:
    clock = Clock(100.0)
    turns = active("one", ("two",), clock)
    uids = [f"pod-{number}" for number in range(20)]
    for uid in uids:
        turns.seen(uid, candidate(1), warm=True)
    anothers = [uid for uid in uids if turns.wait_seconds(uid)]
    assert anothers
    clock.now += TURN_SECONDS
    assert not any(turns.wait_seconds(uid) for uid in anothers)
    clock.now += ACTIVE_SECONDS
    for uid in uids:
        turns.seen(uid, candidate(1), warm=False)
        turns.seen(uid, candidate(1), warm=True)
    assert not any(turns.wait_seconds(uid) for uid in uids)


def test_two_gateways_with_callers_who_wait_do_not_choose_the_same_new_pods() -> None:
    async def chosen() -> None:
        loop = asyncio.get_running_loop()
        views = [ClusterView(), ClusterView()]
        gateways = [
            Allocator(view, monotonic=loop.time, identity=name)
            for view, name in zip(views, ("one", "two"), strict=True)
        ]
        for view, other in zip(views, ("two", "one"), strict=True):
            view.pod_seen(candidate(99))
            view.pod_seen(bound_by(candidate(99), other))
        waiting = [[asyncio.create_task(gateway.wait([KEY], f"s-{n}")) for n in range(20)] for gateway in gateways]
        await asyncio.sleep(0)
        for number in range(20):
            for view in views:
                view.pod_seen(candidate(number))
        await asyncio.sleep(0)
        given = [{task.result().uid for task in tasks if task.done()} for tasks in waiting]
        assert given[0] | given[1] == {candidate(number).uid for number in range(20)}
        assert not given[0] & given[1]
        assert all(given)
        # What the other has not bound by then is for whoever still waits.
        await asyncio.sleep(TURN_SECONDS + 0.01)
        assert all(task.done() for tasks in waiting for task in tasks)

    in_virtual_time(chosen())


def test_a_caller_who_finds_a_free_pod_waits_for_no_turn() -> None:
    async def taken() -> None:
        view = ClusterView()
        allocator = Allocator(view, monotonic=asyncio.get_running_loop().time, identity="one")
        view.pod_seen(candidate(99))
        view.pod_seen(bound_by(candidate(99), "two"))
        for number in range(8):
            view.pod_seen(candidate(number))
        assert all(allocator.take(KEY, f"s-{number}") for number in range(8))

    in_virtual_time(taken())
