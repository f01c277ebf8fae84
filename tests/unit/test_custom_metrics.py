"""The API for a HorizontalPodAutoscaler: what it answers, and to whom. Certificates and handshakes are real."""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from tests.cluster.native.certificates import Authority, KeyPair
from tests.unit.fakes import NAMESPACE, POOL
from tests.unit.gateways import Gateway, World, world

from voicepool.gateway.custom_metrics import METRIC, RESOURCE, CustomMetrics
from voicepool.gateway.front_proxy import FrontProxy, FrontProxyError
from voicepool.kube.api import CONFIG_MAPS

ROOT = "/apis/custom.metrics.k8s.io/v1beta2"
PATH = f"{ROOT}/namespaces/{NAMESPACE}/{RESOURCE}/{POOL}/{METRIC}"


class Cluster:
    """What the API server brings: its authorities, and the ConfigMap that names them."""

    def __init__(self, here: World, gateway: Gateway) -> None:
        now = datetime.now(UTC)
        self.here = here
        self.gateway = gateway
        self.front_proxies = Authority("front proxies", now)
        self.others = Authority("others", now)
        self.servers = Authority("servers", now)
        self.folder = here.folder / "custom-metrics"
        self.folder.mkdir()
        self.new_certificate()
        self.publish(self.front_proxies, '["front-proxy-client"]')

    def new_certificate(self) -> None:
        pair = self.servers.issue("gateway", hosts=["localhost"])
        (self.folder / "tls.crt").write_bytes(pair.certificate)
        (self.folder / "tls.key").write_bytes(pair.key)

    def publish(self, authority: Authority, names: str) -> None:
        data = {
            "requestheader-client-ca-file": authority.own.certificate.decode(),
            "requestheader-allowed-names": names,
        }
        metadata = {"name": "extension-apiserver-authentication", "namespace": "kube-system"}
        self.here.kube.put(CONFIG_MAPS, {"metadata": metadata, "data": data})

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator[CustomMetrics]:
        services = self.gateway.services
        server = CustomMetrics(
            self.here.kube,
            services.view,
            services.advisor,
            self.folder,
            synced=services.synced,
            host="127.0.0.1",
            port=0,
            look_again_seconds=0.02,
        )
        task = asyncio.create_task(server.run())
        try:
            yield server
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    def context(self, pair: KeyPair | None) -> ssl.SSLContext:
        context = ssl.create_default_context(cadata=self.servers.own.certificate.decode())
        if pair is not None:
            file = self.here.folder / "client.pem"
            file.write_bytes(pair.certificate + pair.key)
            context.load_cert_chain(file)
        return context

    async def ask(self, server: CustomMetrics, path: str, pair: KeyPair | None) -> tuple[int, dict[str, Any]]:
        port = server.addresses[0][1]
        connector = aiohttp.TCPConnector(ssl=self.context(pair), force_close=True)
        async with (
            aiohttp.ClientSession(connector=connector) as http,
            http.get(f"https://localhost:{port}{path}") as answer,
        ):
            return answer.status, await answer.json()

    async def answered(self, server: CustomMetrics, authority: Authority, name: str) -> None:
        """Wait until somebody with such a certificate gets an answer."""
        async with asyncio.timeout(10):
            while True:
                await asyncio.sleep(0.005)
                # Between two listeners there is none.
                with contextlib.suppress(aiohttp.ClientError):
                    if server.addresses and (await self.ask(server, PATH, authority.issue(name)))[0] == 200:
                        return

    async def get(self, server: CustomMetrics, path: str) -> tuple[int, dict[str, Any]]:
        return await self.ask(server, path, self.front_proxies.issue("front-proxy-client"))


@pytest.fixture
async def here(tmp_path: Path) -> AsyncIterator[World]:
    async with world(tmp_path) as made:
        yield made


@pytest.fixture
async def cluster(here: World) -> Cluster:
    here.pool(headroom={"schedules": [{"cron": "* * * * *", "warmPods": 7}]})
    return Cluster(here, await here.gateway())


async def until(condition: Any) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 -- what is waited for has no event of its own
            await asyncio.sleep(0.005)


@pytest.fixture
async def server(cluster: Cluster) -> AsyncIterator[CustomMetrics]:
    async with cluster.serving() as running:
        await until(lambda: running.addresses)
        yield running


async def test_the_recommendation_is_a_metric_of_the_pool(cluster: Cluster, server: CustomMetrics) -> None:
    status, body = await cluster.get(server, PATH)
    assert status == 200
    assert (body["kind"], body["apiVersion"]) == ("MetricValueList", "custom.metrics.k8s.io/v1beta2")
    [item] = body["items"]
    assert item["describedObject"]["kind"] == "VoiceAgentPool"
    assert (item["describedObject"]["namespace"], item["describedObject"]["name"]) == (NAMESPACE, POOL)
    assert (item["metric"], item["value"]) == ({"name": "recommended_replicas"}, "7")
    age = datetime.now(UTC) - datetime.fromisoformat(item["timestamp"])
    assert timedelta(0) <= age < timedelta(minutes=1)


async def test_the_group_says_what_it_has(cluster: Cluster, server: CustomMetrics) -> None:
    status, body = await cluster.get(server, ROOT)
    assert (status, body["kind"], body["groupVersion"]) == (200, "APIResourceList", "custom.metrics.k8s.io/v1beta2")
    assert [resource["name"] for resource in body["resources"]] == [
        "voiceagentpools.voicepool.dev/recommended_replicas"
    ]


