"""What each warmth costs while an agent waits, and what it gains its caller. In turns, with no cluster: real agents, a real LiveKit server.

The caller is in the room before the bind, so that all time after it is the agent's. Providers are doubles: with no latency of their own, and with
that of another continent. The floor is a bare join of the same server by the same SDK: connect, and publish a track.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp

from tests.bench import agent_timeline
from tests.bench.figures import over_rounds
from tests.bench.processes import cpu_seconds
from tests.bench.report import Row
from tests.bench.world import load_average
from tests.cluster.native.build import programs
from tests.cluster.progress import Progress
from tests.e2e.agent_process import BOTS, AgentProcess, run_agent
from tests.e2e.caller import Caller
from tests.e2e.livekit_server import LiveKit, run_livekit
from tests.e2e.providers import Providers

NAME = "agent"
ROUNDS = 9
ROUNDS_OF_MODELS = 3
"""The keyless bot takes several seconds to build; what it shows is large."""

WARMTHS = ("Imported", "Built", "Started")
POLL_SECONDS = 0.005
LATENCY_SECONDS = 0.4
"""Before a provider accepts a connection: TCP, TLS and the WebSocket's handshake are four round trips, of 0.1 s across an ocean."""

READY_GOAL_SECONDS = 1.2
MEMORY_GOAL_MEGABYTES = 165.0
HEARD_GOAL_SECONDS = 0.5

STEPS = {
    "accepted": "accepted",
    "room": "in the room",
    agent_timeline.STARTED: "pipeline started",
    "text": "the speech synthesis has the text",
    "audio": "it has answered with audio",
    "speaking": "audio goes to the room",
    "heard": "the caller hears it",
}
"""From the bind on, in the order in which they happen."""
OUTLINE = ("room", "heard")


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of agent."""

    label: str
    bot: Path
    rounds: int
    latency_seconds: float = 0.0
    is_reference: bool = False
    """It has goals, and each of its steps is shown."""


KINDS = (
    Kind("reference bot", BOTS / "reference" / "bot.py", ROUNDS, is_reference=True),
    Kind(
        f"reference bot, providers {LATENCY_SECONDS:g} s away", BOTS / "reference" / "bot.py", ROUNDS, LATENCY_SECONDS
    ),
    Kind("keyless bot", BOTS / "keyless" / "bot.py", ROUNDS_OF_MODELS),
)


@dataclass(slots=True)
class Life:
    """One agent's life, in seconds."""

    ready: float
    processor: float
    """Of the processors, all threads, until it was Ready."""
    parked_megabytes: float
    steps: dict[str, float] = field(default_factory=dict)
    """Since the bind was sent."""


async def measure(folder: Path, progress: Progress) -> list[Row]:
    """Run it; takes about five minutes."""
    load = load_average()
    server = programs(progress).livekit_server
    joins: list[float] = []
    rows: list[Row] = []
    async with run_livekit(server, folder) as livekit:
        for kind in KINDS:
            lives: dict[str, list[Life]] = {warmth: [] for warmth in WARMTHS}
            with progress.step(f"{kind.rounds} lives of an agent at each warmth: {kind.label}", 24 * kind.rounds):
                for turn in range(kind.rounds):
                    at = turn % len(WARMTHS)
                    for warmth in WARMTHS[at:] + WARMTHS[:at]:
                        where = folder / f"{len(rows)}-{warmth}-{turn}"
                        where.mkdir()
                        life, join = await _live(livekit, where, kind, warmth)
                        lives[warmth].append(life)
                        joins.append(join)
            for warmth in WARMTHS:
                rows += _rows(kind, warmth, lives[warmth], load)
    floor = over_rounds([seconds * 1000 for seconds in joins])
    return [Row(NAME, "a bare join: connect, publish a track", floor, "ms", load=load), *rows]


async def _live(livekit: LiveKit, folder: Path, kind: Kind, warmth: str) -> tuple[Life, float]:
    """One agent from its start to the first word that its caller hears; and how long the caller's own join took."""
    timeline = folder / "timeline"
    async with Providers(latency_seconds=kind.latency_seconds) as providers:
        environment = {
            **providers.environment,
            "VOICEPOOL_WARMTH": warmth,
            "PIPECAT_SETUP_FILES": agent_timeline.__file__,
            agent_timeline.VARIABLE: str(timeline),
        }
        began = time.monotonic()
        async with run_agent(kind.bot, folder, environment) as agent:
            await _ready(agent)
            ready = time.monotonic() - began
            life = Life(ready, cpu_seconds(agent.process.pid), agent.resident_bytes / 1e6)
            async with _caller(livekit) as (caller, join):
                token = livekit.token("agent", "room", agent=True)
                bound = time.monotonic()
                status, answer = await agent.bind(session="s-1", room="room", url=livekit.url, token=token)
                if status != 202:
                    raise RuntimeError(f"the agent refused its session: {answer}")
                life.steps["accepted"] = time.monotonic() - bound
                life.steps["heard"] = await caller.first_audio() - bound
                await agent.end("s-1", "cancel")
                await agent.exit_code()
    for line in timeline.read_text().splitlines():
        word, moment = json.loads(line)
        life.steps[word] = moment - bound
    return life, join


async def _ready(agent: AgentProcess) -> None:
    while agent.process.returncode is None:
        with contextlib.suppress(aiohttp.ClientError):
            if (await agent.get("/readyz"))[0] == 200:
                return
        await asyncio.sleep(POLL_SECONDS)
    raise RuntimeError(f"the agent did not get ready; its log:\n{agent.log}")


@contextlib.asynccontextmanager
async def _caller(livekit: LiveKit) -> AsyncIterator[tuple[Caller, float]]:
    began = time.monotonic()
    async with Caller(livekit.url, livekit.token("caller", "room")) as caller:
        yield caller, time.monotonic() - began


def _rows(kind: Kind, warmth: str, lives: Sequence[Life], load: float) -> list[Row]:
    def row(what: str, values: list[float], unit: str, goal: float | None = None) -> Row:
        reach = goal if kind.is_reference else None
        return Row(NAME, f"{kind.label}, {warmth}: {what}", over_rounds(values), unit, reach, load=load)

    return [
        row("process start to Ready", [life.ready for life in lives], "s", READY_GOAL_SECONDS),
        row("processor time until then", [life.processor for life in lives], "s"),
        row("memory parked", [life.parked_megabytes for life in lives], "MB", MEMORY_GOAL_MEGABYTES),
        *(
            row(
                f"bind to: {STEPS[step]}",
                [life.steps[step] * 1000 for life in lives],
                "ms",
                HEARD_GOAL_SECONDS * 1000 if step == "heard" else None,
            )
            for step in (STEPS if kind.is_reference else OUTLINE)
        ),
    ]
