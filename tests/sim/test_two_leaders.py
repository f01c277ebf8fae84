"""Two operators that both believe to lead, one of which has missed what happened."""

from __future__ import annotations

import asyncio

from voicepool.kube.api import POOLS

from .mutants import MUTANTS
from .stories import play
from .world import World

MOST_STATUS_WRITES = 40
"""In 25 minutes, by both of them: the intervals double up to five minutes. One each second would be 3,000."""


async def story(world: World) -> None:
    world.create_pool(replicas=2, maxPods=8)
    world.start("operator-a")
    world.start("operator-b")
    await asyncio.sleep(30.0)
    world.deaf.add("operator-b")
    world.change_pool(replicas=3)
    await asyncio.sleep(20.0)
    world.deaf.clear()
    since = world.server.revision
    # It hears of the pool again, and not of the pod that it missed: until its copy is listed anew it counts one less.
    world.change_pool(maxPods=9)
    await asyncio.sleep(1500.0)
    writes = [
        change.actor for change in world.server.log[since:] if change.resource == POOLS and change.actor != "user"
    ]
    if not {"operator-a", "operator-b"} <= set(writes):
        world.wrong(f"only {set(writes)} wrote a status: nobody disagreed")
    if len(writes) > MOST_STATUS_WRITES:
        world.wrong(f"{len(writes)} status writes against each other")
    await asyncio.sleep(1000.0)
    for words in world.invariants.not_converged():
        world.wrong(words)


def test_leaders_with_different_views_do_not_write_against_each_other() -> None:
    for seed in range(3):
        assert not play(seed, story).problems


def test_leaders_that_write_their_status_at_any_price_are_found() -> None:
    with MUTANTS["status"]():
        (problem,) = play(0, story).problems
    assert "against each other" in problem
