"""The keyless bot: local speech in and out, and a rule-based language model; no key, no network.

An ordinary Pipecat bot, like the reference bot. Its models are used once while it builds, so that no caller waits for
a first inference.
"""

from __future__ import annotations

import asyncio
import os
import re
from typing import Any

# Before the libraries that read them.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "2")

from pipecat.audio.turn.smart_turn.local_smart_turn_v3 import LocalSmartTurnAnalyzerV3
from pipecat.audio.vad.silero import SileroVADAnalyzer
from pipecat.frames.frames import TTSSpeakFrame
from pipecat.pipeline.pipeline import Pipeline
from pipecat.pipeline.worker import PipelineParams, PipelineWorker
from pipecat.processors.aggregators.llm_context import LLMContext
from pipecat.processors.aggregators.llm_response_universal import LLMContextAggregatorPair, LLMUserAggregatorParams
from pipecat.runner.types import RunnerArguments
from pipecat.runner.utils import create_transport
from pipecat.transports.livekit.transport import LiveKitParams
from pipecat.turns.user_stop import TurnAnalyzerUserTurnStopStrategy
from pipecat.turns.user_turn_strategies import UserTurnStrategies
from pipecat.workers.runner import WorkerRunner
from services import LocalRecognition, LocalSpeech, RuleBasedModel

TRANSPORTS = {"livekit": lambda: LiveKitParams(audio_in_enabled=True, audio_out_enabled=True)}

GREETING = "Hello!"
OFFER = "How can I help you?"
"""Prepared while building, so that the first words are there when the caller is."""


def greeting_for(body: Any) -> str:
    """The first words; with the caller's name, where the session brought one that can be spoken."""
    name = body.get("name") if isinstance(body, dict) else None
    if isinstance(name, str) and re.fullmatch(r"[\w' -]{1,40}", name):
        return f"{GREETING} Nice to meet you, {name}. {OFFER}"
    return f"{GREETING} {OFFER}"


async def bot(runner_args: RunnerArguments) -> None:
    """One conversation."""
    transport = await create_transport(runner_args, TRANSPORTS)
    recognition, speech = await asyncio.gather(asyncio.to_thread(LocalRecognition), asyncio.to_thread(LocalSpeech))
    await asyncio.gather(recognition.warm_up(), speech.prepare([GREETING, OFFER]))
    turns = UserTurnStrategies(stop=[TurnAnalyzerUserTurnStopStrategy(turn_analyzer=LocalSmartTurnAnalyzerV3())])
    aggregators = LLMContextAggregatorPair(
        LLMContext(),
        user_params=LLMUserAggregatorParams(vad_analyzer=SileroVADAnalyzer(), user_turn_strategies=turns),
    )
    pipeline = Pipeline(
        [
            transport.input(),
            recognition,
            aggregators.user(),
            RuleBasedModel(),
            speech,
            transport.output(),
            aggregators.assistant(),
        ]
    )
    worker = PipelineWorker(
        pipeline, params=PipelineParams(enable_metrics=True), idle_timeout_secs=runner_args.pipeline_idle_timeout_secs
    )

    @transport.event_handler("on_client_connected")
    async def greet(_transport: Any, _client: Any) -> None:
        await worker.queue_frame(TTSSpeakFrame(greeting_for(runner_args.body)))

    @transport.event_handler("on_client_disconnected")
    async def hang_up(_transport: Any, _client: Any) -> None:
        await worker.cancel(reason="the caller left")

    runner = WorkerRunner(handle_sigint=runner_args.handle_sigint)
    await runner.add_workers(worker)
    await runner.run()


if __name__ == "__main__":
    from pipecat.runner.run import main

    main()
