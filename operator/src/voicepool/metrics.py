"""The operator's Prometheus metrics. Each has the pool where that helps to act; reasons are from a fixed, small set."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

POD_STATES = ("starting", "warm", "bound", "ended", "failed", "leaving", "cold")

DURATION_BUCKETS_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
STARTUP_BUCKETS_SECONDS = (
    0.001,
    0.01,
    0.1,
    0.25,
    0.5,
    0.75,
    1.0,
    1.5,
    2.0,
    3.0,
    5.0,
    7.5,
    10.0,
    20.0,
    30.0,
    60.0,
    120.0,
    300.0,
)


class OperatorMetrics:
    """All metrics of one operator process.

    Args:
        registry: where they are registered; a new one for each operator keeps tests apart.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        pool = ("namespace", "pool")
        self.pods = Gauge("voicepool_pods", "Pods of a pool by state.", (*pool, "state"), registry=registry)
        self.warm_target = Gauge(
            "voicepool_warm_target_pods",
            "spec.replicas of a pool, or what Native headroom makes of it.",
            pool,
            registry=registry,
        )
        self.recommended = Gauge(
            "voicepool_recommended_pods",
            "Warm pods that headroom recommends for a pool; 0 where it is off.",
            pool,
            registry=registry,
        )
        self.creates = Counter("voicepool_pod_creates", "Pods created.", pool, registry=registry)
        self.deletes = Counter(
            "voicepool_pod_deletes", "Pods deleted, by reason.", (*pool, "reason"), registry=registry
        )
        self.conflicts = Counter(
            "voicepool_write_conflicts",
            "Writes that lost against somebody else and were dropped: no error.",
            ("operation",),
            registry=registry,
        )
        self.status_writes = Counter(
            "voicepool_status_writes",
            "Writes of a pool's status: stored (ok), or not, for another reason than a conflict (failed).",
            (*pool, "outcome"),
            registry=registry,
        )
        self.reconcile_seconds = Histogram(
            "voicepool_reconcile_seconds",
            "Time from taking a pool up to having done what its plan says.",
            ("outcome",),
            buckets=DURATION_BUCKETS_SECONDS,
            registry=registry,
        )
        self.lists = Counter(
            "voicepool_informer_lists", "Full lists of pods, by reason.", ("reason",), registry=registry
        )
        self.queue_age_seconds = Histogram(
            "voicepool_queue_age_seconds",
            "How long a pool waited for a worker.",
            buckets=DURATION_BUCKETS_SECONDS,
            registry=registry,
        )
        self.event_lag_seconds = Histogram(
            "voicepool_event_lag_seconds",
            "From a bind, by the gateway's clock, to the operator's seeing it.",
            buckets=DURATION_BUCKETS_SECONDS,
            registry=registry,
        )
        self.startup_seconds = Histogram(
            "voicepool_startup_seconds",
            "From asking for a pod to its being warm.",
            pool,
            buckets=STARTUP_BUCKETS_SECONDS,
            registry=registry,
        )
        self.startup_phase_seconds = Histogram(
            "voicepool_startup_phase_seconds",
            "Of that: until a node took the pod (scheduling), until its agent's process started (containers), until it was Ready (agent). "
            "Kubernetes writes whole seconds.",
            (*pool, "phase"),
            buckets=STARTUP_BUCKETS_SECONDS,
            registry=registry,
        )
        self.start_failures = Counter(
            "voicepool_start_failures", "Pods that failed before they were warm.", (*pool, "reason"), registry=registry
        )
        self.warm_deaths = Counter(
            "voicepool_warm_pod_deaths", "Warm pods that ended by themselves.", (*pool, "reason"), registry=registry
        )
        self.sessions_started = Counter("voicepool_sessions_started", "Pods that were bound.", pool, registry=registry)
        self.session_waited_seconds = Histogram(
            "voicepool_session_waited_seconds",
            "From the caller's request to the bind, as the gateway wrote it on the pod.",
            pool,
            buckets=STARTUP_BUCKETS_SECONDS,
            registry=registry,
        )
        self.sessions_ended = Counter(
            "voicepool_sessions_ended",
            "Sessions that ended, by the reason in the agent's summary.",
            (*pool, "reason"),
            registry=registry,
        )
        self.sessions_dropped = Counter(
            "voicepool_sessions_dropped",
            "Sessions whose pod ended or vanished without a summary.",
            (*pool, "reason"),
            registry=registry,
        )
        self.events = Counter(
            "voicepool_events", "Events on pools: written, failed, or dropped.", ("outcome",), registry=registry
        )
        self.webhooks = Counter(
            "voicepool_webhooks",
            "Webhooks of sessions: taken by the receiver (ok), given up (failed), or not tried since too many waited (dropped).",
            ("outcome",),
            registry=registry,
        )
        self.leading = Gauge(
            "voicepool_leading", "1 in the operator that works, 0 in one that stands by.", registry=registry
        )
        self.queued_pools = Gauge("voicepool_queued_pools", "Pools that wait for a worker.", registry=registry)
        self._of_pools = (
            *(self.pods, self.warm_target, self.recommended, self.creates, self.deletes, self.status_writes),
            *(self.startup_seconds, self.startup_phase_seconds, self.start_failures, self.warm_deaths),
            *(self.sessions_started, self.session_waited_seconds, self.sessions_ended, self.sessions_dropped),
        )

    def forget(self, namespace: str, pool: str) -> None:
        """Drop the gauges of a pool that is gone, or that another operator works on."""
        for state in POD_STATES:
            self.pods.remove(namespace, pool, state)
        self.warm_target.remove(namespace, pool)
        self.recommended.remove(namespace, pool)

    def forget_all(self, namespace: str, pool: str) -> None:
        """Drop whatever was measured of a pool of which nothing is left."""
        for metric in self._of_pools:
            metric.remove_by_labels({"namespace": namespace, "pool": pool})
