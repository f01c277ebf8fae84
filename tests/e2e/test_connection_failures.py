"""Networks and servers that go away in a call: the session goes on where it can, or ends with a reason."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from tests.e2e.agent_process import BOTS, AgentProcess
from tests.e2e.bound import QUIET_BOT, SESSION, bound_agent, reason_of
from tests.e2e.caller import Caller, distant_caller
from tests.e2e.livekit_server import LiveKit, run_livekit
from tests.e2e.providers import Providers
from tests.e2e.test_goodbye import TONE


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["crashed", "not heard of again"])
async def test_a_caller_who_is_gone_without_a_word_ends_the_session(
    livekit: LiveKit, tmp_path: Path, how: signal.Signals
) -> None:
    token = livekit.token("caller", "room")
    async with bound_agent(livekit, tmp_path, QUIET_BOT) as agent, distant_caller(livekit.url, token) as caller:
        caller.send_signal(how)
        assert await reason_of(agent, timeout_seconds=60) == "caller-left"


async def test_a_caller_who_says_nothing_is_idle(livekit: LiveKit, tmp_path: Path) -> None:
    bot = BOTS / "reference" / "bot.py"
    async with (
        Providers() as providers,
        bound_agent(livekit, tmp_path, bot, providers.environment, idle_timeout=4) as agent,
        Caller(livekit.url, livekit.token("caller", "room")) as caller,
    ):
        await caller.hear()
        assert await reason_of(agent) == "idle"
        assert agent.summary["errors"] == []
        assert agent.summary["turns"] == 0


async def test_a_server_that_is_away_before_the_call_ends_the_session_with_what_is_missing(tmp_path: Path) -> None:
    nobody = LiveKit("ws://127.0.0.1:9", "test", "secret" * 8)
    async with bound_agent(nobody, tmp_path, QUIET_BOT, connect_timeout=3) as agent:
        assert await reason_of(agent) == "not-joined"
        assert agent.summary["errors"] == ["not joined in time, still waiting for LiveKit"]


async def test_a_server_that_comes_in_time_is_joined(livekit_program: Path, tmp_path: Path) -> None:
    async with run_livekit(livekit_program, tmp_path) as livekit:
        pass
    async with (
        bound_agent(livekit, tmp_path, QUIET_BOT) as agent,
        run_livekit(livekit_program, tmp_path, again=livekit),
    ):
        await agent.wait_until_state("joined")
        await agent.end(SESSION, "cancel")
        assert await reason_of(agent) == "cancelled"


AWAY_SECONDS = 4.0
SPEAKS_FOR_LONG = """
async def goodbye(worker, reason):
    await worker.queue_frame(tone(5))
"""
HANGS_UP = QUIET_BOT.replace(
    "    runner = WorkerRunner",
    """
    @transport.event_handler("on_client_disconnected")
    async def hang_up(_transport, _client):
        await worker.cancel(reason="the caller left")

    runner = WorkerRunner""",
)


@contextlib.asynccontextmanager
async def call_whose_server_was_killed(
    program: Path, folder: Path, bot: str
) -> AsyncIterator[tuple[LiveKit, AgentProcess, Caller]]:
    """A call that has begun; its server has just been killed."""
    async with contextlib.AsyncExitStack() as stack:
        async with run_livekit(program, folder) as livekit:
            agent = await stack.enter_async_context(bound_agent(livekit, folder, bot))
            caller = await stack.enter_async_context(Caller(livekit.url, livekit.token("caller", "room")))
            await caller.wait_until_listened_to()
        yield livekit, agent, caller


async def test_a_call_goes_on_when_its_server_is_back_soon(livekit_program: Path, tmp_path: Path) -> None:
    bot = QUIET_BOT + TONE + SPEAKS_FOR_LONG
    async with call_whose_server_was_killed(livekit_program, tmp_path, bot) as (livekit, agent, caller):
        await asyncio.sleep(AWAY_SECONDS)
        async with run_livekit(livekit_program, tmp_path, again=livekit):
            async with asyncio.timeout(30):
                while agent.log.count("Participant connected: caller") < 2:  # noqa: ASYNC110 - nobody else tells
                    await asyncio.sleep(0.05)
            assert (await agent.get("/status"))[1]["state"] == "joined"
            await agent.end(SESSION, "drain")
            # The beginning may be lost: the caller is just coming back as well.
            assert (await caller.hear(timeout_seconds=20)).seconds > 0.5
            assert await reason_of(agent) == "drained"
            assert agent.summary["errors"] == []


async def test_a_call_whose_server_does_not_come_back_ends(livekit_program: Path, tmp_path: Path) -> None:
    async with call_whose_server_was_killed(livekit_program, tmp_path, QUIET_BOT) as (_, agent, _caller):
        assert await reason_of(agent, timeout_seconds=60) == "livekit-lost"


async def test_a_bot_that_hangs_up_on_a_caller_who_was_lost_with_the_server_has_not_been_left(
    livekit_program: Path, tmp_path: Path
) -> None:
    async with call_whose_server_was_killed(livekit_program, tmp_path, HANGS_UP) as (_, agent, _caller):
        assert await reason_of(agent) == "livekit-lost"
        assert agent.summary["errors"] == ["the bot ended while the agent was reconnecting to LiveKit"]
