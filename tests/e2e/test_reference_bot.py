"""The reference bot in a real call: a real LiveKit server, doubles of its three providers, a caller who speaks."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from tests.e2e.agent_process import BOTS, run_agent
from tests.e2e.caller import Caller
from tests.e2e.livekit_server import LiveKit
from tests.e2e.providers import SECONDS_PER_CHARACTER, Providers

REFERENCE_BOT = BOTS / "reference" / "bot.py"
CANARY_HEARD = "my secret word is kookaburra"
CANARY_ANSWERED = "I shall never write down kingfisher"

Speech = Callable[[str], Awaitable[tuple[bytes, int]]]


async def test_a_caller_speaks_with_the_reference_bot(livekit: LiveKit, speech: Speech, tmp_path: Path) -> None:
    question = await speech("Could you please tell me something about yourself")
    async with (
        Providers(hears=CANARY_HEARD, answers=CANARY_ANSWERED) as providers,
        run_agent(REFERENCE_BOT, tmp_path, providers.environment) as agent,
    ):
        await agent.wait_until_ready()
        assert providers.connections == {"assemblyai": 0, "groq": 0, "inworld": 0}, (
            "a parked agent has opened connections"
        )

        token = livekit.token("agent", "room", agent=True)
        answer = await agent.bind(
            session="s-1", pool="demo", room="room", url=livekit.url, token=token, body={"name": "Ada"}
        )
        assert answer == (202, {"state": "accepted", "session": "s-1"})
        assert (await agent.get("/readyz"))[0] == 503

        async with Caller(livekit.url, livekit.token("caller", "room")) as caller:
            _, status = await agent.get("/status?wait=joined&timeout=20")
            assert (status["state"], status["session"], status["pod_uid"]) == ("joined", "s-1", agent.pod_uid)
            greeting = await caller.hear()
            assert greeting.seconds > 0.5
            await caller.say(*question)
            reply = await caller.hear()
            assert reply.seconds > 0.5
            for processor in ("AssemblyAISTTService", "GroqLLMService", "InworldTTSService"):
                name = f'voicepool_agent_provider_latency_seconds_count{{processor="{processor}"}}'
                assert await agent.metric(name) >= 1
            assert await agent.metric("voicepool_agent_user_bot_latency_seconds_count") >= 1
            assert await agent.metric('voicepool_agent_llm_prompt_tokens_total{processor="GroqLLMService"}') >= 10

        assert await agent.exit_code() == 0
        summary = agent.summary
        assert summary["session"] == "s-1"
        assert summary["reason"] == "caller-left"
        assert summary["errors"] == []
        assert summary["turns"] >= 1
        assert 0 < summary["joinedSeconds"] < summary["durationSeconds"]
        assert 0 < summary["firstAudioSeconds"] < summary["durationSeconds"]
        requests, said = len(providers.prompts), "".join(providers.spoken)
        assert summary["usage"]["llmPromptTokens"] == 10 * requests
        assert summary["usage"]["llmCompletionTokens"] == 8 * requests
        assert summary["usage"]["ttsCharacters"] == pytest.approx(len(said), abs=2 * len(providers.spoken))
        assert 1 < summary["usage"]["sttAudioSeconds"] <= providers.heard_seconds + 0.1
        assert providers.spoken[0].strip() == "Hello Ada, how can I help you?"
        assert providers.heard_seconds > 1
        assert providers.prompts[0][-1] == {"role": "user", "content": CANARY_HEARD}

        written = agent.log + agent.termination_message
        for secret in ("kookaburra", "kingfisher", "Ada", providers.key, token):
            assert secret not in written


async def test_a_caller_who_cuts_the_agent_short_is_counted(livekit: LiveKit, speech: Speech, tmp_path: Path) -> None:
    # A sentence with a pause in it ("Excuse me, ...") is two turns, and its second half cuts the answer to the first short.
    question = await speech("Could you please tell me something about yourself")
    async with Providers() as providers, run_agent(REFERENCE_BOT, tmp_path, providers.environment) as agent:
        await agent.wait_until_ready()
        token, name = livekit.token("agent", "room", agent=True), "Ada " * 30
        await agent.bind(session="s-1", room="room", url=livekit.url, token=token, body={"name": name})
        async with Caller(livekit.url, livekit.token("caller", "room")) as caller:
            await caller.wait_until_listened_to()
            await caller.first_audio()
            await caller.say(*question)
            greeting = await caller.hear()
            assert greeting.seconds < SECONDS_PER_CHARACTER * len(name)
        assert await agent.exit_code() == 0
        assert agent.summary["interruptions"] == 1


async def test_the_caller_can_be_in_the_room_before_the_agent(livekit: LiveKit, tmp_path: Path) -> None:
    async with Providers() as providers, run_agent(REFERENCE_BOT, tmp_path, providers.environment) as agent:
        await agent.wait_until_ready()
        async with Caller(livekit.url, livekit.token("caller", "room")) as caller:
            token = livekit.token("agent", "room", agent=True)
            await agent.bind(session="s-1", room="room", url=livekit.url, token=token)
            assert (await caller.hear()).seconds > 0.5
        assert await agent.exit_code() == 0


async def test_a_drain_lets_the_agent_finish_its_sentence(livekit: LiveKit, tmp_path: Path) -> None:
    async with Providers() as providers, run_agent(REFERENCE_BOT, tmp_path, providers.environment) as agent:
        await agent.wait_until_ready()
        token = livekit.token("agent", "room", agent=True)
        await agent.bind(session="s-1", room="room", url=livekit.url, token=token)
        async with Caller(livekit.url, livekit.token("caller", "room")) as caller:
            await caller.first_audio()
            assert (await agent.end("s-1", "drain"))[0] == 202
            greeting = await caller.hear()
            # 0.05 s for each of its characters
            assert greeting.seconds > 0.9 * 0.05 * len("Hello, how can I help you?")
            await caller.agent_left.wait()
        assert await agent.exit_code() == 0
        assert agent.summary["reason"] == "drained"


async def test_a_provider_that_does_not_answer_ends_the_session_with_that_reason(
    livekit: LiveKit, tmp_path: Path
) -> None:
    async with (
        Providers(latency_seconds=60) as providers,
        run_agent(
            REFERENCE_BOT, tmp_path, {**providers.environment, "VOICEPOOL_SESSION_CONNECT_TIMEOUT_SECONDS": "2"}
        ) as agent,
    ):
        await agent.wait_until_ready()
        token = livekit.token("agent", "room", agent=True)
        await agent.bind(session="s-1", room="room", url=livekit.url, token=token)
        assert await agent.exit_code() == 0
        assert agent.summary["reason"] == "not-joined"
        assert "a provider that does not answer" in agent.summary["errors"][0]


async def test_a_provider_that_refuses_the_key_ends_the_session_with_that_reason(
    livekit: LiveKit, tmp_path: Path
) -> None:
    async with (
        Providers() as providers,
        run_agent(REFERENCE_BOT, tmp_path, {**providers.environment, "ASSEMBLYAI_API_KEY": "a-wrong-key"}) as agent,
    ):
        await agent.wait_until_ready()
        token = livekit.token("agent", "room", agent=True)
        await agent.bind(session="s-1", room="room", url=livekit.url, token=token)
        assert await agent.exit_code() == 0
        assert agent.summary["reason"] == "not-joined"
        assert any("AssemblyAI" in error for error in agent.summary["errors"])
        assert "a-wrong-key" not in agent.log + agent.termination_message
