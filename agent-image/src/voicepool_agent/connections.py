"""The warmth `Started`: a pipeline whose services are connected to their providers, and which waits for its room.

Invariants: established means that every processor has been set up without an error and can be used; one error, or one
connection that a provider closes, before the release is told at once, and then the agent is not handed out any more;
nothing here runs after the release.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from pipecat.frames.frames import ErrorFrame
from pipecat.observers.base_observer import BaseObserver, ProcessorSetUp
from pipecat.pipeline.service_switcher import ServiceSwitcher
from pipecat.pipeline.worker import PipelineWorker
from pipecat.processors.frame_processor import FrameProcessor
from websockets.asyncio.client import ClientConnection
from websockets.protocol import State

from voicepool_agent import pipecat_private


class Connections:
    """The connections of the workers of one agent.

    Args:
        workers: all that are going to be set up.
        release: set when they may start; until then they are held.
        lost: told in words what is wrong, before the release only, and at most once.
    """

    def __init__(self, workers: Sequence[PipelineWorker], release: asyncio.Event, lost: Callable[[str], None]) -> None:
        self.workers: list[PipelineWorker] = []
        self._release = release
        self._lost = lost
        self._problem: str | None = None
        self._awaited = {one for worker in workers for one in pipecat_private.set_up_before_start(worker)}
        self._set_up = asyncio.Event()
        self._sockets: dict[ClientConnection, FrameProcessor] = {}
        self._watches: set[asyncio.Task[None]] = set()

    def hold(self, worker: PipelineWorker) -> None:
        """A worker is about to be set up: let it connect and not start, and listen to it."""
        self.workers.append(worker)
        pipecat_private.measure(worker)  # the session comes after the set-up, which is too late for it
        pipecat_private.hold_start(worker, self._release)
        worker.add_observer(_SetUps(self))

        async def on_error(processor: FrameProcessor, error: ErrorFrame) -> None:
            if processor not in replaceable or pipecat_private.unusable(worker):
                self._note(f"{type(processor).__name__}: {error.error}")

        # A service inside of a switcher may fail for as long as the switcher has another one.
        alone = set(pipecat_private.processors(worker, closed=(ServiceSwitcher,)))
        replaceable = set(pipecat_private.processors(worker)) - alone
        for processor in {*alone, *replaceable}:
            processor.add_event_handler("on_error", on_error)

    async def established(self) -> None:
        """Return when all are connected; from then on closed connections are noticed. Has no time limit."""
        await self._set_up.wait()
        for worker in self.workers:
            for processor in pipecat_private.processors(worker):
                if (socket := pipecat_private.socket(processor)) is not None:
                    self._sockets[socket] = processor
                    self._watches.add(asyncio.create_task(self._watch(socket, processor)))

    @property
    def missing(self) -> str:
        """The names of processors that are not set up yet."""
        return ", ".join(sorted({type(one).__name__ for one in self._awaited}))

    @property
    def problem(self) -> str | None:
        """What makes the agent unfit for a session at this moment; None when nothing does."""
        closed = [one for socket, one in self._sockets.items() if socket.state is not State.OPEN]
        if self._problem is None and closed:
            return f"{type(closed[0]).__name__}: the connection is closed"
        return self._problem

    def let_go(self) -> None:
        """Stop watching: the session sees to it from here on."""
        for watch in self._watches:
            watch.cancel()

    def was_set_up(self, processor: FrameProcessor) -> None:
        """The set-up of a processor has returned."""
        self._awaited.discard(processor)
        if not self._awaited:
            self._set_up.set()

    async def _watch(self, socket: ClientConnection, processor: FrameProcessor) -> None:
        await socket.wait_closed()
        why = f" ({socket.close_code} {socket.close_reason or ''})".replace(" )", ")")
        self._note(f"{type(processor).__name__}: the provider has closed the connection{why}")

    def _note(self, words: str) -> None:
        if self._problem is None and not self._release.is_set():
            self._problem = words
            self._lost(words)


class _SetUps(BaseObserver):
    """Hears of each processor that has been set up."""

    def __init__(self, connections: Connections) -> None:
        super().__init__()
        self._connections = connections

    async def on_processor_setup(self, data: ProcessorSetUp) -> Any:
        self._connections.was_set_up(data.processor)
