"""Calls that are written down: both sides are in the recording and in the transcript, and nothing is without being asked for."""

from __future__ import annotations

import json
import os
import wave
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.e2e.agent_process import BOTS, run_agent
from tests.e2e.bound import ROOM, SESSION
from tests.e2e.caller import Caller
from tests.e2e.livekit_server import LiveKit
from tests.e2e.providers import Providers

Speech = Callable[[str], Awaitable[tuple[bytes, int]]]

REFERENCE = BOTS / "reference" / "bot.py"
HEARD = "when do you open tomorrow"
ANSWERED = "We open at nine in the morning."
RATE = 16_000
AUDIBLE = 200


async def call(
    livekit: LiveKit, speech: Speech, folder: Path, environment: dict[str, str], *, through: Sequence[str] = ()
) -> tuple[dict[str, object], float]:
    """One call: a greeting, a question, an answer. Returns the summary, and how long the caller heard the agent."""
    question = await speech("Could you please tell me when you open tomorrow")
    async with (
        Providers(hears=HEARD, answers=ANSWERED) as providers,
        run_agent(REFERENCE, folder, {**providers.environment, **environment}, through=through) as agent,
    ):
        await agent.wait_until_ready()
        token = livekit.token("agent", ROOM, agent=True)
        await agent.bind(session=SESSION, room=ROOM, url=livekit.url, token=token)
        async with Caller(livekit.url, livekit.token("caller", ROOM)) as caller:
            greeting = await caller.hear()
            await caller.say(*question)
            answer = await caller.hear()
        assert await agent.exit_code() == 0
        return agent.summary, greeting.seconds + answer.seconds


def sides(path: Path) -> tuple[NDArray[np.int16], NDArray[np.int16]]:
    """Left and right of a recording."""
    with wave.open(str(path)) as sound:
        assert (sound.getnchannels(), sound.getsampwidth(), sound.getframerate()) == (2, 2, RATE)
        samples = np.frombuffer(sound.readframes(sound.getnframes()), np.int16).reshape(-1, 2)
    return samples[:, 0], samples[:, 1]


def audible(side: NDArray[np.int16]) -> list[float]:
    """The moments, in tenths of a second, at which something is heard."""
    frames = side[: len(side) // 1600 * 1600].reshape(-1, 1600).astype(np.float64)
    loud = np.sqrt((frames**2).mean(axis=1)) > AUDIBLE
    return [round(float(index) / 10, 1) for index in np.flatnonzero(loud)]


@pytest.mark.parametrize("warmth", ["Imported", "Built", "Started"])
async def test_both_sides_are_in_the_recording_and_in_the_transcript(
    livekit: LiveKit, speech: Speech, tmp_path: Path, warmth: str
) -> None:
    folder = tmp_path / "recordings"
    folder.mkdir()
    asked = {
        "VOICEPOOL_WARMTH": warmth,
        "VOICEPOOL_RECORDING_AUDIO": "true",
        "VOICEPOOL_RECORDING_TRANSCRIPT": "true",
        "VOICEPOOL_RECORDING_PATH": str(folder),
    }
    summary, heard_seconds = await call(livekit, speech, tmp_path, asked)
    assert summary["errors"] == []
    assert sorted(path.name for path in folder.iterdir()) == [f"{SESSION}.jsonl", f"{SESSION}.wav"]
    left, right = sides(folder / f"{SESSION}.wav")
    assert len(left) / RATE == pytest.approx(float(str(summary["durationSeconds"])), abs=1.0)
    caller, agent = audible(left), audible(right)
    assert agent, "the agent is not to be heard"
    assert caller, "the caller is not to be heard"
    assert agent[0] == pytest.approx(float(str(summary["firstAudioSeconds"])), abs=0.5)
    assert len(agent) / 10 == pytest.approx(heard_seconds, abs=1.5)
    assert agent[0] < caller[0] < caller[-1] < agent[-1], "a greeting, a question, an answer"
    assert set(caller) & set(agent) == set(), "nobody cut the other one short, and no side is in the other's channel"
    turns = [json.loads(line) for line in (folder / f"{SESSION}.jsonl").read_text().splitlines()]
    assert [turn["speaker"] for turn in turns] == ["agent", "caller", "agent"]
    assert turns[0]["text"].startswith("Hello")
    assert turns[1]["text"].lower() == HEARD
    assert turns[1]["identity"] == "caller"
    assert turns[2]["text"] == ANSWERED
    assert turns[0]["seconds"] == pytest.approx(agent[0], abs=1.0)
    assert turns[1]["seconds"] == pytest.approx(caller[0], abs=1.5)
    log = (tmp_path / "agent.log").read_text().lower()
    assert "tomorrow" not in log
    assert "nine in the morning" not in log


async def test_a_disk_that_takes_no_more_in_the_middle_of_a_call_ends_the_recording_and_not_the_call(
    livekit: LiveKit, speech: Speech, tmp_path: Path
) -> None:
    folder = tmp_path / "recordings"
    folder.mkdir()
    asked = {"VOICEPOOL_RECORDING_AUDIO": "true", "VOICEPOOL_RECORDING_PATH": str(folder)}
    summary, heard_seconds = await call(livekit, speech, tmp_path, asked, through=("prlimit", "--fsize=150000"))
    assert summary["errors"] == ["the recording broke off: File too large"]
    assert summary["reason"] == "caller-left"
    assert heard_seconds > 1.0, "the caller heard an answer, long after"
    assert os.listdir(folder) == [f"{SESSION}.wav.part"]
    left, right = sides(folder / f"{SESSION}.wav.part")
    assert RATE < len(left) == len(right) <= 150_000 // 4


async def test_nothing_is_written_down_unless_somebody_asks_for_it(
    livekit: LiveKit, speech: Speech, tmp_path: Path
) -> None:
    folder = tmp_path / "recordings"
    folder.mkdir()
    await call(livekit, speech, tmp_path, {"VOICEPOOL_RECORDING_PATH": str(folder)})
    assert os.listdir(folder) == []
    assert [name for name in os.listdir(tmp_path) if name.endswith((".wav", ".jsonl", ".part"))] == []


async def test_an_agent_that_cannot_write_is_never_ready_and_says_what_to_do(tmp_path: Path) -> None:
    asked = {"VOICEPOOL_RECORDING_AUDIO": "true", "VOICEPOOL_RECORDING_PATH": str(tmp_path / "nowhere")}
    async with run_agent(REFERENCE, tmp_path, asked) as agent:
        assert await agent.exit_code() == 1
        assert agent.termination_message == (
            f"nothing can be written to {tmp_path / 'nowhere'}, which spec.session.recording.path names"
            " (No such file or directory); mount a volume there in spec.template that the agent's user may write to"
        )
