"""How many starts a second gateways bear over HTTP, beside bare patches of the same API server, and whose processor time that is.

Callers ask again as soon as they have been answered, until most of the warm pods are taken. API server, etcd, gateways, the agents' double and the
callers share this machine.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass

import aiohttp

from tests.bench.figures import Figure
from tests.bench.processes import Child, cpu_seconds
from tests.bench.report import Row, number
from tests.bench.world import World, load_average, until
from tests.ports import free_port
from tests.unit.gateways import AUTHORIZED
from voicepool.kube.api import PODS
from voicepool.model import PoolFact

NAME = "rate"
STARTS = 1_500
SPARE = 100
"""Warm pods that nobody takes: the last ones would be fought for."""
CALLERS = 48


@dataclass(frozen=True, slots=True)
class _Rate:
    per_second: float
    cpu_milliseconds: Mapping[str, float]
    """Processor time for each, by process."""

    @property
    def words(self) -> str:
        return ", ".join(f"{name} {number(value)}" for name, value in self.cpu_milliseconds.items()) + " ms"


async def measure(world: World) -> list[Row]:
    """Run it; takes about a minute and a half."""
    load = load_average()
    floor = await _bare_patches(world)
    rates = {count: await _starts(world, count) for count in (1, 2)}
    return [
        _row("bare patches of two operations", floor, load),
        _row("`POST /start`, one gateway", rates[1], load),
        _row("`POST /start`, two gateways", rates[2], load),
    ]


def _row(what: str, rate: _Rate, load: float) -> Row:
    figure = Figure(rate.per_second, rate.per_second, rate.per_second, STARTS)
    return Row(NAME, f"{what}, {CALLERS} at a time", figure, "a second", beside=rate.words, load=load)


async def _pool(world: World, name: str) -> PoolFact:
    namespace = await world.namespace(name)
    pool = await world.pool(namespace, "demo", replicas=STARTS, maxPods=3 * STARTS)
    with world.progress.step(f"making {STARTS + SPARE:,} pods", STARTS / 200):
        await world.warm_pods(pool, range(STARTS + SPARE))
    return pool


async def _bare_patches(world: World) -> _Rate:
    pool = await _pool(world, "rate-floor")
    page = await world.api.list_page(PODS, pool.namespace, limit=0)
    pods = itertools.cycle([(pod["metadata"]["name"], pod["metadata"]["uid"]) for pod in page["items"]])
    turns = itertools.count()

    async def patch() -> None:
        name, uid = next(pods)
        await world.touch(pool.namespace, name, uid, next(turns))

    return await _rate(world, {}, patch)


async def _starts(world: World, count: int) -> _Rate:
    pool = await _pool(world, f"rate-{count}")
    async with contextlib.AsyncExitStack() as stack:
        agent_port = free_port()
        agents = Child(("-m", "tests.bench.parked_agents", str(agent_port)), world.folder / "agents.log")
        await stack.enter_async_context(agents)
        gateways = [await stack.enter_async_context(_gateway(world, pool, agent_port)) for _ in range(count)]
        http = await stack.enter_async_context(
            aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), headers=AUTHORIZED)
        )
        addresses = itertools.cycle([gateway.url for gateway in gateways])

        async def start() -> None:
            body = {"transport": "livekit", "body": {"a": 1}}
            async with http.post(f"{next(addresses)}/start", json=body) as answer:
                answer.raise_for_status()
                await answer.read()

        children = {"gateways": gateways, "agents' double": [agents]}
        return await _rate(world, children, start)


@contextlib.asynccontextmanager
async def _gateway(world: World, pool: PoolFact, agent_port: int) -> AsyncIterator[Child]:
    async with world.gateway(pool.namespace, agent_port) as child:

        async def all_warm() -> bool:
            async with aiohttp.ClientSession(headers=AUTHORIZED) as http, http.get(f"{child.url}/api/health") as answer:
                return bool((await answer.json())["sessions"]["pool"] == STARTS + SPARE)

        await until(all_warm)
        yield child


async def _rate(world: World, children: Mapping[str, list[Child]], do: Callable[[], Awaitable[None]]) -> _Rate:
    components = {name: world.cluster.component_pid(name) for name in ("kube-apiserver", "etcd")}

    def used() -> dict[str, float]:
        return {
            **{name: cpu_seconds(pid) for name, pid in components.items()},
            **{name: sum(child.cpu_seconds() for child in many) for name, many in children.items()},
            "callers": cpu_seconds(os.getpid()),
        }

    left = iter(range(STARTS))

    async def caller() -> None:
        for _ in left:
            await do()

    with world.progress.step(f"{STARTS:,} times", STARTS / 150):
        before, began = used(), time.perf_counter()
        await asyncio.gather(*(caller() for _ in range(CALLERS)))
        seconds, after = time.perf_counter() - began, used()
    return _Rate(STARTS / seconds, {name: 1000 * (after[name] - before[name]) / STARTS for name in before})
