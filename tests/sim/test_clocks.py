"""A clock that is wrong does no harm, however wrong it is."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from voicepool.kube.api import PODS

from .mutants import MUTANTS
from .stories import play
from .world import World

MAX_DURATION_SECONDS = 600
WRONG = [-86_400.0, 86_400.0]


@pytest.mark.parametrize("wrong_seconds", WRONG)
def test_an_operator_with_a_wrong_clock_replaces_no_pod(wrong_seconds: float) -> None:
    assert not play(1, operator_with(wrong_seconds)).problems


def test_an_operator_that_goes_by_its_own_clock_is_found() -> None:
    with MUTANTS["clock"]():
        assert play(1, operator_with(3600.0)).problems


def operator_with(wrong_seconds: float) -> Callable[[World], Coroutine[Any, Any, None]]:
    async def story(world: World) -> None:
        world.create_pool(replicas=3, startup={"deadlineSeconds": 15})
        world.start("operator-a")
        world.processes["operator-a"].clock_offset_seconds = wrong_seconds
        for _ in range(60):
            await asyncio.sleep(10.0)
            if world.invariants.creates > 3:
                break
        problems = world.invariants.not_converged()
        if problems or world.invariants.creates != 3 or world.invariants.deletes:
            world.wrong(f"{world.invariants.creates} creates, {world.invariants.deletes} deletes, {problems}")

    return story


@pytest.mark.parametrize("wrong_seconds", WRONG)
def test_a_gateway_with_a_wrong_clock_gives_a_session_its_time(wrong_seconds: float) -> None:
    async def story(world: World) -> None:
        world.create_pool(replicas=1, session={"maxDurationSeconds": MAX_DURATION_SECONDS})
        world.start("operator-a")
        await asyncio.sleep(300.0)
        world.start("gateway-a")
        world.processes["gateway-a"].clock_offset_seconds = wrong_seconds
        await asyncio.sleep(5.0)
        world.start_session("mine", keyed=True)
        await asyncio.sleep(5.0)
        if world.callers["mine"].outcomes != ["started"]:
            world.wrong(f"the caller is told {world.callers['mine'].outcomes}")
        (deadline,) = filter(None, (pod["spec"].get("activeDeadlineSeconds") for pod in world.server.all(PODS)))
        # The pod is about 300 seconds old, and Kubernetes comes a minute after the agent.
        if not MAX_DURATION_SECONDS + 300 <= deadline <= MAX_DURATION_SECONDS + 300 + 90:
            world.wrong(f"the pod may run {deadline} seconds")

    assert not play(1, story).problems
