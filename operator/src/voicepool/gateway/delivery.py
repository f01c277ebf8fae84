"""Brings orders to agents over HTTP, and asks them how they are.

Invariant: what came of a delivery is never guessed. `Accepted` and `Refused` are the agent's own words, `NotReached` means that not one byte of the
order left, and everything else is `Unknown`: the agent may have taken the session.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import aiohttp

from voicepool.model import PodFact


@dataclass(frozen=True, slots=True)
class Accepted:
    """The agent has the session."""


@dataclass(frozen=True, slots=True)
class Refused:
    """The agent does not have the session, and this order will not change that."""

    code: str


@dataclass(frozen=True, slots=True)
class NotReached:
    """No connection came about; nothing was sent."""


@dataclass(frozen=True, slots=True)
class Unknown:
    """Sent, but no answer that can be trusted."""


Outcome = Accepted | Refused | NotReached | Unknown


@dataclass(frozen=True, slots=True)
class AgentStatus:
    """An agent's own words about itself."""

    state: str
    """starting, parked, accepted, joined or ending."""
    session_id: str | None
    pod_uid: str | None

    def has(self, session_id: str) -> bool:
        """Whether the agent has taken this session."""
        return self.session_id == session_id and self.state in ("accepted", "joined")


class Courier:
    """Talks to agents.

    Args:
        http: a session that keeps no connections (each pod is bound once) and follows no redirects.
        port: the agents' port.
        bind_timeout_seconds: for one order.
        status_timeout_seconds: for one question.
    """

    def __init__(
        self, http: aiohttp.ClientSession, *, port: int, bind_timeout_seconds: float, status_timeout_seconds: float
    ) -> None:
        self._http = http
        self._port = port
        self._bind_timeout_seconds = bind_timeout_seconds
        self._status_timeout_seconds = status_timeout_seconds

    async def bind(self, pod: PodFact, order: str) -> Outcome:
        """Bring an assignment."""
        return await self._order(pod, "/bind", order)

    async def end(self, pod: PodFact, order: str) -> Outcome:
        """Bring the order to end the session."""
        return await self._order(pod, "/end", order)

    async def status(self, pod: PodFact) -> AgentStatus | None:
        """Ask an agent what it does; None when it cannot be asked."""
        return await self._status(pod, {}, self._status_timeout_seconds)

    async def wait_joined(self, pod: PodFact, seconds: float) -> AgentStatus | None:
        """Wait until the agent is in the room, or ends, or the time is up; then as `status`."""
        query = {"wait": "joined", "timeout": f"{seconds:g}"}
        return await self._status(pod, query, seconds + self._status_timeout_seconds)

    async def _order(self, pod: PodFact, path: str, order: str) -> Outcome:
        timeout = aiohttp.ClientTimeout(
            total=self._bind_timeout_seconds, sock_connect=self._bind_timeout_seconds * 0.75
        )
        headers = {"Content-Type": "application/jwt"}
        try:
            async with self._http.post(
                self._url(pod, path), data=order.encode(), headers=headers, timeout=timeout, allow_redirects=False
            ) as answer:
                if answer.status in (200, 202):
                    return Accepted()
                body = await answer.content.read(64 * 1024)
                if answer.status in (400, 401, 409, 413, 503):
                    return Refused(_code(body, answer.status))
                # A 404 or 500 is not in the contract: whether the session was taken cannot be told from it.
                return Unknown()
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError):
            return NotReached()
        except (aiohttp.ClientError, TimeoutError, OSError):
            return Unknown()

    async def _status(self, pod: PodFact, query: dict[str, str], timeout_seconds: float) -> AgentStatus | None:
        timeout = aiohttp.ClientTimeout(total=timeout_seconds, sock_connect=self._status_timeout_seconds)
        try:
            async with self._http.get(
                self._url(pod, "/status"), params=query, timeout=timeout, allow_redirects=False
            ) as answer:
                if answer.status != 200:
                    return None
                words: Any = json.loads(await answer.content.read(64 * 1024))
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError):
            return None
        if not isinstance(words, dict) or words.get("pod_uid") != pod.uid:
            # The address has been given to another pod since.
            return None
        return AgentStatus(state=str(words.get("state")), session_id=words.get("session"), pod_uid=words["pod_uid"])

    def _url(self, pod: PodFact, path: str) -> str:
        host = f"[{pod.pod_ip}]" if pod.pod_ip and ":" in pod.pod_ip else pod.pod_ip
        return f"http://{host}:{self._port}{path}"


def _code(body: bytes, status: int) -> str:
    try:
        code = json.loads(body).get("code")
    except (ValueError, AttributeError):
        code = None
    return code if isinstance(code, str) and len(code) <= 64 else f"HTTP_{status}"
