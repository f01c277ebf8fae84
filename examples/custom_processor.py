"""A bot with a processor of its own: long numbers, such as those of cards, never reach the language model."""

from __future__ import annotations

import re

from pipecat.frames.frames import Frame, TranscriptionFrame, TTSSpeakFrame
from pipecat.pipeline.pipeline import Pipeline
from pipecat.pipeline.worker import PipelineWorker
from pipecat.processors.aggregators.llm_context import LLMContext
from pipecat.processors.frame_processor import FrameDirection, FrameProcessor
from pipecat.runner.types import RunnerArguments
from pipecat.runner.utils import create_transport
from pipecat.transports.base_transport import TransportParams
from pipecat.transports.websocket.fastapi import FastAPIWebsocketParams
from services import both_sides_of, language_model, run_until_hung_up, speech_to_text, text_to_speech

transport_params = {
    "twilio": lambda: FastAPIWebsocketParams(audio_in_enabled=True, audio_out_enabled=True),
    "webrtc": lambda: TransportParams(audio_in_enabled=True, audio_out_enabled=True),
}

LONG_NUMBER = re.compile(r"\d(?:[ -]?\d){6,}")


class HideNumbers(FrameProcessor):
    """Replaces long numbers in what the caller has said."""

    async def process_frame(self, frame: Frame, direction: FrameDirection) -> None:
        """See Pipecat."""
        await super().process_frame(frame, direction)
        if isinstance(frame, TranscriptionFrame):
            frame.text = LONG_NUMBER.sub("(a number)", frame.text)
        await self.push_frame(frame, direction)


async def bot(runner_args: RunnerArguments) -> None:
    """One conversation."""
    transport = await create_transport(runner_args, transport_params)
    sides = both_sides_of(LLMContext())
    pipeline = Pipeline(
        [
            transport.input(),
            speech_to_text(),
            HideNumbers(),
            sides.user(),
            language_model(),
            text_to_speech(),
            transport.output(),
            sides.assistant(),
        ]
    )
    worker = PipelineWorker(pipeline, idle_timeout_secs=runner_args.pipeline_idle_timeout_secs)
    await run_until_hung_up(worker, transport, runner_args, TTSSpeakFrame("Hello, how would you like to pay?"))


if __name__ == "__main__":
    from pipecat.runner.run import main

    main()
