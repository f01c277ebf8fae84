"""A session that is written down: what is in the files, when they have their names, and what a broken disk does."""

from __future__ import annotations

import asyncio
import json
import threading
import wave
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest
from pipecat.frames.frames import (
    BotStartedSpeakingFrame,
    InterruptionFrame,
    OutputAudioRawFrame,
    TranscriptionFrame,
    TTSTextFrame,
    UserAudioRawFrame,
    UserStartedSpeakingFrame,
)
from pipecat.pipeline.pipeline import Pipeline
from pipecat.pipeline.worker import PipelineWorker
from pipecat.processors.frame_processor import FrameProcessor
from pipecat.transports.livekit.transport import LiveKitParams, LiveKitTransport

from voicepool_agent import recording as module
from voicepool_agent.recording import Recording
from voicepool_agent.settings import Settings, SettingsError, check_recording_path, read_settings
from voicepool_agent.timeline import RATE

BIND = datetime(2026, 3, 2, 10, 0, 0, tzinfo=UTC)
OUT_RATE = 24_000


def settings(folder: Path, *, audio: bool = True, transcript: bool = True) -> Settings:
    return read_settings(
        {
            "VOICEPOOL_POD_UID": "uid-1",
            "VOICEPOOL_ASSIGNMENT_PUBLIC_KEY": "-----BEGIN PUBLIC KEY-----",
            "VOICEPOOL_RECORDING_AUDIO": str(audio).lower(),
            "VOICEPOOL_RECORDING_TRANSCRIPT": str(transcript).lower(),
            "VOICEPOOL_RECORDING_PATH": str(folder),
        }
    )


class Call:
    """A recording, and Pipecat's part played by the test, at times that it sets."""

    def __init__(self, folder: Path, session: str = "s-1", **asked: bool) -> None:
        self.folder = folder
        self.seconds = 0.0
        self.errors: list[str] = []
        self.transport = LiveKitTransport("", "", "", params=LiveKitParams())
        self.worker = PipelineWorker(Pipeline([self.transport.input(), self.transport.output()]))
        self.recording = Recording(
            session,
            settings(folder, **asked),
            note=self.errors.append,
            clock=lambda: 100.0 + self.seconds,
            now=lambda: BIND + timedelta(seconds=self.seconds),
        )
        self.recording.attach(self.worker)

    async def hear(self, seconds: float, level: int = 1000, identity: str = "caller-1") -> None:
        """The caller speaks for so long, in pieces of 20 ms."""
        for _ in range(round(seconds / 0.02)):
            self.seconds += 0.02
            audio = np.full(320, level, np.int16).tobytes()
            await self.transport.input().push_audio_frame(
                UserAudioRawFrame(user_id=identity, audio=audio, sample_rate=RATE, num_channels=1)
            )

    async def hear_late(self, seconds: float) -> None:
        """The caller speaks for so long while the event loop is held up: all of it comes at the end."""
        self.seconds += seconds
        for _ in range(round(seconds / 0.02)):
            self.seconds -= 0.02
            await self.hear(0.02)

    async def play(self, seconds: float, level: int = 2000) -> None:
        """The agent's voice goes out, all at once."""
        audio = np.full(round(seconds * OUT_RATE), level, np.int16).tobytes()
        await self.transport.output().write_audio_frame(
            OutputAudioRawFrame(audio=audio, sample_rate=OUT_RATE, num_channels=1)
        )

    async def written(self) -> None:
        """Return when all is on the disk that was to be written so far."""
        await asyncio.to_thread(self.recording._thread.submit(lambda: None).result)
        await asyncio.sleep(0)

    def names(self) -> list[str]:
        """The files that there are."""
        return sorted(path.name for path in self.folder.iterdir())

    def file(self, suffix: str) -> Path:
        return self.folder / f"s-1{suffix}"

    def sides(self, suffix: str = ".wav") -> tuple[Any, Any]:
        """Left and right of what was written."""
        with wave.open(str(self.file(suffix))) as sound:
            assert (sound.getnchannels(), sound.getsampwidth(), sound.getframerate()) == (2, 2, RATE)
            samples = np.frombuffer(sound.readframes(sound.getnframes()), np.int16).reshape(-1, 2)
        return samples[:, 0], samples[:, 1]


