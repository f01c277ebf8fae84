"""How the operator's process grows with the number of pods: time to sync, memory, CPU for each pod event.

The pods are real objects of a real API server, made in bulk without a kubelet and Ready. The floor for the CPU is a bare stream of the same events to the
same client, which throws the bytes away: a TLS record and a wake-up each. What is ours beside that, reading an event and taking it into the copy, is also
measured alone.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from tests.bench.figures import Figure, over_rounds, per_event
from tests.bench.processes import Child
from tests.bench.report import Row, number
from tests.bench.world import World, in_parallel, load_average, ready_status
from voicepool.copies import pod_informer
from voicepool.kube.api import PODS
from voicepool.kube.client import event_reader
from voicepool.kube.convert import AGENT_PODS
from voicepool.model import PodFact

NAME = "operator-size"
SIZES = (0, 100, 1_000, 10_000)
PODS_IN_POOL = 500
PATIENT = {"deadlineSeconds": 3600}
"""Pods that are made not Ready stay so for a while; that must not count as a failure of theirs."""
STARTS = 3
EVENTS = 1_000
EVENT_ROUNDS = 2
TOGETHER = 50
"""Events that wait in the stream when a process goes on; with many more the API server would break the watch off."""
CATCH_UP_SECONDS = 0.3
QUIET_SECONDS = 2.0
SETTLE_SECONDS = 5.0
"""Until the copy beside the operator has listed all pods."""
GOAL_SYNC_SECONDS = 2.0
GOAL_MEMORY_MEBIBYTES = 120.0
GOAL_EVENT_MICROSECONDS = 40.0
ALONE_ROUNDS = 300


Touch = Callable[[tuple[int, PodFact]], Awaitable[None]]
"""Makes an event of a pod."""


@dataclass(slots=True)
class _Seen:
    """What was measured at one size."""

    starts: list[float] = field(default_factory=list)
    syncs: list[float] = field(default_factory=list)
    memory: list[float] = field(default_factory=list)
    peaks: list[float] = field(default_factory=list)
    idle: list[float] = field(default_factory=list)
    events: dict[str, list[float]] = field(default_factory=dict)
    floors: dict[str, list[float]] = field(default_factory=dict)
    copies: dict[str, list[float]] = field(default_factory=dict)


async def measure(world: World) -> list[Row]:
    """Run it; takes about ten minutes, most of it for the storms."""
    load = load_average()
    namespace = await world.namespace("size")
    pods: list[PodFact] = []
    rows: list[Row] = []
    for size in SIZES:
        await _grow(world, namespace, pods, size)
        with world.progress.step(f"an operator with {size:,} pods", 150 if size else 10):
            rows += _rows(size, await _look(world, namespace, pods), load)
    rows.append(await _alone(world, namespace, load))
    return rows


async def _grow(world: World, namespace: str, pods: list[PodFact], size: int) -> None:
    if size > len(pods):
        with world.progress.step(f"making {size:,} pods", (size - len(pods)) / 250):
            while size > len(pods):
                count = min(PODS_IN_POOL, size - len(pods))
                name = f"pool-{len(pods)}"
                pool = await world.pool(namespace, name, replicas=count, maxPods=count, startup=PATIENT)
                pods += await world.warm_pods(pool, range(count), address="10.1.2.3")


async def _look(world: World, namespace: str, pods: list[PodFact]) -> _Seen:
    seen = _Seen()
    for turn in range(STARTS):
        async with world.operator(namespace) as operator:
            listening = await operator.answers("/readyz", 200, 503)
            ready = await operator.answers("/readyz", 200)
            seen.starts.append(ready - operator.started_at)
            seen.syncs.append(ready - listening)
            await asyncio.sleep(QUIET_SECONDS)
            seen.memory.append(operator.memory_mebibytes())
            if pods and turn == STARTS - 1:
                await _storms(world, namespace, pods, operator, seen)
            seen.peaks.append(operator.peak_memory_mebibytes())
    return seen


async def _storms(world: World, namespace: str, pods: list[PodFact], operator: Child, seen: _Seen) -> None:
    environment = {"VOICEPOOL_KUBECONFIG": str(world.cluster.kubeconfig)}
    arguments = ("-m", "tests.bench.bare_watch", namespace)
    async with (
        Child(arguments, world.folder / "watch.log", environment=environment) as watch,
        Child((*arguments, "copy"), world.folder / "copy.log", environment=environment) as copy,
    ):
        children = {"operator": operator, "watch": watch, "copy": copy}
        costs = {"operator": seen.events, "watch": seen.floors, "copy": seen.copies}
        await asyncio.sleep(SETTLE_SECONDS)
        idle = {name: child.cpu_seconds() for name, child in children.items()}
        await asyncio.sleep(QUIET_SECONDS)
        shares = {name: (child.cpu_seconds() - idle[name]) / QUIET_SECONDS for name, child in children.items()}
        seen.idle.append(shares["operator"])
        for turn, (what, touch) in itertools.product(range(EVENT_ROUNDS), _touches(world).items()):
            chosen = [pods[number % len(pods)] for number in range(turn, turn + EVENTS)]
            for how, storm in (("", _one_by_one), (f", {TOGETHER} at once", _together)):
                before = {name: child.cpu_seconds() for name, child in children.items()}
                began = time.perf_counter()
                await storm(touch, chosen, list(children.values()))
                wall_seconds = time.perf_counter() - began
                for name, child in children.items():
                    cost = per_event(child.cpu_seconds() - before[name], shares[name], wall_seconds, EVENTS)
                    costs[name].setdefault(what + how, []).append(cost * 1e6)


async def _one_by_one(touch: Touch, chosen: Sequence[PodFact], _children: Sequence[Child]) -> None:
    """As fast as the API server takes them, which is slower than any of us reads them."""
    await in_parallel(touch, enumerate(chosen))
    await asyncio.sleep(QUIET_SECONDS)


async def _together(touch: Touch, chosen: Sequence[PodFact], children: Sequence[Child]) -> None:
    """As on an API server with many cores: the processes stand still while some events are made, and then go on, one after the other."""
    for start in range(0, len(chosen), TOGETHER):
        for child in children:
            child.freeze()
        try:
            await in_parallel(touch, enumerate(chosen[start : start + TOGETHER], start))
        finally:
            for child in children:
                child.go_on()
                await asyncio.sleep(CATCH_UP_SECONDS)


async def _alone(world: World, namespace: str, load: float) -> Row:
    """An event's way from its bytes into the copy of the pods, without the stream that brings it. The shortest of many rounds, as others use the machine."""
    page = await world.api.list_page(PODS, namespace, limit=PODS_IN_POOL)
    pods = pod_informer(world.api, namespace)
    read = event_reader(AGENT_PODS)
    versions = itertools.count(int(page["metadata"]["resourceVersion"]) + 1)
    seconds = math.inf
    for _ in range(ALONE_ROUNDS):
        for pod in page["items"]:
            pod["metadata"]["resourceVersion"] = str(next(versions))
        lines = [json.dumps({"type": "MODIFIED", "object": pod}).encode() for pod in page["items"]]
        began = time.perf_counter()
        for line in lines:
            pods.apply(read(line).object)
        seconds = min(seconds, (time.perf_counter() - began) / len(lines))
    what = "an event, from its bytes into the copy of the pods"
    return Row(NAME, what, over_rounds([seconds * 1e6]), "us", GOAL_EVENT_MICROSECONDS, load=load)


