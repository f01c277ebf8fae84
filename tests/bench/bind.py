"""What a bind costs through the gateway, beside one bare JSON patch of a pod by the same client.

In turns: the floor, the bind's own patch by the bare client, `Sessions.start` in this process, and `POST /start` to a gateway's process.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import aiohttp

from tests.bench.figures import Figure, of_quantile, over_rounds, quantile, ratio_of_quantiles, ratio_over_rounds
from tests.bench.gateway import gateway
from tests.bench.processes import Child
from tests.bench.report import Row, number
from tests.bench.world import World, load_average, until
from tests.ports import free_port
from tests.unit.gateways import AUTHORIZED
from voicepool.binding import active_deadline_seconds, bind_patch
from voicepool.gateway.requests import StartRequest
from voicepool.gateway.services import Services
from voicepool.kube.api import PODS
from voicepool.model import LABEL_SESSION, LABEL_STATE, PodFact, PoolFact

WARM = 300
"""Warm pods of each pool, filled up before each block and each burst."""
BLOCKS = 4
ROUNDS_IN_BLOCK = 75
BURSTS = 3
NAME = "bind"
POOL = "demo"
LABELS = {
    "floor": "a bare patch of two operations",
    "patch": "the bind's own patch, bare",
    "sessions": "gateway, `Sessions.start`",
    "http": "gateway, `POST /start`",
    "nothing": "gateway, a request that does nothing",
}
TAKE_NONE = ("floor", "nothing")
"""Kinds that use up no pods."""
BURST_KINDS = ("floor", "sessions", "http")


@dataclass(frozen=True, slots=True)
class _Kind:
    """One way to patch a pod."""

    pool: PoolFact
    do: Callable[[], Awaitable[str]]
    """One patch; returns the name of the pod that was taken."""
    ready: Callable[[], Awaitable[bool]]
    """Whether all of the warm pods can be taken."""


class _Stock:
    """The pods of one pool: tops it up, and hands out those that are bound without a gateway."""

    def __init__(self, world: World, pool: PoolFact) -> None:
        self._world = world
        self._pool = pool
        self._made = 0
        self.free: list[PodFact] = []

    async def fill(self, taken: int) -> None:
        """Make as many new warm pods as were taken since."""
        numbers = range(self._made, self._made + taken)
        self._made += taken
        self.free += await self._world.warm_pods(self._pool, numbers)


async def measure(world: World) -> list[Row]:
    """Run it; takes about a minute and a half."""
    load = load_average()
    async with _kinds(world) as (kinds, stocks):
        serial = await _one_at_a_time(world, kinds, stocks)
        bursts, failures, doubles = await _bursts(world, kinds, stocks)
    rows = [*_serial_rows(serial, load), *_burst_rows(bursts, load)]
    return [
        *rows,
        Row(NAME, "simultaneous: failures", over_rounds([failures]), "", goal=0, load=load),
        Row(NAME, "simultaneous: pods with two sessions", over_rounds([doubles]), "", goal=0, load=load),
    ]


async def _one_at_a_time(world: World, kinds: dict[str, _Kind], stocks: dict[str, _Stock]) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    taken = dict.fromkeys(kinds, WARM)
    with world.progress.step("binding one at a time", 40):
        for _ in range(BLOCKS):
            await _top_up(kinds, stocks, taken)
            for name in kinds:
                # The first ones open connections.
                for _ in range(3):
                    await kinds[name].do()
            for order in _in_turns(list(kinds), ROUNDS_IN_BLOCK):
                for name in order:
                    began = time.perf_counter()
                    await kinds[name].do()
                    seconds[name].append(time.perf_counter() - began)
            taken = dict.fromkeys(kinds, ROUNDS_IN_BLOCK + 3)
        await _top_up(kinds, stocks, taken)
    return seconds


async def _bursts(
    world: World, kinds: dict[str, _Kind], stocks: dict[str, _Stock]
) -> tuple[dict[str, list[float]], int, int]:
    """Seconds of each burst, how many starts failed, and how many pods were given to two sessions."""
    seconds: dict[str, list[float]] = {name: [] for name in BURST_KINDS}
    failures = doubles = 0
    with world.progress.step(f"binding {WARM} at once", 40):
        for number_of_burst, order in enumerate(_in_turns(list(BURST_KINDS), BURSTS)):
            if number_of_burst:
                await _top_up(kinds, stocks, dict.fromkeys(BURST_KINDS, WARM))
            for name in order:
                began = time.perf_counter()
                pods = await asyncio.gather(*(kinds[name].do() for _ in range(WARM)), return_exceptions=True)
                seconds[name].append(time.perf_counter() - began)
                names = [pod for pod in pods if isinstance(pod, str)]
                failures += WARM - len(names)
                if name != "floor":
                    doubles += len(names) - len(set(names))
        for name in ("sessions", "http"):
            doubles += await _sessions_with_two_pods(world, kinds[name].pool)
    return seconds, failures, doubles


async def _sessions_with_two_pods(world: World, pool: PoolFact) -> int:
    page = await world.api.list_page(PODS, pool.namespace, label_selector=f"{LABEL_STATE}=bound", limit=0)
    sessions = [pod["metadata"]["labels"][LABEL_SESSION] for pod in page["items"]]
    return len(sessions) - len(set(sessions))


async def _top_up(kinds: dict[str, _Kind], stocks: dict[str, _Stock], taken: dict[str, int]) -> None:
    for name, count in taken.items():
        # The floor's pods can be patched again and again.
        if name not in TAKE_NONE or not stocks[name].free:
            await stocks[name].fill(count)
    for name in taken:
        await until(kinds[name].ready)


def _in_turns(names: list[str], rounds: int) -> Iterator[list[str]]:
    """Each round begins with another one, so that none always follows the same."""
    for number_of_round in range(rounds):
        at = number_of_round % len(names)
        yield names[at:] + names[:at]


@contextlib.asynccontextmanager
async def _kinds(world: World) -> AsyncIterator[tuple[dict[str, _Kind], dict[str, _Stock]]]:
    pools = {}
    for name in LABELS:
        namespace = await world.namespace(f"bind-{name}")
        pools[name] = await world.pool(namespace, POOL, replicas=WARM, maxPods=10_000)
    stocks = {name: _Stock(world, pool) for name, pool in pools.items()}
    agent_port = free_port()
    async with (
        Child(("-m", "tests.bench.parked_agents", str(agent_port)), world.folder / "agents.log"),
        world.gateway(pools["http"].namespace, agent_port) as child,
        gateway(world.cluster.kubeconfig, world.folder, pools["sessions"].namespace, agent_port) as services,
        aiohttp.ClientSession(child.url, connector=aiohttp.TCPConnector(limit=0), headers=AUTHORIZED) as caller,
    ):
        yield (
            {
                "floor": _floor(world, stocks["floor"], pools["floor"]),
                "patch": _patch(world, stocks["patch"], pools["patch"]),
                "sessions": _sessions(services, pools["sessions"]),
                "http": _http(caller, pools["http"]),
                "nothing": _nothing(caller, pools["nothing"]),
            },
            stocks,
        )


async def _always() -> bool:
    return True


def _floor(world: World, stock: _Stock, pool: PoolFact) -> _Kind:
    turn = 0

    async def do() -> str:
        nonlocal turn
        pod = stock.free[turn % len(stock.free)]
        turn += 1
        await world.touch(pod.namespace, pod.name, pod.uid, turn)
        return pod.name

    return _Kind(pool, do, _always)


def _patch(world: World, stock: _Stock, pool: PoolFact) -> _Kind:
    async def do() -> str:
        pod = stock.free.pop()
        now = datetime.now(UTC)
        session_id = str(uuid.uuid4())
        operations = bind_patch(
            pod,
            session_id=session_id,
            room=f"{pool.namespace}-{pool.name}-{session_id}",
            bound_at=now,
            bound_by="bench",
            active_deadline_seconds=active_deadline_seconds(pod, pool.spec.session.max_duration_seconds, now),
        )
        await world.api.json_patch(PODS, pod.namespace, pod.name, operations)
        return pod.name

    return _Kind(pool, do, _always)


def _sessions(services: Services, pool: PoolFact) -> _Kind:
    async def do() -> str:
        request = StartRequest(pool.namespace, pool.name, session_id=str(uuid.uuid4()), keyed=False, body={"a": 1})
        return (await services.sessions.start(request)).pod.name

    async def ready() -> bool:
        return len(services.view.warm((pool.namespace, pool.name))) == WARM

    return _Kind(pool, do, ready)


def _http(caller: aiohttp.ClientSession, pool: PoolFact) -> _Kind:
    async def do() -> str:
        async with caller.post("/start", json={"transport": "livekit", "body": {"a": 1}}) as answer:
            answer.raise_for_status()
            return str((await answer.json())["agent"]["pod"])

    async def ready() -> bool:
        async with caller.get("/api/health") as answer:
            return bool((await answer.json())["sessions"]["pool"] == WARM)

    return _Kind(pool, do, ready)


def _nothing(caller: aiohttp.ClientSession, pool: PoolFact) -> _Kind:
    """What HTTP alone costs: the way to the gateway's process and back."""

    async def do() -> str:
        async with caller.get("/readyz") as answer:
            return await answer.text()

    return _Kind(pool, do, _always)


