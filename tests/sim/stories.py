"""Stories: a random one for each seed, and scripted ones for what is tested exhaustively."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from .server import REFUSED_IMAGE, Fate
from .world import CALM, MOST_REPLICAS, STORM, World

STEPS = 30


def play(seed: int, story: Callable[[World], Coroutine[Any, Any, None]] | None = None) -> World:
    """Play a story (the random one unless another is given) from its first to its last second; see ``problems`` of the result."""
    world = World(seed)
    world.run(story or random_story)
    return world


async def random_story(world: World) -> None:
    """Whatever can happen, in any order; then peace."""
    chance = world.chance
    policy = chance.choice(("Queue", "Queue", "ColdStart", "Reject"))
    world.cluster.healthy = chance.choice((1.0, 0.9, 0.7))
    world.cluster.delivery_trouble = chance.choice((0.0, 0.05, 0.2))
    operators = ["operator-a"] + (["operator-b"] if chance.random() < 0.4 else [])
    gateways = ["gateway-a"] + (["gateway-b"] if chance.random() < 0.6 else [])
    # With stale views each writer may fill the pool once by names of its own, and each gateway starts one pod for each of its callers.
    world.invariants.overshoot_bound = MOST_REPLICAS * len(operators) + 4 * len(gateways) * (policy == "ColdStart")
    spec = _spec(policy, chance.randrange(MOST_REPLICAS + 1), chance.randrange(2, 12), chance.choice((600, 86_400)))
    world.create_pool(**spec)
    for name in (*operators, *gateways):
        world.start(name)
    await asyncio.sleep(chance.choice((0.0, 1.0, 15.0)))
    world.weather = chance.choice((CALM, STORM, STORM))
    for number in range(STEPS):
        _step(world, number, spec)
        await asyncio.sleep(chance.choice((0.0, 0.01, 0.3, 3.0, 15.0)) * chance.random())
        if world.problems:
            return
    await world.settle()


def _spec(policy: str, replicas: int, max_pods: int, duration_seconds: int) -> dict[str, Any]:
    return {
        "replicas": replicas,
        "maxPods": max_pods,
        "startup": {"deadlineSeconds": 15},
        "session": {"retentionSeconds": 30, "maxDurationSeconds": duration_seconds},
        "onEmpty": {"policy": policy, "timeoutSeconds": 10},
    }


def _step(world: World, number: int, spec: dict[str, Any]) -> None:
    """One thing happens."""
    chance = world.chance
    match chance.choices(
        ("call", "burst", "again", "gone", "end", "scale", "image", "pod", "delete", "kill", "crash", "freeze", "sky"),
        (24, 6, 8, 4, 4, 14, 6, 8, 3, 6, 8, 4, 10),
    )[0]:
        case "call":
            world.start_session(f"s{number}", keyed=chance.random() < 0.6)
        case "burst":
            for one in range(chance.randrange(2, 5)):
                world.start_session(f"s{number}-{one}", keyed=chance.random() < 0.5)
        case "again":
            keyed = [call.session for call in world.callers.values() if call.keyed] or [f"s{number}"]
            session = chance.choice(keyed)
            for _ in range(2):
                world.start_session(session, keyed=True)
        case "gone" if world.callers:
            world.caller_goes(world.callers[chance.choice(sorted(world.callers))])
        case "end" if world.calls.answered:
            world.end_session(chance.choice(sorted(world.calls.answered)))
        case "scale":
            if chance.random() < 0.8:
                world.change_pool(replicas=chance.randrange(MOST_REPLICAS + 1))
            else:
                world.change_pool(maxPods=chance.randrange(2, 12))
        case "image":
            world.new_image(chance.choice((number, number, 1, REFUSED_IMAGE)))
        case "pod":
            _trouble_with_a_pod(world)
        case "delete":
            if world.pool() is not None:
                world.delete_pool(foreground=chance.random() < 0.3)
            if chance.random() < 0.8:
                world.loop.call_later(chance.uniform(0.0, 30.0), _create_again, world, spec)
        case "kill":
            world.kill(chance.choice(sorted(world.processes)))
        case "crash":
            fate = chance.choice((Fate.CRASH_BEFORE, Fate.CRASH_AFTER))
            world.crash_at[chance.choice(sorted(world.processes))] = (chance.randrange(12), fate)
        case "freeze":
            world.freeze(chance.choice(sorted(world.processes)), chance.uniform(1.0, 60.0))
        case "sky":
            _trouble_in_the_sky(world)


def _create_again(world: World, spec: dict[str, Any]) -> None:
    if world.pool() is None:
        world.create_pool(**spec)


def _trouble_with_a_pod(world: World) -> None:
    chance = world.chance
    alive = [agent for agent in world.cluster.agents.values() if agent.alive]
    if chance.random() < 0.2:
        node = chance.choice(sorted(world.cluster.nodes))
        if world.cluster.nodes[node]:
            world.tell("world", f"{node} is gone")
            world.cluster.lose_node(node)
    elif alive:
        world.cluster.fail(chance.choice(alive).uid, chance.choice(("crashed", "Evicted", "OOMKilled")))


def _trouble_in_the_sky(world: World) -> None:
    chance = world.chance
    match chance.randrange(5):
        case 0:
            world.down_until = world.loop.time() + chance.choice((1.0, 20.0, 600.0)) * chance.random()
            world.tell("world", f"the API server is away until {world.down_until:.1f}")
        case 1:
            world.server.compacted = world.server.revision
            world.tell("world", "the history is compacted")
        case 2:
            world.weather = CALM if world.weather is STORM else STORM
            world.tell("world", "the weather changes")
        case 3:
            process = world.processes[chance.choice(sorted(world.processes))]
            process.clock_offset_seconds = chance.uniform(-3600.0, 3600.0)
            world.tell(process.name, f"has a clock that is {process.clock_offset_seconds:+.1f} s off")
        case _:
            world.server.collect_garbage()


# -- scripted -----------------------------------------------------------------------------------------------------------------------


def operator_crash(
    call: int, fate: Fate, change: Callable[[World], None]
) -> Callable[[World], Coroutine[Any, Any, None]]:
    """A full pool is changed, and the operator dies at its ``call``-th call after that."""

    async def story(world: World) -> None:
        world.invariants.overshoot_bound = 0
        world.create_pool(**_spec("Queue", 3, 8, 600))
        world.start("operator-a")
        world.start("gateway-a")
        await asyncio.sleep(20.0)
        world.crash_at["operator-a"] = (call, fate)
        world.start_session("running", keyed=True)
        change(world)
        await asyncio.sleep(40.0)
        world.start_session("later", keyed=True)
        await asyncio.sleep(40.0)
        world.uncrashed = "operator-a" in world.crash_at
        await world.settle(settling_seconds=900.0, quiet_seconds=900.0)

    return story


def gateway_crash(call: int, fate: Fate, policy: str) -> Callable[[World], Coroutine[Any, Any, None]]:
    """A gateway dies at the ``call``-th call of a start; the caller asks the other one for the same session."""

    async def story(world: World) -> None:
        world.create_pool(**_spec(policy, 0 if policy == "ColdStart" else 2, 8, 600))
        world.invariants.overshoot_bound = 0
        for name in ("operator-a", "gateway-a", "gateway-b"):
            world.start(name)
        await asyncio.sleep(20.0)
        world.crash_at["gateway-a"] = (call, fate)
        world.start_session("mine", keyed=True, gateway="gateway-a")
        await asyncio.sleep(world.chance.uniform(0.0, 1.0))
        world.start_session("mine", keyed=True, gateway="gateway-b")
        await asyncio.sleep(60.0)
        # Until then the first gateway might have come back to it; past that the second one may see to it.
        if "started" not in world.callers["mine"].outcomes:
            world.start_session("mine", keyed=True, gateway="gateway-b")
        await asyncio.sleep(60.0)
        if "started" not in world.callers["mine"].outcomes:
            world.wrong(f"the caller who asked two gateways was told {world.callers['mine'].outcomes}")
        world.uncrashed = "gateway-a" in world.crash_at
        await world.settle(settling_seconds=900.0, quiet_seconds=900.0)

    return story
