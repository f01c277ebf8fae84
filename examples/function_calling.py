"""A bot whose language model looks things up: it calls a function, and answers with what the function found."""

from __future__ import annotations

from pipecat.frames.frames import TTSSpeakFrame
from pipecat.pipeline.pipeline import Pipeline
from pipecat.pipeline.worker import PipelineWorker
from pipecat.processors.aggregators.llm_context import LLMContext
from pipecat.runner.types import RunnerArguments
from pipecat.runner.utils import create_transport
from pipecat.services.llm_service import FunctionCallParams
from pipecat.transports.base_transport import TransportParams
from pipecat.transports.daily.transport import DailyParams
from services import both_sides_of, language_model, run_until_hung_up, speech_to_text, text_to_speech

transport_params = {
    "daily": lambda: DailyParams(audio_in_enabled=True, audio_out_enabled=True),
    "webrtc": lambda: TransportParams(audio_in_enabled=True, audio_out_enabled=True),
}

FREE_ROOMS = {"monday": 4, "tuesday": 0}


async def free_rooms(params: FunctionCallParams, weekday: str) -> None:
    """Look up how many rooms are free.

    Args:
        weekday: The day of the week, in English.
    """
    await params.result_callback({"weekday": weekday, "free": FREE_ROOMS.get(weekday.lower(), 1)})


async def bot(runner_args: RunnerArguments) -> None:
    """One conversation."""
    transport = await create_transport(runner_args, transport_params)
    sides = both_sides_of(LLMContext(tools=[free_rooms]))
    model, voice = language_model(), text_to_speech()

    @model.event_handler("on_function_calls_started")
    async def bridge(_model: object, _calls: object) -> None:
        await voice.queue_frame(TTSSpeakFrame("One moment, I am looking."))

    pipeline = Pipeline(
        [
            transport.input(),
            speech_to_text(),
            sides.user(),
            model,
            voice,
            transport.output(),
            sides.assistant(),
        ]
    )
    worker = PipelineWorker(pipeline, idle_timeout_secs=runner_args.pipeline_idle_timeout_secs)
    await run_until_hung_up(worker, transport, runner_args, TTSSpeakFrame("Hello, how can I help you?"))


if __name__ == "__main__":
    from pipecat.runner.run import main

    main()
