"""Where Pipecat meets the host: the two hooks of a setup file, handed on to whoever is installed here.

Pipecat imports the file that PIPECAT_SETUP_FILES names by its path, outside of any package; this module, imported by
name, is the same one for both sides. Invariant: the hooks never raise. Pipecat would log the error and start the
pipeline unbound.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from pipecat.pipeline.worker import PipelineWorker
    from pipecat.workers.runner import WorkerRunner

SETUP_FILE = Path(__file__).with_name("setup_file.py")
VARIABLE = "PIPECAT_SETUP_FILES"


class Hooks(Protocol):
    """What the host does at the two moments."""

    async def park(self, runner: WorkerRunner) -> None:
        """Everything is built, nothing has started. Returns when workers may start to connect; does not raise."""

    async def attach(self, worker: PipelineWorker) -> None:
        """A pipeline is about to be set up; does not raise."""


class NotInstalled(RuntimeError):
    """The setup file runs in a process without a host."""


_installed: Hooks | None = None


def install(hooks: Hooks, environment: MutableMapping[str, str]) -> None:
    """Make these the hooks of this process, called after those of the setup files that the user has named."""
    global _installed  # Pipecat calls back by path; there is one host in a process
    _installed = hooks
    files = [name for name in environment.get(VARIABLE, "").split(os.pathsep) if name and name != str(SETUP_FILE)]
    environment[VARIABLE] = os.pathsep.join([*files, str(SETUP_FILE)])


def hooks() -> Hooks:
    """The hooks of this process.

    Raises:
        NotInstalled: there are none.
    """
    if _installed is None:
        raise NotInstalled("setup_file.py belongs to voicepool-agent; do not name it in PIPECAT_SETUP_FILES yourself")
    return _installed
