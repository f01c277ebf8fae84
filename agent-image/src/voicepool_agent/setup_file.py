"""The file that PIPECAT_SETUP_FILES names. Pipecat awaits these two functions; see `parking`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from voicepool_agent import parking

if TYPE_CHECKING:
    from pipecat.pipeline.worker import PipelineWorker
    from pipecat.workers.runner import WorkerRunner


async def setup_worker_runner(runner: WorkerRunner) -> None:
    """Wait here until the pod is bound, unless its warmth is another one than `Built`."""
    await parking.hooks().park(runner)


async def setup_pipeline_worker(worker: PipelineWorker) -> None:
    """Listen to the pipeline."""
    await parking.hooks().attach(worker)
