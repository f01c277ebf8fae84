"""A bot that can be called in four ways: from a browser over WebRTC or Daily, by telephone over Twilio, over LiveKit."""

from __future__ import annotations

from dotenv import load_dotenv
from pipecat.frames.frames import LLMRunFrame
from pipecat.pipeline.pipeline import Pipeline
from pipecat.pipeline.worker import PipelineParams, PipelineWorker
from pipecat.processors.aggregators.llm_context import LLMContext
from pipecat.runner.types import RunnerArguments
from pipecat.runner.utils import create_transport
from pipecat.transports.base_transport import TransportParams
from pipecat.transports.daily.transport import DailyParams
from pipecat.transports.livekit.transport import LiveKitParams
from pipecat.transports.websocket.fastapi import FastAPIWebsocketParams
from services import both_sides_of, language_model, run_until_hung_up, speech_to_text, text_to_speech

load_dotenv(override=True)

transport_params = {
    "daily": lambda: DailyParams(audio_in_enabled=True, audio_out_enabled=True),
    "livekit": lambda: LiveKitParams(audio_in_enabled=True, audio_out_enabled=True),
    "twilio": lambda: FastAPIWebsocketParams(audio_in_enabled=True, audio_out_enabled=True),
    "webrtc": lambda: TransportParams(audio_in_enabled=True, audio_out_enabled=True),
}


async def bot(runner_args: RunnerArguments) -> None:
    """One conversation."""
    transport = await create_transport(runner_args, transport_params)
    context = LLMContext([{"role": "developer", "content": "Greet the caller and ask what they would like."}])
    sides = both_sides_of(context)
    pipeline = Pipeline(
        [
            transport.input(),
            speech_to_text(),
            sides.user(),
            language_model(),
            text_to_speech(),
            transport.output(),
            sides.assistant(),
        ]
    )
    worker = PipelineWorker(
        pipeline,
        params=PipelineParams(enable_metrics=True, enable_usage_metrics=True),
        idle_timeout_secs=runner_args.pipeline_idle_timeout_secs,
    )
    await run_until_hung_up(worker, transport, runner_args, LLMRunFrame())


if __name__ == "__main__":
    from pipecat.runner.run import main

    main()
