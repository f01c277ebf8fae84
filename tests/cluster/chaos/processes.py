"""A process of ours that is started again whenever it ends, as Kubernetes would do, and that can be killed and frozen."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import aiohttp

RESTART_SECONDS = 0.2
READY_DEADLINE_SECONDS = 60.0


class Process:
    """`voicepool operator` or `voicepool gateway`. An async context manager: entered it is started, not ready yet.

    Args:
        role: which of the two.
        settings: its `VOICEPOOL_*` variables, and others.
        port: where it answers `/readyz`, on loopback.
        log: the file of its output.
        http: asks it.
    """

    def __init__(
        self, role: str, settings: Mapping[str, str], port: int, log: Path, http: aiohttp.ClientSession
    ) -> None:
        self.address = f"http://127.0.0.1:{port}"
        self.own_ends: list[int] = []
        """Exit codes where it ended without having been killed."""
        self.kills = 0
        self._role = role
        self._settings = settings
        self._log = log
        self._http = http
        self._process: asyncio.subprocess.Process | None = None
        self._killed = False

    async def __aenter__(self) -> Process:
        self._keeper = asyncio.create_task(self._keep())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._keeper.cancel()
        await asyncio.gather(self._keeper, return_exceptions=True)
        if self._process is not None and self._process.returncode is None:
            self._process.kill()
            await self._process.wait()

    async def kill(self) -> None:
        """End it with SIGKILL; it is started again at once."""
        process = self._running()
        self._killed = True
        self.kills += 1
        process.kill()
        await process.wait()

    def memory_bytes(self) -> int:
        """What it has resident."""
        pages = int(Path(f"/proc/{self._running().pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGESIZE")

    def terminate(self) -> None:
        """End it politely; it is started again."""
        self._killed = True
        self._running().terminate()

    def freeze(self) -> None:
        """Stop it in the middle of whatever it does."""
        self._running().send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """Let it go on from where it was frozen."""
        self._running().send_signal(signal.SIGCONT)

    async def ready(self) -> None:
        """Wait until it says so. Raises TimeoutError."""
        deadline = time.monotonic() + READY_DEADLINE_SECONDS
        while await self.ask("/readyz") is None:
            if time.monotonic() > deadline:
                raise TimeoutError(f"the {self._role} was not ready within {READY_DEADLINE_SECONDS} s; see {self._log}")
            await asyncio.sleep(0.05)

    async def ask(self, path: str) -> str | None:
        """What it answers; None where it does not, or not with 200."""
        timeout = aiohttp.ClientTimeout(total=2)
        with contextlib.suppress(aiohttp.ClientError, TimeoutError):
            async with self._http.get(f"{self.address}{path}", timeout=timeout) as answer:
                return await answer.text() if answer.status == 200 else None
        return None

    def _running(self) -> asyncio.subprocess.Process:
        assert self._process is not None
        return self._process

    async def _keep(self) -> None:
        environment = {**os.environ, **self._settings}
        command = (sys.executable, "-m", "voicepool.main", self._role)
        with self._log.open("ab") as log:
            while True:
                self._process = await asyncio.create_subprocess_exec(*command, env=environment, stdout=log, stderr=log)
                code = await self._process.wait()
                if not self._killed:
                    self.own_ends.append(code)
                self._killed = False
                await asyncio.sleep(RESTART_SECONDS)
