"""Writes a session down, where its pool asks for that: what was heard as a WAV file, what was said as lines of JSON.

The event loop only notes what comes by; a thread of its own makes samples and text of it and writes them. Invariants:
whatever the disk does, the call goes on, and what went wrong is an error of the session; what is written stands under
another name (`.part`) until it is complete, and can be played at every moment; nothing that exists is overwritten;
memory holds a few seconds, however long the call is.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import BinaryIO

import soxr
from loguru import logger
from pipecat.frames.frames import (
    BotStartedSpeakingFrame,
    Frame,
    InterruptionFrame,
    TranscriptionFrame,
    TTSTextFrame,
    UserStartedSpeakingFrame,
)
from pipecat.observers.base_observer import BaseObserver, FramePushed
from pipecat.pipeline.worker import PipelineWorker
from pipecat.transports.livekit.transport import LiveKitOutputTransport

from voicepool_agent import pipecat_private, timeline
from voicepool_agent.settings import Settings
from voicepool_agent.transcript import AGENT, CALLER, Turn, Turns

FINISH_SECONDS = 2.5
"""How long the end of a session waits for the disk; the summary has to be written before the pod's grace is over."""

WRITE_SECONDS = 1.0
"""So much is written at a time."""

HELD_SECONDS = 1.0
"""The youngest part of the recording is not written yet: pieces of it may still come, or be cut off."""

MAX_WAITING = 30
"""Writes that may wait for a disk; more, and it has stopped."""

MAX_WAV_BYTES = 2**32 - 2**16
"""The format has 32 bits for it: 18 hours."""

PART = ".part"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


@dataclass(frozen=True, slots=True)
class _Piece:
    agent: bool
    voice: str
    audio: bytes
    rate: int
    channels: int
    seconds: float
    """When it was heard, or began to be played."""


class Recording:
    """What is written of one session.

    Args:
        session_id: names the files.
        settings: what is asked for, and where.
        note: told what went wrong.
        clock: seconds, monotonic; the recording begins now.
        now: the current time, with its zone.
    """

    def __init__(
        self,
        session_id: str,
        settings: Settings,
        *,
        note: Callable[[str], None],
        clock: Callable[[], float],
        now: Callable[[], datetime],
    ) -> None:
        self._settings = settings
        self._note = note
        self._clock = clock
        self._now = now
        self._began = clock()
        self._loop = asyncio.get_running_loop()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="voicepool-recording")
        self._waiting = 0
        self._over = asyncio.Event()
        self._broken = False
        self._stopped = False
        self._pieces: list[_Piece | float] = []
        self._written_seconds = 0.0
        self._turns = Turns()
        self._sound: _Sound | None = None
        self._files: dict[str, BinaryIO] = {}
        self._base = settings.recording_path / session_id
        if not _NAME.fullmatch(session_id):
            self._break(f"the session's id {session_id!r} cannot name a file")
        else:
            self._later(self._open)

    # -- in the event loop -----------------------------------------------------------------------------------------

    def attach(self, worker: PipelineWorker) -> None:
        """Listen to a pipeline that is not set up yet."""
        if self._settings.recording_audio:
            pipecat_private.tap_audio(worker, self._heard, self._played)
        if not pipecat_private.works_over_bus(worker):
            worker.add_observer(_Observer(self))

    async def finish(self) -> None:
        """Complete the files and give them their names, for as long as `FINISH_SECONDS`."""
        if (turn := self._turns.end()) is not None:
            self._later(partial(self._write_turn, turn))
        self._write_sound(self._seconds)
        self._later(self._close, last=True)
        try:
            async with asyncio.timeout(FINISH_SECONDS):
                await self._over.wait()
        except TimeoutError:
            self._break(f"its end could not be written within {FINISH_SECONDS:g} s")

    @property
    def _seconds(self) -> float:
        return self._clock() - self._began

    def _heard(self, voice: str, audio: bytes, rate: int, channels: int) -> None:
        self._add(_Piece(False, voice, audio, rate, channels, self._seconds - len(audio) / (2 * channels * rate)))

    def _played(self, audio: bytes, rate: int, channels: int) -> None:
        self._add(_Piece(True, "", audio, rate, channels, self._seconds))

    def saw(self, frame: Frame, *, spoken: bool) -> None:
        """A frame went by; `spoken` when it comes from the agent's end, with the sound that belongs to it."""
        if self._broken:
            return
        if isinstance(frame, InterruptionFrame) and self._settings.recording_audio:
            self._pieces.append(self._seconds)  # what the agent had not said by now, it never did
        if not self._settings.recording_transcript:
            return
        at, seconds = self._now(), self._seconds
        over: Turn | None = None
        if isinstance(frame, UserStartedSpeakingFrame):
            self._turns.began(CALLER, at, seconds)
        elif isinstance(frame, BotStartedSpeakingFrame):
            self._turns.began(AGENT, at, seconds)
        elif isinstance(frame, TranscriptionFrame):
            over = self._turns.said(CALLER, frame.text, at, seconds, identity=frame.user_id or None)
        elif isinstance(frame, TTSTextFrame) and spoken:
            over = self._turns.said(AGENT, frame.text, at, seconds, spaced=frame.includes_inter_frame_spaces)
        if over is not None:
            self._later(partial(self._write_turn, over))

    def _add(self, piece: _Piece) -> None:
        if self._broken:
            return
        self._pieces.append(piece)
        if self._seconds - self._written_seconds >= WRITE_SECONDS + HELD_SECONDS:
            self._write_sound(self._seconds - HELD_SECONDS)

    def _write_sound(self, until_seconds: float) -> None:
        if not self._settings.recording_audio:
            return
        pieces, self._pieces = self._pieces, []
        self._written_seconds = until_seconds
        self._later(partial(self._write_pieces, pieces, until_seconds))

    def _later(self, work: Callable[[], None], *, last: bool = False) -> None:
        """Have the thread do it, after all that it has to do already."""
        if self._broken:
            return
        if self._waiting >= MAX_WAITING:
            self._break("the disk has stopped")
            return
        self._waiting += 1
        self._thread.submit(self._do, work).add_done_callback(
            lambda future: self._loop.call_soon_threadsafe(self._done, future.exception(), last)
        )

    def _done(self, error: BaseException | None, last: bool) -> None:
        self._waiting -= 1
        if error is not None:
            self._break((error.strerror if isinstance(error, OSError) else None) or type(error).__name__)
        if last:
            self._over.set()

    def _break(self, words: str) -> None:
        if not self._broken:
            self._broken = self._stopped = True
            self._over.set()
            self._pieces.clear()
            self._note(f"the recording broke off: {words}")
            logger.warning(f"the recording broke off, and the call goes on without it: {words}")

    # -- in the thread ---------------------------------------------------------------------------------------------

    def _do(self, work: Callable[[], None]) -> None:
        if self._stopped:
            self._abandon()
            return
        try:
            work()
        except Exception:
            self._stopped = True  # at once: what waits behind it must not complete a file that lacks something
            self._abandon()
            raise

    def _abandon(self) -> None:
        for file in self._files.values():
            with contextlib.suppress(OSError):
                file.close()

    def _open(self) -> None:
        if self._settings.recording_audio:
            self._sound = _Sound(self._create(".wav"))
        if self._settings.recording_transcript:
            self._create(".jsonl")

    def _create(self, suffix: str) -> BinaryIO:
        path = self._base.with_name(self._base.name + suffix)
        if path.exists():
            raise FileExistsError(17, "there is a recording of that name")
        # Readable for the group, which is the volume's (fsGroup), and for nobody else.
        descriptor = os.open(f"{path}{PART}", os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o640)
        self._files[suffix] = file = os.fdopen(descriptor, "r+b", buffering=0)
        return file

    def _write_turn(self, turn: Turn) -> None:
        _write(self._files[".jsonl"], turn.as_line().encode())

    def _write_pieces(self, pieces: list[_Piece | float], until_seconds: float) -> None:
        if self._sound is not None:
            self._sound.write(pieces, until_seconds)

    def _close(self) -> None:
        if self._sound is not None:
            self._sound.finish()
        for suffix, file in self._files.items():
            os.fsync(file.fileno())
            file.close()
            path = self._base.with_name(self._base.name + suffix)
            Path(f"{path}{PART}").rename(path)


