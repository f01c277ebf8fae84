"""Stories of bugs that were found here. Each is told as it has to go, and once more with its bug built in again, which has to show."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from voicepool.kube.api import PODS, Json
from voicepool.model import ANNOTATION_BOUND_BY

from .mutants import MUTANTS
from .server import Change, Fate
from .stories import play
from .world import World

Story = Callable[[World], Coroutine[Any, Any, None]]

BRIEF: dict[str, Any] = {"session": {"retentionSeconds": 30}}
"""What has ended is soon gone, so that a short story ends in peace."""


async def a_bind_of_another_gateway(world: World) -> None:
    """Gateway a's patch is lost, b binds the pod that both prefer for the session of both; then a's patch is refused, and a gives up."""
    world.create_pool(replicas=1)
    for name in ("operator-a", "gateway-a", "gateway-b"):
        world.start(name)
    await asyncio.sleep(20.0)
    world.at_next_call("gateway-a", "patch", Fate.LOST_BEFORE)
    world.start_session("mine", keyed=True, gateway="gateway-a", stays=True)
    await world.until(lambda: not world.turns)
    world.start_session("mine", keyed=True, gateway="gateway-b", stays=True)
    # Whatever a does next about the session, it cannot know it, and tells its caller so: a list that comes to nothing, and that asking again does not mend.
    world.at_next_call("gateway-a", "list", Fate.EXPIRED, about="session=mine")
    await asyncio.sleep(10.0)
    bound_by = {pod["metadata"]["annotations"].get(ANNOTATION_BOUND_BY) for pod in world.server.all(PODS)}
    if "gateway-b" not in bound_by or world.turns:
        world.wrong(f"the story went differently: bound by {bound_by}, to come {world.turns}")
    await asyncio.sleep(50.0)


async def a_waiter_who_gives_up_as_a_pod_comes(world: World) -> None:
    """Of two callers in the queue the first goes in the very moment in which the pod for it is warm."""
    world.event_seconds = 0.0
    world.create_pool(replicas=0, onEmpty={"policy": "Queue", "timeoutSeconds": 60})
    world.start("operator-a")
    world.start("gateway-a")
    await asyncio.sleep(5.0)
    first = world.start_session("first", keyed=False)
    await asyncio.sleep(1.0)
    second = world.start_session("second", keyed=False)
    await asyncio.sleep(1.0)
    assert first is not None
    assert second is not None

    def goes(change: Change) -> None:
        if change.resource == PODS and _ready(change.new) and not _ready(change.old or {}):
            world.caller_goes(first)

    world.server.observers.append(goes)
    world.change_pool(replicas=1)
    await asyncio.sleep(30.0)
    if second.outcomes != ["started"]:
        world.wrong(f"the caller behind the one who went is told {second.outcomes}")


async def a_late_pod_in_the_place_of_its_successor(world: World) -> None:
    """The last pod that maxPods allows never becomes Ready; only when it goes there is room for another."""
    world.create_pool(replicas=2, maxPods=2, startup={"deadlineSeconds": 15}, **BRIEF)
    world.cluster.starts.extend(("well", "hangs"))
    world.start("operator-a")
    world.start("gateway-a")
    await world.settle(settling_seconds=60.0, quiet_seconds=60.0)


async def a_failed_cold_start_and_max_pods(world: World) -> None:
    """A pod that was started for one caller fails; its place is free for a pod of the warm target, which stays."""
    policy = {"policy": "ColdStart", "timeoutSeconds": 10}
    world.create_pool(replicas=0, maxPods=2, startup={"deadlineSeconds": 60}, onEmpty=policy, **BRIEF)
    world.start("operator-a")
    world.start("gateway-a")
    await asyncio.sleep(5.0)
    world.start_session("first", keyed=False, stays=True)
    await asyncio.sleep(10.0)
    world.cluster.starts.append("fails")
    world.start_session("second", keyed=False)
    await asyncio.sleep(8.0)
    world.change_pool(replicas=1)
    await asyncio.sleep(20.0)
    made = [change for change in world.server.log if (change.actor, change.kind) == ("operator-a", "ADDED")]
    made = [change for change in made if change.resource == PODS]
    if len(made) != 1:
        world.wrong(f"the operator created {len(made)} pods for one place")
    await world.settle(settling_seconds=120.0, quiet_seconds=60.0)


async def a_pod_that_changed_while_its_delete_was_on_its_way(world: World) -> None:
    """An ended pod changes in something that voicepool does not look at, so that no watch event makes it look again."""
    world.create_pool(replicas=1, **BRIEF)
    world.start("operator-a")
    world.start("gateway-a")
    await asyncio.sleep(20.0)
    world.start_session("mine", keyed=True, stays=True)
    await asyncio.sleep(20.0)
    uid = world.calls.answered["mine"]
    world.cluster.finish(world.cluster.agents[uid], "the caller left")
    world.at_next_call("operator-a", "delete", Fate.ANSWERED, seconds=1.0)
    await world.until(lambda: not world.turns)
    world.server.change(
        PODS, world.cluster.agents[uid].key, uid, "kubelet", lambda pod: pod["status"].update(hostIP="x")
    )
    await world.settle(settling_seconds=0.0, quiet_seconds=60.0)


STORIES: dict[str, Story] = {
    "bind of another": a_bind_of_another_gateway,
    "changed pod": a_pod_that_changed_while_its_delete_was_on_its_way,
    "failed cold start": a_failed_cold_start_and_max_pods,
    "late pod": a_late_pod_in_the_place_of_its_successor,
    "waiter": a_waiter_who_gives_up_as_a_pod_comes,
}
SEEDS = {"waiter": 20}
"""Where it takes two things in the order of which a seed decides."""


@pytest.mark.parametrize("bug", sorted(STORIES))
def test_a_story_of_a_bug_that_was_found_goes_well(bug: str) -> None:
    for seed in range(SEEDS.get(bug, 3)):
        world = play(seed, STORIES[bug])
        assert not world.problems, "\n".join(world.story)


@pytest.mark.parametrize("bug", sorted(STORIES))
def test_its_bug_is_found_again(bug: str) -> None:
    with MUTANTS[bug]():
        assert any(play(seed, STORIES[bug]).problems for seed in range(SEEDS.get(bug, 1)))


def _ready(pod: Json) -> bool:
    return any(entry["ready"] for entry in pod.get("status", {}).get("containerStatuses") or ())
