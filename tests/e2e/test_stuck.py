"""Agents that hang in a call: what the caller is spared, and what is written down."""

from __future__ import annotations

import asyncio
from pathlib import Path

from tests.e2e.agent_process import AgentProcess
from tests.e2e.bound import QUIET_BOT, bound_agent, reason_of
from tests.e2e.caller import Caller
from tests.e2e.livekit_server import LiveKit

HANGS = """
import asyncio
from pipecat.frames.frames import TextFrame
from pipecat.processors.frame_processor import FrameProcessor

class NeverComesBack(FrameProcessor):
    async def process_frame(self, frame, direction):
        await super().process_frame(frame, direction)
        if isinstance(frame, TextFrame):
            await asyncio.Event().wait()
        await self.push_frame(frame, direction)
"""


def changed(source: str, *changes: tuple[str, str]) -> str:
    """The source with each first text replaced by the second; it must be there."""
    for old, new in changes:
        assert old in source
        source = source.replace(old, new)
    return source


HANGING_BOT = HANGS + changed(
    QUIET_BOT,
    ("transport.input(), transport.output()", "transport.input(), NeverComesBack(), transport.output()"),
    (
        "    runner = WorkerRunner",
        """
    @transport.event_handler("on_client_connected")
    async def greet(_transport, _client):
        await worker.queue_frame(TextFrame("words"))

    runner = WorkerRunner""",
    ),
)


BLOCKING_BOT = "import time\n" + changed(
    HANGING_BOT, ('await worker.queue_frame(TextFrame("words"))', "time.sleep(60)"), ("NeverComesBack(), ", "")
)
BLOCKING_LINE = BLOCKING_BOT.splitlines().index("        time.sleep(60)") + 1


async def ended(agent: AgentProcess, caller: Caller, reason: str) -> None:
    """The session ends with this reason, and the caller is not left alone with it."""
    assert await reason_of(agent) == reason
    async with asyncio.timeout(5):
        await caller.agent_left.wait()


async def test_a_pipeline_that_is_stuck_ends_the_session_with_the_processor_that_holds_it_up(
    livekit: LiveKit, tmp_path: Path
) -> None:
    async with (
        bound_agent(livekit, tmp_path, HANGING_BOT, stuck_timeout=3) as agent,
        Caller(livekit.url, livekit.token("caller", "room")) as caller,
    ):
        await ended(agent, caller, "stuck")
        assert agent.summary["errors"] == ["nothing has come through the pipeline for 3 s: NeverComesBack held it up"]


async def test_a_pipeline_that_moves_is_left_alone_however_quiet_it_is(livekit: LiveKit, tmp_path: Path) -> None:
    async with (
        bound_agent(livekit, tmp_path, QUIET_BOT, stuck_timeout=2, max_duration=8) as agent,
        Caller(livekit.url, livekit.token("caller", "room")) as caller,
    ):
        await ended(agent, caller, "max-duration")
        assert agent.summary["errors"] == []


async def test_a_bot_that_holds_up_the_event_loop_in_the_call_is_given_up_with_its_line(
    livekit: LiveKit, tmp_path: Path
) -> None:
    limit = {"VOICEPOOL_BLOCKED_TIMEOUT_SECONDS": "3"}
    async with (
        bound_agent(livekit, tmp_path, BLOCKING_BOT, limit) as agent,
        Caller(livekit.url, livekit.token("caller", "room")) as caller,
    ):
        await ended(agent, caller, "stuck")
        (error,) = agent.summary["errors"]
        assert f"has held up the event loop for 3 s in line {BLOCKING_LINE} of bot.py" in error
        assert f"held up by line {BLOCKING_LINE} of bot.py" in agent.log