class _Sound:
    """A stereo WAV file that grows: the callers left, the agent right."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._callers: dict[str, timeline.Voice] = {}
        self._agent: dict[str, timeline.Voice] = {}
        self._resamplers: dict[tuple[bool, str, int], soxr.ResampleStream] = {}
        self._samples = 0
        self._head()

    def write(self, pieces: list[_Piece | float], until_seconds: float) -> None:
        """Take in what came, and write all before a moment."""
        for piece in pieces:
            if isinstance(piece, _Piece):
                self._place(piece)
            else:
                self._cut(round(piece * timeline.RATE))
        self._write_until(round(until_seconds * timeline.RATE))

    def finish(self) -> None:
        """Write what is left of callers who were heard late; what is left of the agent was not played."""
        self._cut(self._samples)
        self._write_until(max((voice.end for voice in self._callers.values()), default=0))

    def _cut(self, at: int) -> None:
        for voice in self._agent.values():
            voice.cut(at)

    def _write_until(self, until: int) -> None:
        count = max(0, until - self._samples)
        left = timeline.mixed(self._callers.values(), until, count)
        right = timeline.mixed(self._agent.values(), until, count)
        if 4 * (self._samples + count) > MAX_WAV_BYTES:
            raise OSError(27, "a WAV file cannot be longer")
        _write(self._file, timeline.interleaved(left, right))
        self._samples += count
        self._head()

    def _place(self, piece: _Piece) -> None:
        samples = timeline.mono(piece.audio, piece.channels)
        if piece.rate != timeline.RATE:
            key = (piece.agent, piece.voice, piece.rate)
            if key not in self._resamplers:
                self._resamplers[key] = soxr.ResampleStream(piece.rate, timeline.RATE, 1, dtype="int16")
            samples = self._resamplers[key].resample_chunk(samples)
        voices = self._agent if piece.agent else self._callers
        if piece.voice not in voices:
            voices[piece.voice] = timeline.Voice(catches_up=not piece.agent)
            voices[piece.voice].take(self._samples)
        voices[piece.voice].add(samples, round(piece.seconds * timeline.RATE))

    def _head(self) -> None:
        """What says how long the file is: right after each write, so that also a part of a call can be played."""
        size = 4 * self._samples
        head = struct.pack(
            "<4sI4s4sIHHIIHH4sI",
            b"RIFF", 36 + size, b"WAVE", b"fmt ", 16, 1, 2, timeline.RATE, 4 * timeline.RATE, 4, 16, b"data", size,
        )  # fmt: skip
        self._file.seek(0)
        _write(self._file, head)
        self._file.seek(0, os.SEEK_END)


def _write(file: BinaryIO, data: bytes) -> None:
    """Write all of it: a disk that is nearly full takes a part."""
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


class _Observer(BaseObserver):
    """Sees a frame when it first goes by, and an agent's words when they leave with their sound."""

    def __init__(self, recording: Recording) -> None:
        super().__init__()
        self._recording = recording

    async def on_push_frame(self, data: FramePushed) -> None:
        spoken = isinstance(data.source, LiveKitOutputTransport)
        if data.first_push or spoken:
            self._recording.saw(data.frame, spoken=spoken)
