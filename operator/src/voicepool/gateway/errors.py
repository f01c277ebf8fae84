"""Everything that a caller can be told went wrong, as a tree of exceptions that becomes one JSON shape.

``{"error", "code", "detail", "info"}``: Pipecat Cloud's clients read the first two, the JavaScript client the others. A message says what, where, and
what to do; it never carries a secret, a body or a stack trace.

GatewayError
+-- BadRequest           400 INVALID_REQUEST, MALFORMED_JSON
+-- Unauthenticated      401 UNAUTHENTICATED, NO_API_KEYS, INVALID_WEBHOOK
+-- NotAllowed           403 POOL_NOT_ALLOWED
+-- PoolNotFound         404 POOL_NOT_FOUND
+-- SessionNotFound      404 SESSION_NOT_FOUND
+-- RouteNotFound        404 NOT_FOUND
+-- SessionEnded         409 SESSION_ENDED
+-- SessionElsewhere     409 SESSION_IN_OTHER_POOL
+-- RoomEnded            409 ROOM_ENDED
+-- BodyTimeout          408 BODY_TIMEOUT
+-- BodyTooLarge         413 BODY_TOO_LARGE
+-- TooManyFailures      429 TOO_MANY_FAILURES
+-- RateLimited          429 RATE_LIMITED
+-- QuotaExceeded        429 QUOTA_EXCEEDED
+-- PoolAtCapacity       429 POOL_AT_CAPACITY
+-- TooManyStreams       429 TOO_MANY_STREAMS
+-- QueueFull            429 QUEUE_FULL
+-- NoWarmAgent          503 (429 where no pool queues) NO_WARM_AGENT
+-- TooManyBodies        503 TOO_MANY_BODIES
+-- AgentsRefused        503 AGENTS_REFUSED
+-- AgentUnreachable     503 AGENT_UNREACHABLE
+-- IssuerUnavailable    503 ISSUER_UNAVAILABLE
+-- ClusterUnavailable   503 CLUSTER_UNAVAILABLE
+-- LiveKitUnavailable   503 LIVEKIT_UNAVAILABLE, LIVEKIT_NOT_CONFIGURED
+-- NotSynced            503 NOT_SYNCED
+-- DeadlinePassed       504 DEADLINE_PASSED
+-- NotJoined            504 AGENT_NOT_JOINED
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.routing import Match

from voicepool.kube.api import Forbidden, KubeApiError
from voicepool.model import PoolFact
from voicepool.session_api import ErrorAnswer

log = logging.getLogger("voicepool.gateway")

TRY_AGAIN = frozenset({429, 503})
"""Statuses that always come with ``Retry-After``."""
_WHEN_MENDED_SECONDS = 30.0
"""What it says where somebody has to do something first."""


class GatewayError(Exception):
    """A request that is answered with an error.

    Args:
        detail: one sentence: what, where, what to do.
        code: overrides the class's own code.
        status: overrides the class's own status.
        retry_after_seconds: sent as ``Retry-After``, rounded up. Default: none, but for a status of :data:`TRY_AGAIN`.
    """

    status = 500
    code = "INTERNAL"
    error = "Internal error"
    other_statuses: tuple[int, ...] = ()
    """That an instance may have instead."""
    other_codes: tuple[str, ...] = ()
    """The same of codes."""

    def __init__(
        self,
        detail: str,
        *,
        code: str | None = None,
        status: int | None = None,
        retry_after_seconds: float | None = None,
    ) -> None:
        super().__init__(detail)
        self.detail = detail
        self.code = code or type(self).code
        self.status = status or type(self).status
        self.retry_after_seconds = retry_after_seconds


class BadRequest(GatewayError):
    """The request itself is wrong; the same request will fail again."""

    status, code, error = 400, "INVALID_REQUEST", "Bad request"
    other_codes = ("MALFORMED_JSON",)


class Unauthenticated(GatewayError):
    """No key or token, or a wrong one."""

    status, code, error = 401, "UNAUTHENTICATED", "Unauthorized"
    other_codes = ("NO_API_KEYS", "INVALID_WEBHOOK")


class NotAllowed(GatewayError):
    """The key or token is good, but not for this pool."""

    status, code, error = 403, "POOL_NOT_ALLOWED", "Forbidden"


class PoolNotFound(GatewayError):
    """There is no such VoiceAgentPool, or none was named and there is no default."""

    status, code, error = 404, "POOL_NOT_FOUND", "Pool not found"


class SessionNotFound(GatewayError):
    """No pod carries this session, or it ended longer ago than the pool retains it."""

    status, code, error = 404, "SESSION_NOT_FOUND", "Session not found"


class RouteNotFound(GatewayError):
    """The bot has no route of its own for this path."""

    status, code, error = 404, "NOT_FOUND", "Route not found"


class SessionEnded(GatewayError):
    """The session had its agent and is over; it does not get a second one."""

    status, code, error = 409, "SESSION_ENDED", "Session has ended"


class SessionElsewhere(GatewayError):
    """The session id is in use in another pool."""

    status, code, error = 409, "SESSION_IN_OTHER_POOL", "Session belongs to another pool"


class RoomEnded(GatewayError):
    """The room in which a caller waited is no longer there. Nobody is told: it is an outcome in the metrics, and a line in the log."""

    status, code, error = 409, "ROOM_ENDED", "Room has ended"


class BodyTimeout(GatewayError):
    """The request's body did not arrive in time."""

    status, code, error = 408, "BODY_TIMEOUT", "Request body timed out"


