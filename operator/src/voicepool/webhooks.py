"""Tells one address of the beginning and the end of every session, signed as the Standard Webhooks specification says.

Invariants: telling never waits and never fails; what cannot be delivered within :data:`GIVE_UP_SECONDS`, or comes while :data:`MAX_PENDING` others wait, is
counted and dropped; one thing that happened has one id, whoever tells it and how often, so that the receiver can tell a repetition; the address is
the operator's own setting, no redirect is followed from it, and no answer is read.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import hmac
import json
import logging
import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import aiohttp

from voicepool.binding import timestamp
from voicepool.events import Happening, Kind, end_of_session
from voicepool.model import BindState, PodFact

logger = logging.getLogger(__name__)

SECRET_PREFIX = "whsec_"  # noqa: S105 - what a secret begins with, not one
MAX_PENDING = 1000
PARALLEL = 4
TIMEOUT_SECONDS = 10.0
FIRST_RETRY_SECONDS = 1.0
MAX_RETRY_SECONDS = 60.0
GIVE_UP_SECONDS = 900.0
REPEAT_SECONDS = 120
"""What is no older when an operator begins to work is told (again): the one before it may not have come to it."""

TYPES: Mapping[Kind, str] = {
    Kind.SESSION_STARTED: "session.started",
    Kind.SESSION_ENDED: "session.ended",
    Kind.SESSION_DROPPED: "session.dropped",
    Kind.SESSION_UNDELIVERED: "session.dropped",
}


class WebhookSecretError(ValueError):
    """The secret that signs is not of the form that the specification asks for."""


@dataclass(frozen=True, slots=True)
class Message:
    """One thing to tell."""

    id: str
    body: bytes


def message_of(happening: Happening, now: datetime) -> Message | None:
    """What is told of something that happened; None where nothing is.

    The summary is the agent's, which has no word of what was said.
    """
    kind = TYPES.get(happening.kind)
    if kind is None:
        return None
    pod = happening.pod
    started = happening.kind is Kind.SESSION_STARTED
    at = pod.bound_at if started else pod.finished_at
    body = {
        "type": kind,
        "timestamp": timestamp(at or now),
        "data": {
            "sessionId": pod.session,
            "namespace": pod.namespace,
            "pool": pod.pool,
            "reason": None if started else happening.reason,
            "createdAt": timestamp(pod.bound_at) if pod.bound_at else None,
            "endedAt": None if started else timestamp(pod.finished_at or now),
            "coldStart": pod.cold_start is not None,
            "summary": None if started else _summary(pod.message),
        },
    }
    # Of the pod and the type alone: what happened once has the same id for every operator that tells it.
    digest = hashlib.sha256(f"{pod.uid} {'started' if started else 'over'}".encode()).hexdigest()
    return Message(f"msg_{digest[:32]}", json.dumps(body, separators=(",", ":")).encode())


def recent(pods: Iterable[PodFact], now: datetime) -> list[Happening]:
    """What happened to sessions in the last :data:`REPEAT_SECONDS`, as far as their pods still show it."""
    since = now - timedelta(seconds=REPEAT_SECONDS)
    found: list[Happening] = []
    for pod in pods:
        if pod.state is not BindState.BOUND:
            continue
        if pod.bound_at is not None and pod.bound_at >= since:
            found.append(Happening(Kind.SESSION_STARTED, pod))
        if pod.finished and pod.finished_at is not None and pod.finished_at >= since:
            found.append(end_of_session(pod))
    return found


def secrets_of(text: str) -> tuple[bytes, ...]:
    """The keys of a file: each ``whsec_`` and base64, one a line. Several sign at the same time, so that a receiver can change over.

    Raises:
        WebhookSecretError: it holds none, or something else; the message does not show it.
    """
    keys = []
    for line in text.split():
        try:
            if not line.startswith(SECRET_PREFIX):
                raise WebhookSecretError(f"a secret must begin with {SECRET_PREFIX!r}")
            key = base64.b64decode(line.removeprefix(SECRET_PREFIX), validate=True)
        except binascii.Error:
            raise WebhookSecretError(f"a secret must be {SECRET_PREFIX!r} and base64") from None
        if not 24 <= len(key) <= 64:
            raise WebhookSecretError(f"a secret must have 24 to 64 bytes, not {len(key)}")
        keys.append(key)
    if not keys:
        raise WebhookSecretError("there is no secret in it")
    return tuple(keys)


def headers_of(message: Message, keys: Iterable[bytes], now: datetime) -> dict[str, str]:
    """The headers that prove where a message comes from and when it was sent."""
    moment = str(int(now.timestamp()))
    signed = b".".join((message.id.encode(), moment.encode(), message.body))
    signatures = (base64.b64encode(hmac.digest(key, signed, "sha256")).decode() for key in keys)
    return {
        "webhook-id": message.id,
        "webhook-timestamp": moment,
        "webhook-signature": " ".join(f"v1,{signature}" for signature in signatures),
    }


def _summary(message: str | None) -> dict[str, Any] | None:
    try:
        summary = json.loads(message or "")
    except (ValueError, RecursionError):
        return None
    return summary if isinstance(summary, dict) else None


@dataclass(frozen=True, slots=True)
class WebhookLimits:
    """How a message is sent."""

    timeout_seconds: float = TIMEOUT_SECONDS
    first_retry_seconds: float = FIRST_RETRY_SECONDS
    max_retry_seconds: float = MAX_RETRY_SECONDS
    give_up_seconds: float = GIVE_UP_SECONDS
    pending: int = MAX_PENDING


class Webhooks:
    """Takes what happened and delivers it while :meth:`run` runs.

    Args:
        http: from :func:`make_webhook_session`.
        url: where to.
        secret_file: read for each message, so that a new secret is used at once.
        now: the time, with a time zone.
        on_told: told with the outcome: ``ok``, ``failed`` (given up) or ``dropped`` (too many waited).
        limits: see there.
        jitter: source of randomness for the retries.
    """

    def __init__(
        self,
        http: aiohttp.ClientSession,
        url: str,
        secret_file: Path,
        now: Callable[[], datetime],
        *,
        on_told: Callable[[str], None] = lambda outcome: None,
        limits: WebhookLimits | None = None,
        jitter: random.Random | None = None,
    ) -> None:
        self._http = http
        self._url = url
        self._secret_file = secret_file
        self._now = now
        self._on_told = on_told
        self._limits = limits or WebhookLimits()
        self._jitter = jitter or random.Random()
        self._queue: asyncio.Queue[Message] = asyncio.Queue()
        self._pending = 0
        self._places = asyncio.Semaphore(PARALLEL)

    def tell(self, happening: Happening) -> None:
        """Tell of something that happened, soon."""
        message = message_of(happening, self._now())
        if message is None:
            return
        if self._pending >= self._limits.pending:
            self._on_told("dropped")
            return
        self._pending += 1
        self._queue.put_nowait(message)

    async def run(self) -> None:
        """Deliver until cancelled; what is still pending then is forgotten."""
        try:
            async with asyncio.TaskGroup() as group:
                while True:
                    group.create_task(self._deliver(await self._queue.get()))
        finally:
            self._pending = 0
            self._queue = asyncio.Queue()

    async def _deliver(self, message: Message) -> None:
        loop = asyncio.get_running_loop()
        limits = self._limits
        give_up_at = loop.time() + limits.give_up_seconds
        wait_seconds = limits.first_retry_seconds
        while True:
            # A receiver that is slow holds up a few, not all: who waits for the next try has no place.
            async with self._places:
                failure, final = await self._send(message)
            if failure is None:
                outcome = "ok"
                break
            pause_seconds = wait_seconds * self._jitter.uniform(0.8, 1.2)
            if final or loop.time() + pause_seconds > give_up_at:
                outcome = "failed"
                logger.warning("a webhook was given up", extra={"webhook": message.id, "error": failure})
                break
            await asyncio.sleep(pause_seconds)
            wait_seconds = min(wait_seconds * 2, limits.max_retry_seconds)
        self._pending -= 1
        self._on_told(outcome)

    async def _send(self, message: Message) -> tuple[str | None, bool]:
        """Why it was not taken, None where it was; and whether it never will be."""
        try:
            keys = secrets_of(self._secret_file.read_text())
        except (OSError, ValueError) as error:
            return f"the secret cannot be used: {error}", False
        headers = headers_of(message, keys, self._now()) | {"Content-Type": "application/json"}
        timeout = aiohttp.ClientTimeout(total=self._limits.timeout_seconds)
        try:
            async with self._http.post(
                self._url, data=message.body, headers=headers, timeout=timeout, allow_redirects=False
            ) as answer:
                status = answer.status
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            # Not the error's own words: they may hold the address, and an address may hold a token.
            return type(error).__name__, False
        if 200 <= status < 300:
            return None, False
        return f"HTTP {status}", status == 410


def make_webhook_session() -> aiohttp.ClientSession:
    """For the one address: no cookie is kept, and no proxy of the environment comes in between."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=PARALLEL),
        cookie_jar=aiohttp.DummyCookieJar(),
        headers={"User-Agent": "voicepool"},
        trust_env=False,
    )
