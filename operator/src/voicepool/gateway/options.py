"""The times and limits of the gateway, in one place."""

from __future__ import annotations

from dataclasses import dataclass

from voicepool.gateway.allocator import MOST_WAITING
from voicepool.model import AGENT_PORT


@dataclass(frozen=True, slots=True)
class GatewayOptions:
    """What a gateway may wait for, and how long."""

    default_namespace: str = "default"
    """The namespace of a pool that is named without one."""
    default_pool: str | None = None
    """The pool of a caller who names none; without it, the only pool there is."""
    authentication: bool = True
    health_is_public: bool = True
    """Whether ``/api/health`` (counts only) needs no API key."""
    cors_allow_origins: tuple[str, ...] = ()
    """Origins of pages that may call from a browser."""
    max_body_bytes: int = 1024 * 1024
    max_buffered_bytes: int = 32 * 1024 * 1024
    """Of all bodies that are on their way in. Whoever sends them is not known yet, and the chart's limit of memory is 256 Mi."""
    body_timeout_seconds: float = 10.0
    start_deadline_seconds: float = 30.0
    """From having a pod in sight to an answer; waiting for a pod (queue, cold start) has its own limits in the pool and comes on top."""
    assignment_seconds: float = 10.0
    """How long an assignment, and the agent's token in it, is good."""
    bind_timeout_seconds: float = 4.0
    """One ``POST /bind``. Agents accept at once; the time is for a gateway or a node that is busy."""
    status_timeout_seconds: float = 1.0
    status_interval_seconds: float = 0.25
    """Between two questions to an agent of which it is not known whether it accepted."""
    max_waiting: int = MOST_WAITING
    """Callers who may wait in the queue of one pool at this gateway; each is an open connection and some memory."""
    max_refusals: int = 5
    """Agents that may refuse one session before its caller is told."""
    caller_token_seconds: float = 300.0
    """A caller's token is for the first connect only; LiveKit refreshes it in a running call."""
    livekit_token_leeway_seconds: float = 60.0
    """LiveKit's server accepts a token for a minute past its expiry (``tokenLeeway`` in its ``auth`` package). An agent's token is dated that much
    earlier, so that it really is refused from the assignment's expiry on."""
    livekit_timeout_seconds: float = 5.0
    livekit_trusted_seconds: float = 60.0
    """So long after a room was made on a LiveKit server the next one there is made side by side with the bind. Else it comes before the bind, so that a
    server that is down costs no warm pod for each caller."""
    room_left_seconds: float = 5.0
    """How long after a session's end another gateway than the one that bound it deletes its room, if it is still there."""
    room_uncertain_seconds: float = 60.0
    """The same where the agent left no summary, so that it may never have had the session; what callers of the pool may wait for a pod comes on top."""
    secret_cache_seconds: float = 30.0
    joined_wait_seconds: float = 20.0
    """``waitFor: joined`` without a time of its own."""
    max_joined_wait_seconds: float = 60.0
    route_timeout_seconds: float = 60.0
    """How long a bot's own route may be silent, before its answer and in it."""
    peer_timeout_seconds: float = 1.0
    """One question to another gateway about its waiting callers."""
    web_client: bool = False
    """Whether Pipecat's prebuilt web client is served at ``/client/``."""
    max_streams: int = 64
    """Logs and events that are followed at the same time."""
    heartbeat_seconds: float = 15.0
    """Proxies close what is silent for longer, most of them after 60 s. As often the credential of a stream is looked at again."""
    stream_stalled_seconds: float = 60.0
    """How long the client of a stream may read nothing."""
    log_timeout_seconds: float = 10.0
    """Until the API server begins to answer with a log."""
    max_log_bytes: int = 4 * 1024 * 1024
    """Of one answer with a log that is not followed."""
    log_settle_seconds: float = 5.0
    """A log that is followed ends by itself with its container; this long after the end of the session it is ended."""
    state_interval_seconds: float = 3.0
    """Between two questions to an agent whose session is followed, once it has joined."""
    state_wait_seconds: float = 20.0
    """One question to it that waits until it has joined."""
    agent_port: int = AGENT_PORT
