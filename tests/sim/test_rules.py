"""What the fields of a pool promise, each in a story of its own: budgets, limits of a deleted pool's calls, sizing, rollouts as pods are taken."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable
from typing import Any

import pytest

from voicepool.kube.api import BUDGETS, PODS, Json, NotFound
from voicepool.model import LABEL_SESSION, LABEL_STATE

from .cluster import NODE_SILENT_SECONDS
from .mutants import MUTANTS
from .server import Change
from .stories import play
from .world import NAMESPACE, World

BRIEF: dict[str, Any] = {"session": {"retentionSeconds": 30}}


async def call(world: World, **spec: Any) -> Json:
    """A pool and one call of it that does not end by itself; returns its pod as it was bound."""
    world.create_pool(**{"replicas": 1, **BRIEF, **spec})
    for name in ("operator-a", "gateway-a"):
        world.start(name)
    await asyncio.sleep(20.0)
    world.start_session("mine", keyed=True, stays=True)
    await asyncio.sleep(5.0)
    return pod_of_call(world)


def pod_of_call(world: World) -> Json:
    (pod,) = (pod for pod in world.server.all(PODS) if pod["metadata"]["labels"][LABEL_STATE] == "bound")
    return pod


def goes_on(world: World) -> bool:
    """Whether the call has its agent."""
    return any(agent.in_session and agent.session == "mine" for agent in world.cluster.agents.values())


def all_well(world: World) -> None:
    assert not world.problems, "\n".join(world.story)


@pytest.mark.parametrize(("disruption", "refused"), [("Never", True), ("OnUpgrade", False), ("Always", False)])
def test_a_call_is_evicted_only_where_its_pool_allows_that(disruption: str, refused: bool) -> None:
    async def story(world: World) -> None:
        pod = await call(world, disruption=disruption)
        world.evictions.evict(pod)
        await asyncio.sleep(1.0)
        assert ("deletionTimestamp" not in pod_of_call(world)["metadata"]) == refused
        await world.settle(settling_seconds=60.0, quiet_seconds=60.0)

    all_well(play(1, story))


def test_the_calls_of_a_deleted_pool_keep_their_budget_to_their_end_and_no_longer() -> None:
    async def story(world: World) -> None:
        pod = await call(world)
        world.delete_pool()
        await asyncio.sleep(600.0)
        assert world.evictions.is_refused(pod_of_call(world))
        world.cluster.finish(world.cluster.agents[pod["metadata"]["uid"]], "the caller left")
        await asyncio.sleep(90.0)
        assert not world.server.all(BUDGETS)

    all_well(play(1, story))


async def call_that_the_operator_has_not_seen(world: World) -> None:
    """A pod is started for a caller and bound to its call, of which the operator hears nothing; then the pool is deleted."""
    world.create_pool(replicas=0, onEmpty={"policy": "ColdStart"}, **BRIEF)
    for name in ("operator-a", "gateway-a"):
        world.start(name)
    # Long enough that nobody acts on a time without the pool any more.
    await asyncio.sleep(200.0)
    world.deaf.add("operator-a")
    world.start_session("mine", keyed=True, stays=True)
    await asyncio.sleep(20.0)
    world.deaf.clear()
    world.delete_pool()
    await asyncio.sleep(600.0)
    pod = pod_of_call(world)
    if not world.evictions.is_refused(pod):
        world.wrong("the call may be evicted")
    world.cluster.finish(world.cluster.agents[pod["metadata"]["uid"]], "the caller left")
    await asyncio.sleep(90.0)
    if world.server.all(BUDGETS):
        world.wrong("the budget is still there")


def test_a_call_that_the_operator_has_not_seen_keeps_the_budget_of_its_deleted_pool() -> None:
    all_well(play(1, call_that_the_operator_has_not_seen))


def test_an_operator_that_asks_only_its_own_copy_for_calls_is_found() -> None:
    with MUTANTS["unseen call"]():
        assert "which calls of it need" in play(1, call_that_the_operator_has_not_seen).problems[0]


async def budget_that_has_changed_unseen(world: World) -> None:
    """Kubernetes counts a call in the budget's status; the operator hears nothing of that, and then has to delete the budget."""
    world.create_pool(replicas=0, **BRIEF)
    world.start("operator-a")
    await asyncio.sleep(20.0)
    world.deaf.add("operator-a")
    (budget,) = world.server.all(BUDGETS)
    key, uid = ("calls", budget["metadata"]["name"]), budget["metadata"]["uid"]
    world.server.change(BUDGETS, key, uid, "disruption controller", lambda one: one.update(status={"expectedPods": 1}))
    await asyncio.sleep(5.0)
    world.deaf.clear()
    world.delete_pool()
    await asyncio.sleep(400.0)
    if world.server.all(BUDGETS):
        world.wrong("the budget is still there")


def test_a_budget_that_has_changed_unseen_goes_with_its_pool() -> None:
    all_well(play(1, budget_that_has_changed_unseen))


