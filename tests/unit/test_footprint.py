"""What a process holds on to, as the test of leaks reads it."""

from __future__ import annotations

import os
import socket
import threading
import time
from pathlib import Path

import pytest
from tests.e2e.footprint import footprint, growth_per_step


def test_what_this_process_opens_is_seen(tmp_path: Path) -> None:
    before, waiting = footprint([os.getpid()]), threading.Event()
    thread = threading.Thread(target=waiting.wait)
    thread.start()
    with socket.socket(), (tmp_path / "file").open("w"):
        during = footprint([os.getpid()])
    waiting.set()
    thread.join()
    deadline = time.monotonic() + 10
    # Python has joined it a moment before the kernel has taken it down.
    while Path(f"/proc/self/task/{thread.native_id}").exists() and time.monotonic() < deadline:
        time.sleep(0.001)
    after = footprint([os.getpid()])
    grown = [(one.threads, one.files, one.sockets) for one in (before, during, after)]
    (threads, files, sockets), *later = grown
    assert later == [(threads + 1, files + 1, sockets + 1), (threads, files, sockets)]
    assert (before.processes, before.resident_bytes > 1e6) == (1, True)


def test_a_process_that_is_gone_holds_nothing() -> None:
    assert footprint([2**22 + 1]).processes == 0


@pytest.mark.parametrize(("values", "growth"), [([5, 5, 5], 0), ([1, 3, 5, 7], 2), ([0, 9, 0, 9], 1.8)])
def test_growth_is_the_slope_of_the_nearest_line(values: list[float], growth: float) -> None:
    assert growth_per_step(values) == pytest.approx(growth)