def seconds_of_sound(side: Any) -> float:
    return float((np.abs(side.astype(np.int32)) > 500).sum()) / RATE


async def test_the_caller_is_left_and_the_agent_is_right_each_where_they_spoke(tmp_path: Path) -> None:
    call = Call(tmp_path)
    await call.play(0.5)
    await call.hear(1.0, level=0)
    await call.hear(1.0)
    await call.recording.finish()
    left, right = call.sides()
    assert len(left) == len(right) == 2 * RATE
    assert seconds_of_sound(left[:RATE]) == 0.0
    assert seconds_of_sound(left[RATE:]) == pytest.approx(1.0, abs=0.05)
    assert seconds_of_sound(right[: RATE // 2 + 800]) == pytest.approx(0.5, abs=0.05)
    assert seconds_of_sound(right[RATE:]) == 0.0
    assert call.errors == []


@pytest.mark.parametrize("pauses", [True, False], ids=["with pauses", "without a pause"])
async def test_a_caller_who_was_heard_late_for_once_is_in_the_recording_to_the_last_word(
    tmp_path: Path, *, pauses: bool
) -> None:
    call = Call(tmp_path)
    await call.hear(7.0)
    await call.hear_late(3.0)
    await call.play(0.5)
    if pauses:
        await call.hear(5.0, level=0)
    await call.hear(5.0 if pauses else 10.0)
    await call.play(5.0)
    await call.recording.finish()
    left, right = call.sides()
    assert seconds_of_sound(left) == pytest.approx(15.0 if pauses else 20.0, abs=0.05)
    last = np.flatnonzero(left)[-1] / RATE
    assert last == pytest.approx(20.0 if pauses else 23.0, abs=0.25)
    assert seconds_of_sound(right) == pytest.approx(0.5, abs=0.05), "what was to be played at the end never was"


async def test_what_an_interrupted_agent_had_not_said_is_not_in_the_recording(tmp_path: Path) -> None:
    call = Call(tmp_path)
    await call.play(3.0)
    await call.hear(0.5)
    call.recording.saw(InterruptionFrame(), spoken=False)
    await call.hear(3.5)
    await call.recording.finish()
    _, right = call.sides()
    assert seconds_of_sound(right) == pytest.approx(0.5, abs=0.05)


async def test_a_transcript_has_a_line_for_each_turn(tmp_path: Path) -> None:
    call = Call(tmp_path)
    call.recording.saw(BotStartedSpeakingFrame(), spoken=True)
    call.recording.saw(TTSTextFrame("Hello, how can I help you?", "sentence"), spoken=True)
    call.recording.saw(TTSTextFrame("This was never spoken.", "sentence"), spoken=False)
    call.seconds = 4.0
    call.recording.saw(UserStartedSpeakingFrame(), spoken=False)
    call.seconds = 6.0
    call.recording.saw(TranscriptionFrame("When do you open?", "caller-1", "", None), spoken=False)
    await call.recording.finish()
    lines = [json.loads(line) for line in call.file(".jsonl").read_text().splitlines()]
    assert lines == [
        {"speaker": "agent", "at": "2026-03-02T10:00:00.000Z", "seconds": 0.0, "text": "Hello, how can I help you?"},
        {
            "speaker": "caller",
            "identity": "caller-1",
            "at": "2026-03-02T10:00:04.000Z",
            "seconds": 4.0,
            "text": "When do you open?",
        },
    ]


async def test_what_goes_over_the_bus_to_another_worker_is_written_once(tmp_path: Path) -> None:
    call = Call(tmp_path)
    answering = PipelineWorker(Pipeline([FrameProcessor()]), bridged=())
    before = list(answering._observer._observers)
    call.recording.attach(answering)
    assert answering._observer._observers == before
    await call.recording.finish()


async def test_a_file_has_its_name_when_it_is_complete_and_can_be_played_before(tmp_path: Path) -> None:
    call = Call(tmp_path)
    await call.hear(5.0)
    await call.written()
    assert call.names() == ["s-1.jsonl.part", "s-1.wav.part"]
    left, _ = call.sides(".wav.part")
    assert 2.0 <= seconds_of_sound(left) <= 4.1, "the last second may still change"
    await call.recording.finish()
    assert call.names() == ["s-1.jsonl", "s-1.wav"]
    assert call.file(".wav").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize(("asked", "names"), [("audio", ["s-1.wav"]), ("transcript", ["s-1.jsonl"])])
async def test_only_what_is_asked_for_is_written(tmp_path: Path, asked: str, names: list[str]) -> None:
    call = Call(tmp_path, audio=asked == "audio", transcript=asked == "transcript")
    await call.play(0.5)
    await call.hear(4.0)
    call.recording.saw(InterruptionFrame(), spoken=False)
    call.recording.saw(TranscriptionFrame("When do you open?", "caller-1", "", None), spoken=False)
    await call.recording.finish()
    assert call.names() == names
    assert call.errors == []


async def test_two_callers_are_both_in_the_left_channel(tmp_path: Path) -> None:
    call = Call(tmp_path)
    await call.hear(1.0, level=1000, identity="a")
    await call.hear(3.0, level=0, identity="a")
    await call.hear(1.0, level=3000, identity="b")
    await call.recording.finish()
    left, _ = call.sides()
    assert set(np.unique(left)) == {0, 1000, 3000}
    assert seconds_of_sound(left) == pytest.approx(2.0, abs=0.05)


async def test_a_disk_that_is_full_ends_the_recording_and_leaves_what_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = Call(tmp_path)
    await call.hear(4.0)
    await call.written()

    def full(_file: BinaryIO, _data: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "_write", full)
    await call.hear(4.0)
    await call.written()
    await call.recording.finish()
    await call.hear(4.0)
    assert call.errors == ["the recording broke off: No space left on device"]
    assert call.names() == ["s-1.jsonl.part", "s-1.wav.part"]
    assert seconds_of_sound(call.sides(".wav.part")[0]) >= 1.0


async def test_a_disk_that_no_longer_answers_holds_up_neither_the_call_nor_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    released = threading.Event()
    call = Call(tmp_path)
    monkeypatch.setattr(module, "_write", lambda _file, _data: released.wait(30))
    monkeypatch.setattr(module, "FINISH_SECONDS", 0.05)
    await call.hear(5.0)
    await call.recording.finish()
    assert call.errors == ["the recording broke off: its end could not be written within 0.05 s"]
    released.set()
    await call.written()


async def test_what_waits_for_a_disk_is_not_kept_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    released = threading.Event()
    call = Call(tmp_path)
    monkeypatch.setattr(module, "_write", lambda _file, _data: released.wait(30))
    await call.hear(3.0 * module.MAX_WAITING)
    assert call.errors == ["the recording broke off: the disk has stopped"]
    await call.recording.finish()
    released.set()
    await call.written()


async def test_a_recording_that_is_there_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "s-1.wav").write_bytes(b"another one")
    call = Call(tmp_path)
    await call.hear(4.0)
    await call.recording.finish()
    assert call.errors == ["the recording broke off: there is a recording of that name"]
    assert (tmp_path / "s-1.wav").read_bytes() == b"another one"


async def test_a_session_whose_id_is_a_path_writes_nothing_anywhere(tmp_path: Path) -> None:
    call = Call(tmp_path, session="../s-1")
    await call.hear(4.0)
    await call.recording.finish()
    assert call.errors == ["the recording broke off: the session's id '../s-1' cannot name a file"]
    assert call.names() == []
    assert not call.folder.with_name("s-1.wav.part").exists()


def test_an_agent_that_could_not_write_says_so_before_it_takes_a_call(tmp_path: Path) -> None:
    check_recording_path(settings(tmp_path))
    assert list(tmp_path.iterdir()) == []
    missing = tmp_path / "recordings"
    check_recording_path(settings(missing, audio=False, transcript=False))
    with pytest.raises(SettingsError, match=r"nothing can be written to .*/recordings.*\(No such file or directory\)"):
        check_recording_path(settings(missing))