def _serial_rows(seconds: dict[str, list[float]], load: float) -> list[Row]:
    floor = seconds["floor"]
    rows = [
        _milliseconds(f"one at a time, {LABELS[name]}: p50", of_quantile(seconds[name], 0.5), load)
        for name in TAKE_NONE
    ]
    for name, goals in (("patch", (None, None)), ("sessions", (1.3, 2.0)), ("http", (1.3, 2.0))):
        for share, goal in zip((0.5, 0.99), goals, strict=True):
            words = f"one at a time, {LABELS[name]}: p{share * 100:.0f}"
            beside = _beside(quantile(seconds[name], share) * 1000, quantile(floor, share) * 1000, "ms")
            figure = ratio_of_quantiles(seconds[name], floor, share)
            rows.append(Row(NAME, words, figure, "x", goal, beside, load))
    return rows


def _burst_rows(seconds: dict[str, list[float]], load: float) -> list[Row]:
    floor = seconds["floor"]
    rows = [_milliseconds(f"{WARM} simultaneous, {LABELS['floor']}", over_rounds(floor), load)]
    for name in ("sessions", "http"):
        beside = _beside(_median(seconds[name]) * 1000, _median(floor) * 1000, "ms")
        words = f"{WARM} simultaneous, {LABELS[name]}: until the last is done"
        rows.append(Row(NAME, words, ratio_over_rounds(seconds[name], floor), "x", 1.5, beside, load))
    return rows


def _milliseconds(what: str, figure: Figure, load: float) -> Row:
    scaled = Figure(figure.value * 1000, figure.low * 1000, figure.high * 1000, figure.samples)
    return Row(NAME, what, scaled, "ms", load=load)


def _beside(mine: float, floor: float, unit: str) -> str:
    return f"{number(mine)} {unit}, floor {number(floor)} {unit}"


def _median(values: Sequence[float]) -> float:
    return quantile(values, 0.5)
