"""File locks between processes; the kernel lets go of them when a process ends, however it ends."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from tests.cluster.errors import ClusterError


@contextmanager
def locked(path: Path, deadline_seconds: float, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Holds the lock of a file around the body of a `with`.

    The holder may delete the file: the next one makes it anew.

    Args:
        path: the lock file; made when missing.
        deadline_seconds: how long to wait for another holder.
        waiting: called once when somebody else holds the lock.

    Raises:
        ClusterError: another process held the lock until the deadline.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + deadline_seconds
    said = False
    while True:
        with path.open("a") as file:
            if _taken(path, file):
                yield
                return
        if not said:
            waiting()
            said = True
        if time.monotonic() > deadline:
            raise ClusterError(
                f"another process has held {path} for {deadline_seconds:.0f} s",
                f"see who it is (`fuser {path}`), wait for it or end it, and try again",
            )
        time.sleep(0.1)


def _taken(path: Path, file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Deleted by its last holder between our opening and locking it: a lock on it would keep nobody out.
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except (BlockingIOError, FileNotFoundError):
        return False
