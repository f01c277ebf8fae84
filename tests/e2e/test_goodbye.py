"""The end of a call that somebody orders: what the caller still hears, and that it does end, whatever the bot does."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from tests.e2e.agent_process import BOTS
from tests.e2e.bound import QUIET_BOT, SESSION, bound_agent, reason_of
from tests.e2e.caller import HEARD_RATE, Caller
from tests.e2e.livekit_server import LiveKit
from tests.e2e.providers import SECONDS_PER_CHARACTER, Providers

RATE = 24_000
TONE_SECONDS = 0.6

TONE = f"""
import asyncio, math, os
from array import array
from pipecat.frames.frames import OutputAudioRawFrame

def tone(seconds):
    steps = range(round({RATE} * seconds))
    samples = array("h", (round(8000 * math.sin(2 * math.pi * 440 * step / {RATE})) for step in steps))
    return OutputAudioRawFrame(audio=samples.tobytes(), sample_rate={RATE}, num_channels=1)
"""

SAYS_GOODBYE = f"""
async def goodbye(worker, reason):
    print(f"goodbye for {{reason}}")
    await worker.queue_frame(tone({TONE_SECONDS}))
"""
RAISES = """
async def goodbye(worker, reason):
    raise ValueError("no words")
"""
HANGS = """
async def goodbye(worker, reason):
    await asyncio.Event().wait()
"""
TALKS_ON = """
async def goodbye(worker, reason):
    await worker.queue_frame(tone(30))
