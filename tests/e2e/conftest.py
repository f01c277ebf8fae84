"""What several end-to-end tests need: the LiveKit server's program, and a voice for the caller."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
from tests.e2e.livekit_server import LiveKit, run_livekit

Speech = tuple[bytes, int]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks what needs no cluster: it can run beside what only computes."""
    for item in items:
        if item.path.parent == Path(__file__).parent and item.get_closest_marker("cluster") is None:
            item.add_marker("agent_process")


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
