"""The keyless bot in a real call: local speech in and out, nothing outside of this machine."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from tests.e2e.agent_process import BOTS, run_agent
from tests.e2e.caller import Caller
from tests.e2e.conversation import hear_out, offers_help, says_opening_hours
from tests.e2e.livekit_server import LiveKit

# Its speech models compute as much as three agents do.
pytestmark = pytest.mark.crowded

KEYLESS_BOT = BOTS / "keyless" / "bot.py"

Speech = Callable[[str], Awaitable[tuple[bytes, int]]]


async def test_the_keyless_bot_understands_a_question_and_answers_it(
    livekit: LiveKit, speech: Speech, tmp_path: Path
) -> None:
    question = await speech("What are your opening hours?")
    async with run_agent(KEYLESS_BOT, tmp_path) as agent:
        await agent.wait_until_ready()
        token = livekit.token("agent", "room", agent=True)
        await agent.bind(session="s-1", room="room", url=livekit.url, token=token, body={"name": "Ada"})
        async with Caller(livekit.url, livekit.token("caller", "room")) as caller:
            await hear_out(await caller.hear(), caller.hear, offers_help)
            await caller.say(*question)
            await hear_out(await caller.hear(), caller.hear, says_opening_hours)
            caller.write_wav(tmp_path / "call.wav")
        assert await agent.exit_code() == 0
        assert agent.summary["errors"] == []
        assert "opening hours" not in agent.log.lower()
