"""The reference bot: LiveKit, Silero VAD, Smart Turn v3, AssemblyAI, Groq, Inworld.

An ordinary Pipecat bot: nothing in it knows about pools, and it runs in Pipecat's own runner as it is (`python bot.py
-t livekit`). Keys, models, voice and prompt come from the environment; the caller's `name` comes with the session.
"""

from __future__ import annotations

import os
from typing import Any

from pipecat.audio.turn.smart_turn.local_smart_turn_v3 import LocalSmartTurnAnalyzerV3
from pipecat.audio.vad.silero import SileroVADAnalyzer
from pipecat.frames.frames import TTSSpeakFrame
from pipecat.pipeline.pipeline import Pipeline
from pipecat.pipeline.worker import PipelineParams, PipelineWorker
from pipecat.processors.aggregators.llm_context import LLMContext
from pipecat.processors.aggregators.llm_response_universal import LLMContextAggregatorPair, LLMUserAggregatorParams
from pipecat.runner.types import RunnerArguments
from pipecat.runner.utils import create_transport
from pipecat.services.assemblyai.stt import AssemblyAISTTService
from pipecat.services.groq.llm import GroqLLMService
from pipecat.services.inworld.tts import InworldTTSService
from pipecat.transports.livekit.transport import LiveKitParams
from pipecat.turns.user_stop import TurnAnalyzerUserTurnStopStrategy
from pipecat.turns.user_turn_strategies import UserTurnStrategies
from pipecat.workers.runner import WorkerRunner

KEYS = ("ASSEMBLYAI_API_KEY", "GROQ_API_KEY", "INWORLD_API_KEY")

PROMPT = (
    "You are a friendly voice assistant on a phone call. Answer in one or two short spoken sentences, "
    "without lists, markup or emoji. When you do not know, say so."
)

TRANSPORTS = {"livekit": lambda: LiveKitParams(audio_in_enabled=True, audio_out_enabled=True)}


class MissingKeys(Exception):
    """The bot cannot work without its keys."""


def read_keys() -> list[str]:
    """The three API keys, in the order of `KEYS`.

    Raises:
        MissingKeys: some are not set; the message names all of them, and where they come from.
    """
    missing = [name for name in KEYS if not os.environ.get(name)]
    if missing:
        raise MissingKeys(
            f"set {', '.join(missing)} in the Secret that spec.template.spec.containers[agent].envFrom names"
        )
    return [os.environ[name] for name in KEYS]


def setting(name: str, default: str) -> str:
    """A variable of the environment; an empty one counts as not set."""
    return os.environ.get(name) or default


async def bot(runner_args: RunnerArguments) -> None:
    """One conversation."""
    assemblyai_key, groq_key, inworld_key = read_keys()
    transport = await create_transport(runner_args, TRANSPORTS)
    speech_to_text = AssemblyAISTTService(
        api_key=assemblyai_key,
        api_endpoint_base_url=setting("ASSEMBLYAI_URL", "wss://streaming.assemblyai.com/v3/ws"),
        settings=AssemblyAISTTService.Settings(model=setting("ASSEMBLYAI_MODEL", "universal-3-6-pro")),
    )
    language_model = GroqLLMService(
        api_key=groq_key,
        base_url=setting("GROQ_URL", "https://api.groq.com/openai/v1"),
        settings=GroqLLMService.Settings(
            model=setting("GROQ_MODEL", "openai/gpt-oss-120b"), system_instruction=setting("SYSTEM_PROMPT", PROMPT)
        ),
    )
    text_to_speech = InworldTTSService(
        api_key=inworld_key,
        url=setting("INWORLD_URL", "wss://api.inworld.ai/tts/v1/voice:streamBidirectional"),
        settings=InworldTTSService.Settings(
            model=setting("INWORLD_MODEL", "inworld-tts-2"), voice=setting("INWORLD_VOICE", "Ashley")
        ),
    )
    turns = UserTurnStrategies(stop=[TurnAnalyzerUserTurnStopStrategy(turn_analyzer=LocalSmartTurnAnalyzerV3())])
    aggregators = LLMContextAggregatorPair(
        LLMContext(),
        user_params=LLMUserAggregatorParams(vad_analyzer=SileroVADAnalyzer(), user_turn_strategies=turns),
    )
    pipeline = Pipeline(
        [
            transport.input(),
            speech_to_text,
            aggregators.user(),
            language_model,
            text_to_speech,
            transport.output(),
            aggregators.assistant(),
        ]
    )
    worker = PipelineWorker(
        pipeline,
        params=PipelineParams(enable_metrics=True, enable_usage_metrics=True),
        idle_timeout_secs=runner_args.pipeline_idle_timeout_secs,
    )

    @transport.event_handler("on_client_connected")
    async def greet(_transport: Any, _client: Any) -> None:
        name = (runner_args.body or {}).get("name")
        await worker.queue_frame(
            TTSSpeakFrame(f"Hello {name}, how can I help you?" if name else "Hello, how can I help you?")
        )

    @transport.event_handler("on_client_disconnected")
    async def hang_up(_transport: Any, _client: Any) -> None:
        await worker.cancel(reason="the caller left")

    runner = WorkerRunner(handle_sigint=runner_args.handle_sigint)
    await runner.add_workers(worker)
    await runner.run()


async def goodbye(worker: PipelineWorker, reason: str) -> None:
    """The last words of a session that voicepool ends; Pipecat's own runner does not know of it."""
    await worker.queue_frame(TTSSpeakFrame("I have to go now. Goodbye!"))


if __name__ == "__main__":
    from pipecat.runner.run import main

    main()
