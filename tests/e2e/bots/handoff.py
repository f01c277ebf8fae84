"""A bot of several workers, as Pipecat has them: one holds the call, two language models take turns in answering over the bus.

The desk answers first, and hands over to the expert when it is asked to. Neither hears nor speaks itself.
"""

from __future__ import annotations

import os
from typing import Any

from pipecat.audio.vad.silero import SileroVADAnalyzer
from pipecat.bus import BusBridgeProcessor
from pipecat.frames.frames import FunctionCallResultProperties, TTSSpeakFrame
from pipecat.pipeline.pipeline import Pipeline
from pipecat.pipeline.worker import PipelineWorker
from pipecat.processors.aggregators.llm_context import LLMContext
from pipecat.processors.aggregators.llm_response_universal import LLMContextAggregatorPair, LLMUserAggregatorParams
from pipecat.runner.types import RunnerArguments
from pipecat.runner.utils import create_transport
from pipecat.services.assemblyai.stt import AssemblyAISTTService
from pipecat.services.groq.llm import GroqLLMService
from pipecat.services.inworld.tts import InworldTTSService
from pipecat.services.llm_service import FunctionCallParams
from pipecat.transports.livekit.transport import LiveKitParams
from pipecat.workers.llm import LLMWorker, LLMWorkerActivationArgs, tool
from pipecat.workers.runner import WorkerRunner

CALL, DESK, EXPERT = "call", "desk", "expert"
GOODBYE = "We both have to go now. Goodbye!"

TRANSPORTS = {"livekit": lambda: LiveKitParams(audio_in_enabled=True, audio_out_enabled=True)}


def welcome(words: str) -> LLMWorkerActivationArgs:
    """What a language model is told when it takes over."""
    return LLMWorkerActivationArgs(messages=[{"role": "developer", "content": words}])


class Answers(LLMWorker):
    """A language model that answers for as long as it is its turn."""

    def __init__(self, name: str, prompt: str) -> None:
        llm = GroqLLMService(
            api_key=os.environ["GROQ_API_KEY"],
            base_url=os.environ["GROQ_URL"],
            settings=GroqLLMService.Settings(model="openai/gpt-oss-120b", system_instruction=prompt),
        )
        super().__init__(name, llm=llm, bridged=())


class Desk(Answers):
    """Knows who knows."""

    @tool  # type: ignore[untyped-decorator]
    async def ask_the_expert(self, params: FunctionCallParams) -> None:
        """Hand the caller over to the expert."""
        await params.result_callback("handed over", properties=FunctionCallResultProperties(run_llm=False))
        await self.activate_worker(EXPERT, args=welcome("Say that you have taken over."), deactivate_self=True)


async def bot(runner_args: RunnerArguments) -> None:
    """One call."""
    transport = await create_transport(runner_args, TRANSPORTS)
    runner = WorkerRunner(handle_sigint=runner_args.handle_sigint)
    aggregators = LLMContextAggregatorPair(
        LLMContext(), user_params=LLMUserAggregatorParams(vad_analyzer=SileroVADAnalyzer())
    )
    pipeline = Pipeline(
        [
            transport.input(),
            AssemblyAISTTService(
                api_key=os.environ["ASSEMBLYAI_API_KEY"], api_endpoint_base_url=os.environ["ASSEMBLYAI_URL"]
            ),
            aggregators.user(),
            BusBridgeProcessor(bus=runner.bus, worker_name=CALL),
            InworldTTSService(api_key=os.environ["INWORLD_API_KEY"], url=os.environ["INWORLD_URL"]),
            transport.output(),
            aggregators.assistant(),
        ]
    )
    call = PipelineWorker(pipeline, name=CALL)

    async def greet(_transport: Any, _client: Any) -> None:
        await call.activate_worker(DESK, args=welcome("Greet the caller."))

    async def hang_up(_transport: Any, _client: Any) -> None:
        await runner.cancel(reason="the caller left")

    transport.add_event_handler("on_client_connected", greet)
    transport.add_event_handler("on_client_disconnected", hang_up)
    await runner.add_workers(Desk(DESK, "You answer the door."), Answers(EXPERT, "You know everything."), call)
    await runner.run()


async def goodbye(worker: PipelineWorker, reason: str) -> None:
    """Last words, spoken by the worker that holds the call."""
    await worker.queue_frame(TTSSpeakFrame(GOODBYE))
