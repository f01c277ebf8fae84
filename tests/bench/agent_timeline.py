"""A setup file of Pipecat's: writes down when what happens in a pipeline, for the benchmark of the agent.

Each line of the file that `BENCH_TIMELINE` names is a JSON list: what, and seconds on the machine's monotonic clock,
which the process that measures reads as well.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from pipecat.frames.frames import BotConnectedFrame, BotStartedSpeakingFrame, TTSAudioRawFrame, TTSStartedFrame
from pipecat.observers.base_observer import BaseObserver, FramePushed
from pipecat.pipeline.worker import PipelineWorker

VARIABLE = "BENCH_TIMELINE"
WORDS = {
    BotConnectedFrame: "room",
    TTSStartedFrame: "text",
    TTSAudioRawFrame: "audio",
    BotStartedSpeakingFrame: "speaking",
}
STARTED = "started"


class Timeline(BaseObserver):
    """Writes down the first time of each kind of frame."""

    def __init__(self) -> None:
        super().__init__(observe_every_push=False)
        self._seen: set[str] = set()

    async def on_push_frame(self, data: FramePushed) -> None:
        """See Pipecat."""
        if (word := WORDS.get(type(data.frame))) is not None:
            self.write(word)

    def write(self, word: str) -> None:
        """This has happened now."""
        if word not in self._seen:
            self._seen.add(word)
            with Path(os.environ[VARIABLE]).open("a") as file:
                file.write(json.dumps([word, time.monotonic()]) + "\n")


async def setup_pipeline_worker(worker: PipelineWorker) -> None:
    """Listen to a worker's pipeline."""
    timeline = Timeline()
    worker.add_observer(timeline)

    async def on_started(_worker: Any, _frame: Any) -> None:
        timeline.write(STARTED)

    worker.add_event_handler("on_pipeline_started", on_started)