def test_an_operator_that_asks_for_a_delete_of_the_old_version_again_and_again_is_found() -> None:
    with MUTANTS["stale budget"]():
        assert play(1, budget_that_has_changed_unseen).problems


def test_a_call_goes_on_for_the_seconds_that_its_pool_gave_it_and_is_ended_then() -> None:
    async def story(world: World) -> None:
        await call(world, drainSeconds=300)
        world.delete_pool()
        await asyncio.sleep(295.0)
        assert goes_on(world)
        # An agent that does not end has 30 seconds of grace.
        await asyncio.sleep(45.0)
        assert not goes_on(world)

    all_well(play(1, story))


async def evicted_call_of_a_deleted_pool(world: World) -> None:
    """Its pod is being deleted, and has the whole time of the longest call for that; the pool's limit is shorter."""
    pod = await call(world, drainSeconds=60, disruption="Always")
    world.evictions.evict(pod)
    await asyncio.sleep(5.0)
    world.delete_pool()
    await asyncio.sleep(55.0)
    if not goes_on(world):
        world.wrong("the call is over before its time")
    await asyncio.sleep(45.0)
    if goes_on(world):
        world.wrong("the call still goes on")


def test_a_call_whose_pod_was_evicted_has_no_more_time_than_any_other_when_its_pool_is_deleted() -> None:
    all_well(play(1, evicted_call_of_a_deleted_pool))


def test_an_operator_that_leaves_evicted_calls_alone_is_found() -> None:
    with MUTANTS["evicted call"]():
        assert play(1, evicted_call_of_a_deleted_pool).problems == ["the call still goes on"]


async def deleted_twice(world: World) -> None:
    """The pool comes back while its call's time runs, and goes again long after."""
    await call(world, drainSeconds=60)
    world.delete_pool()
    await asyncio.sleep(20.0)
    world.create_pool(drainSeconds=60, **BRIEF)
    await asyncio.sleep(600.0)
    world.delete_pool()
    await asyncio.sleep(50.0)
    if not goes_on(world):
        world.wrong("the call is over before its time")


def test_a_call_that_a_new_pool_has_taken_over_has_its_time_again_when_that_pool_is_deleted() -> None:
    all_well(play(1, deleted_twice))


def test_an_operator_that_leaves_the_old_end_of_such_a_call_is_found() -> None:
    with MUTANTS["taken over"]():
        assert "which is bound to session mine and has not ended" in play(1, deleted_twice).problems[0]


def test_a_schedule_fills_the_pool_at_its_minute_and_empties_it_at_the_next() -> None:
    async def story(world: World) -> None:
        schedules = [
            {"cron": "10 0 * * *", "warmPods": 4},
            {"cron": "30 1 * * *", "timeZone": "Europe/Berlin", "warmPods": 0},
        ]
        world.create_pool(replicas=1, headroom={"mode": "Native", "schedules": schedules}, **BRIEF)
        world.start("operator-a")
        for seconds, pods in ((590.0, 1), (610.0, 4), (1790.0, 4), (1810.0, 1)):
            await asyncio.sleep(seconds - world.loop.time())
            if len(world.server.all(PODS)) != pods:
                world.wrong(f"{len(world.server.all(PODS))} pods after {seconds:.0f} s")
            if seconds == 610.0:
                await asyncio.sleep(60.0)
                revision = world.server.revision
            if seconds == 1790.0 and world.server.revision != revision:
                world.wrong("somebody wrote between the minutes of the schedules")

    all_well(play(1, story))


def test_with_on_replenish_a_new_template_comes_only_as_pods_are_taken() -> None:
    async def story(world: World) -> None:
        world.create_pool(replicas=3, updateStrategy={"type": "OnReplenish"}, **BRIEF)
        for name in ("operator-a", "gateway-a"):
            world.start(name)
        await asyncio.sleep(20.0)
        world.new_image(2)
        await asyncio.sleep(400.0)
        assert (world.invariants.creates, world.invariants.deletes) == (3, 0)
        for caller in ("one", "two", "three"):
            world.start_session(caller, keyed=True, stays=True)
        await asyncio.sleep(20.0)
        images = sorted(
            (pod["metadata"]["labels"][LABEL_STATE], pod["spec"]["containers"][0]["image"])
            for pod in world.server.all(PODS)
        )
        assert [image for state, image in images if state == "warm"] == ["example.org/agent:2"] * 3
        await world.settle(settling_seconds=120.0, quiet_seconds=60.0)

    all_well(play(1, story))


