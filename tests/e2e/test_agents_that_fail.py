"""Agents that are killed in a call or cannot be built, on a real cluster: what the gateway, the pool and its Events say."""

from __future__ import annotations

import asyncio
import json
import time

import pytest
from tests.e2e.conversation import call
from tests.e2e.deployment import Deployment, Json
from tests.e2e.pools import MakePool, kill, light, processes_in, until

pytestmark = pytest.mark.cluster


def events_of(deployment: Deployment, pool: str, reason: str) -> list[str]:
    """The messages of a pool's Events with this reason."""
    selector = f"involvedObject.kind=VoiceAgentPool,involvedObject.name={pool},reason={reason}"
    found = deployment.cluster.kubectl("get", "events", "--field-selector", selector, "--output", "json")
    return [event["message"] for event in json.loads(found)["items"]]


async def test_a_session_whose_agent_is_killed_is_dropped_and_says_why(
    deployment: Deployment, make_pool: MakePool
) -> None:
    pool = await make_pool("killed-agent", light())
    async with call(deployment, pool) as conversation:
        session = conversation.session.session_id
        await conversation.listen()
        assert (await deployment.session(pool, session)).state in ("accepted", "joined")
        pod = await asyncio.to_thread(deployment.pod_of_session, session)
        processes = await asyncio.to_thread(processes_in, [pod["metadata"]["uid"]], b"voicepool_agent")
        assert processes
        kill(processes)
        began = time.monotonic()
        async with asyncio.timeout(60):
            while (record := await deployment.session(pool, session)).completion_status is None:  # noqa: ASYNC110 - a caller polls as well
                await asyncio.sleep(0.05)
        print(f"dropped, seen at the gateway after {time.monotonic() - began:.2f} s")
    assert (record.state, record.completion_status, record.reason) == ("ended", "dropped", "crashed")
    (event,) = await until("the Event", lambda: events_of(deployment, pool, "SessionDropped"))
    assert f"Session {session} was dropped with pod {pod['metadata']['name']} (crashed, exit code 137)" in event


@pytest.mark.parametrize(
    ("bot", "words"),
    [
        ("syntax_error.py", "the bot /bots/syntax_error.py failed: SyntaxError: "),
        ("reads_body.py", "reads runner_args.body while it is being built (line "),
        ("holds_up.py", "has held up the event loop for 5 s in line "),
    ],
)
async def test_a_bot_that_cannot_be_built_is_never_ready_and_the_pool_says_why(
    deployment: Deployment, make_pool: MakePool, bot: str, words: str
) -> None:
    name = bot.removesuffix(".py").replace("_", "-")
    pool = await make_pool(name, light(bot, VOICEPOOL_STARTUP_BLOCKED_TIMEOUT_SECONDS="5"), wait=False)

    def failed() -> Json | None:
        condition = deployment.conditions(pool).get("Ready")
        return condition if condition and condition["reason"] == "AgentFailed" else None

    condition = await until("the condition Ready to say AgentFailed", failed)
    assert condition["status"] == "False"
    assert words in condition["message"]
    (event, *_) = await until("the Event", lambda: events_of(deployment, pool, "StartFailed"))
    assert words in event
    messages = [
        terminated["message"]
        for pod in await asyncio.to_thread(deployment.pods_of, pool)
        for container in pod["status"].get("containerStatuses") or ()
        if (terminated := container["state"].get("terminated"))
    ]
    assert all(words in message and "\n" not in message for message in messages)
