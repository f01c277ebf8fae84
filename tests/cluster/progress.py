"""Says what long steps do: a line at the start with the expected time, one now and then, one at the end.

Safe to use from several threads.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


def words(seconds: float) -> str:
    """A duration for people: `8.2 s`, `45 s`, `6 min 20 s`."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    return f"{whole} s" if whole < 90 else f"{whole // 60} min {whole % 60:02d} s"


def _to_stderr(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


class Progress:
    """Reports steps.

    Args:
        write: takes one line; standard error by default, so that output meant for programs stays clean.
        clock: seconds, monotonic.
        every_seconds: how often a running step says that it still runs.
    """

    def __init__(
        self,
        write: Callable[[str], None] = _to_stderr,
        clock: Callable[[], float] = time.monotonic,
        every_seconds: float = 15,
    ) -> None:
        self._write, self._clock, self._every_seconds = write, clock, every_seconds
        self._began = clock()

    @property
    def elapsed_seconds(self) -> float:
        """Time since this object was made."""
        return self._clock() - self._began

    def say(self, text: str) -> None:
        """Writes one line, with the time since the start in front."""
        self._write(f"[{words(self.elapsed_seconds):>11}] {text}")

    @contextmanager
    def step(self, what: str, expected_seconds: float) -> Iterator[None]:
        """Reports a step around the body of a `with`.

        Args:
            what: the step, as a participle: "compiling Kubernetes".
            expected_seconds: how long it took where it was measured (2 cores).
        """
        began = self._clock()
        ended = threading.Event()
        self.say(f"{what} (expected: {words(expected_seconds)})")

        def remind() -> None:
            while not ended.wait(self._every_seconds):
                self.say(f"{what}: {words(self._clock() - began)} of about {words(expected_seconds)}")

        reminder = threading.Thread(target=remind, daemon=True)
        reminder.start()
        outcome = "failed after"
        try:
            yield
            outcome = "done in"
        finally:
            ended.set()
            reminder.join()
            self.say(f"{what}: {outcome} {words(self._clock() - began)}")
