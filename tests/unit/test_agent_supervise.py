"""The agent as the first process of a container, without tini: orphans are reaped, signals and exit codes passed on."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from tests.e2e.agent_process import run_agent
from tests.unit.test_agent_process import NOWHERE, SILENT_BOT

SUPERVISED = """
import ctypes, sys
from voicepool_agent import process
PR_SET_CHILD_SUBREAPER = 36  # what process 1 is to everybody, this process is to its descendants
ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
process.supervise()
"""
ORPHAN = """
import os, subprocess, time
from pathlib import Path

shell = subprocess.run(["sh", "-c", "sleep 0.1 >/dev/null 2>&1 & echo $!"], stdout=subprocess.PIPE, check=True)
orphan = Path("/proc", shell.stdout.decode().strip())
"""
WAIT_UNTIL_REAPED = """
until = time.monotonic() + 10
while orphan.exists() and time.monotonic() < until:
    time.sleep(0.01)
sys.exit(7 if not orphan.exists() else (orphan / "stat").read_text())
"""

UNSHARE = ("unshare", "--user", "--map-root-user", "--pid", "--fork", "--kill-child", "--mount-proc")


async def supervised(source: str) -> asyncio.subprocess.Process:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return await asyncio.create_subprocess_exec(
        sys.executable, "-c", SUPERVISED + source, env=environment, stdout=asyncio.subprocess.PIPE
    )


async def test_orphans_are_reaped_and_the_exit_code_is_passed_on() -> None:
    process = await supervised(ORPHAN + WAIT_UNTIL_REAPED)
    assert await process.wait() == 7


async def test_sigterm_is_passed_on() -> None:
    process = await supervised(
        "import signal\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(3))\n"
        "print('ready', flush=True)\n"
        "while True: signal.pause()"
    )
    assert process.stdout is not None
    await process.stdout.readline()
    process.terminate()
    assert await process.wait() == 3


async def test_a_child_that_was_killed_is_an_exit_code_of_its_own() -> None:
    process = await supervised("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    assert await process.wait() == 128 + signal.SIGKILL


@pytest.fixture(scope="module")
def own_processes() -> Sequence[str]:
    """What runs a program as process 1 of a namespace of its own."""
    if shutil.which("unshare") is None or subprocess.run([*UNSHARE, "true"]).returncode:
        pytest.skip("no namespace for processes can be made here")
    return UNSHARE


async def test_an_agent_that_is_process_1_reaps_orphans_and_leaves_no_child_of_the_bot_behind(
    own_processes: Sequence[str], tmp_path: Path
) -> None:
    marker = f"60{os.getpid()}"
    leftover = f'subprocess.Popen(["sleep", "{marker}"], start_new_session=True)\n'
    bot = ORPHAN + leftover + SILENT_BOT.replace("return ready", "return not orphan.exists()")
    (tmp_path / "bot.py").write_text(bot)

    def still_there() -> list[str]:
        wanted = f"sleep\0{marker}\0".encode()
        return [path.parent.name for path in Path("/proc").glob("[0-9]*/cmdline") if read(path) == wanted]

    async with run_agent("bot.py", tmp_path, through=own_processes) as agent:
        await agent.wait_until_ready()
        assert still_there()
        await agent.bind(session="s-1", room="r-1", url=NOWHERE, token="a-token")
        await agent.end("s-1", "cancel")
        assert await agent.exit_code() == 0
    assert not still_there()


def read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:  # it has ended meanwhile
        return b""
