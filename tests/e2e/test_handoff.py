"""A bot of several workers in a call: the host knows which of them carry it, and each thing counts once."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from tests.e2e.bots.handoff import GOODBYE
from tests.e2e.bound import SESSION, bound_agent, reason_of
from tests.e2e.caller import Caller
from tests.e2e.livekit_server import LiveKit
from tests.e2e.providers import SECONDS_PER_CHARACTER, Fault, FunctionCall, Providers

BOT = Path(__file__).parent / "bots" / "handoff.py"
DRAIN_SECONDS = 40.0

Speech = Callable[[str], Awaitable[tuple[bytes, int]]]


@pytest.fixture
async def question(speech: Speech) -> tuple[bytes, int]:
    return await speech("Could you please tell me something about yourself")


async def test_a_bot_that_hands_over_between_language_models_answers_and_is_drained_with_its_last_words(
    livekit: LiveKit, question: tuple[bytes, int], tmp_path: Path
) -> None:
    async with (
        Providers(calls=[FunctionCall("ask_the_expert", {})]) as providers,
        bound_agent(
            livekit, tmp_path, BOT, providers.environment, drain_timeout=DRAIN_SECONDS, stuck_timeout=8
        ) as agent,
        Caller(livekit.url, livekit.token("caller", "room")) as caller,
    ):
        await caller.hear()
        for _ in range(2):
            await caller.say(*question)
            assert (await caller.hear()).seconds > 0.5
        assert providers.prompts[-1][0]["content"] == "You know everything."
        assert await agent.metric("voicepool_agent_turns_total") == 2
        assert await agent.metric("voicepool_agent_user_bot_latency_seconds_count") == 2
        assert (await agent.end(SESSION, "drain"))[0] == 202
        assert await reason_of(agent, timeout_seconds=DRAIN_SECONDS / 2) == "drained"
        assert (agent.summary["turns"], agent.summary["errors"]) == (2, [])
        assert agent.summary["usage"]["llmPromptTokens"] == 10 * len(providers.prompts)
        assert providers.spoken[-1].strip() == GOODBYE
        assert (await caller.hear()).seconds > 0.9 * SECONDS_PER_CHARACTER * len(GOODBYE)


@pytest.mark.parametrize(
    ("fault", "reason", "error"),
    [
        (Fault.REFUSES, "provider-failed", "GroqLLMService can no longer be used"),
        (Fault.SILENT, "stuck", "nothing has come through the pipeline for 8 s: GroqLLMService held it up"),
    ],
)
async def test_a_language_model_that_fails_behind_the_bus_ends_the_call_with_its_name(
    livekit: LiveKit, question: tuple[bytes, int], tmp_path: Path, fault: Fault, reason: str, error: str
) -> None:
    limits = {"provider_grace": 2.0, "drain_timeout": DRAIN_SECONDS, "stuck_timeout": 8.0}
    async with (
        Providers() as providers,
        bound_agent(livekit, tmp_path, BOT, providers.environment, **limits) as agent,
        Caller(livekit.url, livekit.token("caller", "room")) as caller,
    ):
        await caller.hear()
        providers.faults["groq"] = fault
        await caller.say(*question)
        assert await reason_of(agent, timeout_seconds=DRAIN_SECONDS) == reason
        assert agent.summary["errors"][0] == error
