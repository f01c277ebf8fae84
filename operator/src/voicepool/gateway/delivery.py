"""Brings orders to agents over HTTP, and asks them how they are.

Invariant: what came of a delivery is never guessed. `Accepted` and `Refused` are the agent's own words, `NotReached` means that not one byte of the
order left, and everything else is `Unknown`: the agent may have taken the session.
"""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass
from functools import partial

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


class Call:
    """A connection to an agent that is made while its pod is being bound, for an assignment of which not one byte goes out before the bind.

    To connect takes as long as to be answered; beside the patch it costs the caller nothing. aiohttp sends a request's head together with the first
    piece of its body, so the agent of a pod that is lost to another gateway sees a connection that comes and goes.

    Args:
        request: brings a body that comes in pieces.
        order: the assignment.
        timeout_seconds: for the answer, from when the assignment goes out.
    """

    def __init__(
        self,
        request: Callable[[AsyncIterator[bytes]], Coroutine[None, None, Outcome]],
        order: str,
        timeout_seconds: float,
    ) -> None:
        self._order = order
        self._timeout_seconds = timeout_seconds
        self._bound = asyncio.Event()
        self._sent = False
        self._request = asyncio.create_task(request(self._body()))

    async def _body(self) -> AsyncIterator[bytes]:
        await self._bound.wait()
        self._sent = True
        yield self._order.encode()

    async def bring(self) -> Outcome:
        """Bring the assignment, now that the pod is bound."""
        self._bound.set()
        try:
            async with asyncio.timeout(self._timeout_seconds):
                outcome = await self._request
        except TimeoutError:
            outcome = Unknown()
        return outcome if self._sent else NotReached()

    def hang_up(self) -> None:
        """Close the connection; harmless when the assignment was brought."""
        self._request.cancel()


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

    def call(self, pod: PodFact, order: str) -> Call:
        """Connect to an agent whose pod is still being bound, to bring it an assignment."""
        request = partial(self._post, pod, "/bind", len(order), None)
        return Call(request, order, self._bind_timeout_seconds)

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
        # As a file, which is written in pieces: an order may have megabytes.
        return await self._post(pod, path, len(order), self._bind_timeout_seconds, io.BytesIO(order.encode()))

    async def _post(
        self,
        pod: PodFact,
        path: str,
        length: int,
        timeout_seconds: float | None,
        order: io.BytesIO | AsyncIterator[bytes],
    ) -> Outcome:
        timeout = aiohttp.ClientTimeout(total=timeout_seconds, sock_connect=self._bind_timeout_seconds * 0.75)
        headers = {"Content-Type": "application/jwt", "Content-Length": str(length)}
        try:
            async with self._http.post(
                agent_url(pod, path, self._port),
                data=order,
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
