"""Providers that fail in a call: it goes on where it can, or ends with a reason; the summary says what went wrong.

The doubles go wrong on purpose in a real call of the reference bot. Three calls at a time, one for each provider.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from tests.e2e.agent_process import BOTS, AgentProcess
from tests.e2e.bound import bound_agent, reason_of
from tests.e2e.caller import Caller
from tests.e2e.livekit_server import run_livekit
from tests.e2e.providers import Fault, Providers

# In a call an agent takes a quarter of a slow core, and so does its caller: three of each, and their providers, are as much as two of them bring along in time.
pytestmark = pytest.mark.crowded

Speech = Callable[[str], Awaitable[tuple[bytes, int]]]
Question = tuple[bytes, int]
PROVIDERS = {"assemblyai": "AssemblyAISTTService", "groq": "GroqLLMService", "inworld": "InworldTTSService"}
LIMITS = {"idle_timeout": 15.0, "provider_grace": 2.0}


@pytest.fixture
async def question(speech: Speech) -> Question:
    return await speech("Could you please tell me something about yourself")


@contextlib.asynccontextmanager
async def talking(
    program: Path, folder: Path, question: Question, **limits: float
) -> AsyncIterator[tuple[Providers, AgentProcess, Caller]]:
    """A caller who has been greeted and answered once, so that everything has worked."""
    await asyncio.to_thread(folder.mkdir)
    async with (
        run_livekit(program, folder) as livekit,
        Providers() as providers,
        bound_agent(livekit, folder, BOTS / "reference" / "bot.py", providers.environment, **limits) as agent,
        Caller(livekit.url, livekit.token("caller", "room")) as caller,
    ):
        await caller.hear()
        await caller.say(*question)
        await caller.hear()
        yield providers, agent, caller


async def each(program: Path, folder: Path, question: Question, fault: Fault) -> dict[str, dict[str, Any]]:
    """The summary of a call in which one provider gets this fault and keeps it, for each provider.

    The caller asks once more, then waits.
    """

    async def one(provider: str) -> dict[str, Any]:
        async with talking(program, folder / provider, question, **LIMITS) as (providers, agent, caller):
            providers.faults[provider] = fault
            await caller.say(*question)
            await reason_of(agent, timeout_seconds=120)
            async with asyncio.timeout(5):
                await caller.agent_left.wait()
            return agent.summary

    return dict(zip(PROVIDERS, await asyncio.gather(*map(one, PROVIDERS)), strict=True))


NOT_HEARD, NOT_ANSWERED, NOT_SPOKEN = (
    f"not answered for [1-9][0-9] s: {words}"
    for words in ("no transcript came of it", "the language model wrote nothing", "nothing of the answer was spoken")
)


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        (
            Fault.REFUSES,
            {
                "assemblyai": ("provider-failed", "AssemblyAISTTService: authentication: .*401"),
                "groq": ("provider-failed", "GroqLLMService: authentication: .*401"),
                "inworld": ("provider-failed", "InworldTTSService: authentication: .*401"),
            },
        ),
        (
            Fault.SILENT,
            {"assemblyai": ("idle", NOT_HEARD), "groq": ("idle", NOT_ANSWERED), "inworld": ("idle", NOT_SPOKEN)},
        ),
        (
            Fault.CLOSES,
            {
                "assemblyai": ("provider-failed", "AssemblyAISTTService: .*connection failed 3 times"),
                "groq": ("idle", "GroqLLMService: .*Connection error"),
                # Pipecat tells of it only where it has something left to send; it connects again and says nothing of what was lost.
                "inworld": ("idle", NOT_SPOKEN),
            },
        ),
        (
            Fault.BABBLES,
            {"assemblyai": ("idle", NOT_HEARD), "groq": ("idle", NOT_ANSWERED), "inworld": ("idle", NOT_SPOKEN)},
        ),
    ],
    ids=lambda value: str(value) if isinstance(value, Fault) else "",
)
async def test_a_provider_that_fails_for_good_is_in_the_summary_of_a_session_that_ends(
    livekit_program: Path, tmp_path: Path, question: Question, fault: Fault, expected: dict[str, tuple[str, str]]
) -> None:
    for provider, summary in (await each(livekit_program, tmp_path, question, fault)).items():
        reason, words = expected[provider]
        assert summary["reason"] == reason, (provider, summary)
        assert any(re.search(words, error) for error in summary["errors"]), (provider, summary)


async def test_a_call_goes_on_when_a_provider_that_broke_off_is_there_again(
    livekit_program: Path, tmp_path: Path, question: Question
) -> None:
    async def one(provider: str) -> None:
        async with talking(livekit_program, tmp_path / provider, question, provider_grace=10) as (
            providers,
            agent,
            caller,
        ):
            before = providers.connections[provider]
            providers.faults[provider] = Fault.CLOSES
            asking = asyncio.create_task(caller.say(*question))
            async with asyncio.timeout(30):
                # The broken request to the language model is one of these; a socket is opened again.
                while providers.connections[provider] == before:  # noqa: ASYNC110 - the double has no event for it
                    await asyncio.sleep(0.01)
            del providers.faults[provider]
            await asking
            spoken = len(providers.spoken)
            await caller.say(*question)
            async with asyncio.timeout(30):
                while providers.answers not in "".join(providers.spoken[spoken:]):
                    await caller.hear()
            await caller.leave()
            assert await reason_of(agent) == "caller-left"

    await asyncio.gather(*map(one, PROVIDERS))


async def test_a_language_model_that_never_answers_holds_up_the_pipeline_and_is_named(
    livekit_program: Path, tmp_path: Path, question: Question
) -> None:
    async with talking(livekit_program, tmp_path / "groq", question, stuck_timeout=8) as (providers, agent, caller):
        providers.faults["groq"] = Fault.SILENT
        await caller.say(*question)
        assert await reason_of(agent, timeout_seconds=60) == "stuck"
        assert "nothing has come through the pipeline for 8 s: GroqLLMService held it up" in agent.summary["errors"]
