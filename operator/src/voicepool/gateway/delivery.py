"""Brings orders to agents over HTTP, and asks them how they are.

Invariant: what came of a delivery is never guessed. `Accepted` and `Refused` are the agent's own words, `NotReached` means that not one byte of the
order left, and everything else is `Unknown`: the agent may have taken the session.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import aiohttp

from voicepool.agents import AgentStatus, agent_url, ask
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


class Courier:
    """Talks to agents.

    Args:
        http: from :func:`~voicepool.agents.make_agent_session`.
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
                agent_url(pod, path, self._port),
                data=order.encode(),
                headers=headers,
                timeout=timeout,
                allow_redirects=False,
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
        return await ask(
            self._http,
            pod,
            timeout_seconds=timeout_seconds,
            connect_seconds=self._status_timeout_seconds,
            port=self._port,
            query=query,
        )


def _code(body: bytes, status: int) -> str:
    try:
        code = json.loads(body).get("code")
    except (ValueError, AttributeError):
        code = None
    return code if isinstance(code, str) and len(code) <= 64 else f"HTTP_{status}"
