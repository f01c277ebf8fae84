"""A list that breaks off between its pages, or whose token has expired, and a process that dies where it reads one pod anew."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from .mutants import MUTANTS
from .server import NEXT_PAGE, Fate
from .stories import play
from .world import World

REPLICAS = 9
"""In the pages of the simulated server, three."""
OTHERS = 6
"""Pools whose names come before the pool's, so that it is on the second page."""
FATES = (Fate.LOST_BEFORE, Fate.THROTTLED, Fate.FAILED_BEFORE, Fate.EXPIRED)


def broken_list(process: str, plural: str, fate: Fate) -> Callable[[World], Coroutine[Any, Any, None]]:
    """A process starts again, and the first list of that kind comes to its second page and no further."""

    async def story(world: World) -> None:
        _create(world)
        for name in ("operator-a", "gateway-a"):
            world.start(name)
        await asyncio.sleep(20.0)
        creates = world.invariants.creates
        world.kill(process, restart_seconds=1.0)
        world.at_next_call(process, NEXT_PAGE, fate, about=plural)
        await world.until(lambda: not world.turns)
        await asyncio.sleep(20.0)
        if (world.invariants.creates, world.invariants.deletes) != (creates, 0):
            world.wrong(f"{world.invariants.creates - creates} creates, {world.invariants.deletes} deletes for nothing")
        await world.settle(settling_seconds=120.0, quiet_seconds=900.0)

    return story


def _create(world: World) -> None:
    for number in range(OTHERS):
        world.create_pool(f"another-{number}", replicas=0)
    world.create_pool(replicas=REPLICAS, session={"retentionSeconds": 30})


@pytest.mark.parametrize("fate", FATES)
@pytest.mark.parametrize(
    ("process", "plural"),
    [("operator-a", "pods"), ("operator-a", "voiceagentpools"), ("gateway-a", "pods")],
)
def test_a_list_that_fails_in_the_middle_is_made_again_from_its_beginning(
    process: str, plural: str, fate: Fate
) -> None:
    world = play(1, broken_list(process, plural, fate))
    assert not world.problems, "\n".join(world.story)


def test_an_informer_that_takes_the_pages_that_came_for_the_whole_list_is_found() -> None:
    with MUTANTS["page"]():
        assert play(1, broken_list("operator-a", "pods", Fate.FAILED_BEFORE)).problems


async def pods_that_vanish_unseen(world: World) -> None:
    """While the API server is away for the operator, a node is lost with its pods, and the history of that is compacted."""
    world.create_pool(replicas=4, session={"retentionSeconds": 30})
    for name in ("operator-a", "gateway-a"):
        world.start(name)
    await asyncio.sleep(20.0)
    world.down_until = world.loop.time() + 60.0
    for node in world.cluster.nodes:
        world.cluster.lose_node(node)
    await asyncio.sleep(50.0)
    world.server.compacted = world.server.revision
    await asyncio.sleep(60.0)
    await world.settle(settling_seconds=60.0, quiet_seconds=900.0)


def test_pods_that_vanish_while_nobody_can_look_are_replaced() -> None:
    world = play(1, pods_that_vanish_unseen)
    assert not world.problems, "\n".join(world.story)


def test_an_informer_that_keeps_what_a_list_does_not_show_any_more_is_found() -> None:
    with MUTANTS["replace"]():
        assert play(1, pods_that_vanish_unseen).problems


@pytest.mark.parametrize("fate", [Fate.CRASH_BEFORE, Fate.CRASH_AFTER, Fate.LOST_BEFORE, Fate.FAILED_BEFORE])
def test_an_operator_that_dies_where_it_reads_the_pod_whose_delete_was_refused_goes_on_from_there(fate: Fate) -> None:
    async def story(world: World) -> None:
        world.create_pool(replicas=2, session={"retentionSeconds": 30})
        for name in ("operator-a", "gateway-a"):
            world.start(name)
        await asyncio.sleep(20.0)
        # Slow enough for a caller to come before it.
        world.at_next_call("operator-a", "delete", Fate.ANSWERED, seconds=2.0)
        world.change_pool(replicas=0)
        await world.until(lambda: not world.turns)
        world.at_next_call("operator-a", "get", fate, about="demo-")
        for caller in ("one", "two"):
            world.start_session(caller, keyed=True, stays=True)
        await world.until(lambda: not world.turns)
        await asyncio.sleep(120.0)
        outcomes = {call.session: call.outcomes for call in world.callers.values()}
        lost = [agent.session for agent in world.cluster.agents.values() if agent.session and not agent.in_session]
        if "started" not in (outcomes["one"] + outcomes["two"]) or lost:
            world.wrong(f"the callers are told {outcomes}, and {lost} are over")
        await world.settle(settling_seconds=900.0, quiet_seconds=900.0)

    world = play(1, story)
    assert not world.problems, "\n".join(world.story)
