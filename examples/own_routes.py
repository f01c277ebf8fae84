"""A bot with HTTP routes of its own, as on Pipecat Cloud: a colleague can whisper to the model, or have the bot speak."""

from __future__ import annotations

from fastapi import HTTPException
from pipecat.frames.frames import LLMMessagesAppendFrame, TTSSpeakFrame
from pipecat.pipeline.pipeline import Pipeline
from pipecat.pipeline.worker import PipelineWorker
from pipecat.processors.aggregators.llm_context import LLMContext
from pipecat.runner.types import RunnerArguments
from pipecat.runner.utils import create_transport
from pipecat.transports.daily.transport import DailyParams
from pipecatcloud_system import app
from pydantic import BaseModel
from services import both_sides_of, language_model, run_until_hung_up, speech_to_text, text_to_speech

transport_params = {"daily": lambda: DailyParams(audio_in_enabled=True, audio_out_enabled=True)}

context = LLMContext()
worker: PipelineWorker | None = None


class Text(BaseModel):
    """What to say or to know."""

    text: str


def running() -> PipelineWorker:
    """The pipeline of this conversation."""
    if worker is None:
        raise HTTPException(503, "there is no conversation yet")
    return worker


@app.get("/messages")
async def messages() -> dict[str, int]:
    """How many messages the conversation has."""
    return {"messages": len(context.get_messages())}


@app.post("/say")
async def say(what: Text) -> dict[str, bool]:
    """Have the bot say something."""
    await running().queue_frame(TTSSpeakFrame(what.text))
    return {"queued": True}


@app.post("/whisper")
async def whisper(what: Text) -> dict[str, bool]:
    """Tell the model something that the caller does not hear."""
    message = {"role": "developer", "content": what.text}
    await running().queue_frame(LLMMessagesAppendFrame(messages=[message], run_llm=False))
    return {"queued": True}


async def bot(runner_args: RunnerArguments) -> None:
    """One conversation."""
    global worker  # a process has one conversation
    transport = await create_transport(runner_args, transport_params)
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
    worker = PipelineWorker(pipeline, idle_timeout_secs=runner_args.pipeline_idle_timeout_secs)
    await run_until_hung_up(worker, transport, runner_args, TTSSpeakFrame("Hello, how can I help you?"))
