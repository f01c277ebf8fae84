"""Everything that can go wrong with a call, as a tree of exceptions.

VoicepoolError
+-- ConnectionFailed             no answer: nobody listens there, or the connection broke
|   +-- TlsFailed                the certificate is not trusted, or nobody speaks TLS there
|   +-- StreamBroken             a log or events that were followed broke off
+-- Timeout                      no answer within ``timeout_seconds``
+-- NotUnderstood                what answered is no gateway, or one that speaks another version
+-- Refused                      the gateway's answer is an error: ``status``, ``code``, ``detail``
    +-- InvalidRequest           400 INVALID_REQUEST, MALFORMED_JSON
    +-- Unauthorized             401 UNAUTHENTICATED, NO_API_KEYS
    +-- PoolNotAllowed           403 POOL_NOT_ALLOWED
    +-- PoolNotFound             404 POOL_NOT_FOUND
    +-- SessionNotFound          404 SESSION_NOT_FOUND
    +-- RouteNotFound            404 NOT_FOUND, 405 METHOD_NOT_ALLOWED
    +-- BodyTimeout              408 BODY_TIMEOUT
    +-- SessionEnded             409 SESSION_ENDED
    +-- SessionElsewhere         409 SESSION_IN_OTHER_POOL
    +-- BodyTooLarge             413 BODY_TOO_LARGE
    +-- GatewayFailed            500 INTERNAL
    +-- LiveKitNotConfigured     503 LIVEKIT_NOT_CONFIGURED
    +-- AgentNotJoined           504 AGENT_NOT_JOINED
    +-- TryAgainLater            it passes; where the gateway says when, the client has tried again until its time was up
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
        +-- LiveKitUnavailable   503 LIVEKIT_UNAVAILABLE
        +-- NotSynced            503 NOT_SYNCED
        +-- DeadlinePassed       504 DEADLINE_PASSED

The names are the gateway's own, and so are the words of a refusal.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar


class VoicepoolError(Exception):
    """A call that did not do what it was to do.

    Attributes:
        detail: what happened, and where.
        what_to_do: one sentence.
        status: of HTTP; None where there was no answer.
        code: the gateway's word for the error; empty where it said none.
        retry_after_seconds: when the gateway thinks that it is worth while to try again; None where it did not say.
    """

    what_to_do: ClassVar[str] = ""

    def __init__(
        self, detail: str, *, status: int | None = None, code: str = "", retry_after_seconds: float | None = None
    ) -> None:
        super().__init__(detail)
        self.detail = detail
        self.status = status
        self.code = code
        self.retry_after_seconds = retry_after_seconds

    def __str__(self) -> str:
        answer = f" ({' '.join(str(part) for part in (self.status, self.code) if part)})" if self.status else ""
        advice = f" What to do: {self.what_to_do}" if self.what_to_do else ""
        return f"{self.detail}{answer}{advice}"


class ConnectionFailed(VoicepoolError):
    """No answer came, or only a part of one."""

    what_to_do = "check the address, and that the gateway runs and can be reached from here."


class TlsFailed(ConnectionFailed):
    """Somebody is there, but not with a certificate that is trusted here, or without TLS at all."""

    what_to_do = "check https or http and the port, and give the certificates that you trust by an http_client."


class StreamBroken(ConnectionFailed):
    """A log or events that were followed broke off, and were not connected again."""

    what_to_do = "follow it again; what happened in a pool meanwhile is in its list of sessions."


class Timeout(VoicepoolError):
    """The time that the call was given is up. Its request was taken back; ``__cause__`` is what an earlier attempt was told."""

    what_to_do = "give the call more timeout_seconds, or look at what the gateway does in its log."


class NotUnderstood(VoicepoolError):
    """The answer is none of the session API: another server's page, a proxy's error, or a gateway of another version."""

    what_to_do = (
        "check the address (it ends before /start), what stands between here and the gateway, and the versions of both."
    )


class Refused(VoicepoolError):
    """The gateway's answer is an error; of this class itself where the code is one that this client does not know."""

    status: int


class InvalidRequest(Refused):
    """The request itself is wrong; the same one will fail again."""

    what_to_do = "mend the request as the message says."


class Unauthorized(Refused):
    """No key or token, or a wrong one."""

    what_to_do = "give an api_key that is in the gateway's Secret of API keys, or a token that it takes."


class PoolNotAllowed(Refused):
    """The key or token is good, but not for this pool."""

    what_to_do = "use a key for this pool, or add the pool to the key (pools=<namespace>/<pool>)."


class PoolNotFound(Refused):
    """There is no such pool, or none was named and there is no default."""

    what_to_do = "name a pool of `kubectl get vpool --all-namespaces`, as 'name' or 'namespace.name'."


class SessionNotFound(Refused):
    """No pod carries this session, or it ended longer ago than the pool retains it."""

    what_to_do = "check pool and session id; ended sessions are kept for the pool's session.retentionSeconds."


class RouteNotFound(Refused):
    """The gateway has no such route."""

    what_to_do = "check the address (it ends before /start), and whether the gateway is older than this client."


class BodyTimeout(Refused):
    """The request's body did not arrive in time."""

    what_to_do = "look at the network between here and the gateway."


class SessionEnded(Refused):
    """The session had its agent and is over; it does not get a second one."""

    what_to_do = "start a new session, with another session_id and idempotency_key."


class SessionElsewhere(Refused):
    """The session id is in use in another pool."""

    what_to_do = "take another session_id or idempotency_key, or name the pool that has the session."


