"""Real calls at each warmth: what a caller gets is the same, and what has happened before the bind is not."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from tests.e2e.agent_process import BOTS, run_agent
from tests.e2e.bound import QUIET_BOT, ROOM, SESSION, bound_agent, reason_of
from tests.e2e.caller import Caller
from tests.e2e.livekit_server import LiveKit
from tests.e2e.providers import Providers

REFERENCE_BOT = BOTS / "reference" / "bot.py"
KEYLESS_BOT = BOTS / "keyless" / "bot.py"

NONE = {"assemblyai": 0, "groq": 0, "inworld": 0}
SPEECH = {"assemblyai": 1, "groq": 0, "inworld": 1}


@pytest.mark.parametrize(
    ("warmth", "before_the_bind"), [("Imported", NONE), ("Built", NONE), ("Started", SPEECH)], ids=str
)
async def test_a_caller_is_greeted_by_name(
    livekit: LiveKit, tmp_path: Path, warmth: str, before_the_bind: dict[str, int]
) -> None:
    async with (
        Providers() as providers,
        run_agent(REFERENCE_BOT, tmp_path, {**providers.environment, "VOICEPOOL_WARMTH": warmth}) as agent,
    ):
        await agent.wait_until_ready()
        assert providers.connections == before_the_bind
        token = livekit.token("agent", ROOM, agent=True)
        await agent.bind(session=SESSION, room=ROOM, url=livekit.url, token=token, body={"name": "Ada"})
        async with Caller(livekit.url, livekit.token("caller", ROOM)) as caller:
            assert (await caller.hear()).seconds > 0.5
        assert await reason_of(agent) == "caller-left"
        assert agent.summary["errors"] == []
        assert [text.strip() for text in providers.spoken] == ["Hello Ada, how can I help you?"]
        assert providers.heard_seconds > 0
        assert providers.connections == SPEECH


@pytest.mark.parametrize("warmth", ["Imported", "Started"])
async def test_a_bot_whose_models_are_its_own_speaks_at_any_warmth(
    livekit: LiveKit, tmp_path: Path, warmth: str
) -> None:
    async with (
        bound_agent(livekit, tmp_path, KEYLESS_BOT, {"VOICEPOOL_WARMTH": warmth}) as agent,
        Caller(livekit.url, livekit.token("caller", ROOM)) as caller,
    ):
        assert (await caller.hear()).seconds > 0.5
        await agent.end(SESSION, "cancel")
        assert await reason_of(agent) == "cancelled"
        assert agent.summary["errors"] == []


async def test_silence_counts_from_the_bind_however_long_a_started_agent_has_waited(
    livekit: LiveKit, tmp_path: Path
) -> None:
    (tmp_path / "bot.py").write_text(QUIET_BOT)
    limits = {"VOICEPOOL_WARMTH": "Started", "VOICEPOOL_SESSION_IDLE_TIMEOUT_SECONDS": "1.5"}
    async with run_agent("bot.py", tmp_path, limits) as agent:
        await agent.wait_until_ready()
        _, waited = await agent.get("/status?wait=joined&timeout=2")
        assert waited["state"] == "parked"
        token = livekit.token("agent", ROOM, agent=True)
        await agent.bind(session=SESSION, room=ROOM, url=livekit.url, token=token)
        async with Caller(livekit.url, livekit.token("caller", ROOM)):
            assert await reason_of(agent) == "idle"
        assert agent.summary["durationSeconds"] > 1.5


@pytest.mark.parametrize("provider", ["assemblyai", "inworld"])
async def test_a_provider_that_hangs_up_on_a_started_agent_makes_it_exit_and_say_which(
    tmp_path: Path, provider: str
) -> None:
    async with (
        Providers() as providers,
        run_agent(REFERENCE_BOT, tmp_path, {**providers.environment, "VOICEPOOL_WARMTH": "Started"}) as agent,
    ):
        await agent.wait_until_ready()
        await providers.hang_up(provider)
        assert await agent.exit_code() == 1
        assert provider in agent.termination_message.lower()
        assert "(1013 idle for too long)" in agent.termination_message


async def test_a_started_agent_whose_key_is_refused_is_never_ready_and_says_so(tmp_path: Path) -> None:
    async with Providers() as providers:
        environment = {**providers.environment, "ASSEMBLYAI_API_KEY": "a-wrong-key", "VOICEPOOL_WARMTH": "Started"}
        async with run_agent(REFERENCE_BOT, tmp_path, environment) as agent:
            assert await agent.exit_code() == 1
            assert "AssemblyAISTTService: Unable to connect" in agent.termination_message
            assert "a-wrong-key" not in agent.log + agent.termination_message


async def test_a_provider_that_hangs_up_right_after_the_bind_is_connected_again_as_in_any_call(
    livekit: LiveKit, tmp_path: Path
) -> None:
    async with (
        Providers() as providers,
        bound_agent(
            livekit, tmp_path, REFERENCE_BOT, {**providers.environment, "VOICEPOOL_WARMTH": "Started"}
        ) as agent,
    ):
        await providers.hang_up("assemblyai")
        async with Caller(livekit.url, livekit.token("caller", ROOM)) as caller, asyncio.timeout(30):
            assert (await caller.hear()).seconds > 0.5
            await agent.end(SESSION, "cancel")
            assert await reason_of(agent) == "cancelled"
            assert providers.connections["assemblyai"] == 2
