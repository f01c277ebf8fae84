"""A Chromium without a window, with a WAV file as its microphone, driven over its DevTools protocol.

Debian's own, so that nothing is downloaded but from the distribution. What the page's connections carry is asked of the connections themselves
(`RTCPeerConnection.getStats()`): sound came in if energy did.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import json
import shutil
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
from tests.cluster.errors import ClusterError
from tests.cluster.native.packages import install
from tests.cluster.progress import Progress

PROGRAM = "chromium"
START_SECONDS = 60.0
_ARGUMENTS = (
    "--headless=new",
    "--no-sandbox",
    "--no-first-run",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-extensions",
    "--disable-quic",
    "--use-fake-ui-for-media-stream",
    "--use-fake-device-for-media-stream",
    "--autoplay-policy=no-user-gesture-required",
    "--window-size=1280,900",
    "--remote-debugging-port=0",
)
_KEEP_CONNECTIONS = """
window.connections = [];
window.RTCPeerConnection = class extends window.RTCPeerConnection {
  constructor(...settings) { super(...settings); window.connections.push(this); }
};
"""
_HEARD = """(async () => {
  let packets = 0, energy = 0;
  for (const one of window.connections) for (const stat of (await one.getStats()).values())
    if (stat.type === 'inbound-rtp' && stat.kind === 'audio') { packets += stat.packetsReceived; energy += stat.totalAudioEnergy ?? 0; }
  return {packets, energy};
})()"""
_FIND = """(words => {
  const named = one => (one.getAttribute('aria-label') ?? one.textContent).trim();
  const found = [...document.querySelectorAll('button, [role=option], [role=menuitem], [role=menuitemradio], [role=combobox]')]
    .filter(one => named(one) === words || one.textContent.trim() === words).find(one => one.offsetParent && !one.disabled);
  if (!found) return null;
  found.scrollIntoView({block: 'center'});
  const {x, y, width, height} = found.getBoundingClientRect();
  return [x + width / 2, y + height / 2];
})"""


def install_chromium() -> None:
    """Install Debian's Chromium where there is none. Raises ClusterError."""
    if shutil.which(PROGRAM) is None:
        install(Progress(), [PROGRAM], 60)


