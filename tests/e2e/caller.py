"""A caller: joins a LiveKit room, speaks, listens, and remembers when what happened.

Invariants: the microphone track never stops, silence flows between the utterances (an agent's voice detection hears
an end of speech only in audio that goes on); everything heard is kept at 16 kHz, mono, 16 bit; all times are seconds
on the one clock that the constructor was given, so that they can be laid beside times taken elsewhere.

    async with Caller(url, token) as caller:
        greeting = await caller.hear()
        await caller.say(pcm, 22050)
        answer = await caller.hear()
    caller.write_wav(Path("call.wav"))
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import time
import wave
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import soxr
from livekit import rtc

HEARD_RATE = 16_000
"""Samples per second of what is heard and written."""

MICROPHONE_RATE = 48_000
FRAME_SECONDS = 0.01
SILENCE_AHEAD_SECONDS = 0.1
SPEECH_AHEAD_SECONDS = 2.0
"""How much of a saying is handed over before it is heard: so long may a busy machine keep this process waiting, and no word has a gap in it."""
AUDIBLE_RMS = 200.0
"""Loudness (root mean square of 16-bit samples) from which a frame of 10 ms counts as sound; a silent track is at 0
to 20."""


@dataclass(frozen=True, slots=True)
class Utterance:
    """One stretch of sound from the agent, silence at both ends cut off."""

    pcm: bytes
    began: float
    ended: float

    @property
    def seconds(self) -> float:
        """How long it is."""
        return len(self.pcm) / 2 / HEARD_RATE


@dataclass(slots=True)
class _Heard:
    """What has been heard so far, in frames of 10 ms."""

    frames: list[bytes] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    audible: list[bool] = field(default_factory=list)


class Caller:
    """One participant of one room.

    Args:
        url: LiveKit's address, ws:// or wss://.
        token: the caller's token for the room.
        clock: where times come from.
        subscribes: whether to everything that is in the room, at once; otherwise `subscribe` does.

    Attributes:
        timeline: the first time of each of `joined`, `agent-joined`, `agent-track`, `first-audio`, `said`,
            `agent-left`, `disconnected`.
        messages: what came over the data channel as JSON (Pipecat's RTVI), with its time.
    """

    def __init__(
        self, url: str, token: str, *, clock: Callable[[], float] = time.monotonic, subscribes: bool = True
    ) -> None:
        self._options = rtc.RoomOptions(auto_subscribe=subscribes)
        self._url = url
        self._token = token
        self._clock = clock
        self._room = rtc.Room()
        self._microphone = rtc.AudioSource(MICROPHONE_RATE, 1, queue_size_ms=round(1000 * SPEECH_AHEAD_SECONDS))
        self._sayings: asyncio.Queue[tuple[bytes, asyncio.Event]] = asyncio.Queue()
        self._heard = _Heard()
        self._news = asyncio.Condition()
        self._cursor = 0
        self._publication: Any = None
        self._tasks: set[asyncio.Task[None]] = set()
        self.timeline: dict[str, float] = {}
        self.messages: list[tuple[float, dict[str, Any]]] = []
        self.agent_left = asyncio.Event()

    async def __aenter__(self) -> Self:
        room = self._room
        room.on("track_subscribed", self._on_track)
        room.on("participant_connected", lambda _: self._mark("agent-joined"))
        room.on("participant_disconnected", self._on_left)
        room.on("disconnected", lambda _: self._mark("disconnected"))
        room.on("data_received", self._on_data)
        await room.connect(self._url, self._token, self._options)
        self._mark("joined")
        if room.remote_participants:
            self._mark("agent-joined")
        track = rtc.LocalAudioTrack.create_audio_track("microphone", self._microphone)
        options = rtc.TrackPublishOptions(source=rtc.TrackSource.SOURCE_MICROPHONE)
        self._publication = await room.local_participant.publish_track(track, options)
        self._start(self._speak())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.leave()

    def subscribe(self) -> None:
        """Listen to all who are in the room and have a voice there."""
        for participant in self._room.remote_participants.values():
            for publication in participant.track_publications.values():
                publication.set_subscribed(True)

    async def wait_until_listened_to(self, *, timeout_seconds: float = 30.0) -> None:
        """Return when the agent has subscribed to the microphone: from then on it hears what is said.

        Raises:
            TimeoutError: it has not in time.
        """
        async with asyncio.timeout(timeout_seconds):
            await self._publication.wait_for_subscription()

    async def wait_until_connected(self, *, timeout_seconds: float = 30.0) -> None:
        """Return when sound gets through both ways: from then on both hear every word from its beginning.

        A room forwards the agent's sound when it has been agreed on and encrypted, which is some time after the agent has begun to listen.

        Raises:
            TimeoutError: it does not in time.
        """
        async with asyncio.timeout(timeout_seconds):
            await self.wait_until_listened_to(timeout_seconds=timeout_seconds)
            while not await self._packets_heard():  # noqa: ASYNC110 - LiveKit has no event for it
                await asyncio.sleep(0.02)

    async def _packets_heard(self) -> int:
        # Of silence as well: a track that nobody speaks on sends a packet now and then.
        stats = await self._room.get_rtc_stats()
        both = (*stats.publisher_stats, *stats.subscriber_stats)
        return sum(
            one.inbound_rtp.received.packets_received for one in both if one.WhichOneof("stats") == "inbound_rtp"
        )

    async def leave(self) -> None:
        """Leave the room. A second time does nothing."""
        tasks, self._tasks = self._tasks, set()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._room.isconnected():
            await self._room.disconnect()
        await self._microphone.aclose()

    async def say(self, pcm16: bytes, rate: int) -> None:
        """Say 16-bit mono samples; returns when the last of them has left on the microphone track."""
        samples = np.frombuffer(pcm16, dtype=np.int16)
        if rate != MICROPHONE_RATE:
            samples = soxr.resample(samples, rate, MICROPHONE_RATE).astype(np.int16)
        done = asyncio.Event()
        self._sayings.put_nowait((samples.tobytes(), done))
        await done.wait()

    async def hear(self, *, timeout_seconds: float = 30.0, silence_seconds: float = 0.9) -> Utterance:
        """The next stretch of sound that no earlier call has returned; it ends with `silence_seconds` of silence.

        Raises:
            TimeoutError: none came, or it did not end, in time.
        """
        quiet_frames = round(silence_seconds / FRAME_SECONDS)
        async with asyncio.timeout(timeout_seconds), self._news:
            while (found := self._utterance(quiet_frames)) is None:
                await self._news.wait()
        return found

    async def first_audio(self, *, timeout_seconds: float = 30.0) -> float:
        """When the agent was first heard, on the caller's clock.

        Raises:
            TimeoutError: it was not heard in time.
        """
        async with asyncio.timeout(timeout_seconds), self._news:
            while "first-audio" not in self.timeline:
                await self._news.wait()
        return self.timeline["first-audio"]

    @property
    def pcm(self) -> bytes:
        """Everything heard so far."""
        return b"".join(self._heard.frames)

    def write_wav(self, path: Path) -> None:
        """Write everything heard so far."""
        write_wav(path, self.pcm)

    def _utterance(self, quiet_frames: int) -> Utterance | None:
        audible, times = self._heard.audible, self._heard.times
        try:
            first = audible.index(True, self._cursor)
        except ValueError:
            return None
        last = first
        for index in range(first, len(audible)):
            if audible[index]:
                last = index
            elif index - last >= quiet_frames:
                self._cursor = index
                return Utterance(b"".join(self._heard.frames[first : last + 1]), times[first], times[last])
        return None

    def _mark(self, name: str) -> None:
        self.timeline.setdefault(name, self._clock())

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        self._tasks.add(asyncio.get_running_loop().create_task(work))

    def _on_track(self, track: Any, _publication: Any, _participant: Any) -> None:
        if track.kind == rtc.TrackKind.KIND_AUDIO:
            self._mark("agent-track")
            self._start(self._listen(track))

    def _on_left(self, _participant: Any) -> None:
        self._mark("agent-left")
        self.agent_left.set()

    def _on_data(self, packet: Any) -> None:
        try:
            message = json.loads(packet.data)
        except ValueError:
            return
        if isinstance(message, dict):
            self.messages.append((self._clock(), message))

    async def _listen(self, track: Any) -> None:
        stream = rtc.AudioStream.from_track(track=track, sample_rate=HEARD_RATE, num_channels=1, frame_size_ms=10)
        try:
            async for event in stream:
                frame = bytes(event.frame.data)
                samples = np.frombuffer(frame, dtype=np.int16).astype(np.float32)
                audible = bool(np.sqrt(np.mean(np.square(samples))) > AUDIBLE_RMS)
                async with self._news:
                    self._heard.frames.append(frame)
                    self._heard.times.append(self._clock())
                    self._heard.audible.append(audible)
                    if audible:
                        self._mark("first-audio")
                    self._news.notify_all()
        finally:
            await stream.aclose()

    async def _speak(self) -> None:
        per_frame = round(MICROPHONE_RATE * FRAME_SECONDS)
        silence = bytes(2 * per_frame)
        while True:
            if self._sayings.empty():
                if self._microphone.queued_duration > SILENCE_AHEAD_SECONDS:
                    await asyncio.sleep(FRAME_SECONDS)
                else:
                    await self._microphone.capture_frame(rtc.AudioFrame(silence, MICROPHONE_RATE, 1, per_frame))
                continue
            pcm, done = self._sayings.get_nowait()
            for start in range(0, len(pcm), 2 * per_frame):
                frame = pcm[start : start + 2 * per_frame].ljust(2 * per_frame, b"\0")
                await self._microphone.capture_frame(rtc.AudioFrame(frame, MICROPHONE_RATE, 1, per_frame))
            await self._microphone.wait_for_playout()
            self._mark("said")
            done.set()


_DISTANT = """
import asyncio, sys
from tests.e2e.caller import Caller

async def main():
    async with Caller(sys.argv[1], sys.argv[2]) as caller:
        await caller.wait_until_listened_to()
        print("listened to", flush=True)
        await asyncio.Event().wait()

asyncio.run(main())
"""


@contextlib.asynccontextmanager
async def distant_caller(
    url: str, token: str, *, timeout_seconds: float = 30.0
) -> AsyncIterator[asyncio.subprocess.Process]:
    """A caller in a process of its own, whom the agent hears, and who never says goodbye.

    Raises:
        TimeoutError: the agent does not hear it in time.
    """
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", _DISTANT, url, token, stdout=asyncio.subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        async with asyncio.timeout(timeout_seconds):
            assert await process.stdout.readline() == b"listened to\n"
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


def write_wav(path: Path, pcm16: bytes, rate: int = HEARD_RATE) -> None:
    """Write 16-bit mono samples as a WAV file."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(pcm16)


def read_wav(path: Path) -> tuple[bytes, int]:
    """Samples and rate of a 16-bit mono WAV file.

    Raises:
        ValueError: it is of another kind.
    """
    with wave.open(str(path), "rb") as file:
        if file.getnchannels() != 1 or file.getsampwidth() != 2:
            raise ValueError(
                f"{path}: a caller speaks 16-bit mono WAV files; this one has {file.getnchannels()} channels"
            )
        return file.readframes(file.getnframes()), file.getframerate()
