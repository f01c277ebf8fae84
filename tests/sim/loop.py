"""An event loop with virtual time, in which one seed is one interleaving.

Invariants: of the callbacks that are ready a seeded one runs next, so tasks meet in every order; time creeps while anything is ready and then
jumps to the next timer; nothing real (clock, socket, thread) is ever waited for. A process is a group of tasks (whoever a task starts belongs to its
process): it can be killed, after which none of its code has any effect, or frozen, during which none of it runs.
"""

from __future__ import annotations

import asyncio
import heapq
import random
from collections.abc import Coroutine
from contextvars import ContextVar, copy_context
from typing import Any

TURN_SECONDS = 1e-6
"""What one callback takes. Were it nothing, a wait for less than a float can tell from now would be one without end."""


class Process:
    """One simulated process."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.alive = True
        self.frozen = False
        self.clock_offset_seconds = 0.0
        self.held: list[asyncio.Handle] = []
        """What came due while it was frozen."""
        self.tasks: dict[asyncio.Task[Any], None] = {}

    def kill(self) -> None:
        """As SIGKILL: what it has not sent is never sent. Clean-up code that still runs here finds every way out closed."""
        self.alive = False
        self.frozen = False
        for task in list(self.tasks):
            task.cancel()


PROCESS: ContextVar[Process | None] = ContextVar("process", default=None)


class Stuck(Exception):
    """Nothing is ready and no timer is set: everybody waits for everybody."""


class SeededLoop(asyncio.BaseEventLoop):
    """See the module.

    Args:
        seed: of the interleaving.
    """

    _ready: Any
    _scheduled: Any

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._random = random.Random(seed)
        self._now_seconds = 0.0
        self.set_task_factory(_task)

    def time(self) -> float:
        """Virtual seconds since the start."""
        return self._now_seconds

    def spawn(self, process: Process | None, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Run a coroutine as part of a process (or of none)."""
        context = copy_context()
        context.run(PROCESS.set, process)
        return self.create_task(work, context=context)

    def thaw(self, process: Process) -> None:
        """Let a frozen process run on."""
        process.frozen = False
        self._ready.extend(process.held)
        process.held.clear()

    def _process_events(self, event_list: Any) -> None:
        """There is no selector."""

    def _write_to_self(self) -> None:
        """Nothing sleeps that would have to be woken."""

    def _run_once(self) -> None:
        ready, scheduled = self._ready, self._scheduled
        while scheduled and scheduled[0].cancelled():
            heapq.heappop(scheduled)._scheduled = False
        if not ready:
            if not scheduled:
                raise Stuck
            self._now_seconds = max(self._now_seconds, scheduled[0].when())
        while scheduled and scheduled[0].when() <= self._now_seconds:
            timer = heapq.heappop(scheduled)
            timer._scheduled = False
            ready.append(timer)
        if len(ready) > 1:
            ready.rotate(-self._random.randrange(len(ready)))
        handle = ready.popleft()
        if handle.cancelled():
            return
        process = handle._context.get(PROCESS)
        if process is not None and process.frozen:
            process.held.append(handle)
            return
        self._now_seconds += TURN_SECONDS
        handle._run()


def _task(loop: asyncio.AbstractEventLoop, work: Any, context: Any = None) -> asyncio.Task[Any]:
    task: asyncio.Task[Any] = asyncio.Task(work, loop=loop, context=context)
    process = context.get(PROCESS) if context is not None else PROCESS.get()
    if process is not None:
        process.tasks[task] = None
        task.add_done_callback(lambda done: process.tasks.pop(done, None))
        if not process.alive:
            task.cancel()
    return task
