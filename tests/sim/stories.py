"""Stories: a random one for each seed, and scripted ones for what is tested exhaustively."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from voicepool.kube.api import PODS

from .server import REFUSED_IMAGE, EventFate, Fate
from .world import CALM, MOST_PODS, MOST_REPLICAS, QUIET_SECONDS, STORM, World

STEPS = 30
QUIET_WITH_LEASE_SECONDS = 1800.0


def play(seed: int, story: Callable[[World], Coroutine[Any, Any, None]] | None = None) -> World:
    """Play a story (the random one unless another is given) from its first to its last second; see ``problems`` of the result."""
    world = World(seed)
    world.run(story or random_story)
    return world


def every_call(story: Callable[[int], Callable[[World], Coroutine[Any, Any, None]]]) -> int:
    """Play a story once for each call (or event) at which something can go wrong in it; returns how many there are.

    Args:
        story: makes the one in which it goes wrong at that call; it sets ``unplayed`` where there are fewer calls.
    """
    call = 0
    while True:
        world = play(call, story(call))
        assert not world.problems, f"wrong at {call}: {world.problems[0]}\n" + "\n".join(world.story)
        if world.unplayed:
            return call
        call += 1


async def random_story(world: World) -> None:
    """Whatever can happen, in any order; then peace."""
    chance = world.chance
    policy = chance.choice(("Queue", "Queue", "ColdStart", "Reject"))
    world.cluster.healthy = chance.choice((1.0, 0.9, 0.7))
    world.cluster.delivery_trouble = chance.choice((0.0, 0.05, 0.2))
    operators = ["operator-a"] + (["operator-b"] if chance.random() < 0.4 else [])
    gateways = ["gateway-a"] + (["gateway-b"] if chance.random() < 0.6 else [])
    world.leases = len(operators) > 1 and chance.random() < 0.35
    sized = chance.random() < 0.2
    # With stale views each writer may fill the pool once by names of its own, and each gateway starts one pod for each of its callers.
    most = MOST_PODS if sized else MOST_REPLICAS
    world.invariants.overshoot_bound = most * len(operators) + 4 * len(gateways) * (policy == "ColdStart")
    spec = _spec(
        policy, chance.randrange(MOST_REPLICAS + 1), chance.randrange(2, MOST_PODS + 1), chance.choice((600, 86_400))
    )
    for rule in _rules(sized):
        spec[rule] = _drawn(world, rule)
    world.create_pool(**spec)
    for name in (*operators, *gateways):
        world.start(name)
    await asyncio.sleep(chance.choice((0.0, 1.0, 15.0)))
    world.weather = chance.choice((CALM, STORM, STORM))
    for number in range(STEPS):
        _step(world, number, spec, sized)
        await asyncio.sleep(chance.choice((0.0, 0.01, 0.3, 3.0, 15.0)) * chance.random())
        if world.problems:
            return
    if chance.random() < 0.15:
        world.delete_pool()
    # A Lease is renewed each two seconds, which costs more than all else here: less of the same has to do.
    await world.settle(quiet_seconds=QUIET_WITH_LEASE_SECONDS if world.leases else QUIET_SECONDS)


def _spec(policy: str, replicas: int, max_pods: int, duration_seconds: int) -> dict[str, Any]:
    return {
        "replicas": replicas,
        "maxPods": max_pods,
        "startup": {"deadlineSeconds": 15},
        "session": {"retentionSeconds": 30, "maxDurationSeconds": duration_seconds},
        "onEmpty": {"policy": policy, "timeoutSeconds": 10},
    }


def _rules(sized: bool) -> list[str]:
    """Fields of a spec that say how, and not how many."""
    return ["placement", "disruption", "drainSeconds", "updateStrategy", *(["headroom"] if sized else [])]


def _drawn(world: World, rule: str) -> Any:
    chance = world.chance
    match rule:
        case "placement":
            return chance.choice(("Packed", "Spread"))
        case "disruption":
            return chance.choice(("Never", "Never", "OnUpgrade", "Always"))
        case "drainSeconds":
            return chance.choice((0, 0, 20, 300))
        case "updateStrategy":
            return chance.choice(
                (
                    {"type": "RollingUpdate"},
                    {"type": "OnReplenish"},
                    {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 0, "maxUnavailable": 1}},
                    {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": "50%", "maxUnavailable": "50%"}},
                )
            )
        case _:
            return {
                "mode": chance.choice(("Native", "Native", "Advise")),
                "percentage": chance.choice((0, 50, 150)),
                "missRate": chance.choice((0.01, 0.3)),
                # A minute after the story begins, and 45 minutes after: long before all has to be quiet.
                "schedules": [
                    {"cron": "1 0 * * *", "warmPods": chance.randrange(6)},
                    {"cron": "45 1 * * *", "timeZone": "Europe/Berlin", "warmPods": chance.randrange(6)},
                ],
            }


def _step(world: World, number: int, spec: dict[str, Any], sized: bool) -> None:
    """One thing happens."""
    chance = world.chance
    match chance.choices(
        (
            "call",
            "burst",
            "again",
            "gone",
            "end",
            "scale",
            "rule",
            "image",
            "pod",
            "delete",
            "kill",
            "crash",
            "freeze",
            "sky",
        ),
        (24, 6, 8, 4, 4, 14, 6, 6, 10, 3, 6, 8, 4, 10),
    )[0]:
        case "call":
            world.start_session(f"s{number}", keyed=chance.random() < 0.6, stays=chance.random() < 0.2)
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
                world.change_pool(maxPods=chance.randrange(2, MOST_PODS + 1))
        case "rule":
            rule = chance.choice(_rules(sized))
            world.change_pool(**{rule: _drawn(world, rule)})
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
    kind = chance.random()
    pods = world.server.all(PODS)
    if kind < 0.25 and pods:
        world.evictions.evict(chance.choice(pods))
    elif kind < 0.4:
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
    call: int, fate: Fate, change: Callable[[World], None], **spec: Any
) -> Callable[[World], Coroutine[Any, Any, None]]:
    """A full pool is changed, and the operator dies at its ``call``-th call after that."""

    async def story(world: World) -> None:
        world.invariants.overshoot_bound = 0
        world.create_pool(**_spec("Queue", 3, 8, 600), **spec)
        world.start("operator-a")
        world.start("gateway-a")
        await asyncio.sleep(20.0)
        world.crash_at["operator-a"] = (call, fate)
        world.start_session("running", keyed=True)
        change(world)
        await asyncio.sleep(40.0)
        world.start_session("later", keyed=True)
        await asyncio.sleep(40.0)
        world.unplayed = "operator-a" in world.crash_at
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
        world.unplayed = "gateway-a" in world.crash_at
        await world.settle(settling_seconds=900.0, quiet_seconds=900.0)

    return story


def missed_event(process: str, number: int, fate: EventFate) -> Callable[[World], Coroutine[Any, Any, None]]:
    """Much happens to a pool, and a process misses the ``number``-th watch event of it."""

    async def story(world: World) -> None:
        # Until its copy is listed anew an operator may count what is there once less, and what is gone once more.
        world.invariants.overshoot_bound = MOST_REPLICAS
        spec = _spec("Queue", 2, 8, 86_400)
        world.create_pool(**spec)
        for name in ("operator-a", "gateway-a"):
            world.start(name)
        world.event_at[process] = (number, fate)
        await asyncio.sleep(10.0)
        world.start_session("one", keyed=True, stays=True)
        await asyncio.sleep(5.0)
        world.change_pool(replicas=3)
        await asyncio.sleep(5.0)
        world.new_image(2)
        await asyncio.sleep(15.0)
        for agent in world.cluster.agents.values():
            if agent.session == "one":
                world.cluster.finish(agent, "the caller left")
        world.start_session("two", keyed=True, stays=True)
        await asyncio.sleep(5.0)
        world.change_pool(replicas=1)
        await asyncio.sleep(5.0)
        world.delete_pool()
        await asyncio.sleep(20.0)
        world.create_pool(**spec)
        await asyncio.sleep(20.0)
        world.unplayed = world.event_at.pop(process, None) is not None
        # What was dropped the next periodic list shows.
        await world.settle(settling_seconds=2400.0 if fate is EventFate.DROPPED else 120.0, quiet_seconds=300.0)

    return story


def old_lists(process: str, revisions: int) -> Callable[[World], Coroutine[Any, Any, None]]:
    """A process starts again after much has happened, and its first lists are so many revisions old."""

    async def story(world: World) -> None:
        world.invariants.overshoot_bound = 0
        world.create_pool(**_spec("Queue", 2, 8, 86_400))
        for name in ("operator-a", "gateway-a"):
            world.start(name)
        await asyncio.sleep(15.0)
        world.start_session("one", keyed=True, stays=True)
        await asyncio.sleep(5.0)
        world.change_pool(replicas=3)
        await asyncio.sleep(5.0)
        world.old_lists[process] = revisions
        world.kill(process, restart_seconds=0.1)
        world.change_pool(replicas=1)
        await asyncio.sleep(2.0)
        del world.old_lists[process]
        await asyncio.sleep(20.0)
        if world.callers["one"].outcomes != ["started"]:
            world.wrong(f"the caller is told {world.callers['one'].outcomes}")
        world.unplayed = revisions > world.server.revision
        await world.settle(settling_seconds=120.0, quiet_seconds=300.0)

    return story
