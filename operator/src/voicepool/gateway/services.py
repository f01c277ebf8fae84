"""What the routes work with, made once per process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from voicepool.gateway.access import Access
from voicepool.gateway.advice import Advisor
from voicepool.gateway.changes import Changes
from voicepool.gateway.ended_rooms import EndedRooms
from voicepool.gateway.errors import NotSynced
from voicepool.gateway.inbound import InboundCalls
from voicepool.gateway.metrics import GatewayMetrics
from voicepool.gateway.options import GatewayOptions
from voicepool.gateway.quota import Quota
from voicepool.gateway.route_proxy import RouteProxy
from voicepool.gateway.session_logs import SessionLogs
from voicepool.gateway.sessions import Sessions
from voicepool.gateway.streams import Streams
from voicepool.gateway.tracing import Tracing
from voicepool.gateway.view import ClusterView


@dataclass(frozen=True, slots=True)
class Services:
    """The parts of a running gateway."""

    sessions: Sessions
    view: ClusterView
    advisor: Advisor
    access: Access
    quota: Quota
    route_proxy: RouteProxy
    logs: SessionLogs
    changes: Changes
    streams: Streams
    inbound: InboundCalls
    ended_rooms: EndedRooms
    metrics: GatewayMetrics
    tracing: Tracing
    options: GatewayOptions
    synced: Callable[[], bool]
    """Whether the informers have seen the cluster."""

    def require_synced(self) -> None:
        """Refuse what needs to know the cluster, until it is known.

        Raises:
            NotSynced: the gateway has just started.
        """
        if not self.synced():
            raise NotSynced("The gateway has just started and does not know the cluster yet.", retry_after_seconds=1)
