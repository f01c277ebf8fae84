"""Sessions that fail in pods of a real cluster, each for a cause of its own; and what is said of each, wherever one looks.

All but two fail side by side; each test looks at one of them. The last one takes the LiveKit server away from everybody.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field

import aiohttp
import pytest
import pytest_asyncio
from aiohttp import web
from tests.conftest import Show
from tests.e2e.caller import distant_caller, read_wav
from tests.e2e.conversation import OPENING_HOURS, Conversation, call
from tests.e2e.deployment import (
    LIVEKIT_NAMESPACE,
    NAMESPACE,
    Answer,
    Deployment,
    Json,
    livekit_url,
    own_address,
)
from tests.e2e.failures import KILLED, LIVEKIT_LOST, SESSION_FAILURES, SessionFailure, says
from tests.e2e.pools import REFERENCE, MakePool, away, kill, light, pools, processes_in, until, until_over, until_state
from tests.e2e.providers import Fault, Providers

from voicepool.session_api import SessionRecord

pytestmark = pytest.mark.cluster

START_SECONDS = 150.0
END_SECONDS = 150.0
TOGETHER = 2
"""So many agents start, or have a caller, at a time. In a call an agent takes a quarter of a slow core, and its caller as much. Where two cores are not enough
for all, a pipeline falls behind the caller's sound, which Pipecat works off before anything else, and the agent says nothing."""
LIVEKIT = "app.kubernetes.io/name=livekit"


@dataclass(frozen=True, slots=True)
class Ended:
    """What is seen of a session that has ended.

    Attributes:
        record: the gateway's answer.
        pod: as it is then.
        pool: as it is then.
        described_pod: by `kubectl describe pod`.
        described_pool: by `kubectl describe vpool`.
        log: of the pod.
    """

    record: SessionRecord
    pod: Json
    pool: Json
    described_pod: str
    described_pool: str
    log: str


@dataclass(frozen=True, slots=True)
class Stage:
    """Where sessions fail, each in a pool of its own that starts one agent for it."""

    deployment: Deployment
    make_pool: MakePool
    turns: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(TOGETHER))

    async def pool(self, name: str, container: Json, **spec: object) -> str:
        cold = {"policy": "ColdStart", "timeoutSeconds": int(START_SECONDS)}
        return await self.make_pool(name, container, replicas=0, onEmpty=cold, **spec)

    async def start(self, pool: str) -> Answer:
        async with self.turns:
            answer = await self.deployment.start(pool, timeout_seconds=START_SECONDS)
        assert answer.status == 200, answer
        return answer

    @contextlib.asynccontextmanager
    async def call(self, pool: str) -> AsyncIterator[Conversation]:
        async with self.turns, call(self.deployment, pool, timeout_seconds=START_SECONDS) as conversation:
            yield conversation

    async def ended(self, pool: str, session: str) -> Ended:
        return await ended(self.deployment, pool, session)

    @contextlib.asynccontextmanager
    async def reference(self, pool: str, providers: Providers, **environment: str) -> AsyncIterator[Providers]:
        """A pool of the reference bot with doubles of its providers."""
        providers.host = own_address(self.deployment.cluster)
        async with providers:
            variables = {**providers.environment, **environment}
            env = [{"name": name, "value": value} for name, value in variables.items()]
            await self.pool(pool, {**REFERENCE, "env": env})
            yield providers


async def ended(deployment: Deployment, pool: str, session: str) -> Ended:
    """Wait until a session has ended and the operator has counted it, and look."""
    kubectl = deployment.cluster.kubectl
    async with asyncio.timeout(END_SECONDS):
        while (record := await deployment.session(pool, session)).completion_status is None:  # noqa: ASYNC110 - a caller polls as well
            await asyncio.sleep(0.5)

    def counted() -> Json | None:
        found = deployment.get("vpool", pool)
        sessions = found["status"].get("sessions") or {}
        return found if sessions.get("ended", 0) + sessions.get("dropped", 0) else None

    def described() -> str | None:
        found = kubectl("describe", "vpool", pool)
        return found if record.completion_status != "dropped" or "SessionDropped" in found else None

    pod = record.agent.pod
    seen = await until(f"the operator to count the session of {pool}", counted)
    return Ended(
        record=record,
        pod=await until_over(deployment, pod),
        pool=seen,
        described_pod=await asyncio.to_thread(kubectl, "describe", "pod", pod),
        described_pool=await until(f"the Event of {pool}", described),
        log=await asyncio.to_thread(kubectl, "logs", pod),
    )


