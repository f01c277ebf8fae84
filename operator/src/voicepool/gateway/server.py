"""The gateway's process: informers, parts, HTTP server, and a graceful end."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import signal
import socket
from collections.abc import AsyncIterator, Callable, Collection, Iterator
from datetime import datetime

import aiohttp
import uvicorn
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from voicepool.agents import make_agent_session
from voicepool.gateway.access import Access
from voicepool.gateway.advice import Advisor
from voicepool.gateway.allocator import Allocator
from voicepool.gateway.app import create_app
from voicepool.gateway.assignments import Signer
from voicepool.gateway.auth import ApiKeys
from voicepool.gateway.changes import Changes
from voicepool.gateway.custom_metrics import CustomMetrics
from voicepool.gateway.delivery import Courier
from voicepool.gateway.ended_rooms import EndedRooms
from voicepool.gateway.failures import Failures
from voicepool.gateway.inbound import InboundCalls
from voicepool.gateway.jwks import SigningKeys, fetcher
from voicepool.gateway.livekit import LiveKitRooms, LiveKitServers, Rooms
from voicepool.gateway.metrics import GatewayMetrics
from voicepool.gateway.oidc import Issuer, OidcTokens
from voicepool.gateway.options import GatewayOptions
from voicepool.gateway.peers import Peers
from voicepool.gateway.quota import Quota
from voicepool.gateway.route_proxy import RouteProxy, make_route_session
from voicepool.gateway.services import Services
from voicepool.gateway.session_logs import SessionLogs
from voicepool.gateway.sessions import Sessions
from voicepool.gateway.streams import Streams
from voicepool.gateway.token_review import TokenReviews
from voicepool.gateway.tracing import Tracing, make_tracing
from voicepool.gateway.view import ClusterView
from voicepool.kube.api import POOLS, Json, KubeApi, LogApi
from voicepool.kube.client import AiohttpKubeApi, load_connection
from voicepool.kube.clock import ServerClock
from voicepool.kube.convert import AGENT_PODS, pod_from_json, pool_from_json
from voicepool.kube.informer import Informer
from voicepool.model import LABEL_POOL, Key, PodFact, PoolFact
from voicepool.podspec import PodSettings, build_pod, cold_start_number, pod_name, template_hash
from voicepool.settings import GatewaySettings, SettingsError

log = logging.getLogger("voicepool.gateway")

_GRACE_SECONDS = 20
_KEEP_ALIVE_SECONDS = 620
"""An idle connection is closed by whoever is before us: nginx and AWS do it after 60 s, Google Cloud after 600 s and asks for this much. A request that
goes out on a connection which the other side closes in the same moment has no answer."""
_CONNECTIONS = 128
"""To the API server; a burst of binds must not queue behind each other in here."""


async def run_gateway(settings: GatewaySettings) -> None:
    """Serve the session API until SIGTERM or SIGINT.

    Raises:
        SettingsError: the assignment key cannot be used.
        voicepool.kube.client.ConnectionSettingsError: there is no way to the API server.
    """
    clock = ServerClock()
    try:
        signer = Signer.from_file(settings.assignment_private_key_file, clock.now)
    except ValueError as error:
        raise SettingsError(f"VOICEPOOL_ASSIGNMENT_PRIVATE_KEY_FILE: {error}") from None
    connection = load_connection(settings.kubeconfig, settings.kube_context)
    async with (
        AiohttpKubeApi.connect(
            connection,
            clock=clock,
            request_timeout_seconds=settings.request_timeout_seconds,
            connections=_CONNECTIONS,
        ) as kube,
        # A log that is followed takes its connection for as long as the session lasts.
        AiohttpKubeApi.connect(connection, clock=clock, connections=0) as logs,
        running(kube, settings, signer, _options(settings), now=clock.now, logs=logs) as services,
        _custom_metrics(kube, settings, services),
    ):
        server = _Server(http_config(services, settings))
        loop = asyncio.get_running_loop()

        def stop(number: int) -> None:
            # Streams go on for as long as their sessions; uvicorn would wait for them.
            services.streams.stop()
            server.handle_exit(number, None)

        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop, number)
        await server.serve()


def http_config(services: Services, settings: GatewaySettings) -> uvicorn.Config:
    """How the session API is served."""
    return uvicorn.Config(
        create_app(services),
        host=settings.listen_host,
        port=settings.listen_port,
        access_log=False,
        log_config=None,
        server_header=False,
        # Nothing here speaks it: a request to upgrade is an ordinary one.
        ws="none",
        timeout_keep_alive=_KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=_GRACE_SECONDS,
        # uvicorn's own default believes whoever is on the same machine, and an environment variable.
        proxy_headers=bool(settings.trusted_proxies),
        forwarded_allow_ips=list(settings.trusted_proxies),
    )


@contextlib.asynccontextmanager
async def _custom_metrics(kube: KubeApi, settings: GatewaySettings, services: Services) -> AsyncIterator[None]:
    if settings.custom_metrics_folder is None:
        yield
        return
    server = CustomMetrics(
        kube,
        services.view,
        services.advisor,
        settings.custom_metrics_folder,
        synced=services.synced,
        host=settings.custom_metrics_host,
        port=settings.custom_metrics_port,
    )
    task = asyncio.create_task(server.run(), name="voicepool-custom-metrics")
    task.add_done_callback(_say_why)
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def _say_why(task: asyncio.Task[None]) -> None:
    if not task.cancelled():
        log.error("custom metrics are no longer served", exc_info=task.exception())


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        # uvicorn raises the signal again when it has stopped serving, which would end the process before bound pods are seen to.
        yield


def _options(settings: GatewaySettings) -> GatewayOptions:
    return GatewayOptions(
        default_namespace=settings.default_namespace,
        default_pool=settings.default_pool,
        health_is_public=settings.health_is_public,
        cors_allow_origins=settings.cors_allow_origins,
        web_client=settings.web_client,
    )


@contextlib.asynccontextmanager
async def running(
    kube: KubeApi,
    settings: GatewaySettings,
    signer: Signer,
    options: GatewayOptions,
    *,
    now: Callable[[], datetime],
    logs: LogApi,
    rooms: Rooms | None = None,
    tracing: Tracing | None = None,
) -> AsyncIterator[Services]:
    """The parts of a gateway with its informers running; on leaving, what runs in the background is finished or stopped."""
    loop = asyncio.get_running_loop()
    identity = os.environ.get("HOSTNAME") or socket.gethostname()
    metrics = GatewayMetrics()
    view = ClusterView()
    allocator = Allocator(
        view,
        monotonic=loop.time,
        identity=identity,
        on_waiters=lambda key, count: metrics.waiters.labels(*key).set(count),
        most_waiting=options.max_waiting,
    )
    pools: Informer[PoolFact] = Informer(kube, POOLS, settings.namespace, "", pool_from_json)
    pods: Informer[PodFact] = Informer(kube, AGENT_PODS, settings.namespace, LABEL_POOL, pod_from_json)
    pools.handlers.append(_pool_handler(view))
    pods.handlers.append(_pod_handler(view))
    changes = Changes()
    pods.handlers.append(changes.pod_changed)
    # Each pod is bound once: a kept connection would only be in the way.
    agents = make_agent_session()
    livekit = aiohttp.ClientSession(trust_env=False)
    issuers = aiohttp.ClientSession(trust_env=False, cookie_jar=aiohttp.DummyCookieJar())
    others = aiohttp.ClientSession(trust_env=False)
    bots = make_route_session()
    tracing = tracing or make_tracing(os.environ, instance=identity)
    async with agents, livekit, issuers, others, bots, contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(tracing.close)
        servers = LiveKitServers(
            kube, settings.livekit_folder, monotonic=loop.time, cache_seconds=options.secret_cache_seconds
        )
        rooms = rooms or LiveKitRooms(livekit, timeout_seconds=options.livekit_timeout_seconds)
        sessions = Sessions(
            kube=kube,
            view=view,
            allocator=allocator,
            courier=Courier(
                agents,
                port=options.agent_port,
                bind_timeout_seconds=options.bind_timeout_seconds,
                status_timeout_seconds=options.status_timeout_seconds,
            ),
            signer=signer,
            servers=servers,
            rooms=rooms,
            options=options,
            metrics=metrics,
            identity=identity,
            pod_fact=pod_from_json,
            cold_pod=_cold_pods(signer),
            now=now,
        )
        pools.handlers.append(lambda key, _old, new: sessions.demand.forget(key) if new is None else None)
        inbound = InboundCalls(view=view, sessions=sessions, servers=servers, rooms=rooms, metrics=metrics)
        ended_rooms = EndedRooms(
            view=view,
            sessions=sessions,
            servers=servers,
            rooms=rooms,
            options=options,
            metrics=metrics,
            identity=identity,
            now=now,
        )
        pools.handlers.append(ended_rooms.pool_changed)
        pods.handlers.append(lambda _key, old, new: ended_rooms.pod_changed(old, new))
        peers = Peers(
            kube,
            others,
            namespace=settings.peers_namespace,
            service=settings.peers_service,
            identity=identity,
            monotonic=loop.time,
            timeout_seconds=options.peer_timeout_seconds,
        )
        access = await stack.enter_async_context(_access(kube, settings, issuers, loop.time))
        informers = [asyncio.create_task(informer.run()) for informer in (pools, pods)]
        try:
            yield Services(
                sessions=sessions,
                view=view,
                advisor=Advisor(view, sessions.demand, peers, now),
                access=access,
                quota=Quota(
                    view,
                    sessions=settings.sessions_per_caller,
                    starts_per_minute=settings.starts_per_minute,
                    starts_burst=settings.starts_burst,
                    monotonic=loop.time,
                ),
                route_proxy=RouteProxy(bots, signer, options, metrics, now),
                logs=SessionLogs(logs, options),
                changes=changes,
                streams=Streams(options),
                inbound=inbound,
                ended_rooms=ended_rooms,
                metrics=metrics,
                tracing=tracing,
                options=options,
                synced=lambda: (
                    pools.synced.is_set() and pods.synced.is_set() and not any(task.done() for task in informers)
                ),
            )
        finally:
            await asyncio.gather(
                sessions.close(timeout_seconds=_GRACE_SECONDS), inbound.close(timeout_seconds=_GRACE_SECONDS)
            )
            await ended_rooms.close()
            for task in informers:
                task.cancel()
            await asyncio.gather(*informers, return_exceptions=True)


@contextlib.asynccontextmanager
async def _access(
    kube: KubeApi, settings: GatewaySettings, http: aiohttp.ClientSession, monotonic: Callable[[], float]
) -> AsyncIterator[Access]:
    reviews = None
    if settings.token_review_audience is not None:
        reviews = TokenReviews(kube, settings.token_review_audience, monotonic=monotonic)
    async with contextlib.AsyncExitStack() as stack:
        oidc = None
        if settings.oidc_issuer is not None and settings.oidc_audience is not None:
            keys = SigningKeys(settings.oidc_issuer, settings.oidc_jwks_url, fetcher(http), monotonic=monotonic)
            stack.push_async_callback(keys.close)
            issuer = Issuer(
                issuer=settings.oidc_issuer,
                audience=settings.oidc_audience,
                name_claim=settings.oidc_name_claim,
                pools_claim=settings.oidc_pools_claim,
                default_pools=frozenset(settings.oidc_default_pools),
            )
            oidc = OidcTokens(issuer, keys)
        failures = Failures(settings.failed_authentications_per_minute, monotonic)
        yield Access(ApiKeys(settings.api_keys_folder), failures, oidc=oidc, reviews=reviews)


def _pool_handler(view: ClusterView) -> Callable[[Key, PoolFact | None, PoolFact | None], None]:
    def handle(key: Key, _old: PoolFact | None, new: PoolFact | None) -> None:
        if new is None:
            view.pool_gone(*key)
        else:
            view.pool_seen(new)

    return handle


def _pod_handler(view: ClusterView) -> Callable[[Key, PodFact | None, PodFact | None], None]:
    def handle(key: Key, _old: PodFact | None, new: PodFact | None) -> None:
        if new is None:
            view.pod_gone(*key)
        else:
            view.pod_seen(new)

    return handle


def _cold_pods(signer: Signer) -> Callable[[PoolFact, str, Collection[str]], Json]:
    public_key = signer.public_key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()
    pod_settings = PodSettings(assignment_public_key=public_key)

    def build(pool: PoolFact, session_id: str, taken: Collection[str]) -> Json:
        hash_ = template_hash(pool, pod_settings)
        numbers = (cold_start_number(session_id, attempt) for attempt in itertools.count())
        free = next(number for number in numbers if pod_name(pool.name, hash_, number) not in taken)
        return build_pod(pool, free, hash_, pod_settings, cold_start=session_id)

    return build
