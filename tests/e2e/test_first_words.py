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
