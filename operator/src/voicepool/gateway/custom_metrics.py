"""The API ``custom.metrics.k8s.io``: a pool's recommendation for a HorizontalPodAutoscaler, with nothing else installed.

One metric, ``recommended_replicas``, of the object VoiceAgentPool. Invariants: nobody is answered but the API server's front proxy, known by its client
certificate, in the TLS handshake and by name; who may ask is the API server's decision (RBAC), made before; without what is needed to recognise it nothing is
served; certificates that change are taken up without a restart; a fault in here ends no session and no gateway.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC
from pathlib import Path
from typing import Any

from aiohttp import web

from voicepool.gateway.advice import Advisor
from voicepool.gateway.front_proxy import NAME, NAMESPACE, FrontProxy, FrontProxyError
from voicepool.gateway.view import ClusterView
from voicepool.kube.api import CONFIG_MAPS, KubeApi, KubeApiError
from voicepool.model import GROUP, KIND, PLURAL, VERSION

log = logging.getLogger("voicepool.gateway")

API_GROUP = "custom.metrics.k8s.io"
API_VERSION = "v1beta2"
METRIC = "recommended_replicas"
RESOURCE = f"{PLURAL}.{GROUP}"

LOOK_AGAIN_SECONDS = 60.0
"""How often certificates are looked at."""
TRY_AGAIN_SECONDS = 5.0

_ROOT = f"/apis/{API_GROUP}/{API_VERSION}"
_SELECTORS = ("labelSelector", "metricLabelSelector")


@dataclass(frozen=True, slots=True)
class _Identity:
    """What a listener is made of; a change of it needs another listener."""

    front_proxy: FrontProxy
    files: bytes
    """Digest of certificate and key."""


class CustomMetrics:
    """The server.

    Args:
        kube: the API server.
        view: what is known of the cluster.
        advisor: makes the recommendations.
        folder: with ``tls.crt`` and ``tls.key``.
        synced: whether the view has seen the cluster.
        host: the address to listen on.
        port: the port; 0 is any free one.
        look_again_seconds: how often certificates are looked at.
    """

    def __init__(
        self,
        kube: KubeApi,
        view: ClusterView,
        advisor: Advisor,
        folder: Path,
        *,
        synced: Callable[[], bool],
        host: str,
        port: int,
        look_again_seconds: float = LOOK_AGAIN_SECONDS,
    ) -> None:
        self._kube = kube
        self._view = view
        self._advisor = advisor
        self._folder = folder
        self._synced = synced
        self._host = host
        self._port = port
        self._look_again_seconds = look_again_seconds
        self._identity: _Identity | None = None
        self.addresses: list[Any] = []
        """Where it listens; empty while it does not."""

    async def run(self) -> None:
        """Serve until cancelled."""
        runner = web.AppRunner(self._application(), access_log=None, shutdown_timeout=1)
        await runner.setup()
        site: web.TCPSite | None = None
        try:
            while True:
                pause_seconds = self._look_again_seconds
                try:
                    identity = await self._find()
                    if site is None or identity != self._identity:
                        context = self._context(identity.front_proxy)
                        if site is not None:
                            await site.stop()
                            self.addresses, site = [], None
                        self._identity = identity
                        fresh = web.TCPSite(runner, self._host, self._port, ssl_context=context)
                        await fresh.start()
                        site = fresh
                        self.addresses = list(runner.addresses)
                        log.info("custom metrics are served", extra={"port": self._port})
                # ssl.SSLError is an OSError, and so is a port that is taken.
                except (FrontProxyError, KubeApiError, OSError) as error:
                    log.error(
                        "custom metrics are not served, or with old certificates; trying again",
                        extra={"error": str(error), "retry_seconds": TRY_AGAIN_SECONDS},
                    )
                    pause_seconds = min(TRY_AGAIN_SECONDS, pause_seconds)
                await asyncio.sleep(pause_seconds)
        finally:
            self.addresses = []
            await runner.cleanup()

    async def _find(self) -> _Identity:
        front_proxy = FrontProxy.from_config_map(await self._kube.get(CONFIG_MAPS, NAMESPACE, NAME))
        files = hashlib.sha256()
        for name in ("tls.crt", "tls.key"):
            files.update((self._folder / name).read_bytes())
        return _Identity(front_proxy, files.digest())

    def _context(self, front_proxy: FrontProxy) -> ssl.SSLContext:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cadata=front_proxy.authority)
        # From Python 3.13 on, certificates without an Authority Key Identifier are refused; clusters have such.
        context.verify_flags &= ~ssl.VERIFY_X509_STRICT
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_cert_chain(self._folder / "tls.crt", self._folder / "tls.key")
        return context

    # -- what is served ------------------------------------------------------------------------------------------------------------

    def _application(self) -> web.Application:
        application = web.Application(middlewares=[self._only_the_front_proxy])
        application.add_routes(
            [
                web.get(_ROOT, self._resources),
                web.get(_ROOT + "/namespaces/{namespace}/" + RESOURCE + "/{pool}/" + METRIC, self._metric),
                # The API server asks for more, such as an OpenAPI document, and takes 404 for an answer.
                web.route("*", "/{rest:.*}", self._nothing),
            ]
        )
        return application

    @web.middleware
    async def _only_the_front_proxy(self, request: web.Request, handler: Any) -> web.StreamResponse:
        identity = self._identity
        certificate = request.get_extra_info("peercert")
        if identity is None or not identity.front_proxy.is_it(certificate):
            log.warning("somebody other than the API server asked for custom metrics", extra={"peer": request.remote})
            return _status(401, "Unauthorized", "Only the API server is answered here.")
        answer: web.StreamResponse = await handler(request)
        return answer

    async def _resources(self, request: web.Request) -> web.Response:
        resource = {
            "name": f"{RESOURCE}/{METRIC}",
            "singularName": "",
            "namespaced": True,
            "kind": "MetricValueList",
            "verbs": ["get"],
        }
        return web.json_response(
            {
                "kind": "APIResourceList",
                "apiVersion": "v1",
                "groupVersion": f"{API_GROUP}/{API_VERSION}",
                "resources": [resource],
            }
        )

    async def _metric(self, request: web.Request) -> web.Response:
        namespace, name = request.match_info["namespace"], request.match_info["pool"]
        if not self._synced():
            # From half of the pods would follow half of the pool.
            return _status(503, "ServiceUnavailable", "The gateway has just started and does not know the cluster yet.")
        pool = self._view.pools.get((namespace, name))
        if pool is None or pool.deleting:
            return _status(404, "NotFound", f"There is no VoiceAgentPool {namespace}/{name}.")
        if any(request.query.get(selector) for selector in _SELECTORS):
            return _status(404, "NotFound", f"The metric {METRIC} has no labels that a selector could match.")
        advice = await self._advisor.advise(pool)
        if advice.recommendation is None:
            words = f"The VoiceAgentPool {namespace}/{name} asks for no recommendation; set spec.headroom, {{}} for all defaults."
            return _status(404, "NotFound", words)
        described = {
            "kind": KIND,
            "apiVersion": f"{GROUP}/{VERSION}",
            "namespace": namespace,
            "name": name,
            "uid": pool.uid,
        }
        value = {
            "describedObject": described,
            "metric": {"name": METRIC},
            # metav1.Time has whole seconds.
            "timestamp": advice.at.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            # A quantity.
            "value": str(advice.recommendation.replicas),
        }
        return web.json_response(
            {
                "kind": "MetricValueList",
                "apiVersion": f"{API_GROUP}/{API_VERSION}",
                "metadata": {},
                "items": [value],
            }
        )

    async def _nothing(self, request: web.Request) -> web.Response:
        return _status(404, "NotFound", f"There is nothing but {METRIC} of {RESOURCE} here.")


def _status(code: int, reason: str, message: str) -> web.Response:
    body = {
        "kind": "Status",
        "apiVersion": "v1",
        "metadata": {},
        "status": "Failure",
        "message": message,
        "reason": reason,
        "code": code,
    }
    return web.json_response(body, status=code)