def placed(placement: str, best: Callable[[Iterable[int]], int]) -> Callable[[World], Coroutine[Any, Any, None]]:
    """Callers come one at a time; each bind goes to a node with that many calls, of the nodes that have a warm pod."""

    async def story(world: World) -> None:
        def bound(change: Change) -> None:
            if change.resource != PODS or not change.actor.startswith("gateway") or change.old is None:
                return
            on_node = Counter(
                pod["spec"]["nodeName"] for pod in map(pod_before(change), world.server.all(PODS)) if is_call(pod)
            )
            free = {pod["spec"]["nodeName"] for pod in map(pod_before(change), world.server.all(PODS)) if is_warm(pod)}
            chosen = change.new["spec"]["nodeName"]
            if on_node[chosen] != best(on_node[node] for node in free):
                world.wrong(f"a call goes to {chosen}; calls: {dict(on_node)}, free: {sorted(free)}")

        world.server.observers.append(bound)
        world.create_pool(replicas=6, maxPods=20, placement=placement, **BRIEF)
        for name in ("operator-a", "gateway-a"):
            world.start(name)
        await asyncio.sleep(20.0)
        for number in range(9):
            world.start_session(f"caller-{number}", keyed=False, stays=True)
            await asyncio.sleep(10.0)
        assert world.invariants.binds == 9

    return story


def pod_before(change: Change) -> Callable[[Json], Json]:
    """A pod as it was before the change."""
    return lambda pod: change.old if change.old and pod["metadata"]["uid"] == change.old["metadata"]["uid"] else pod


def is_call(pod: Json) -> bool:
    return bool(pod["metadata"]["labels"][LABEL_STATE] == "bound")


def is_warm(pod: Json) -> bool:
    return not is_call(pod) and any(entry["ready"] for entry in pod["status"].get("containerStatuses") or ())


async def node_that_falls_silent(world: World) -> None:
    """A node with warm pods is gone; for as long as its pods are there, callers come."""
    world.create_pool(replicas=6, **BRIEF)
    for name in ("operator-a", "gateway-a"):
        world.start(name)
    await asyncio.sleep(20.0)
    # The one whose pods would be taken first.
    silent = min(pod["spec"]["nodeName"] for pod in world.server.all(PODS))
    world.cluster.lose_node(silent)
    await asyncio.sleep(NODE_SILENT_SECONDS + 2.0)

    def on(pod: Json) -> bool:
        return bool(pod["spec"]["nodeName"] == silent)

    def bound(change: Change) -> None:
        if change.resource == PODS and change.actor.startswith("gateway") and on(change.new):
            world.wrong("a caller was given a pod of the node that is gone")

    world.server.observers.append(bound)
    for number in range(2):
        world.start_session(f"caller-{number}", keyed=False, stays=True)
        await asyncio.sleep(5.0)
    assert len(world.calls.answered) == 2
    await world.settle(settling_seconds=120.0, quiet_seconds=60.0)


def test_nobody_gets_a_pod_of_a_node_that_has_fallen_silent() -> None:
    all_well(play(1, node_that_falls_silent))


def test_a_gateway_that_goes_by_the_containers_of_a_silent_node_is_found() -> None:
    with MUTANTS["silent node"]():
        assert "of the node that is gone" in play(1, node_that_falls_silent).problems[0]


@pytest.mark.parametrize(("placement", "best"), [("Packed", max), ("Spread", min)])
def test_callers_one_at_a_time_go_to_the_nodes_that_the_placement_says(
    placement: str, best: Callable[[Iterable[int]], int]
) -> None:
    for seed in range(3):
        all_well(play(seed, placed(placement, best)))


def test_a_placement_that_is_the_other_way_round_is_found() -> None:
    assert play(0, placed("Packed", min)).problems
    assert play(0, placed("Spread", max)).problems


async def deleted_by_name(world: World) -> None:
    """Kubernetes' pod garbage collector deletes by its name what ended a while ago, when the pool has put another pod in its place."""

    def running() -> list[Json]:
        return [pod for pod in world.server.all(PODS) if pod["status"]["phase"] == "Running"]

    async def session(name: str) -> str:
        """Starts a call that goes on, and returns the name of its pod."""
        world.start_session(name, keyed=True, stays=True)
        await asyncio.sleep(20.0)
        (pod,) = (pod for pod in running() if pod["metadata"]["labels"].get(LABEL_SESSION) == name)
        return str(pod["metadata"]["name"])

    world.create_pool(replicas=1, maxPods=2, session={"retentionSeconds": 0})
    for name in ("operator-a", "gateway-a"):
        world.start(name)
    await asyncio.sleep(20.0)
    await session("first")
    gone = await session("second")
    world.end_session("second")
    await asyncio.sleep(20.0)
    await session("third")
    world.end_session("third")
    await asyncio.sleep(20.0)
    await session("mine")
    with contextlib.suppress(NotFound):
        world.server.delete(PODS, NAMESPACE, gone, "pod-garbage-collector", grace_period_seconds=0)
    await asyncio.sleep(1.0)
    if not goes_on(world):
        world.wrong("the call was taken for another pod's")


def test_a_pod_that_is_gone_and_is_deleted_by_its_name_is_not_another_one_by_now() -> None:
    all_well(play(1, deleted_by_name))


def test_an_operator_that_gives_a_name_again_is_found() -> None:
    with MUTANTS["name"]():
        assert play(1, deleted_by_name).problems == ["the call was taken for another pod's"]
