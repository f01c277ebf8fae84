"""Pipecat's prebuilt web client in a real browser: a person who opens the page talks with an agent."""

from __future__ import annotations

import asyncio
import contextlib
import re
import wave
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest
import soxr
from tests.cluster.errors import ClusterError
from tests.e2e.browser import Page, browser_page, install_chromium
from tests.e2e.caller import read_wav
from tests.e2e.conversation import OPENING_HOURS
from tests.e2e.deployment import NAMESPACE, ROOT, Deployment, Key, add_key, remove_key
from tests.e2e.pools import KEYLESS, MakePool, until

pytestmark = pytest.mark.cluster

POOL = "web"
PICTURES = ROOT / "build" / "web-client"
"""Where the screenshots are kept."""
MICROPHONE_RATE = 48_000
BEFORE_SECONDS, AFTER_SECONDS = 7.0, 9.0
"""Silence around the question, which the browser repeats for ever: time for the greeting, and for the answer."""
HEARD_ENERGY = 0.001
"""Of decoded sound (WebRTC's `totalAudioEnergy`). Silence adds nothing; a spoken sentence some hundredths."""


@pytest.fixture
async def key(deployment: Deployment) -> AsyncIterator[Key]:
    """For this pool alone, so that the page, which names none, gets this one."""
    made = await asyncio.to_thread(add_key, deployment, POOL, f"default/{POOL}")
    yield made
    await asyncio.to_thread(remove_key, deployment, made)


@contextlib.asynccontextmanager
async def forwarded(deployment: Deployment) -> AsyncIterator[str]:
    """The gateway at localhost, as the guide says: there a browser gives a page the microphone, and says of the page's calls whose they are."""
    cluster = deployment.cluster
    process = await asyncio.create_subprocess_exec(
        *(cluster.program("kubectl"), "--kubeconfig", str(cluster.kubeconfig), "port-forward"),
        *("--namespace", NAMESPACE, "service/voicepool-gateway", ":80"),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    assert process.stdout is not None
    try:
        async with asyncio.timeout(30):
            line = (await process.stdout.readline()).decode()
        found = re.search(r"127\.0\.0\.1:(\d+)", line)
        if found is None:
            raise ClusterError(f"kubectl port-forward said {line!r}", "see whether the gateways run")
        yield f"http://localhost:{found[1]}"
    finally:
        process.terminate()
        await process.communicate()


def write_microphone(file: Path) -> None:
    """The question with silence around it, as the browser's microphone takes it."""
    pcm, rate = read_wav(OPENING_HOURS)
    samples = soxr.resample(np.frombuffer(pcm, dtype=np.int16), rate, MICROPHONE_RATE).astype(np.int16)
    silences = [
        np.zeros(round(seconds * MICROPHONE_RATE), dtype=np.int16) for seconds in (BEFORE_SECONDS, AFTER_SECONDS)
    ]
    with wave.open(str(file), "wb") as wav:
        wav.setnchannels(1)
        wav.setsampwidth(2)
        wav.setframerate(MICROPHONE_RATE)
        wav.writeframes(np.concatenate([silences[0], samples, silences[1]]).tobytes())


async def converse(page: Page, address: str, picture: Path) -> None:
    """Open the page, connect, wait until the question is answered, in words and, from then on, in sound, and hang up."""
    await page.open(address)
    await page.click("Transport")
    await page.click("LiveKit")
    # It lets the transport before go and makes this one, and a click before that goes nowhere.
    await page.wait_until_said("[LiveKit Transport] Initialized")
    await page.wait_for("Client\nINITIALIZED", timeout_seconds=30)
    await page.click("Connect")
    text = await page.wait_for("in the morning", timeout_seconds=120)
    await page.write_screenshot(picture)
    assert "opening hours" in text.lower()
    _, before = await page.heard()
    await page.wait_for_energy(before + HEARD_ENERGY, timeout_seconds=30)
    await page.click("Disconnect")


async def test_whoever_opens_the_page_asks_an_agent_and_hears_its_answer_twice_in_a_row(
    deployment: Deployment, make_pool: MakePool, key: Key, tmp_path: Path
) -> None:
    await asyncio.to_thread(install_chromium)
    pool = await make_pool(POOL, KEYLESS, replicas=2)
    await asyncio.to_thread(write_microphone, tmp_path / "question.wav")
    await asyncio.to_thread(PICTURES.mkdir, parents=True, exist_ok=True)
    async with (
        forwarded(deployment) as address,
        browser_page(tmp_path / "question.wav", password=key.value) as page,
    ):
        try:
            for number in (1, 2):
                await converse(page, f"{address}/client/", PICTURES / f"conversation-{number}.png")
        finally:
            await page.write_screenshot(PICTURES / "last.png")
            await asyncio.to_thread((PICTURES / "console.txt").write_text, "\n".join(page.said))
        assert page.asked >= 1

    def both_ended() -> bool:
        pods = [pod for pod in deployment.pods_of(pool) if "voicepool.dev/session" in pod["metadata"]["labels"]]
        return len(pods) == 2 and all(pod["status"]["phase"] == "Succeeded" for pod in pods)

    await until("both sessions to end when their callers had left", both_ended)
