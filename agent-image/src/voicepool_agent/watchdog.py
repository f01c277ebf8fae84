"""Watches the event loop from a thread of its own, and names the line of code that holds it up.

While a coroutine does not give way, no timer fires, no probe is answered and no audio flows, and nothing that runs in the
loop could tell. Invariants: only time in which this thread itself ran counts, so that a process that was frozen for a
moment is not blamed; code that keeps the interpreter to itself (a C extension that holds the GIL) stops this thread as well,
and then a timer that needs no interpreter ends the process (`faulthandler`). The kubelet would not: where a liveness probe
of a pod with `restartPolicy: Never` fails, it waits for the whole grace of the pod, which is as long as a call.
"""

from __future__ import annotations

import asyncio
import faulthandler
import itertools
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

TICK_SECONDS = 0.25
NOTICE_SHARE = 0.1
"""Of the limit: for longer blocks there is a line in the log."""

LAST_RESORT_SECONDS = 20.0
"""Past the limit, until the process is ended from outside of the interpreter."""
LAST_RESORT_EVERY_TICKS = 20
"""So often that is put off."""


@dataclass(slots=True)
class Patience:
    """How long the loop has been held up, in ticks of the watching thread. Pure.

    Args:
        limit_seconds: asked each time, as it depends on where the agent is in its life.
    """

    limit_seconds: Callable[[], float]
    beats: int = -1
    waited_seconds: float = 0.0
    noticed: bool = False

    def tick(self, beats: int) -> str | None:
        """One tick later the loop has come round `beats` times: "notice", "give up" or nothing."""
        if beats != self.beats:
            self.beats, self.waited_seconds, self.noticed = beats, 0.0, False
            return None
        self.waited_seconds += TICK_SECONDS
        limit = self.limit_seconds()
        if self.waited_seconds >= limit:
            return "give up"
        if self.waited_seconds >= limit * NOTICE_SHARE and not self.noticed:
            self.noticed = True
            return "notice"
        return None


class Watchdog:
    """Watches the loop that it was made in, until the process ends.

    Args:
        limit_seconds: how long the loop may be held up.
        notice: called in the watching thread, once for each long block, with its place.
        give_up: called there when the limit is over, with the seconds and the place. It ends the process.
        folder: of the bot, whose lines are named first.
        is_live: whether the agent is; one that is not is ended as well.
        last_resort_seconds: see :data:`LAST_RESORT_SECONDS`.
    """

    def __init__(
        self,
        limit_seconds: Callable[[], float],
        notice: Callable[[str], None],
        give_up: Callable[[float, str], None],
        folder: Path | None,
        is_live: Callable[[], bool] = lambda: True,
        last_resort_seconds: float = LAST_RESORT_SECONDS,
    ) -> None:
        self._limit_seconds = limit_seconds
        self._is_live = is_live
        self._last_resort_seconds = last_resort_seconds
        self._patience = Patience(limit_seconds)
        self._notice = notice
        self._give_up = give_up
        self._folder = folder
        self._loop = asyncio.get_running_loop()
        self._watched = threading.get_ident()
        self._beats = 0

    def start(self) -> None:
        """Begin to watch."""
        self._beat()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def _beat(self) -> None:
        self._beats += 1
        self._loop.call_later(TICK_SECONDS, self._beat)

    def _watch(self) -> None:
        try:
            self._watch_until_closed()
        finally:
            faulthandler.cancel_dump_traceback_later()

    def _watch_until_closed(self) -> None:
        for tick in itertools.count():
            if tick % LAST_RESORT_EVERY_TICKS == 0 and self._is_live():
                # Whatever it says goes to the log: who keeps the lock, and where the other threads are.
                faulthandler.dump_traceback_later(self._limit_seconds() + self._last_resort_seconds, exit=True, file=2)
            time.sleep(TICK_SECONDS)
            if self._loop.is_closed():
                return
            verdict = self._patience.tick(self._beats)
            if verdict is None:
                continue
            frame = sys._current_frames().get(self._watched)
            place = place_of(traceback.extract_stack(frame), self._folder) if frame else "an unknown place"
            if verdict == "notice":
                self._notice(place)
            else:
                self._give_up(self._patience.waited_seconds, place)
                return


def place_of(stack: traceback.StackSummary, folder: Path | None) -> str:
    """The innermost line of the bot's own code, or of whatever runs where there is none: "line 3 of bot.py"."""
    own = [frame for frame in stack if folder is not None and Path(frame.filename).is_relative_to(folder)]
    frame = (own or stack)[-1]
    return f"line {frame.lineno} of {Path(frame.filename).name}"
