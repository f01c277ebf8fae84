"""Uses once, before any caller, what is slow the first time: each model, and LiveKit's native library.

What a bot has built is used itself; of a bot that is only imported it is known which kinds of models it imports.

Invariants: a model that fails here fails the build (it would fail the caller); warming opens no connection. The
models' inferences are short (under 0.1 s each) and run in a thread, beside the native library's start.
"""

from __future__ import annotations

import asyncio
import importlib
import sys
from collections.abc import Sequence

from livekit import rtc
from pipecat.audio.turn.smart_turn.local_smart_turn_v3 import LocalSmartTurnAnalyzerV3
from pipecat.audio.vad.vad_analyzer import VADAnalyzer
from pipecat.pipeline.worker import PipelineWorker

from voicepool_agent import pipecat_private

VAD_RATE = 16_000

SILERO = "pipecat.audio.vad.silero"
USER_TURNS = "pipecat.turns.user_turn_strategies"
"""Whoever imports this has Smart Turn, unless it is told to take something else."""
OPENAI = "openai"
OPENAI_CHAT = "openai.resources.chat.completions"


async def warm_up(workers: Sequence[PipelineWorker]) -> list[str]:
    """Warm what the workers' pipelines hold; returns what was warmed, in words."""
    vads = [analyzer for worker in workers for analyzer in pipecat_private.vad_analyzers(worker)]
    turns = [analyzer for worker in workers for analyzer in pipecat_private.smart_turn_analyzers(worker)]
    for client in (client for worker in workers for client in pipecat_private.openai_clients(worker)):
        client.chat.completions  # noqa: B018 - the first use imports it: 0.03 s of the caller's first turn
    models = asyncio.to_thread(_infer, vads, turns)
    _, names = await asyncio.gather(_start_native_library(), models)
    return ["LiveKit", *names]


async def warm_up_imported() -> list[str]:
    """Warm what a bot needs that is imported and not built; returns what was warmed, in words.

    A model is loaded and used, and let go: the bot makes its own, from files that are in the memory of the machine
    and with libraries that have started their threads.
    """
    if OPENAI in sys.modules:
        importlib.import_module(OPENAI_CHAT)
    models = asyncio.to_thread(_load_and_infer, silero=SILERO in sys.modules, smart_turn=USER_TURNS in sys.modules)
    _, names = await asyncio.gather(_start_native_library(), models)
    return ["LiveKit", *names]


def _load_and_infer(*, silero: bool, smart_turn: bool) -> list[str]:
    vads: list[VADAnalyzer] = [importlib.import_module(SILERO).SileroVADAnalyzer()] if silero else []
    return _infer(vads, [LocalSmartTurnAnalyzerV3()] if smart_turn else [])


async def _start_native_library() -> None:
    """The first room of a process loads 28 MB of native code and starts its threads: 0.1 to 0.9 s."""
    rtc.Room()
    await rtc.AudioSource(24_000, 1).aclose()


def _infer(vads: Sequence[VADAnalyzer], turns: Sequence[LocalSmartTurnAnalyzerV3]) -> list[str]:
    names = []
    for vad in vads:
        vad.set_sample_rate(VAD_RATE)  # the pipeline sets its own when it starts
        vad.voice_confidence(bytes(2 * vad.num_frames_required()))
        names.append(type(vad).__name__)
    for turn in turns:
        pipecat_private.infer_smart_turn(turn)
        names.append(type(turn).__name__)
    return names
