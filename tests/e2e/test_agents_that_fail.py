"""Agents that cannot be built, in pods of a real cluster: no caller gets one, and wherever one looks it says why.

The pools fail side by side, each in its own way; each test looks at one of them.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass

import pytest
import pytest_asyncio
from tests.cluster.errors import ClusterError
from tests.e2e.deployment import Deployment, Json
from tests.e2e.failures import BUILD_FAILURES, BuildFailure, says
from tests.e2e.pools import MakePool, is_ready, pools, remove, until

pytestmark = pytest.mark.cluster

CONDITION_SECONDS = 120
LOG_SECONDS = 120
"""On a machine with much else to do, only a later pod of a pool may come so far within its deadline."""
TOGETHER = 4
"""So many pools fail at a time: more would only get in each other's way."""


@dataclass(frozen=True, slots=True)
class Failed:
    """What is seen of a pool whose agents cannot be built.

    Attributes:
        pod: one of its pods.
        log: of that pod, the messages of its lines.
        condition: Ready.
        events: on the pool: reasons and messages.
        described: by `kubectl describe vpool`.
        wide: by `kubectl get vpool --output wide`.
    """

    pod: Json
    log: list[str]
    condition: Json
    events: list[tuple[str, str]]
    described: str
    wide: str


async def cause(deployment: Deployment, make_pool: MakePool, failure: BuildFailure) -> Failed:
    """Make the pool and look at it when it has failed; it is gone in the end, so that its next tries take no processor time from others."""
    pool, kubectl = failure.pool, deployment.cluster.kubectl
    await make_pool(pool, failure.container, wait=False, **failure.spec)

    def logged() -> tuple[Json, list[str]] | None:
        for pod in deployment.pods_of(pool):
            (agent,) = pod["status"].get("containerStatuses") or ({"state": {}},)
            if failure.reason == "AgentFailed" and "terminated" not in agent["state"]:
                continue
            try:
                lines = kubectl("logs", pod["metadata"]["name"]).splitlines()
            except ClusterError:
                continue  # not started yet, or replaced by now
            messages = [json.loads(line)["message"] for line in lines]
            if any(says(failure.words, message) for message in messages):
                return pod, messages
        return None

    def described() -> str | None:
        found = kubectl("describe", "vpool", pool)
        return found if any(line.split()[:2] == ["Warning", failure.event] for line in found.splitlines()) else None

    def reason() -> str:
        path = '{.status.conditions[?(@.type=="Ready")].reason}'
        wait = ("wait", f"vpool/{pool}", f"--for=jsonpath={path}={failure.reason}", f"--timeout={CONDITION_SECONDS}s")
        return kubectl(*wait, deadline_seconds=CONDITION_SECONDS + 10)

    if failure.reason == "AgentFailed":
        await asyncio.to_thread(reason)
    # A pod that was not Ready in time is soon gone, with its log.
    pod, log = await until(f"the log of {pool}", logged, LOG_SECONDS, every_seconds=1)
    await asyncio.to_thread(reason)
    words = await until(f"the Event of {pool}", described)
    selector = f"involvedObject.kind=VoiceAgentPool,involvedObject.name={pool}"
    events = json.loads(
        await asyncio.to_thread(kubectl, "get", "events", "--field-selector", selector, "--output", "json")
    )["items"]
    seen = Failed(
        pod=pod,
        log=log,
        condition=(await asyncio.to_thread(deployment.conditions, pool))["Ready"],
        events=[(event["reason"], event["message"]) for event in events],
        described=words,
        wide=await asyncio.to_thread(kubectl, "get", "vpool", pool, "--output", "wide"),
    )
    await asyncio.to_thread(remove, deployment, [pool])
    return seen


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def failed(deployment: Deployment) -> AsyncIterator[dict[str, Failed | BaseException]]:
    """What is seen of each pool, by its name; or what went wrong with looking."""
    async with pools(deployment) as make_pool:
        turns = asyncio.Semaphore(TOGETHER)

        async def in_turn(failure: BuildFailure) -> Failed:
            async with turns:
                return await cause(deployment, make_pool, failure)

        seen = await asyncio.gather(*map(in_turn, BUILD_FAILURES), return_exceptions=True)
        yield {failure.pool: one for failure, one in zip(BUILD_FAILURES, seen, strict=True)}


@pytest.mark.parametrize("failure", BUILD_FAILURES, ids=lambda failure: failure.pool)
async def test_an_agent_that_cannot_be_built_is_never_ready_and_says_why_wherever_one_looks(
    failed: dict[str, Failed | BaseException], failure: BuildFailure
) -> None:
    seen = failed[failure.pool]
    if isinstance(seen, BaseException):
        raise seen
    assert not is_ready(seen.pod)
    assert "Traceback" not in "\n".join(seen.log)
    assert sum(says(failure.words, message) for message in seen.log) == 1
    assert (seen.condition["status"], seen.condition["reason"]) == ("False", failure.reason)
    assert not {"Ready", "WarmPodDied"} & {reason for reason, _ in seen.events}
    if failure.reason == "AgentFailed":
        assert "parked" not in seen.log
        (agent,) = seen.pod["status"]["containerStatuses"]
        ended = agent["state"]["terminated"]
        assert (ended["exitCode"], ended["message"].count("\n")) == (1, 0)
        assert says(failure.words, ended["message"], entirely=True)
        words = f"ended with exit code 1 before a caller came: {failure.words}"
        event = f"failed to start (crashed, exit code 1): {failure.words}"
    else:
        words = "was not Ready within 45 s (its readiness probe, or its log, says why)"
        event = "was not Ready within 45 s and is replaced; its readiness probe, or its log, says why"
    assert says(f"Pod ... {words}", seen.condition["message"])
    assert any(says(f"Pod ... {event}", message) for reason, message in seen.events if reason == failure.event)
    one_line = " ".join(seen.described.split())
    assert says(f"Message: Pod ... {words}", one_line)
    assert says(f"Pod ... {event}", one_line)
    assert says(f"{failure.reason} ... Pod ... {words}", seen.wide)
