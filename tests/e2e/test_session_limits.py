"""What ends a session besides the caller's goodbye, each with its reason, over a real LiveKit server."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from functools import partial
from pathlib import Path

import pytest
from livekit import api
from tests.e2e.agent_process import AgentProcess, run_agent
from tests.e2e.bound import QUIET_BOT, bound_agent, reason_of
from tests.e2e.caller import Caller
from tests.e2e.livekit_server import LiveKit

HANGS_UP = QUIET_BOT.replace(
    "    await runner.add_workers(worker)",
    """
    @transport.event_handler("on_client_connected")
    async def hang_up(_transport, _client):
        await worker.stop_when_done()

    await runner.add_workers(PipelineWorker(Pipeline([]), idle_timeout_secs=None), worker)""",
)

HAS_NO_LIMIT = QUIET_BOT.replace("idle_timeout_secs=runner_args.pipeline_idle_timeout_secs", "")

Bound = Callable[..., AbstractAsyncContextManager[AgentProcess]]


@pytest.fixture
def bound(tmp_path: Path) -> Bound:
    """An agent around the quiet bot, bound to `room`."""
    return partial(bound_agent, folder=tmp_path)


async def test_nobody_joins(livekit: LiveKit, bound: Bound) -> None:
    async with bound(livekit, join_timeout=1) as agent:
        assert await reason_of(agent) == "nobody-joined"
        assert agent.summary["joinedSeconds"] is not None


async def test_the_maximum_duration(livekit: LiveKit, bound: Bound) -> None:
    async with bound(livekit, max_duration=2) as agent, Caller(livekit.url, livekit.token("caller", "room")) as caller:
        assert await reason_of(agent) == "max-duration"
        await caller.agent_left.wait()


@pytest.mark.parametrize("bot", [QUIET_BOT, HAS_NO_LIMIT], ids=["a bot that passes it on", "a bot that has none"])
async def test_silence_on_both_sides(livekit: LiveKit, bound: Bound, bot: str) -> None:
    async with bound(livekit, bot=bot, idle_timeout=1.5) as agent, Caller(livekit.url, livekit.token("caller", "room")):
        assert await reason_of(agent) == "idle"


async def test_a_bot_that_sees_to_silence_itself_keeps_its_caller(livekit: LiveKit, bound: Bound) -> None:
    asks = QUIET_BOT.replace("idle_timeout_secs=", "cancel_on_idle_timeout=False, idle_timeout_secs=")
    async with (
        bound(livekit, bot=asks, idle_timeout=0.5, max_duration=4) as agent,
        Caller(livekit.url, livekit.token("caller", "room")),
    ):
        assert await reason_of(agent) == "max-duration"


async def test_a_bot_that_hangs_up_while_another_worker_of_its_goes_on(livekit: LiveKit, bound: Bound) -> None:
    async with (
        bound(livekit, bot=HANGS_UP, caller_left_grace=0.5) as agent,
        Caller(livekit.url, livekit.token("caller", "room")) as caller,
    ):
        assert await reason_of(agent) == "bot-ended"
        assert agent.summary["errors"] == []
        await caller.agent_left.wait()


async def test_the_caller_leaves_a_bot_that_does_not_mind(livekit: LiveKit, bound: Bound) -> None:
    async with bound(livekit, caller_left_grace=0.5) as agent:
        async with Caller(livekit.url, livekit.token("caller", "room")) as caller:
            await caller.wait_until_listened_to()
        assert await reason_of(agent) == "caller-left"


async def test_a_caller_who_comes_back_in_time_finds_the_agent(livekit: LiveKit, bound: Bound) -> None:
    async with bound(livekit, caller_left_grace=20) as agent:
        async with Caller(livekit.url, livekit.token("caller", "room")) as caller:
            await caller.wait_until_listened_to()
        async with Caller(livekit.url, livekit.token("caller", "room")):
            assert (await agent.get("/status"))[1]["state"] == "joined"
            await agent.end("s-1", "cancel")
            assert await reason_of(agent) == "cancelled"


async def test_a_room_that_is_deleted(livekit: LiveKit, bound: Bound) -> None:
    async with bound(livekit) as agent, Caller(livekit.url, livekit.token("caller", "room")) as caller:
        await caller.wait_until_listened_to()
        async with api.LiveKitAPI(livekit.url, livekit.api_key, livekit.api_secret) as server:
            await server.room.delete_room(api.DeleteRoomRequest(room="room"))
        assert await reason_of(agent) == "room-closed"


async def test_an_agent_that_another_one_replaces(livekit: LiveKit, bound: Bound) -> None:
    async with bound(livekit) as agent:
        await agent.get("/status?wait=joined")
        async with Caller(livekit.url, livekit.token("agent", "room", agent=True)):
            assert await reason_of(agent) == "replaced"


async def test_a_token_that_livekit_refuses(livekit: LiveKit, tmp_path: Path) -> None:
    (tmp_path / "bot.py").write_text(QUIET_BOT)
    async with run_agent("bot.py", tmp_path) as agent:
        await agent.wait_until_ready()
        await agent.bind(session="s-1", room="room", url=livekit.url, token="not-a-token")
        assert await reason_of(agent) == "not-joined"
