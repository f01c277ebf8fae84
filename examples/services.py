"""What the bots of this folder have in common: AssemblyAI, Groq and Inworld by the keys in the environment."""

from __future__ import annotations

import os
from typing import Any

from pipecat.audio.vad.silero import SileroVADAnalyzer
from pipecat.frames.frames import Frame
from pipecat.pipeline.worker import PipelineWorker
from pipecat.processors.aggregators.llm_context import LLMContext
from pipecat.processors.aggregators.llm_response_universal import LLMContextAggregatorPair, LLMUserAggregatorParams
from pipecat.runner.types import RunnerArguments
from pipecat.services.assemblyai.stt import AssemblyAISTTService
from pipecat.services.groq.llm import GroqLLMService
from pipecat.services.inworld.tts import InworldTTSService
from pipecat.transports.base_transport import BaseTransport
from pipecat.workers.runner import WorkerRunner

INSTRUCTION = "You answer the telephone of a small hotel. Speak in one or two short sentences, without markup."


def speech_to_text() -> AssemblyAISTTService:
    """AssemblyAI."""
    return AssemblyAISTTService(
        api_key=os.environ["ASSEMBLYAI_API_KEY"],
        api_endpoint_base_url=os.getenv("ASSEMBLYAI_URL", "wss://streaming.assemblyai.com/v3/ws"),
    )


def language_model(instruction: str = INSTRUCTION) -> GroqLLMService:
    """Groq."""
    return GroqLLMService(
        api_key=os.environ["GROQ_API_KEY"],
        base_url=os.getenv("GROQ_URL", "https://api.groq.com/openai/v1"),
        settings=GroqLLMService.Settings(model="openai/gpt-oss-120b", system_instruction=instruction),
    )


def text_to_speech() -> InworldTTSService:
    """Inworld."""
    return InworldTTSService(
        api_key=os.environ["INWORLD_API_KEY"],
        url=os.getenv("INWORLD_URL", "wss://api.inworld.ai/tts/v1/voice:streamBidirectional"),
        settings=InworldTTSService.Settings(model="inworld-tts-2", voice="Ashley"),
    )


def both_sides_of(context: LLMContext) -> LLMContextAggregatorPair:
    """What writes down in the context what the caller and the bot say; Silero tells when the caller speaks."""
    return LLMContextAggregatorPair(context, user_params=LLMUserAggregatorParams(vad_analyzer=SileroVADAnalyzer()))


async def run_until_hung_up(
    worker: PipelineWorker, transport: BaseTransport, runner_args: RunnerArguments, *first: Frame
) -> None:
    """Run the pipeline; `first` goes into it when somebody is there."""
    runner = WorkerRunner(handle_sigint=runner_args.handle_sigint)
    await runner.add_workers(worker)

    @transport.event_handler("on_client_connected")
    async def begin(_transport: BaseTransport, _client: Any) -> None:
        await worker.queue_frames(list(first))

    @transport.event_handler("on_client_disconnected")
    async def end(_transport: BaseTransport, _client: Any) -> None:
        await runner.cancel()

    await runner.run()
