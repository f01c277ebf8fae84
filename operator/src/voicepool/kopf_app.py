"""The operator process: kopf watches the pools, our informer the pods, the controller does the work, a small HTTP server tells how it goes.

Invariants: this is the only module that knows kopf; kopf never writes to any object (no finalizer, no annotation, no Event), it only
hands pools to the controller. Every operator keeps its copies of pools and pods fresh, only the one that holds the Lease works on them. Our own
tasks start in kopf's startup and end in its cleanup, before kopf ends what is left. A task of ours that fails ends the process with an error, so
that Kubernetes starts it again.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import socket
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import kopf
from aiohttp import web
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_public_key
from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from voicepool.agents import ask, make_agent_session
from voicepool.controller import Controller, ControllerSettings
from voicepool.copies import PoolStore, budget_informer, pod_informer
from voicepool.health import HealthFacts, HealthLimits, Verdict, liveness, readiness
from voicepool.kube.client import AiohttpKubeApi, Connection, load_connection, make_session
from voicepool.kube.convert import pool_from_json
from voicepool.kube.lease import Election
from voicepool.metrics import OperatorMetrics
from voicepool.model import GROUP, PLURAL, VERSION
from voicepool.podspec import PodSettings
from voicepool.recorder import EventRecorder
from voicepool.settings import OperatorSettings, SettingsError
from voicepool.webhooks import Webhooks, make_webhook_session, secrets_of

logger = logging.getLogger(__name__)

EXIT_DEADLINE_SECONDS = 25.0
"""Kubernetes kills after 30 s."""
LEASE_REQUEST_TIMEOUT_SECONDS = 5.0
LOG_IN_AGAIN_SECONDS = 1.0
AGENT_TIMEOUT_SECONDS = 5.0


def read_public_key(path: Path) -> str:
    """The PEM of an Ed25519 public key, from a file with the key itself or with a certificate of it.

    Raises:
        SettingsError: the file holds neither.
    """
    try:
        content = path.read_bytes()
        certificate = b"BEGIN CERTIFICATE" in content
        key = x509.load_pem_x509_certificate(content).public_key() if certificate else load_pem_public_key(content)
    except (OSError, ValueError) as error:
        raise SettingsError(f"VOICEPOOL_ASSIGNMENT_PUBLIC_KEY_FILE: {path} cannot be read: {error}") from None
    if not isinstance(key, Ed25519PublicKey):
        raise SettingsError(f"VOICEPOOL_ASSIGNMENT_PUBLIC_KEY_FILE: {path} does not hold an Ed25519 key")
    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()


def check_webhook_secret(path: Path | None) -> None:
    """Look now at what is needed when the first session begins.

    Raises:
        SettingsError: the file holds no secret that can sign.
    """
    try:
        if path is not None:
            secrets_of(path.read_text())
    except (OSError, ValueError) as error:
        raise SettingsError(f"VOICEPOOL_WEBHOOK_SECRET_FILE: {path} cannot be used: {error}") from None


class Operator:
    """One operator: builds everything in kopf's startup, takes it down in its cleanup.

    Args:
        settings: see there.
        connection: to the API server.
        pod_settings: what every agent pod gets.
    """

    def __init__(self, settings: OperatorSettings, connection: Connection, pod_settings: PodSettings) -> None:
        self.metrics = OperatorMetrics(CollectorRegistry())
        ProcessCollector(registry=self.metrics.registry)
        PlatformCollector(registry=self.metrics.registry)
        GCCollector(registry=self.metrics.registry)
        self.error: BaseException | None = None
        """Why a task of ours ended although nobody asked for it."""
        self.health_address: tuple[str, int] | None = None
        """Where the health server listens, once it does."""
        self._settings = settings
        self._connection = connection
        self._pod_settings = pod_settings
        self._identity = settings.lease_identity or f"{socket.gethostname()}-{uuid.uuid4().hex[:8]}"
        self._log_in_at = float("-inf")
        """No sooner than that again."""
        self._stop = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._election: Election | None = None
        self._lease_api: AiohttpKubeApi | None = None

    async def run(self) -> None:
        """Work until :meth:`stop` or SIGTERM.

        Raises:
            BaseException: what ended a task of ours.
        """
        # Nobody sees it, as there are no peers. Left to itself, kopf asks for the user's name, and a container's user has none.
        identity: Any = "voicepool"
        await kopf.operator(
            identity=identity,
            registry=self._registry(),
            settings=_kopf_settings(self._settings),
            standalone=True,
            clusterwide=self._settings.namespace is None,
            namespaces=[self._settings.namespace] if self._settings.namespace else [],
            stop_flag=self._stop,
        )
        if self.error is not None:
            raise self.error

    def stop(self) -> None:
        """End :meth:`run`."""
        self._stop.set()

    def _registry(self) -> kopf.OperatorRegistry:
        registry = kopf.OperatorRegistry()
        kopf.on.login(registry=registry)(self._log_in)
        kopf.on.startup(registry=registry)(self._start)
        kopf.on.cleanup(registry=registry)(self._clean_up)
        kopf.on.event(GROUP, VERSION, PLURAL, registry=registry)(self._pool_event)
        return registry

    async def _log_in(self, **_: Any) -> kopf.AiohttpSession:
        # kopf asks for it after each answer of 401, at once and as often as one comes.
        now = asyncio.get_running_loop().time()
        wait_seconds = self._log_in_at - now
        self._log_in_at = max(now, self._log_in_at) + LOG_IN_AGAIN_SECONDS
        if wait_seconds > 0:
            logger.warning("the API server does not accept our credentials, trying again")
            await asyncio.sleep(wait_seconds)
        # kopf closes its session whenever it wants to log in again, so it gets one of its own.
        session = make_session(self._connection)
        return kopf.AiohttpSession(aiohttp_session=session, server=self._connection.server)

    async def _start(self, **_: Any) -> None:
        settings = self._settings
        self._started_at = asyncio.get_running_loop().time()
        self._api = AiohttpKubeApi(
            make_session(self._connection, request_timeout_seconds=settings.request_timeout_seconds),
            silence_seconds=settings.watch_silence_seconds,
            field_manager="voicepool-operator",
        )
        self._pods = pod_informer(
            self._api, settings.namespace, on_list=lambda reason: self.metrics.lists.labels(reason).inc()
        )
        self._budgets = budget_informer(self._api, settings.namespace)
        self._agents = make_agent_session()
        self._receiver = make_webhook_session()
        self._controller = Controller(
            self._api,
            self._pods,
            PoolStore(),
            self._pod_settings,
            self.metrics,
            self._api.clock.now,
            ControllerSettings(
                namespace=settings.namespace,
                workers=settings.workers,
                parallel_writes=settings.parallel_writes,
                resync_seconds=settings.resync_seconds,
                orphan_retention_seconds=settings.orphan_retention_seconds,
            ),
            recorder=EventRecorder(
                self._api,
                self._identity,
                self._api.clock.now,
                on_written=lambda outcome: self.metrics.events.labels(outcome).inc(),
            ),
            may_write=lambda: self._election is None or self._election.leading(),
            budgets=self._budgets,
            ask_agent=lambda pod: ask(
                self._agents, pod, timeout_seconds=AGENT_TIMEOUT_SECONDS, connect_seconds=AGENT_TIMEOUT_SECONDS
            ),
            webhooks=self._make_webhooks(),
        )
        self._election = self._make_election()
        self._web = web.AppRunner(self._application(), access_log=None, shutdown_timeout=1)
        await self._web.setup()
        site = web.TCPSite(self._web, settings.health_host, settings.health_port)
        await site.start()
        host, port, *_rest = self._web.addresses[0]
        self.health_address = (host, port)
        works = {
            "pods": self._pods.run(),
            "budgets": self._budgets.run(),
            "pools": self._controller.watch(),
            "work": self._work(),
        }
        for name, work in works.items():
            task = asyncio.create_task(work, name=f"voicepool-{name}")
            task.add_done_callback(self._ended)
            self._tasks.append(task)
        logger.info("operator started", extra={"server": self._connection.server, "port": port})

    def _make_webhooks(self) -> Webhooks | None:
        settings = self._settings
        if settings.webhook_url is None or settings.webhook_secret_file is None:
            return None
        return Webhooks(
            self._receiver,
            settings.webhook_url,
            settings.webhook_secret_file,
            self._api.clock.now,
            on_told=lambda outcome: self.metrics.webhooks.labels(outcome).inc(),
        )

    def _make_election(self) -> Election | None:
        settings = self._settings
        if settings.lease_name is None or settings.lease_namespace is None:
            self.metrics.leading.set(1)
            return None
        # Connections of its own: a renewal must not wait behind a hundred creates.
        self._lease_api = AiohttpKubeApi(
            make_session(self._connection, request_timeout_seconds=LEASE_REQUEST_TIMEOUT_SECONDS, connections=2),
            field_manager="voicepool-operator",
        )
        return Election(
            self._lease_api,
            settings.lease_namespace,
            settings.lease_name,
            self._identity,
            on_change=self.metrics.leading.set,
        )

    async def _work(self) -> None:
        if self._election is None:
            await self._controller.work()
        else:
            # Who cannot work at once does not ask for it.
            await self._pods.synced.wait()
            await self._controller.pools_listed.wait()
            await self._election.run(self._controller.work)

    async def _clean_up(self, **_: Any) -> None:
        # kopf waits 5 s for its own waiter of this flag.
        self._stop.set()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._web.cleanup()
        await self._api.close()
        await self._agents.close()
        await self._receiver.close()
        if self._lease_api is not None:
            await self._lease_api.close()
        logger.info("operator stopped")

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled():
            self.error = task.exception() or RuntimeError(f"{task.get_name()} ended")
            logger.error("a task ended unexpectedly, the process ends too", exc_info=self.error)
            self._stop.set()

    async def _pool_event(self, type: str | None, body: Mapping[str, Any], **_: Any) -> None:
        obj = dict(body)
        metadata = obj["metadata"]
        if type == "DELETED":
            self._controller.pool_deleted((metadata["namespace"], metadata["name"]), metadata["uid"])
            return
        pool = pool_from_json(obj)
        if pool is not None:
            self._controller.pool_changed(pool)

    def _facts(self) -> HealthFacts:
        election = self._election
        facts = HealthFacts(
            pods_listed=self._pods.synced.is_set(),
            pods_silence_seconds=self._pods.silence_seconds(),
            pools_listed=self._controller.pools_listed.is_set(),
            pools_age_seconds=self._controller.pools_age_seconds(),
            pools_owed_seconds=self._controller.pools_owed_seconds(),
            running_seconds=asyncio.get_running_loop().time() - self._started_at,
        )
        if election is None:
            return facts
        return dataclasses.replace(
            facts,
            lease_silence_seconds=election.silence_seconds(),
            lease_error=election.error,
            holder=election.holder,
            leading=election.leading(),
        )

    def _application(self) -> web.Application:
        limits = HealthLimits(
            watch_silence_seconds=self._settings.watch_silence_seconds, resync_seconds=self._settings.resync_seconds
        )

        def answer(verdict: Verdict) -> web.Response:
            return web.Response(status=200 if verdict.good else 503, text=verdict.text())

        async def live(request: web.Request) -> web.Response:
            return answer(liveness(self._facts(), limits))

        async def ready(request: web.Request) -> web.Response:
            return answer(readiness(self._facts(), limits))

        async def metrics(request: web.Request) -> web.Response:
            text = generate_latest(self.metrics.registry)
            return web.Response(body=text, headers={"Content-Type": CONTENT_TYPE_LATEST})

        application = web.Application()
        application.add_routes([web.get("/livez", live), web.get("/readyz", ready), web.get("/metrics", metrics)])
        return application


def _kopf_settings(settings: OperatorSettings) -> kopf.OperatorSettings:
    # One line for each event of each pool says nothing that a metric does not say better.
    logging.getLogger("kopf").setLevel(max(logging.WARNING, logging.getLogger().level))
    result = kopf.OperatorSettings()
    result.posting.enabled = False
    result.peering.standalone = True
    # Saves two watches (resources, namespaces) and the rights for them; our resource exists before we start.
    result.scanning.disabled = True
    result.watching.server_timeout = 290
    result.watching.inactivity_timeout = settings.watch_silence_seconds
    result.watching.chunk_size = 500
    result.networking.request_timeout = settings.request_timeout_seconds
    result.networking.error_backoffs = (0.5, 1, 2, 4)
    result.process.ultimate_exiting_timeout = EXIT_DEADLINE_SECONDS
    return result


async def run_operator(settings: OperatorSettings) -> None:
    """Run the operator until SIGTERM.

    Raises:
        SettingsError: a file named by a setting is not usable.
        ConnectionSettingsError: there is no API server to be found.
    """
    pod_settings = PodSettings(assignment_public_key=read_public_key(settings.assignment_public_key_file))
    check_webhook_secret(settings.webhook_secret_file)
    await Operator(settings, load_connection(settings.kubeconfig, settings.kube_context), pod_settings).run()