def assert_says_why(seen: Ended, failure: SessionFailure) -> None:
    """Wherever one looks, it says why the session ended."""
    record, counts = seen.record, seen.pool["status"]["sessions"]
    assert (record.state, record.completion_status, record.reason) == (
        "ended",
        failure.completion,
        failure.reason,
    ), record.summary
    (agent,) = seen.pod["status"]["containerStatuses"]
    process = agent["state"]["terminated"]
    assert process["exitCode"] == failure.exit_code
    assert seen.pod["status"]["phase"] == ("Failed" if failure.exit_code else "Succeeded")
    assert "Traceback" not in seen.log
    assert (counts["started"], counts.get("ended", 0), counts.get("dropped", 0)) == (
        1,
        0 if failure.dropped else 1,
        1 if failure.dropped else 0,
    )
    one_line = " ".join(seen.described_pool.split())
    if failure.dropped:
        assert "session" not in (record.summary or {})
        assert says(failure.error, one_line)
        assert f"Session {record.session_id} was dropped with pod {record.agent.pod} " in one_line
        return
    assert "SessionDropped" not in one_line
    summary = json.loads(process["message"])
    assert (summary["session"], summary["reason"]) == (record.session_id, failure.reason)
    assert record.summary == summary
    assert f'"reason":"{failure.reason}"' in seen.described_pod
    as_said = any(says(failure.error, one) for one in summary["errors"]) if failure.error else summary["errors"] == []
    assert as_said, f"{process['message']}\n{seen.log}"


# The causes


async def nobody_joins(stage: Stage, pool: str) -> Ended:
    await stage.pool(pool, light(), session={"joinTimeoutSeconds": 5})
    return await stage.ended(pool, (await stage.start(pool)).session_id)


async def nobody_speaks(stage: Stage, pool: str) -> Ended:
    await stage.pool(pool, light(), session={"idleTimeoutSeconds": 10})
    async with stage.call(pool) as conversation:
        return await stage.ended(pool, conversation.session.session_id)


async def it_lasts_too_long(stage: Stage, pool: str) -> Ended:
    await stage.pool(pool, light(), session={"maxDurationSeconds": 60})
    async with stage.call(pool) as conversation:
        return await stage.ended(pool, conversation.session.session_id)


async def the_caller_is_gone(stage: Stage, pool: str) -> Ended:
    await stage.pool(pool, light())
    session = await stage.start(pool)
    async with distant_caller(session.url, session.token, timeout_seconds=60) as caller:
        caller.kill()
        return await stage.ended(pool, session.session_id)


@contextlib.asynccontextmanager
async def unreachable_for_agents(deployment: Deployment) -> AsyncIterator[str]:
    """The address of a LiveKit server whose rooms can be made, as the gateway does, and which nobody can join."""
    there = livekit_url(deployment.cluster).replace("ws://", "http://")

    async def answer(request: web.Request) -> web.Response:
        if not request.path.startswith("/twirp/"):
            assert request.transport is not None
            request.transport.abort()
            return web.Response()
        headers = {name: request.headers[name] for name in ("Authorization", "Content-Type")}
        async with http.post(there + request.path, data=await request.read(), headers=headers) as response:
            return web.Response(status=response.status, body=await response.read(), content_type=response.content_type)

    application = web.Application()
    application.router.add_route("*", "/{path:.*}", answer)
    runner = web.AppRunner(application, access_log=None, shutdown_timeout=1.0)
    async with aiohttp.ClientSession() as http:
        await runner.setup()
        try:
            await web.TCPSite(runner, own_address(deployment.cluster), 0).start()
            host, port = runner.addresses[0][:2]
            yield f"ws://{host}:{port}"
        finally:
            await runner.cleanup()


async def livekit_is_away(stage: Stage, pool: str) -> Ended:
    async with unreachable_for_agents(stage.deployment) as url:
        await stage.pool(pool, light(), livekit={"url": url})
        return await stage.ended(pool, (await stage.start(pool)).session_id)


