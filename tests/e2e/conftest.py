"""What several end-to-end tests need: the LiveKit server's program, and a voice for the caller."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
from tests.cluster.images import NAMES, build_all
from tests.cluster.progress import Progress
from tests.cluster.tool import Cluster
from tests.e2e.deployment import Deployment, install, load
from tests.e2e.livekit_server import LiveKit, run_livekit
from tests.e2e.pools import BOT_MAP, BOTS, MakePool, pools

Speech = tuple[bytes, int]
_STATUS = pytest.StashKey[int]()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what needs no cluster, so that it can run beside others of its kind."""
    for item in items:
        if Path(__file__).parent in item.path.parents and item.get_closest_marker("cluster") is None:
            item.add_marker(pytest.mark.agent_process)


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Note how the run went."""
    session.config.stash[_STATUS] = int(exitstatus)


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    """Leave as an agent does, without the interpreter's last steps.

    A thread of LiveKit's native library that calls back into an interpreter which is going away takes the process with it ("panic in a function
    that cannot unwind"): a run in which everything passed ended with SIGABRT.
    """
    if "livekit.rtc" in sys.modules and not hasattr(config, "workerinput"):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(config.stash[_STATUS])


@pytest.fixture(scope="session")
def livekit_program() -> Path:
    """The compiled server: VOICEPOOL_LIVEKIT_SERVER, or the newest in the cache of the cluster tool."""
    if named := os.environ.get("VOICEPOOL_LIVEKIT_SERVER"):
        return Path(named)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "voicepool"
    found = sorted(cache.glob("*/**/livekit-server"), key=lambda path: path.stat().st_mtime)
    if not found:
        pytest.skip(f"no livekit-server in {cache}: `make cluster` compiles it; or set VOICEPOOL_LIVEKIT_SERVER to one")
    return found[-1]


@pytest.fixture
async def livekit(livekit_program: Path, tmp_path: Path) -> AsyncIterator[LiveKit]:
    async with run_livekit(livekit_program, tmp_path) as server:
        yield server


@pytest.fixture(scope="session")
def speech() -> Callable[[str], Awaitable[Speech]]:
    """Speaks a text: samples and their rate."""
    from tests.e2e.voice import speak  # takes a second, which tests that do not speak need not wait for

    async def speak_in_a_thread(text: str) -> Speech:
        return await asyncio.to_thread(speak, text)

    return speak_in_a_thread


@pytest.fixture(scope="session")
def deployment(cluster: Cluster) -> Deployment:
    """A whole voicepool on a cluster of its own, for all tests of a run."""
    progress = Progress()
    build_all(progress)
    load(cluster, progress, NAMES)
    installed = install(cluster, progress)
    bots = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": BOT_MAP}, "data": BOTS}
    cluster.apply(json.dumps(bots))
    return installed


@pytest.fixture
async def make_pool(deployment: Deployment) -> AsyncIterator[MakePool]:
    """Makes a pool and waits until it is warm; gone after the test, with its pods."""
    async with pools(deployment) as make:
        yield make


@pytest.fixture
async def kubectl(deployment: Deployment) -> Callable[..., Awaitable[str]]:
    """Runs kubectl without stopping the event loop, in which a caller may be speaking."""

    async def run(*arguments: str) -> str:
        return await asyncio.to_thread(deployment.cluster.kubectl, *arguments)

    return run
