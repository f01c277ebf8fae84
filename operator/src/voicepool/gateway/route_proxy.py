"""Passes one request on to a bot's own route, and the answer back as it comes.

Invariants: the request goes to the pod's address and the agents' port, below ``/sessions/{id}/``, and nowhere else, whatever its path and headers are;
no redirect is followed; the bot sees neither the caller's key nor cookies; the agent lets it through only with the gateway's signature for that pod
and session; what a bot serves cannot act as a page of the gateway's own origin.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Callable, Iterable
from datetime import datetime, timedelta
from urllib.parse import unquote

import aiohttp
import yarl
from fastapi import Request, Response
from fastapi.responses import StreamingResponse

from voicepool.agents import agent_url
from voicepool.gateway.assignments import Signer
from voicepool.gateway.errors import AgentUnreachable, BadRequest, DeadlinePassed, RouteNotFound, SessionNotFound
from voicepool.gateway.metrics import GatewayMetrics
from voicepool.gateway.options import GatewayOptions
from voicepool.model import PodFact

ORDER_HEADER = "Voicepool-Order"
REFUSED_HEADER = "Voicepool-Refused"

ORDER_SECONDS = 10.0
"""How long the agent lets a request through that was signed now: for two clocks that are not one."""

_HOP_BY_HOP = frozenset(
    {"connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection", "te", "trailer", "transfer-encoding", "upgrade"}
)  # fmt: skip
"""RFC 9110, section 7.6.1; with them goes what ``Connection`` names."""

_NOT_FOR_THE_BOT = _HOP_BY_HOP | {"authorization", "cookie", "content-length", "expect", "host", "x-api-key"}
_NOT_FOR_THE_CALLER = _HOP_BY_HOP | {
    # What a browser takes as said by the gateway's whole origin.
    "alt-svc",
    "clear-site-data",
    "content-security-policy",
    "nel",
    "report-to",
    "reporting-endpoints",
    "service-worker-allowed",
    "set-cookie",
    "strict-transport-security",
    "x-content-type-options",
    # What a proxy in front of the gateway takes as an order.
    "x-accel-redirect",
    "x-sendfile",
    # What the gateway says itself.
    "date",
    "server",
}
_CORS_HEADERS = b"access-control-"
"""Which pages may call from a browser is for the gateway's settings to say."""

_SAFE_HEADERS = (
    # Scripts in a page that a bot serves are of no origin, so they reach nothing of the gateway's.
    (b"content-security-policy", b"sandbox"),
    (b"x-content-type-options", b"nosniff"),
)

_PATH = re.compile(rb"[A-Za-z0-9._~!$&'()*+,;=:@%/-]*")
"""RFC 3986, section 3.3."""
_QUERY = re.compile(rb"[!-~]*")


def safe_path(raw_path: bytes, segments: int, path: str) -> str:
    """The end of a request's path as it was sent, once it is certain that everybody reads it in the same way.

    Args:
        raw_path: the whole path, with its percent-encoding.
        segments: how many segments come before the end, the empty one before the first slash included.
        path: the end as the router has decoded it.

    Raises:
        BadRequest: it has a segment ``.`` or ``..``, however it is written, a backslash, or a control character; or the router has read another one.
    """
    if not _PATH.fullmatch(raw_path):
        raise BadRequest("The path has characters that must be percent-encoded.")
    end = raw_path.decode().split("/", segments)[-1]
    read = unquote(end)
    if read != path or "\\" in read or any(ord(character) < 32 or ord(character) == 127 for character in read):
        raise BadRequest(
            "The path can be read in more than one way; leave out backslashes and encoded control characters."
        )
    if any(segment in (".", "..") for segment in read.split("/")):
        raise BadRequest("The path must not have a segment '.' or '..'.")
    return end


