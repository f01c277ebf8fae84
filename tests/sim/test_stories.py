"""Seeds that are played on every run, crashes at every single call, and bugs that have to be found."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import pytest

from .mutants import MUTANTS
from .server import EventFate, Fate
from .stories import every_call, gateway_crash, missed_event, old_lists, operator_crash, play
from .world import World

SEEDS = 160
GROUP = 20
MUTANT_SEEDS = {"delete": 40, "bind": 40}
"""How many seeds it may take to find each of them."""
CRASHES = (Fate.CRASH_BEFORE, Fate.CRASH_AFTER)


@pytest.mark.parametrize("first", range(0, SEEDS, GROUP))
def test_whatever_happens_every_invariant_holds(first: int) -> None:
    for seed in range(first, first + GROUP):
        problems = play(seed).problems
        assert not problems, f"seed {seed}; its story: python -m tests.sim --seed {seed}\n{problems[0]}"


@pytest.mark.parametrize("mutant", sorted(MUTANT_SEEDS))
def test_a_bug_that_is_built_in_is_found(mutant: str) -> None:
    with MUTANTS[mutant]():
        assert any(play(seed).problems for seed in range(MUTANT_SEEDS[mutant]))


def test_one_seed_is_one_story_in_every_process() -> None:
    stories = [
        subprocess.run(
            [sys.executable, "-m", "tests.sim", "--seed", "5"],
            env={**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": os.pathsep.join(sys.path)},
            check=True,
            capture_output=True,
        ).stdout
        for hash_seed in ("1", "2")
    ]
    assert stories[0] == stories[1]
    assert b"all well" in stories[0]


@pytest.mark.parametrize("fate", CRASHES)
@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda world: world.change_pool(replicas=5), id="scale-up"),
        pytest.param(lambda world: world.change_pool(replicas=1), id="scale-down"),
        pytest.param(lambda world: world.new_image(2), id="rollout"),
        pytest.param(lambda world: world.delete_pool(), id="delete"),
        pytest.param(lambda world: world.change_pool(disruption="Always"), id="budget"),
    ],
)
def test_an_operator_that_dies_at_any_call_of_a_reconcile_goes_on_from_there(
    change: Callable[[World], None], fate: Fate
) -> None:
    assert every_call(lambda call: operator_crash(call, fate, change)) > 0


@pytest.mark.parametrize("fate", CRASHES)
def test_an_operator_that_dies_while_a_deleted_pool_comes_back_gives_its_calls_their_whole_time(fate: Fate) -> None:
    def change(world: World) -> None:
        world.delete_pool()
        world.loop.call_later(10.0, lambda: world.create_pool(drainSeconds=60, session={"retentionSeconds": 30}))
        world.loop.call_later(30.0, world.delete_pool)

    assert every_call(lambda call: operator_crash(call, fate, change, drainSeconds=60)) > 5


@pytest.mark.parametrize("process", ["operator-a", "gateway-a"])
def test_lists_after_a_restart_may_be_as_old_as_anything(process: str) -> None:
    assert every_call(lambda revisions: old_lists(process, revisions)) > 20


@pytest.mark.parametrize(
    ("process", "fate"),
    [("operator-a", EventFate.DROPPED), ("operator-a", EventFate.CUT), ("gateway-a", EventFate.DROPPED)],
)
def test_any_one_watch_event_may_be_lost(process: str, fate: EventFate) -> None:
    assert every_call(lambda number: missed_event(process, number, fate)) > 30


@pytest.mark.parametrize("fate", CRASHES)
@pytest.mark.parametrize("policy", ["Queue", "ColdStart"])
def test_a_gateway_that_dies_at_any_call_of_a_start_leaves_the_session_one_agent(policy: str, fate: Fate) -> None:
    assert every_call(lambda call: gateway_crash(call, fate, policy)) > 2
