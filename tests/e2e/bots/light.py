"""A bot of a few lines for tests that need many agents: a real pipeline in a real room, which greets with a tone.

It has no models, so that ten of them fit on two cores. Its `readyz()` can be broken: while the file `BROKEN` exists,
or from the start with LIGHT_BOT_READY=no. With LIGHT_BOT_ROUTES=yes it has a route of its own, `/session`.
"""

from __future__ import annotations

import math
import os
from array import array
from pathlib import Path
from typing import Any

from pipecat.frames.frames import OutputAudioRawFrame
from pipecat.pipeline.pipeline import Pipeline
from pipecat.pipeline.worker import PipelineWorker
from pipecat.runner.types import RunnerArguments
from pipecat.runner.utils import create_transport
from pipecat.transports.livekit.transport import LiveKitParams
from pipecat.workers.runner import WorkerRunner

BROKEN = Path("/tmp/broken")
RATE = 24_000
TONE_SECONDS = 0.8
TONE_HERTZ = 440
LOUDNESS = 8_000

TRANSPORTS = {
    "livekit": lambda: LiveKitParams(audio_in_enabled=True, audio_out_enabled=True, audio_out_sample_rate=RATE)
}


def readyz() -> bool:
    """Whether it wants a caller."""
    return os.environ.get("LIGHT_BOT_READY") != "no" and not BROKEN.exists()


def tone() -> bytes:
    """16-bit samples."""
    steps = range(round(RATE * TONE_SECONDS))
    return array("h", (round(LOUDNESS * math.sin(2 * math.pi * TONE_HERTZ * step / RATE)) for step in steps)).tobytes()


async def bot(runner_args: RunnerArguments) -> None:
    """One call."""
    transport = await create_transport(runner_args, TRANSPORTS)
    worker = PipelineWorker(
        Pipeline([transport.input(), transport.output()]), idle_timeout_secs=runner_args.pipeline_idle_timeout_secs
    )

    async def greet(_transport: Any, _client: Any) -> None:
        await worker.queue_frame(OutputAudioRawFrame(audio=tone(), sample_rate=RATE, num_channels=1))

    async def hang_up(_transport: Any, _client: Any) -> None:
        await worker.cancel(reason="the caller left")

    transport.add_event_handler("on_client_connected", greet)
    transport.add_event_handler("on_client_disconnected", hang_up)
    if os.environ.get("LIGHT_BOT_ROUTES"):
        from pipecatcloud_system import app  # type: ignore[import-not-found]  # 8 MB, which ten agents do without

        app.add_api_route("/session", lambda: {"session": runner_args.session_id})
    runner = WorkerRunner(handle_sigint=runner_args.handle_sigint)
    await runner.add_workers(worker)
    await runner.run()
