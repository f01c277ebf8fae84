"""Two operators and one Lease: whoever does not hold it writes nothing, and whoever dies or is frozen with it is followed by the other."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from voicepool.kube.api import LEASES, PODS

from .mutants import MUTANTS
from .server import Fate
from .stories import every_call, play
from .world import World

BOTH = ("operator-a", "operator-b")
TAKE_OVER_SECONDS = 20.0
"""15 until a Lease that is not renewed is free, a look each second, and the way."""


async def led_pool(world: World) -> tuple[str, str]:
    """A full pool and two operators; returns who leads and who waits."""
    world.leases = True
    world.create_pool(replicas=2, session={"retentionSeconds": 30})
    for name in (*BOTH, "gateway-a"):
        world.start(name)
    await asyncio.sleep(30.0)
    leader = holder(world)
    return leader, next(name for name in BOTH if name != leader)


def holder(world: World) -> str:
    (lease,) = world.server.all(LEASES)
    return str(lease["spec"]["holderIdentity"]).partition("/")[0]


async def frozen_leader(world: World) -> None:
    """The leader stands still for a minute, in which the other takes over and the pool is changed; then it goes on, and its first renewal is slow."""
    leader, other = await led_pool(world)
    world.freeze(leader, 60.0)
    await asyncio.sleep(TAKE_OVER_SECONDS)
    if holder(world) != other:
        world.wrong(f"{holder(world)} holds the Lease of {leader}, which is frozen")
    world.change_pool(replicas=4)
    await asyncio.sleep(30.0)
    world.invariants.calm = True
    world.at_next_call(leader, "merge", Fate.ANSWERED, about="voicepool", seconds=2.0)
    world.change_pool(replicas=1)
    await asyncio.sleep(60.0)
    await world.settle(settling_seconds=60.0, quiet_seconds=600.0)


def test_a_leader_that_was_frozen_writes_nothing_after_another_has_taken_its_place() -> None:
    for seed in range(3):
        world = play(seed, frozen_leader)
        assert not world.problems, "\n".join(world.story)


def test_a_leader_that_does_not_look_at_the_clock_is_found() -> None:
    with MUTANTS["lease"]():
        assert any("had the Lease" in words for seed in range(3) for words in play(seed, frozen_leader).problems)


@pytest.mark.parametrize("fate", [Fate.CRASH_BEFORE, Fate.CRASH_AFTER])
def test_a_leader_that_dies_at_any_call_is_followed_by_the_other_which_goes_on_from_there(fate: Fate) -> None:
    # Its renewals among them.
    assert every_call(lambda call: leader_crash(call, fate)) > 5


def leader_crash(call: int, fate: Fate) -> Callable[[World], Coroutine[Any, Any, None]]:
    async def story(world: World) -> None:
        leader, other = await led_pool(world)
        world.restarts = False
        world.crash_at[leader] = (call, fate)
        world.change_pool(replicas=4)
        await asyncio.sleep(4.0)
        world.unplayed = world.crash_at.pop(leader, None) is not None
        if not world.unplayed:
            await asyncio.sleep(TAKE_OVER_SECONDS)
            if holder(world) != other:
                world.wrong(f"{holder(world)} holds the Lease, and {other} is alone")
            world.change_pool(replicas=1)
            await asyncio.sleep(30.0)
            unbound = [pod for pod in world.server.all(PODS) if "deletionTimestamp" not in pod["metadata"]]
            if len(unbound) != 1:
                world.wrong(f"{len(unbound)} pods, and 1 is wanted")
        await world.settle(settling_seconds=60.0, quiet_seconds=60.0)

    return story
