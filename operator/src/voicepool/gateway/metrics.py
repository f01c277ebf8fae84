"""What the gateway counts. Prefix ``voicepool_gateway_``; labels are few and never hold a session."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_FAST_SECONDS = (0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_START_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0)


class GatewayMetrics:
    """The metrics of one gateway, in a registry of its own."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self.registry = registry or CollectorRegistry()
        pool = ("namespace", "pool")
        self.starts = Counter(
            "voicepool_gateway_starts", "Start requests by outcome", (*pool, "outcome"), registry=self.registry
        )
        self.start_seconds = Histogram(
            "voicepool_gateway_start_seconds",
            "From the request to the agent's acceptance",
            pool,
            registry=self.registry,
            buckets=_START_SECONDS,
        )
        self.bind_seconds = Histogram(
            "voicepool_gateway_bind_seconds",
            "One bind patch that won",
            pool,
            registry=self.registry,
            buckets=_FAST_SECONDS,
        )
        self.delivery_seconds = Histogram(
            "voicepool_gateway_delivery_seconds",
            "From the bind to the agent's acceptance",
            pool,
            registry=self.registry,
            buckets=_FAST_SECONDS,
        )
        self.conflicts = Counter(
            "voicepool_gateway_bind_conflicts", "Bind patches that lost a race", pool, registry=self.registry
        )
        self.refusals = Counter(
            "voicepool_gateway_refusals",
            "Assignments that an agent did not take",
            (*pool, "code"),
            registry=self.registry,
        )
        self.waiters = Gauge(
            "voicepool_gateway_queue_waiters", "Callers who wait for a warm pod", pool, registry=self.registry
        )
        self.cold_starts = Counter(
            "voicepool_gateway_cold_starts", "Pods created for one waiting caller", pool, registry=self.registry
        )
        self.routes = Counter(
            "voicepool_gateway_bot_requests",
            "Requests to bots' own routes by outcome",
            (*pool, "outcome"),
            registry=self.registry,
        )
        self.abandoned = Counter(
            "voicepool_gateway_abandoned_pods",
            "Bound pods that were given up, by what became of them",
            (*pool, "result"),
            registry=self.registry,
        )
        self.rooms = Counter(
            "voicepool_gateway_rooms_closed",
            "Rooms of sessions that have ended, by what became of them",
            (*pool, "outcome"),
            registry=self.registry,
        )
        self.webhooks = Counter(
            "voicepool_gateway_livekit_webhooks",
            "Webhooks of LiveKit servers by what followed from them",
            ("outcome",),
            registry=self.registry,
        )
