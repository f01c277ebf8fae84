"""Who waits for a pod, and who has just stopped waiting."""

from __future__ import annotations

import asyncio
import dataclasses

from tests.unit.facts import warm

from voicepool.gateway.allocator import Allocator
from voicepool.gateway.view import ClusterView

KEY = ("calls", "demo")


async def test_a_pod_that_comes_in_the_moment_in_which_a_caller_gives_up_is_for_the_next() -> None:
    view = ClusterView()
    allocator = Allocator(view, monotonic=lambda: 0.0, identity="one")
    first = asyncio.create_task(allocator.wait([KEY], "session-1"))
    second = asyncio.create_task(allocator.wait([KEY], "session-2"))
    await asyncio.sleep(0)
    first.cancel()
    pod = dataclasses.replace(warm(0), agent_status_index=0)
    view.pod_seen(pod)
    assert await second == pod
    assert first.cancelled() or first.cancelling()


async def test_who_came_first_is_served_first_also_after_a_lost_race() -> None:
    view = ClusterView()
    allocator = Allocator(view, monotonic=lambda: 5.0, identity="one")
    late = asyncio.create_task(allocator.wait([KEY], "session-2"))
    await asyncio.sleep(0)
    early = asyncio.create_task(allocator.wait([KEY], "session-1", since=4.0))
    await asyncio.sleep(0)
    pods = [dataclasses.replace(warm(number), agent_status_index=0) for number in (0, 1)]
    view.pod_seen(pods[0])
    assert await early == pods[0]
    assert not late.done()
    view.pod_seen(pods[1])
    assert await late == pods[1]