class BodyTooLarge(Refused):
    """The request is over the gateway's limit of 1 MB."""

    what_to_do = "hand the bot less in body, for example an address where it finds the rest."


class GatewayFailed(Refused):
    """The gateway failed in a way that nobody foresaw."""

    what_to_do = "read the gateway's log."


class LiveKitNotConfigured(Refused):
    """The pool has no LiveKit server, or its Secret lacks something."""

    what_to_do = "mend the Secret that the message names."


class AgentNotJoined(Refused):
    """The agent accepted, but was not in the room in the time that ``wait_for="joined"`` waits. The session is not ended by that."""

    what_to_do = "look at the agent's log and at LiveKit; the session ends by itself when nobody comes."


class TryAgainLater(Refused):
    """It passes. Of this class itself where the code is one that this client does not know."""

    what_to_do = "try again after retry_after_seconds, or give the call more timeout_seconds."


class TooManyFailures(TryAgainLater):
    """Too many wrong credentials came from this address; none from here is looked at for a while."""

    what_to_do = "find who sends wrong keys from this address, and try again after retry_after_seconds."


class RateLimited(TryAgainLater):
    """The caller starts sessions faster than it may."""


class QuotaExceeded(TryAgainLater):
    """The caller has as many sessions as it may have."""

    what_to_do = "end a session, or wait until one ends."


class PoolAtCapacity(TryAgainLater):
    """All pods that the pool may have are taken."""

    what_to_do = "try again after retry_after_seconds, or raise the pool's maxPods."


class TooManyStreams(TryAgainLater):
    """The gateway has as many open streams as it takes."""

    what_to_do = "leave logs and events that nobody looks at."


class QueueFull(TryAgainLater):
    """As many callers wait for the pool as may wait in one gateway."""

    what_to_do = "try again after retry_after_seconds, or keep more agents warm."


class NoWarmAgent(TryAgainLater):
    """No warm agent now, or none within the time that the pool lets callers wait."""

    what_to_do = "try again after retry_after_seconds, or keep more agents warm; the pool's conditions say why none is."


class TooManyBodies(TryAgainLater):
    """The bodies that are on their way to the gateway are as many bytes as it holds."""


class AgentsRefused(TryAgainLater):
    """Several agents in a row did not take the session."""

    what_to_do = "look at the agents' logs."


class AgentUnreachable(TryAgainLater):
    """The session's agent could not be asked."""

    what_to_do = "look at the agent's log, and at the network policy between gateway and agents."


class IssuerUnavailable(TryAgainLater):
    """The keys of the token's issuer cannot be fetched, so nobody can say whether the token is good."""

    what_to_do = "read the gateway's log, which says why."


class ClusterUnavailable(TryAgainLater):
    """The Kubernetes API does not answer the gateway, throttles, or forbids."""


class LiveKitUnavailable(TryAgainLater):
    """The pool's LiveKit server does not answer the gateway."""


class NotSynced(TryAgainLater):
    """The gateway has just started and does not know the cluster yet."""


class DeadlinePassed(TryAgainLater):
    """No agent took the session in the time that the gateway gives itself."""


BY_CODE: Mapping[str, type[Refused]] = {
    "INVALID_REQUEST": InvalidRequest,
    "MALFORMED_JSON": InvalidRequest,
    "UNAUTHENTICATED": Unauthorized,
    "NO_API_KEYS": Unauthorized,
    "POOL_NOT_ALLOWED": PoolNotAllowed,
    "POOL_NOT_FOUND": PoolNotFound,
    "SESSION_NOT_FOUND": SessionNotFound,
    "NOT_FOUND": RouteNotFound,
    "METHOD_NOT_ALLOWED": RouteNotFound,
    "BODY_TIMEOUT": BodyTimeout,
    "SESSION_ENDED": SessionEnded,
    "SESSION_IN_OTHER_POOL": SessionElsewhere,
    "BODY_TOO_LARGE": BodyTooLarge,
    "INTERNAL": GatewayFailed,
    "LIVEKIT_NOT_CONFIGURED": LiveKitNotConfigured,
    "AGENT_NOT_JOINED": AgentNotJoined,
    "TOO_MANY_FAILURES": TooManyFailures,
    "RATE_LIMITED": RateLimited,
    "QUOTA_EXCEEDED": QuotaExceeded,
    "POOL_AT_CAPACITY": PoolAtCapacity,
    "TOO_MANY_STREAMS": TooManyStreams,
    "QUEUE_FULL": QueueFull,
    "NO_WARM_AGENT": NoWarmAgent,
    "TOO_MANY_BODIES": TooManyBodies,
    "AGENTS_REFUSED": AgentsRefused,
    "AGENT_UNREACHABLE": AgentUnreachable,
    "ISSUER_UNAVAILABLE": IssuerUnavailable,
    "CLUSTER_UNAVAILABLE": ClusterUnavailable,
    "LIVEKIT_UNAVAILABLE": LiveKitUnavailable,
    "NOT_SYNCED": NotSynced,
    "DEADLINE_PASSED": DeadlinePassed,
}
"""What a gateway says, and what is raised here."""


def refused(code: str, status: int) -> type[Refused]:
    """The class of a refusal; for a code that a newer gateway has, the nearest that the status tells."""
    known = BY_CODE.get(code)
    if known is not None:
        return known
    return TryAgainLater if status in (429, 503, 504) else Refused
