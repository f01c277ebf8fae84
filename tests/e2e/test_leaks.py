"""Many calls leave nothing behind: rooms, pods, and what the processes of gateway and operator hold on to.

An agent carries one session in its life, so nothing of a session can stay in an agent. VOICEPOOL_LEAK_CALLS calls are
made one after the other, and then as many ten at a time.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time

import pytest
from livekit import api
from tests.conftest import Show
from tests.e2e.conversation import story_of
from tests.e2e.deployment import Deployment, Json, livekit_secret, livekit_url, secret_values
from tests.e2e.footprint import Footprint, footprint, growth_per_step
from tests.e2e.pools import MakePool, is_ready, light, processes_in, processes_of, until

pytestmark = pytest.mark.cluster

CALLS = int(os.environ.get("VOICEPOOL_LEAK_CALLS", "10"))
AT_ONCE = 10
COMPONENTS = ("gateway", "operator")
FIRST_CALLS = 5
"""What a process needs the first time (code, connections, caches of the allocator) is no leak."""

ROOMS_SECONDS = 90.0
"""A room of LiveKit lives on for 20 s after the last one has left."""

MEMORY_BYTES_PER_CALL = 64 * 1024
"""More than the allocator's noise in a hundred calls, and less than a pod's record with its session."""

GARBAGE_BYTES = 15e6
"""Of each process: both look for garbage after 50,000 new objects only (main.py), which comes to 11 MiB in an operator; until then it counts as held."""

CALLER = """
import asyncio, os, sys
from tests.e2e.caller import Caller

async def main():
    async with Caller(sys.argv[1], sys.argv[2]) as caller:
        try:
            await caller.hear(timeout_seconds=60)
            print("heard", flush=True)
        except TimeoutError:
            print("heard nothing:", caller.timeline, flush=True)
    os._exit(0)

asyncio.run(main())
"""
"""Leaves as the tests do: see `pytest_unconfigure` in conftest.py."""


@pytest.fixture
async def rooms(deployment: Deployment) -> Rooms:
    key = secret_values(deployment.cluster, "livekit-server", "livekit")["api-key"]
    return Rooms(livekit_url(deployment.cluster), key, livekit_secret(deployment.cluster))


class Rooms:
    """The rooms of the LiveKit server."""

    def __init__(self, url: str, key: str, secret: str) -> None:
        self._server = (url, key, secret)

    async def names(self) -> set[str]:
        async with api.LiveKitAPI(*self._server) as server:
            return {room.name for room in (await server.room.list_rooms(api.ListRoomsRequest())).rooms}


def held(deployment: Deployment) -> dict[str, Footprint]:
    """By component."""
    return {name: footprint(sorted(processes_of(deployment, name))) for name in COMPONENTS}


async def one_call(deployment: Deployment, pool: str) -> str:
    """A call from its beginning to its end, with a caller who has a process of his own as in life; its session."""
    session = await deployment.start(pool, timeout_seconds=130)
    assert session.status == 200, session
    caller = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", CALLER, session.url, session.token), stdout=asyncio.subprocess.PIPE
    )
    heard, _ = await caller.communicate()
    assert heard == b"heard\n", f"{heard.decode()}\n{session}\n{await story_of(deployment, session.session_id)}"
    return session.session_id


async def test_many_calls_leave_nothing_behind(
    deployment: Deployment, make_pool: MakePool, rooms: Rooms, show: Show
) -> None:
    replicas = 3
    session = {"retentionSeconds": 0}
    pool = await make_pool(
        "leaks", light(), replicas=replicas, maxPods=30, session=session, onEmpty={"timeoutSeconds": 120}
    )
    uids: set[str] = set()

    def settled() -> list[Json] | None:
        pods = deployment.pods_of(pool)
        uids.update(pod["metadata"]["uid"] for pod in pods)
        return pods if len(pods) == replicas and all(map(is_ready, pods)) else None

    for _ in range(FIRST_CALLS):
        await one_call(deployment, pool)
    await asyncio.gather(*(one_call(deployment, pool) for _ in range(AT_ONCE)))
    await until("the first calls to be gone", settled, deadline_seconds=180)
    before = await asyncio.to_thread(held, deployment)
    curves: dict[str, list[float]] = {name: [] for name in COMPONENTS}

    sessions: set[str] = set()

    async def sample() -> None:
        for name, one in (await asyncio.to_thread(held, deployment)).items():
            curves[name].append(one.resident_bytes)
        show(
            f"{len(sessions)} calls: " + "; ".join(f"{name} {curve[-1] / 1e6:.1f} MB" for name, curve in curves.items())
        )

    began = time.monotonic()
    for _ in range(CALLS):
        sessions.add(await one_call(deployment, pool))
        await sample()
    for _ in range(CALLS // AT_ONCE):
        sessions.update(await asyncio.gather(*(one_call(deployment, pool) for _ in range(AT_ONCE))))
        await sample()
    took = time.monotonic() - began
    assert len(sessions) == CALLS + CALLS // AT_ONCE * AT_ONCE
    await until("the last calls to be gone", settled, deadline_seconds=180)

    async with asyncio.timeout(ROOMS_SECONDS):
        while left := await rooms.names():  # noqa: ASYNC110 - LiveKit has no event for it
            await asyncio.sleep(1)
    after = await asyncio.to_thread(held, deployment)
    show(f"{len(sessions)} calls in {took:.0f} s; rooms left: {len(left)}")
    for name in COMPONENTS:
        slope = growth_per_step(curves[name])
        show(f"{name}: before {before[name]}; after {after[name]}; {slope / 1024:.1f} KiB more with each sample")

    pods = {pod["metadata"]["uid"] for pod in await asyncio.to_thread(deployment.pods_of, pool)}
    assert not await asyncio.to_thread(processes_in, sorted(uids - pods)), "agents that are gone have left processes"
    for name in COMPONENTS:
        assert after[name].processes == before[name].processes
        assert after[name].threads <= before[name].threads
        assert after[name].files <= before[name].files
        grown = after[name].resident_bytes - before[name].resident_bytes
        assert grown <= MEMORY_BYTES_PER_CALL * len(sessions) + GARBAGE_BYTES * after[name].processes

    def sockets_closed() -> bool:
        now = held(deployment)
        return all(now[name].sockets <= before[name].sockets for name in COMPONENTS)

    await until("idle connections to be closed", sockets_closed, deadline_seconds=120)