class RouteProxy:
    """Passes requests on.

    Args:
        http: from :func:`make_route_session`.
        signer: signs for the agent.
        options: the agents' port, times.
        metrics: counts.
        now: the current time, with its zone.
    """

    def __init__(
        self,
        http: aiohttp.ClientSession,
        signer: Signer,
        options: GatewayOptions,
        metrics: GatewayMetrics,
        now: Callable[[], datetime],
    ) -> None:
        self._http = http
        self._signer = signer
        self._options = options
        self._metrics = metrics
        self._now = now

    async def pass_on(self, request: Request, pod: PodFact, session_id: str, path: str) -> Response:
        """The bot's answer.

        Args:
            request: with its body read.
            pod: carries the session.
            session_id: a session id in its allowed form.
            path: from :func:`safe_path`.

        Raises:
            BadRequest: the query cannot be passed on.
            AgentUnreachable: there was no answer, or not from the session's agent.
            DeadlinePassed: the bot did not answer in time.
            SessionNotFound: the agent does not carry the session (yet, or any more).
            RouteNotFound: the bot has no such route.
        """
        outcome = "failed"
        try:
            answer = await self._ask(request, pod, session_id, path)
            outcome = "answered"
        except AgentUnreachable:
            outcome = "unreachable"
            raise
        except DeadlinePassed:
            outcome = "late"
            raise
        finally:
            self._metrics.routes.labels(pod.namespace, pod.pool, outcome).inc()
        return answer

    async def _ask(self, request: Request, pod: PodFact, session_id: str, path: str) -> Response:
        query: bytes = request.scope["query_string"]
        if not _QUERY.fullmatch(query):
            raise BadRequest("The query has characters that must be percent-encoded.")
        if pod.pod_ip is None:
            raise AgentUnreachable(f"The pod of the session {session_id} has no address yet.", retry_after_seconds=1)
        end = f"/sessions/{session_id}/{path}" + (f"?{query.decode()}" if query else "")
        order = self._signer.route(pod.uid, session_id, expires_at=self._now() + timedelta(seconds=ORDER_SECONDS))
        headers = [
            (name.decode("latin-1"), value.decode("latin-1"))
            for name, value in passed_on(request.headers.raw, _NOT_FOR_THE_BOT)
            if not name.startswith(b"voicepool-")
        ]
        try:
            answer = await self._http.request(
                request.method,
                # Encoded: whatever it is, it stays a path of this address.
                yarl.URL(agent_url(pod, end, self._options.agent_port), encoded=True),
                headers=[*headers, (ORDER_HEADER, order)],
                data=await request.body() or None,
                allow_redirects=False,
                skip_auto_headers=("Accept", "Accept-Encoding", "Content-Type", "User-Agent"),
                timeout=aiohttp.ClientTimeout(
                    total=None,
                    sock_connect=self._options.status_timeout_seconds,
                    sock_read=self._options.route_timeout_seconds,
                ),
            )
        except aiohttp.ConnectionTimeoutError:
            raise self._unreachable(session_id) from None
        except TimeoutError:
            raise DeadlinePassed(
                f"The bot of the session {session_id} did not answer within {self._options.route_timeout_seconds:g} s."
            ) from None
        except (aiohttp.ClientError, OSError):
            raise self._unreachable(session_id) from None
        if refused := answer.headers.get(REFUSED_HEADER):
            answer.close()
            raise self._refusal(refused, session_id)
        response = StreamingResponse(_parts(answer), status_code=answer.status)
        response.raw_headers = [
            *(
                (name.lower(), value)
                for name, value in passed_on(answer.raw_headers, _NOT_FOR_THE_CALLER)
                if not name.lower().startswith(_CORS_HEADERS)
            ),
            *_SAFE_HEADERS,
        ]
        return response

    def _unreachable(self, session_id: str) -> AgentUnreachable:
        return AgentUnreachable(
            f"The agent of the session {session_id} could not be asked; it may have just ended.", retry_after_seconds=1
        )

    def _refusal(self, code: str, session_id: str) -> Exception:
        if code == "SESSION_NOT_FOUND":
            return SessionNotFound(f"The session {session_id} has no agent yet, or it has ended.")
        if code == "NOT_FOUND":
            return RouteNotFound(
                f"The bot of the session {session_id} has no routes of its own, or this one is reserved."
            )
        return self._unreachable(session_id)


def passed_on(headers: Iterable[tuple[bytes, bytes]], without: frozenset[str]) -> list[tuple[bytes, bytes]]:
    """The headers without some, and without those that concern one connection only."""
    kept = list(headers)
    named = {
        token.strip().lower()
        for name, value in kept
        if name.lower() == b"connection"
        for token in value.decode("latin-1").split(",")
    }
    return [(name, value) for name, value in kept if name.decode("latin-1").lower() not in without | named]


def make_route_session() -> aiohttp.ClientSession:
    """For requests to bots: answers stay as they are encoded, no cookie is kept for anybody, no proxy comes in between."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, force_close=True),
        auto_decompress=False,
        cookie_jar=aiohttp.DummyCookieJar(),
        trust_env=False,
    )


async def _parts(answer: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    try:
        async for part in answer.content.iter_any():
            yield part
    finally:
        answer.close()