class BodyTooLarge(GatewayError):
    """The request's body is over the limit, and the rest of it was not read; or what an agent would be sent of it is over the agent's."""

    status, code, error = 413, "BODY_TOO_LARGE", "Request body too large"


class TooManyFailures(GatewayError):
    """Too many wrong credentials came from one address; none from there is looked at for a while."""

    status, code, error = 429, "TOO_MANY_FAILURES", "Too many failed authentications"


class RateLimited(GatewayError):
    """The caller starts sessions faster than it may."""

    status, code, error = 429, "RATE_LIMITED", "Too many starts"


class QuotaExceeded(GatewayError):
    """The caller has as many sessions as it may have."""

    status, code, error = 429, "QUOTA_EXCEEDED", "Too many sessions"


class PoolAtCapacity(GatewayError):
    """Each pool that was named has ``maxPods`` live pods, and all of them are taken."""

    status, code, error = 429, "POOL_AT_CAPACITY", "Pool at capacity"


class TooManyStreams(GatewayError):
    """The gateway has as many open streams as it takes."""

    status, code, error = 429, "TOO_MANY_STREAMS", "Too many streams"


class QueueFull(GatewayError):
    """As many callers wait for the pool as may wait in one gateway."""

    status, code, error = 429, "QUEUE_FULL", "Too many callers wait"


class NoWarmAgent(GatewayError):
    """No warm pod now, or none within the time that the pool lets callers wait."""

    status, code, error = 503, "NO_WARM_AGENT", "No warm agent"
    other_statuses = (429,)


class TooManyBodies(GatewayError):
    """The bodies that are on their way to the gateway are as many bytes as it holds."""

    status, code, error = 503, "TOO_MANY_BODIES", "Too many request bodies"


class AgentsRefused(GatewayError):
    """Several agents in a row did not take the session."""

    status, code, error = 503, "AGENTS_REFUSED", "Agents refused the session"


class AgentUnreachable(GatewayError):
    """The session's agent could not be asked."""

    status, code, error = 503, "AGENT_UNREACHABLE", "Agent unreachable"


class IssuerUnavailable(GatewayError):
    """The keys of a token's issuer are not known and cannot be fetched, so nobody can say whether the token is good."""

    status, code, error = 503, "ISSUER_UNAVAILABLE", "Token issuer unavailable"


class ClusterUnavailable(GatewayError):
    """The Kubernetes API does not answer, throttles, or forbids."""

    status, code, error = 503, "CLUSTER_UNAVAILABLE", "Kubernetes API unavailable"


class LiveKitUnavailable(GatewayError):
    """The pool's LiveKit server does not answer or is not configured."""

    status, code, error = 503, "LIVEKIT_UNAVAILABLE", "LiveKit unavailable"
    other_codes = ("LIVEKIT_NOT_CONFIGURED",)