"""


def caller(livekit: LiveKit) -> Caller:
    return Caller(livekit.url, livekit.token("caller", "room"))


async def hears_a_goodbye(someone: Caller) -> bool:
    """Whether a whole tone is heard."""
    return (await someone.hear(timeout_seconds=10, silence_seconds=0.3)).seconds > 0.9 * TONE_SECONDS


async def test_a_bot_with_a_goodbye_says_it_when_its_session_is_drained(livekit: LiveKit, tmp_path: Path) -> None:
    bot = QUIET_BOT + TONE + SAYS_GOODBYE
    async with bound_agent(livekit, tmp_path, bot) as agent, caller(livekit) as someone:
        await someone.wait_until_connected()
        assert (await agent.end(SESSION, "drain"))[0] == 202
        assert await hears_a_goodbye(someone)
        assert await reason_of(agent) == "drained"
        assert agent.summary["errors"] == []
        assert "goodbye for drained" in agent.log


async def test_the_reference_bot_says_its_goodbye_in_its_own_voice(livekit: LiveKit, tmp_path: Path) -> None:
    async with (
        Providers() as providers,
        bound_agent(livekit, tmp_path, BOTS / "reference" / "bot.py", providers.environment) as agent,
        caller(livekit) as someone,
    ):
        await someone.first_audio()
        await agent.end(SESSION, "drain")
        assert await reason_of(agent) == "drained"
        assert [text.strip() for text in providers.spoken] == [
            "Hello, how can I help you?",
            "I have to go now. Goodbye!",
        ]
        said_seconds = sum(len(text) for text in providers.spoken) * SECONDS_PER_CHARACTER
        assert len(someone.pcm) / 2 / HEARD_RATE > said_seconds


async def test_nobody_is_said_goodbye_to_in_an_empty_room(livekit: LiveKit, tmp_path: Path) -> None:
    async with bound_agent(livekit, tmp_path, QUIET_BOT + TONE + SAYS_GOODBYE) as agent:
        await agent.wait_until_state("joined")
        await agent.end(SESSION, "drain")
        assert await reason_of(agent) == "drained"
        assert "goodbye for" not in agent.log


async def test_the_maximum_duration_ends_with_a_goodbye(livekit: LiveKit, tmp_path: Path) -> None:
    bot = QUIET_BOT + TONE + SAYS_GOODBYE
    async with bound_agent(livekit, tmp_path, bot, max_duration=2) as agent, caller(livekit) as someone:
        assert await hears_a_goodbye(someone)
        assert await reason_of(agent) == "max-duration"


# A goodbye that goes wrong


@pytest.mark.parametrize(
    ("goodbye", "words"),
    [
        (RAISES, "bot.py failed: ValueError: no words (line "),
        (HANGS, "goodbye() did not return within 3 s"),
        (TALKS_ON, "did not come to its end within 3 s"),
    ],
    ids=["raises", "hangs", "talks on"],
)
async def test_a_goodbye_that_goes_wrong_is_an_error_of_a_session_that_ends_all_the_same(
    livekit: LiveKit, tmp_path: Path, goodbye: str, words: str
) -> None:
    async with (
        bound_agent(livekit, tmp_path, QUIET_BOT + TONE + goodbye, drain_timeout=3) as agent,
        caller(livekit) as someone,
    ):
        await someone.wait_until_connected()
        await agent.end(SESSION, "drain")
        assert await reason_of(agent, timeout_seconds=10) == "drained"
        (error,) = agent.summary["errors"]
        assert words in error


async def test_a_cancel_does_not_wait_for_a_goodbye_that_is_being_said(livekit: LiveKit, tmp_path: Path) -> None:
    bot = QUIET_BOT + TONE + TALKS_ON
    async with bound_agent(livekit, tmp_path, bot, drain_timeout=60) as agent, caller(livekit) as someone:
        await someone.wait_until_connected()
        await agent.end(SESSION, "drain")
        await someone.first_audio()
        assert (await agent.end(SESSION, "cancel"))[0] == 202
        assert await reason_of(agent, timeout_seconds=10) == "drained"


async def test_a_caller_who_leaves_while_a_goodbye_is_said_ends_it(livekit: LiveKit, tmp_path: Path) -> None:
    bot = QUIET_BOT + TONE + TALKS_ON
    async with bound_agent(livekit, tmp_path, bot, drain_timeout=60, caller_left_grace=0.2) as agent:
        async with caller(livekit) as someone:
            await someone.wait_until_connected()
            await agent.end(SESSION, "drain")
            await someone.first_audio()
        assert await reason_of(agent, timeout_seconds=10) == "drained"


# SIGTERM


async def test_a_bound_agent_that_is_told_to_stop_refuses_other_calls_and_says_goodbye_before_it_would_be_killed(
    livekit: LiveKit, tmp_path: Path
) -> None:
    bot, grace = QUIET_BOT + TONE + SAYS_GOODBYE, {"VOICEPOOL_TERMINATION_GRACE_SECONDS": "9"}
    async with bound_agent(livekit, tmp_path, bot, grace, drain_timeout=3.5) as agent, caller(livekit) as someone:
        await someone.wait_until_connected()
        async with asyncio.timeout(9):
            agent.process.terminate()
            refusal = await agent.bind(session="s-2", room="r-2", url=livekit.url, token="another")
            assert (refusal[0], refusal[1]["code"]) == (409, "ALREADY_BOUND")
            assert (await agent.get("/readyz"))[0] == 503
            assert (await agent.get("/status"))[1]["state"] == "joined"
            assert await hears_a_goodbye(someone)
            assert await reason_of(agent) == "drained"


async def test_a_call_that_ends_before_the_grace_is_over_ends_by_itself(livekit: LiveKit, tmp_path: Path) -> None:
    bot, grace = QUIET_BOT + TONE + SAYS_GOODBYE, {"VOICEPOOL_TERMINATION_GRACE_SECONDS": "7260"}
    async with bound_agent(livekit, tmp_path, bot, grace, caller_left_grace=0.2) as agent:
        async with caller(livekit) as someone:
            await someone.wait_until_connected()
            agent.process.terminate()
            assert (await agent.get("/status"))[1]["state"] == "joined"
        assert await reason_of(agent) == "caller-left"
        assert "goodbye for" not in agent.log
