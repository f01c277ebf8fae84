"""Child processes: started with a log of their own, asked whether they are ready, measured from outside through /proc."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

READY_SECONDS = 120.0
POLL_SECONDS = 0.01
_CPUCLOCK_SCHED = 2
_MEBIBYTE_KIBIBYTES = 1024


class ChildError(Exception):
    """A child process did not do what it must; the message has the end of its log."""


class Child:
    """A Python program beside us; an async context manager that ends it.

    Args:
        arguments: what follows ``python``.
        log: where its output goes.
        url: where it will answer; empty for one that never does.
        environment: added to ours.
    """

    def __init__(
        self, arguments: Sequence[str], log: Path, url: str = "", environment: Mapping[str, str] | None = None
    ) -> None:
        self.url = url
        self.started_at = 0.0
        """When it was started, by `time.perf_counter`."""
        self._arguments = arguments
        self._log = log
        self._environment = {**os.environ, **(environment or {})}
        self._process: asyncio.subprocess.Process | None = None

    async def __aenter__(self) -> Self:
        with self._log.open("ab") as log:
            self.started_at = time.perf_counter()
            self._process = await asyncio.create_subprocess_exec(
                sys.executable, *self._arguments, env=self._environment, stdout=log, stderr=log
            )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        process = self._running()
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
            try:
                await asyncio.wait_for(process.wait(), 30)
            except TimeoutError:
                process.kill()
                await process.wait()

    async def answers(self, path: str, *statuses: int) -> float:
        """Wait until it answers with one of these statuses there; returns the moment, by `time.perf_counter`.

        Raises:
            ChildError: the process ended, or the time is up.
        """
        deadline = time.perf_counter() + READY_SECONDS
        async with aiohttp.ClientSession() as session:
            while time.perf_counter() < deadline and self._running().returncode is None:
                try:
                    async with session.get(self.url + path) as answer:
                        if answer.status in statuses:
                            return time.perf_counter()
                except aiohttp.ClientConnectionError:
                    pass
                await asyncio.sleep(POLL_SECONDS)
        end = self._log.read_text(errors="replace")[-2000:]
        raise ChildError(f"{' '.join(self._arguments)} did not get ready; the end of its log:\n{end}")

    def cpu_seconds(self) -> float:
        """CPU time that the process has used, all its threads."""
        return cpu_seconds(self._running().pid)

    def freeze(self) -> None:
        """Let it do nothing until `go_on`."""
        self._running().send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """Let it work again."""
        self._running().send_signal(signal.SIGCONT)

    def memory_mebibytes(self) -> float:
        """Resident memory now."""
        line = next(line for line in self._proc("status").splitlines() if line.startswith("VmRSS:"))
        return int(line.split()[1]) / _MEBIBYTE_KIBIBYTES

    def peak_memory_mebibytes(self) -> float:
        """The most resident memory that there was."""
        line = next(line for line in self._proc("status").splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) / _MEBIBYTE_KIBIBYTES

    def _proc(self, name: str) -> str:
        return Path(f"/proc/{self._running().pid}/{name}").read_text()

    def _running(self) -> asyncio.subprocess.Process:
        if self._process is None:
            raise ChildError("the process was not started")
        return self._process


def cpu_seconds(process_id: int) -> float:
    """CPU time that a process has used, all its threads; by its own clock (clock_getcpuclockid(3)), as /proc counts in hundredths of a second."""
    return time.clock_gettime((~process_id << 3) | _CPUCLOCK_SCHED)


def metric_sum(text: str, name: str) -> float:
    """The sum of a metric over its labels, in what a process shows to Prometheus; 0 where it is not there."""
    families = text_string_to_metric_families(text)
    return sum(sample.value for family in families for sample in family.samples if sample.name == name)