async def the_key_is_refused(stage: Stage, pool: str) -> Ended:
    async with stage.reference(pool, Providers(faults={"assemblyai": Fault.REFUSES})):
        return await stage.ended(pool, (await stage.start(pool)).session_id)


async def a_provider_does_not_answer(stage: Stage, pool: str) -> Ended:
    async with stage.reference(pool, Providers(latency_seconds=600)):
        return await stage.ended(pool, (await stage.start(pool)).session_id)


async def _in_the_call(stage: Stage, pool: str, provider: str, fault: Fault, **environment: str) -> Ended:
    """A provider that has worked gets a fault and keeps it; the caller asks once more."""
    async with (
        stage.reference(pool, Providers(), **environment) as providers,
        stage.call(pool) as conversation,
    ):
        await conversation.caller.wait_until_listened_to()
        try:
            async with asyncio.timeout(60):
                while not providers.spoken:  # noqa: ASYNC110 - the double has no event for the greeting
                    await asyncio.sleep(0.1)
        except TimeoutError:
            raise await conversation.failure("has not said hello in 60 s") from None
        providers.faults[provider] = fault
        await conversation.caller.say(*await asyncio.to_thread(read_wav, OPENING_HOURS))
        return await stage.ended(pool, conversation.session.session_id)


async def the_key_is_refused_in_the_call(stage: Stage, pool: str) -> Ended:
    return await _in_the_call(stage, pool, "groq", Fault.REFUSES)


async def a_provider_is_silent(stage: Stage, pool: str) -> Ended:
    return await _in_the_call(stage, pool, "groq", Fault.SILENT, VOICEPOOL_SESSION_STUCK_TIMEOUT_SECONDS="8")


async def a_provider_closes(stage: Stage, pool: str) -> Ended:
    return await _in_the_call(stage, pool, "assemblyai", Fault.CLOSES)


async def the_bot_raises(stage: Stage, pool: str) -> Ended:
    await stage.pool(pool, light("needs_a_name.py"), warmth="Imported")
    return await stage.ended(pool, (await stage.start(pool)).session_id)


async def _with_a_caller(stage: Stage, pool: str, container: Json, **spec: object) -> Ended:
    """What the bot does when a caller is there is the end of it."""
    await stage.pool(pool, container, **spec)
    async with stage.call(pool) as conversation:
        return await stage.ended(pool, conversation.session.session_id)


async def the_bot_blocks(stage: Stage, pool: str) -> Ended:
    return await _with_a_caller(stage, pool, light("blocks.py", VOICEPOOL_BLOCKED_TIMEOUT_SECONDS="3"))


async def the_bot_holds_the_lock(stage: Stage, pool: str) -> Ended:
    return await _with_a_caller(stage, pool, light("holds_the_lock.py", VOICEPOOL_BLOCKED_TIMEOUT_SECONDS="3"))


async def the_bot_eats_memory(stage: Stage, pool: str) -> Ended:
    container = light("eats_memory.py")
    container["resources"]["limits"] = {"memory": "400Mi"}
    return await _with_a_caller(stage, pool, container)


async def it_is_killed_in_its_goodbye(stage: Stage, pool: str) -> Ended:
    deployment = stage.deployment
    await stage.pool(pool, light("long_goodbye.py"))
    async with stage.call(pool) as conversation:
        session = conversation.session.session_id
        await until_state(deployment, pool, session, "joined")
        path = f"/v1/agents/{pool}/sessions/{session}"
        async with (
            aiohttp.ClientSession(headers={"Authorization": f"Bearer {deployment.api_key}"}) as http,
            http.delete(f"{deployment.gateway_url}{path}?mode=drain") as answer,
        ):
            assert answer.status == 200
        await until_state(deployment, pool, session, "ending")
        await kill_agent(deployment, session)
        return await stage.ended(pool, session)


async def kill_agent(deployment: Deployment, session: str) -> None:
    pod = await asyncio.to_thread(deployment.pod_of_session, session)
    processes = await asyncio.to_thread(processes_in, [pod["metadata"]["uid"]], b"voicepool_agent")
    assert processes
    kill(processes)


