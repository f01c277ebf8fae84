"""An agent's first words are for a caller who can hear them, over a real LiveKit server.

Who has joined a room hears nothing of it yet: connections have to be agreed on first, which on a busy machine or a slow line takes longer than a greeting.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from tests.e2e.bots import light
from tests.e2e.bound import bound_agent
from tests.e2e.caller import Caller
from tests.e2e.livekit_server import LiveKit
from tests.e2e.pools import BOTS

SLOW_TO_PUBLISH = """
import asyncio
from livekit import rtc

publish = rtc.LocalParticipant.publish_track


async def publish_slowly(*arguments):
    await asyncio.sleep(1)
    return await publish(*arguments)


rtc.LocalParticipant.publish_track = publish_slowly
"""
"""What a bot's module adds to be one with a slow line to LiveKit."""

GREETING_SECONDS = light.TONE_SECONDS


async def test_a_caller_who_is_late_to_listen_hears_the_greeting_from_its_beginning(
    livekit: LiveKit, tmp_path: Path
) -> None:
    async with (
        bound_agent(livekit, tmp_path, BOTS["light.py"]) as agent,
        Caller(livekit.url, livekit.token("caller", "room"), subscribes=False) as caller,
    ):
        await agent.get("/status?wait=joined")
        await caller.wait_until_listened_to()
        await asyncio.sleep(2 * GREETING_SECONDS)
        caller.subscribe()
        greeting = await caller.hear()
        assert greeting.seconds == pytest.approx(GREETING_SECONDS, abs=0.1)


async def test_a_caller_who_waits_in_the_room_is_greeted_as_soon_as_the_agent_is_there(
    livekit: LiveKit, tmp_path: Path
) -> None:
    async with (
        Caller(livekit.url, livekit.token("caller", "room")) as caller,
        bound_agent(livekit, tmp_path, BOTS["light.py"]) as agent,
    ):
        greeting = await caller.hear()
        assert greeting.seconds == pytest.approx(GREETING_SECONDS, abs=0.1)
        assert "nobody in the room has subscribed" not in agent.log


async def test_a_caller_who_comes_while_the_agent_publishes_its_voice_is_greeted_once(
    livekit: LiveKit, tmp_path: Path
) -> None:
    async with bound_agent(livekit, tmp_path, BOTS["light.py"] + SLOW_TO_PUBLISH) as agent:
        while "Connected to room" not in agent.log:  # noqa: ASYNC110 - a line of a log is no event
            await asyncio.sleep(0.02)
        async with Caller(livekit.url, livekit.token("caller", "room")) as caller:
            greeting = await caller.hear()
            assert greeting.seconds == pytest.approx(GREETING_SECONDS, abs=0.1)
