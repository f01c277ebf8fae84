"""This process: how long it has been running, how much memory it holds, and giving back what it does not need."""

from __future__ import annotations

import contextlib
import ctypes
import os
import time
from pathlib import Path


def age_seconds() -> float:
    """Seconds since the kernel started this process (10 ms steps), so that the interpreter's own start counts."""
    # The name of the process may hold spaces and brackets; field 22 is counted from behind its closing one.
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    started = int(fields[19]) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started


def resident_bytes() -> int:
    """Resident memory, shared file pages included: what the pod's memory limit sees at most."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def release_memory() -> None:
    """Give freed memory back to the system (10 MB after the models were loaded), where the C library can: glibc."""
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