CAUSES: dict[str, Callable[[Stage, str], Awaitable[Ended]]] = {
    "max-duration": it_lasts_too_long,
    "caller-gone": the_caller_is_gone,
    "nobody-joins": nobody_joins,
    "idle": nobody_speaks,
    "no-livekit": livekit_is_away,
    "key-refused": the_key_is_refused,
    "key-expired": the_key_is_refused_in_the_call,
    "no-answer": a_provider_does_not_answer,
    "silent": a_provider_is_silent,
    "closes": a_provider_closes,
    "raises": the_bot_raises,
    "blocks": the_bot_blocks,
    "holds-the-lock": the_bot_holds_the_lock,
    "eats-memory": the_bot_eats_memory,
    "killed-in-goodbye": it_is_killed_in_its_goodbye,
}
"""Those that take longest first."""


@dataclass(frozen=True, slots=True)
class Seen:
    """What is seen of all of them.

    Attributes:
        sessions: by the names of their pools; or what went wrong with looking.
        metrics: of the operators.
    """

    sessions: dict[str, Ended | BaseException]
    metrics: str


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def seen(deployment: Deployment) -> AsyncIterator[Seen]:
    """All sessions fail, side by side."""
    async with pools(deployment) as make_pool:
        stage = Stage(deployment, make_pool)
        sessions = await asyncio.gather(*(cause(stage, pool) for pool, cause in CAUSES.items()), return_exceptions=True)
        yield Seen(
            dict(zip(CAUSES, sessions, strict=True)),
            await asyncio.to_thread(operator_metrics, deployment),
        )


def operator_metrics(deployment: Deployment) -> str:
    pods = deployment.pods("app.kubernetes.io/component=operator", NAMESPACE)
    paths = [f"/api/v1/namespaces/{NAMESPACE}/pods/{pod['metadata']['name']}:8081/proxy/metrics" for pod in pods]
    return "\n".join(deployment.cluster.kubectl("get", "--raw", path) for path in paths)


@pytest.mark.parametrize("failure", SESSION_FAILURES, ids=lambda failure: failure.pool)
async def test_a_session_that_fails_says_why_wherever_one_looks(seen: Seen, failure: SessionFailure) -> None:
    session = seen.sessions[failure.pool]
    if isinstance(session, BaseException):
        raise session
    assert_says_why(session, failure)
    counter = "voicepool_sessions_dropped_total" if failure.dropped else "voicepool_sessions_ended_total"
    labels = f'{{namespace="default",pool="{failure.pool}",reason="{failure.reason}"}}'
    assert f"{counter}{labels} 1.0" in seen.metrics.splitlines()


async def test_a_session_whose_agent_is_killed_is_dropped_and_says_why(
    deployment: Deployment, make_pool: MakePool, show: Show
) -> None:
    pool = await make_pool(KILLED.pool, light())
    async with call(deployment, pool) as conversation:
        session = conversation.session.session_id
        await conversation.listen()
        assert (await deployment.session(pool, session)).state in ("accepted", "joined")
        await kill_agent(deployment, session)
        began = time.monotonic()
        async with asyncio.timeout(60):
            while (await deployment.session(pool, session)).completion_status is None:  # noqa: ASYNC110 - a caller polls as well
                await asyncio.sleep(0.05)
        show(f"dropped, seen at the gateway after {time.monotonic() - began:.2f} s")
        assert_says_why(await ended(deployment, pool, session), KILLED)


# The last one: it takes the LiveKit server away from everybody.


async def test_a_call_ends_when_its_livekit_server_is_killed_and_no_other_begins_until_it_is_back(
    deployment: Deployment, make_pool: MakePool
) -> None:
    pool = await make_pool(LIVEKIT_LOST.pool, light("quiet.py"))
    other = await make_pool("livekit-away", light("quiet.py"))

    async with call(deployment, pool) as conversation:
        session = conversation.session.session_id
        await conversation.caller.wait_until_listened_to()
        async with away(deployment, LIVEKIT, LIVEKIT_NAMESPACE, b"livekit"):
            refused = await deployment.start(other)
            assert (refused.status, refused.code) == (503, "LIVEKIT_UNAVAILABLE")
            assert refused.retry_after_seconds is not None
            seen = await ended(deployment, pool, session)
    assert_says_why(seen, LIVEKIT_LOST)
    await asyncio.to_thread(deployment.wait_until_ready, other)
    async with call(deployment, other) as conversation:
        await conversation.caller.wait_until_listened_to()