@pytest.mark.parametrize(
    "path",
    [
        PATH.replace(POOL, "nobody"),
        PATH.replace(METRIC, "replicas"),
        PATH.replace(RESOURCE, "pods"),
        PATH + "?metricLabelSelector=a%3Db",
        "/apis",
        "/openapi/v2",
    ],
)
async def test_what_there_is_not_is_a_status_in_words(cluster: Cluster, server: CustomMetrics, path: str) -> None:
    status, body = await cluster.get(server, path)
    assert (status, body["kind"], body["reason"], body["code"]) == (404, "Status", "NotFound", 404)
    assert body["message"]


async def test_a_pool_that_asks_for_no_recommendation_says_how_to(here: World, tmp_path: Path) -> None:
    here.pool()
    cluster = Cluster(here, await here.gateway())
    async with cluster.serving() as server:
        await until(lambda: server.addresses)
        status, body = await cluster.get(server, PATH)
    assert status == 404
    assert "set spec.headroom" in body["message"]


class TestWhoIsAnswered:
    """The API server's front proxy, and nobody else."""

    async def test_without_a_certificate_there_is_no_connection(self, cluster: Cluster, server: CustomMetrics) -> None:
        with pytest.raises(aiohttp.ClientError):
            await cluster.ask(server, PATH, None)

    async def test_a_certificate_of_another_authority_is_refused(self, cluster: Cluster, server: CustomMetrics) -> None:
        with pytest.raises(aiohttp.ClientError):
            await cluster.ask(server, PATH, cluster.others.issue("front-proxy-client"))

    async def test_another_name_of_the_same_authority_is_refused(self, cluster: Cluster, server: CustomMetrics) -> None:
        status, body = await cluster.ask(server, PATH, cluster.front_proxies.issue("a-node"))
        assert (status, body["reason"]) == (401, "Unauthorized")

    async def test_where_the_cluster_names_nobody_its_authority_is_enough(
        self, cluster: Cluster, server: CustomMetrics
    ) -> None:
        cluster.publish(cluster.front_proxies, "[]")
        await cluster.answered(server, cluster.front_proxies, "anybody")

    async def test_nobody_is_answered_while_the_front_proxy_is_unknown(self, cluster: Cluster) -> None:
        metadata = {"name": "extension-apiserver-authentication", "namespace": "kube-system"}
        cluster.here.kube.put(CONFIG_MAPS, {"metadata": metadata, "data": {}})
        before = len(cluster.here.kube.requests)
        async with cluster.serving() as server:
            await until(lambda: len(cluster.here.kube.requests) >= before + 3)
            assert not server.addresses
            cluster.publish(cluster.front_proxies, '["front-proxy-client"]')
            await until(lambda: server.addresses)
            assert (await cluster.get(server, PATH))[0] == 200


class TestChange:
    """Certificates change while it runs."""

    async def test_a_new_certificate_is_taken_up(self, cluster: Cluster, server: CustomMetrics) -> None:
        cluster.servers = Authority("new servers", datetime.now(UTC))
        cluster.new_certificate()
        await cluster.answered(server, cluster.front_proxies, "front-proxy-client")

    async def test_with_a_broken_one_the_old_one_goes_on(self, cluster: Cluster, server: CustomMetrics) -> None:
        (cluster.folder / "tls.crt").write_text("nothing")
        before = len(cluster.here.kube.requests)
        await until(lambda: len(cluster.here.kube.requests) >= before + 3)
        assert (await cluster.get(server, PATH))[0] == 200

    async def test_a_new_front_proxy_is_recognised(self, cluster: Cluster, server: CustomMetrics) -> None:
        cluster.publish(cluster.others, '["front-proxy-client"]')
        await cluster.answered(server, cluster.others, "front-proxy-client")
        with pytest.raises(aiohttp.ClientError):
            await cluster.ask(server, PATH, cluster.front_proxies.issue("front-proxy-client"))


class TestFrontProxy:
    """The ConfigMap that every cluster has."""

    AUTHORITY = "-----BEGIN CERTIFICATE-----"

    @pytest.mark.parametrize("names", ['"front-proxy-client"', "[1]", "["])
    def test_names_that_cannot_be_read_let_nobody_in(self, names: str) -> None:
        data = {"requestheader-client-ca-file": self.AUTHORITY, "requestheader-allowed-names": names}
        with pytest.raises(FrontProxyError, match="requestheader-allowed-names"):
            FrontProxy.from_config_map({"data": data})

    def test_without_an_aggregation_layer_nobody_is_let_in(self) -> None:
        with pytest.raises(FrontProxyError, match="without an aggregation layer"):
            FrontProxy.from_config_map({})

    def test_it_is_known_by_its_common_name(self) -> None:
        data = {"requestheader-client-ca-file": self.AUTHORITY, "requestheader-allowed-names": json.dumps(["a", "b"])}
        proxy = FrontProxy.from_config_map({"data": data})
        assert proxy.is_it({"subject": ((("organizationName", "x"),), (("commonName", "b"),))})
        assert not proxy.is_it({"subject": ((("organizationName", "a"),), (("commonName", "c"),))})
        assert not proxy.is_it({})
        assert not proxy.is_it(None)