def _touches(world: World) -> dict[str, Touch]:
    """Two kinds of event."""
    turns = itertools.count()

    async def say_nothing_new(item: tuple[int, PodFact]) -> None:
        _, pod = item
        change = {"metadata": {"annotations": {"example.org/turn": str(next(turns))}}}
        await world.api.merge_patch(PODS, pod.namespace, pod.name, change)

    async def flip_ready(item: tuple[int, PodFact]) -> None:
        _, pod = item
        turn = next(turns)
        status = ready_status("10.1.2.3")
        status["containerStatuses"][0]["ready"] = bool(turn % 2)
        status["conditions"][2]["status"] = str(bool(turn % 2))
        await world.api.merge_patch(PODS, pod.namespace, pod.name, {"status": status}, subresource="status")

    return {"that changes nothing for it": say_nothing_new, "of a pod's readiness": flip_ready}


def _rows(size: int, seen: _Seen, load: float) -> list[Row]:
    at = f"{size:,} pods"
    largest = size == max(SIZES)

    def row(what: str, figure: Figure, unit: str, goal: float | None = None, beside: str = "") -> Row:
        return Row(NAME, f"{at}: {what}", figure, unit, goal if largest else None, beside, load)

    rows = [
        row("process start to ready", over_rounds(seen.starts), "s"),
        row("of it: to sync", over_rounds(seen.syncs), "s", GOAL_SYNC_SECONDS),
        row("memory", over_rounds(seen.memory), "MiB", GOAL_MEMORY_MEBIBYTES),
        row("memory at most", over_rounds(seen.peaks), "MiB"),
    ]
    for what, values in seen.events.items():
        floor, copy = over_rounds(seen.floors[what]), over_rounds(seen.copies[what])
        beside = f"a bare watch {number(floor.value)} us, into a copy {number(copy.value)} us"
        rows.append(row(f"CPU for an event {what}", over_rounds(values), "us", GOAL_EVENT_MICROSECONDS, beside))
    if seen.idle:
        rows.append(row("CPU when nothing happens", over_rounds([share * 1000 for share in seen.idle]), "ms/s"))
    return rows