class Page:
    """One page of a browser.

    Args:
        socket: to the browser.
        password: for whoever asks for one, with any name; what the browser's user would type.
    """

    def __init__(self, socket: aiohttp.ClientWebSocketResponse, password: str) -> None:
        self._socket = socket
        self._password = password
        self._ids = itertools.count(1)
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._session: str | None = None
        self._replies: set[asyncio.Task[Any]] = set()
        self.asked = 0
        """How often somebody asked for the password."""
        self.said: list[str] = []
        """The page's console."""

    async def open(self, url: str) -> None:
        """Open a page, in the place of the one before."""
        self.said.clear()
        if self._session is not None:
            await self.command("Page.navigate", url=url)
            return
        target = await self.command("Target.createTarget", url="about:blank")
        attached = await self.command("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime"):
            await self.command(f"{domain}.enable")
        await self.command("Fetch.enable", handleAuthRequests=True)
        await self.command("Page.addScriptToEvaluateOnNewDocument", source=_KEEP_CONNECTIONS)
        await self.command("Page.navigate", url=url)

    async def command(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Have the browser do something.

        Raises:
            ClusterError: it refuses, or does not answer.
        """
        number = next(self._ids)
        answer = self._answers[number] = asyncio.get_running_loop().create_future()
        message = {"id": number, "method": method, "params": parameters}
        await self._socket.send_json(message | ({"sessionId": self._session} if self._session else {}))
        async with asyncio.timeout(START_SECONDS):
            answered = await answer
        if "error" in answered:
            raise ClusterError(f"the browser refused {method}: {answered['error']['message']}", "see the console above")
        result: dict[str, Any] = answered["result"]
        return result

    async def evaluate(self, expression: str) -> Any:
        """The value of a piece of JavaScript, when it has come. Raises ClusterError."""
        answered = await self.command(
            "Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True, userGesture=True
        )
        if "exceptionDetails" in answered:
            raise ClusterError(f"the page raised: {answered['exceptionDetails']['text']}", "look at the expression")
        return answered["result"].get("value")

    async def text(self) -> str:
        """What stands on the page."""
        return str(await self.evaluate("document.body.innerText"))

    async def heard(self) -> tuple[int, float]:
        """Packets of sound that came in on all connections of the page so far, and the energy of what was decoded of them."""
        found = await self.evaluate(_HEARD)
        return int(found["packets"]), float(found["energy"])

    async def wait_for_energy(self, energy: float, *, timeout_seconds: float) -> None:
        """Return when so much energy of sound was heard on the page's connections in all.

        Raises:
            ClusterError: it was not in time.
        """
        deadline = asyncio.get_running_loop().time() + timeout_seconds
        while (heard := await self.heard())[1] < energy:
            if asyncio.get_running_loop().time() > deadline:
                raise ClusterError(
                    f"the page heard {heard[0]} packets of sound with the energy {heard[1]:g}, and not {energy:g}",
                    "see whether the agent speaks, and whether its connection carries it",
                )
            await asyncio.sleep(0.1)

    async def click(self, words: str, *, timeout_seconds: float = 30) -> None:
        """Click on what has these words on it, or as its label, when it is there.

        Raises:
            ClusterError: it is not in time.
        """
        deadline = asyncio.get_running_loop().time() + timeout_seconds
        while (place := await self.evaluate(f"{_FIND}({json.dumps(words)})")) is None:
            if asyncio.get_running_loop().time() > deadline:
                raise ClusterError(f"there is nothing to click that says {words!r}", "see the page", await self.text())
            await asyncio.sleep(0.1)
        x, y = place
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            await self.command("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    async def wait_until_said(self, words: str, *, timeout_seconds: float = 30) -> None:
        """Return when the page has said this on its console since it was opened.

        Raises:
            ClusterError: it has not in time.
        """
        deadline = asyncio.get_running_loop().time() + timeout_seconds
        while not any(words in line for line in self.said):
            if asyncio.get_running_loop().time() > deadline:
                raise ClusterError(f"the page's console does not say {words!r}", "see it", "\n".join(self.said[-20:]))
            await asyncio.sleep(0.05)

    async def wait_for(self, words: str, *, timeout_seconds: float) -> str:
        """The text of the page when these words stand on it.

        Raises:
            ClusterError: they do not in time.
        """
        deadline = asyncio.get_running_loop().time() + timeout_seconds
        while words.lower() not in (text := await self.text()).lower():
            if asyncio.get_running_loop().time() > deadline:
                raise ClusterError(
                    f"{words!r} did not stand on the page within {timeout_seconds:g} s",
                    "see what stands there, and the console",
                    "\n".join([text, *self.said[-20:]]),
                )
            await asyncio.sleep(0.2)
        return text

    async def write_screenshot(self, file: Path) -> None:
        """Write what is seen as a PNG."""
        shot = await self.command("Page.captureScreenshot", format="png")
        await asyncio.to_thread(file.write_bytes, base64.b64decode(shot["data"]))

    async def close_browser(self) -> None:
        """End the browser with all its processes."""
        self._session = None
        await self.command("Browser.close")

    async def read(self) -> None:
        """Read what the browser says, until it says nothing more."""
        async for message in self._socket:
            if message.type is not aiohttp.WSMsgType.TEXT:
                return
            said = json.loads(message.data)
            if "id" in said:
                if (answer := self._answers.pop(said["id"], None)) is not None and not answer.done():
                    answer.set_result(said)
            else:
                self._happened(said["method"], said.get("params", {}))

    def _happened(self, event: str, told: dict[str, Any]) -> None:
        if event == "Fetch.requestPaused":
            self._reply("Fetch.continueRequest", requestId=told["requestId"])
        elif event == "Fetch.authRequired":
            self.asked += 1
            answer = {"response": "ProvideCredentials", "username": "anybody", "password": self._password}
            self._reply("Fetch.continueWithAuth", requestId=told["requestId"], authChallengeResponse=answer)
        elif event == "Runtime.consoleAPICalled":
            self.said.append(" ".join(str(one.get("value", one.get("description", ""))) for one in told["args"])[:300])

    def _reply(self, method: str, **parameters: Any) -> None:
        task = asyncio.create_task(self.command(method, **parameters))
        self._replies.add(task)
        task.add_done_callback(self._replied)

    def _replied(self, task: asyncio.Task[Any]) -> None:
        self._replies.discard(task)
        # A request that was given up meanwhile cannot be continued.
        if not task.cancelled() and task.exception() is not None:
            self.said.append(str(task.exception()))


@contextlib.asynccontextmanager
async def browser_page(microphone: Path, *, password: str) -> AsyncIterator[Page]:
    """A page of a new browser; nothing of it is left behind.

    Args:
        microphone: a WAV file, which is spoken again and again.
        password: for whoever asks for one.

    Raises:
        ClusterError: there is no Chromium, or it does not start.
    """
    with tempfile.TemporaryDirectory(prefix="voicepool-", ignore_cleanup_errors=True) as folder:
        process = await asyncio.create_subprocess_exec(
            *(PROGRAM, *_ARGUMENTS, f"--user-data-dir={folder}", f"--use-file-for-fake-audio-capture={microphone}"),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
        )
        try:
            address = await _address(Path(folder, "DevToolsActivePort"))
            async with aiohttp.ClientSession() as http, http.ws_connect(address, max_msg_size=0) as socket:
                page = Page(socket, password)
                reader = asyncio.create_task(page.read())
                try:
                    yield page
                    with contextlib.suppress(ConnectionError, TimeoutError):
                        async with asyncio.timeout(5):
                            await page.close_browser()
                finally:
                    reader.cancel()
        finally:
            if process.returncode is None:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(5):
                        await process.wait()
            if process.returncode is None:
                process.kill()
            await process.wait()


async def _address(file: Path) -> str:
    """Where the browser listens, which it writes down when it does."""
    deadline = asyncio.get_running_loop().time() + START_SECONDS
    while True:
        lines = await asyncio.to_thread(_lines, file)
        if len(lines) == 2:
            return f"ws://127.0.0.1:{lines[0]}{lines[1]}"
        if asyncio.get_running_loop().time() > deadline:
            raise ClusterError(f"{PROGRAM} did not start within {START_SECONDS:g} s", f"run it by hand: {PROGRAM}")
        await asyncio.sleep(0.1)


def _lines(file: Path) -> list[str]:
    return file.read_text().splitlines() if file.exists() else []
