"""What the routes work with, made once per process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from voicepool.gateway.advice import Advisor
from voicepool.gateway.auth import ApiKeys
from voicepool.gateway.ended_rooms import EndedRooms
from voicepool.gateway.inbound import InboundCalls
from voicepool.gateway.metrics import GatewayMetrics
from voicepool.gateway.options import GatewayOptions
from voicepool.gateway.route_proxy import RouteProxy
from voicepool.gateway.sessions import Sessions
from voicepool.gateway.tracing import Tracing
from voicepool.gateway.view import ClusterView


@dataclass(frozen=True, slots=True)
class Services:
    """The parts of a running gateway."""

    sessions: Sessions
    view: ClusterView
    advisor: Advisor
    keys: ApiKeys
    route_proxy: RouteProxy
    inbound: InboundCalls
    ended_rooms: EndedRooms
    metrics: GatewayMetrics
    tracing: Tracing
    options: GatewayOptions
    synced: Callable[[], bool]
    """Whether the informers have seen the cluster."""
