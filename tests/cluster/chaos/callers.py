"""Callers: each asks a gateway for a session, and remembers what it was told.

Every second one names its session, so that it may ask the other gateway for the same when the first does not answer; the others have one try, as a
caller without a key may not ask twice.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp

ANSWER_SECONDS = 6.0
PATIENCE_SECONDS = 25.0
PAUSE_SECONDS = 0.2
FINAL = frozenset({"SESSION_ENDED"})
"""The session had its agent, and is over: the first answer was lost."""


NO_ANSWER = 0
"""In place of an HTTP status."""
OK = "OK"
NEVER_ARRIVED = "NEVER_ARRIVED"


@dataclass(frozen=True, slots=True)
class Answer:
    """What a caller heard."""

    status: int
    """Of HTTP; `NO_ANSWER` where none came."""
    code: str
    """`OK`, the code of the error, `NEVER_ARRIVED`, or what happened to the connection."""
    seconds: float
    """How long that took."""
    retry_after: str = ""
    session: str = ""
    pod: str = ""
    room: str = ""

    @property
    def says_when_to_come_again(self) -> bool:
        """Whether an error has a number of seconds that one can go by."""
        return self.retry_after.isdigit() and 1 <= int(self.retry_after) <= 60


async def ask(
    http: aiohttp.ClientSession,
    gateway: str,
    body: Mapping[str, Any],
    headers: Mapping[str, str],
    *,
    patience_seconds: float,
) -> Answer:
    """Ask a gateway for a session, once.

    Args:
        http: sends the request.
        gateway: its address.
        body: of the request.
        headers: of the request, with a key.
        patience_seconds: after which the caller hangs up.
    """
    loop = asyncio.get_running_loop()
    began = loop.time()
    timeout = aiohttp.ClientTimeout(total=patience_seconds)
    try:
        async with http.post(f"{gateway}/start", json=body, headers=headers, timeout=timeout) as response:
            told = await response.json()
    except aiohttp.ClientConnectorError:
        return Answer(NO_ANSWER, NEVER_ARRIVED, loop.time() - began)
    except (aiohttp.ClientError, TimeoutError) as error:
        return Answer(NO_ANSWER, type(error).__name__, loop.time() - began)
    seconds = loop.time() - began
    if response.status == 200:
        return Answer(200, OK, seconds, "", told["sessionId"], told["agent"]["pod"], told["roomName"])
    return Answer(response.status, str(told.get("code")), seconds, response.headers.get("Retry-After", ""))


class Callers:
    """All callers of one pool.

    Args:
        http: sends the requests.
        gateways: addresses of the gateways.
        api_key: a key for them.
        pool: ``<namespace>.<name>``.
    """

    def __init__(self, http: aiohttp.ClientSession, gateways: Sequence[str], api_key: str, pool: str) -> None:
        self.asked = 0
        self.answered: dict[str, str] = {}
        """Session to the name of the pod that its caller was told."""
        self.failures: Counter[str] = Counter()
        """Callers without an agent, by the last reason that they heard."""
        self._http = http
        self._gateways = gateways
        self._headers = {"Authorization": f"Bearer {api_key}"}
        self._pool = pool
        self._calls: set[asyncio.Task[None]] = set()

    @property
    def waiting(self) -> int:
        """Callers who have not been answered yet."""
        return len(self._calls)

    async def keep_calling(self, per_second: float) -> None:
        """Call at this rate until cancelled; a moment that was missed is made up for."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        for number in itertools.count(self.asked):
            await asyncio.sleep(max(0.0, began + (number + 1) / per_second - loop.time()))
            self.asked += 1
            call = asyncio.create_task(self._call(number))
            self._calls.add(call)
            call.add_done_callback(self._calls.discard)

    async def finish(self) -> None:
        """Wait until every caller has an answer, or has lost patience."""
        if self._calls:
            await asyncio.gather(*self._calls)

    async def _call(self, number: int) -> None:
        keyed = number % 2 == 0
        reason = "NO_ANSWER"
        loop = asyncio.get_running_loop()
        deadline = loop.time() + PATIENCE_SECONDS
        for attempt in itertools.count():
            gateway = self._gateways[(number // 2 + attempt) % len(self._gateways)]
            reason, again = await self._ask(gateway, f"caller-{number}" if keyed else None)
            if reason == OK:
                return
            if reason in FINAL or not (keyed or again) or loop.time() > deadline:
                break
            await asyncio.sleep(PAUSE_SECONDS)
        self.failures[reason] += 1

    async def _ask(self, gateway: str, session: str | None) -> tuple[str, bool]:
        """One request: OK or why not, and whether it certainly never arrived."""
        body = {"pool": self._pool, "transport": "livekit"} | ({"sessionId": session} if session else {})
        answer = await ask(self._http, gateway, body, self._headers, patience_seconds=ANSWER_SECONDS)
        if answer.code == OK:
            self.answered[answer.session] = answer.pod
        return answer.code, answer.code == NEVER_ARRIVED
