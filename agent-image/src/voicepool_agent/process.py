"""This process: its age, its memory, giving back what it does not need, and being the first of a container."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
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


def supervise() -> None:
    """Go on in a child process, and stay behind as its reaper; returns in the child only.

    For an agent that is process 1 because a pod template's `command` has left out the image's tini. Orphans of the
    bot's children become children of process 1, and stay zombies until it waits for them. Passes SIGTERM and SIGINT
    on, exits as the child does (128 and the signal's number where one has killed it), and with process 1 the kernel
    ends all that the bot has left behind.
    """
    passed_on = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, {*passed_on, signal.SIGCHLD})
    agent = os.fork()
    if agent == 0:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {*passed_on, signal.SIGCHLD})
        return
    while True:
        number = signal.sigwait({*passed_on, signal.SIGCHLD})
        if number in passed_on:
            os.kill(agent, number)
            continue
        with contextlib.suppress(ChildProcessError):  # none are left
            while (ended := os.waitpid(-1, os.WNOHANG)) != (0, 0):
                if ended[0] == agent:
                    code = os.waitstatus_to_exitcode(ended[1])
                    os._exit(code if code >= 0 else 128 - code)


def release_memory() -> None:
    """Give freed memory back to the system (10 MB after the models were loaded), where the C library can: glibc."""
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
