"""Uses once, before any caller, what is slow the first time: each model, LiveKit's native library, TLS.

What a bot has built is used itself; of a bot that is only imported it is known which kinds of models it imports.

Invariants: a model that fails here fails the build (it would fail the caller); warming opens no connection. The
models' inferences are short (under 0.1 s each) and run in a thread, beside the native library's start.
"""

from __future__ import annotations

import asyncio
import functools
import importlib
import ssl
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
    _, names, _ = await asyncio.gather(_start_native_library(), models, asyncio.to_thread(_tls_context))
    share_tls_context(workers)
    return ["LiveKit", *names, "TLS"]


def share_tls_context(workers: Sequence[PipelineWorker]) -> None:
    """Let the workers' services connect with the TLS context of this process, which has been made by now."""
    for worker in workers:
        pipecat_private.share_tls_context(worker, _tls_context())


@functools.cache
def _tls_context() -> ssl.SSLContext:
    return ssl.create_default_context()


async def warm_up_imported() -> list[str]:
    """Warm what a bot needs that is imported and not built; returns what was warmed, in words.

    A model is loaded and used, and let go: the bot makes its own, from files that are in the memory of the machine
    and with libraries that have started their threads.
    """
    if OPENAI in sys.modules:
        importlib.import_module(OPENAI_CHAT)
    models = asyncio.to_thread(_load_and_infer, silero=SILERO in sys.modules, smart_turn=USER_TURNS in sys.modules)
    _, names, _ = await asyncio.gather(_start_native_library(), models, asyncio.to_thread(_tls_context))
    return ["LiveKit", *names, "TLS"]


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