class NotSynced(GatewayError):
    """The gateway has just started and does not know the cluster yet."""

    status, code, error = 503, "NOT_SYNCED", "Gateway is starting"


class DeadlinePassed(GatewayError):
    """The request's own time is up."""

    status, code, error = 504, "DEADLINE_PASSED", "Deadline passed"


class NotJoined(GatewayError):
    """The caller asked to wait until the agent is in the room, and it is not."""

    status, code, error = 504, "AGENT_NOT_JOINED", "Agent did not join"


_METHODS = ("DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT")
_WORDS: Mapping[int, tuple[str, str]] = {
    400: ("MALFORMED_JSON", "The body cannot be read."),
    404: ("NOT_FOUND", "There is no such route; /openapi.json lists them."),
    405: ("METHOD_NOT_ALLOWED", "This route exists, but not for this method; /openapi.json lists them."),
}


def error_response(error: GatewayError) -> JSONResponse:
    """The one shape in which an error leaves the gateway."""
    headers = {}
    retry_after_seconds = error.retry_after_seconds
    if retry_after_seconds is None and error.status in TRY_AGAIN:
        retry_after_seconds = _WHEN_MENDED_SECONDS
    if retry_after_seconds is not None:
        headers["Retry-After"] = str(max(1, -int(-retry_after_seconds // 1)))
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(_shape(error.error, error.code, error.detail), status_code=error.status, headers=headers)


def install(app: FastAPI) -> None:
    """Give every error of the application the one shape."""

    async def gateway_error(_request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, GatewayError)  # noqa: S101 -- registered for this class alone
        return error_response(error)

    async def validation_error(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)  # noqa: S101 -- registered for this class alone
        problems = error.errors()
        if any(problem["type"] == "json_invalid" for problem in problems):
            return error_response(BadRequest("The body is not JSON.", code="MALFORMED_JSON"))
        kind = request.headers.get("Content-Type", "")
        if any(problem["loc"] == ("body",) for problem in problems) and "json" not in kind:
            # What `curl -d` sends unless it is told otherwise.
            said = f"says {kind[:100]!r}" if kind else "is missing"
            return error_response(
                BadRequest(f"The body's Content-Type {said}; send JSON with Content-Type: application/json.")
            )
        # The input itself is left out: it may hold what the caller would not want to see in an error.
        words = "; ".join(f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}" for problem in problems)
        return error_response(BadRequest(words))

    async def http_error(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)  # noqa: S101 -- registered for this class alone
        code, words = _WORDS.get(error.status_code, (f"HTTP_{error.status_code}", str(error.detail)))
        body = _shape(str(error.detail), code, words)
        headers = error.headers
        if error.status_code == 405:
            # The router only knows those of the first route with this path.
            headers = {"Allow": ", ".join(method for method in _METHODS if _is_route(app, request, method))}
        return JSONResponse(body, status_code=error.status_code, headers=headers)

    async def unexpected(_request: Request, error: Exception) -> JSONResponse:
        log.error("a request failed in a way that nobody foresaw", exc_info=error)
        return error_response(GatewayError("The gateway failed; its log says why."))

    app.add_exception_handler(GatewayError, gateway_error)
    app.add_exception_handler(RequestValidationError, validation_error)
    app.add_exception_handler(HTTPException, http_error)
    app.add_exception_handler(Exception, unexpected)


def _is_route(app: FastAPI, request: Request, method: str) -> bool:
    scope = {**request.scope, "method": method}
    return any(route.matches(scope)[0] is Match.FULL for route in app.routes)


def _shape(error: str, code: str, detail: str) -> dict[str, str]:
    return ErrorAnswer(error=error, code=code, detail=detail, info=detail).model_dump()


def cluster_error(error: KubeApiError, what: str, pool: PoolFact) -> ClusterUnavailable:
    """What a caller is told when the API server would not do something for a pool."""
    where = f"the pool {pool.namespace}/{pool.name}"
    if isinstance(error, Forbidden):
        return ClusterUnavailable(f"The gateway's account may not {what} {where}; check the chart's RBAC.")
    return ClusterUnavailable(
        f"The Kubernetes API refused to {what} {where} ({type(error).__name__}).", retry_after_seconds=2
    )
