"""An agent around a small bot, bound to a room of a LiveKit server: what tests of a session's end begin with."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

from tests.e2e.agent_process import AgentProcess, run_agent
from tests.e2e.livekit_server import LiveKit

QUIET_BOT = """
from pipecat.pipeline.pipeline import Pipeline
from pipecat.pipeline.worker import PipelineWorker
from pipecat.runner.utils import create_transport
from pipecat.transports.livekit.transport import LiveKitParams
from pipecat.workers.runner import WorkerRunner

async def bot(runner_args):
    transport = await create_transport(
        runner_args, {"livekit": lambda: LiveKitParams(audio_in_enabled=True, audio_out_enabled=True)}
    )
    worker = PipelineWorker(
        Pipeline([transport.input(), transport.output()]), idle_timeout_secs=runner_args.pipeline_idle_timeout_secs
    )
    runner = WorkerRunner(handle_sigint=runner_args.handle_sigint)
    await runner.add_workers(worker)
    await runner.run()
"""
"""It says nothing, and does not care whether anybody is there: all ends are the host's."""

ROOM, SESSION = "room", "s-1"


@contextlib.asynccontextmanager
async def bound_agent(
    livekit: LiveKit,
    folder: Path,
    bot: str | Path = QUIET_BOT,
    environment: Mapping[str, str] | None = None,
    **limits: float,
) -> AsyncIterator[AgentProcess]:
    """An agent that is bound to `room`, and may not have joined it yet.

    Args:
        livekit: the room's server.
        folder: for the bot, the log and the termination message.
        bot: its source, or its path.
        environment: more variables.
        limits: seconds of `VOICEPOOL_SESSION_<NAME>_SECONDS`, by name in small letters.
    """
    if isinstance(bot, str):
        (folder / "bot.py").write_text(bot)
        bot = Path("bot.py")
    variables = {f"VOICEPOOL_SESSION_{name.upper()}_SECONDS": str(value) for name, value in limits.items()}
    async with run_agent(bot, folder, {**variables, **(environment or {})}) as agent:
        await agent.wait_until_ready()
        token = livekit.token("agent", ROOM, agent=True)
        await agent.bind(session=SESSION, room=ROOM, url=livekit.url, token=token)
        yield agent


async def reason_of(agent: AgentProcess, timeout_seconds: float = 30.0) -> str:
    """Why the session ended, once the process has exited, which it must with 0."""
    assert await agent.exit_code(timeout_seconds) == 0
    return str(agent.summary["reason"])
