"""Traces of starts: which spans there are, whose children they are, what they say, and what they never say."""

from __future__ import annotations

import logging
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from tests.unit.fakes import NAMESPACE, POOL, pod_status
from tests.unit.gateways import API_KEY, LIVEKIT_SECRET, World, world

from voicepool.gateway.tracing import RecordedTracing, Tracing, is_on, make_tracing
from voicepool.kube.api import PODS

TRACE, CALLER = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = f"00-{TRACE}-{CALLER}-01"
COLLECTOR = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector.example:4318"}


@pytest.fixture
async def here(tmp_path: Path) -> AsyncIterator[World]:
    async with world(tmp_path) as made:
        yield made


class Collected:
    """Spans, by name."""

    def __init__(self) -> None:
        self._exporter = InMemorySpanExporter()
        provider = TracerProvider(shutdown_on_exit=False)
        provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        self.tracing = RecordedTracing(provider)

    @property
    def spans(self) -> tuple[ReadableSpan, ...]:
        return self._exporter.get_finished_spans()

    def named(self, name: str) -> list[ReadableSpan]:
        return [span for span in self.spans if span.name == name]

    def one(self, name: str) -> ReadableSpan:
        (span,) = self.named(name)
        return span


@pytest.fixture
def collected() -> Collected:
    return Collected()


def attributes(span: ReadableSpan) -> dict[str, object]:
    return dict(span.attributes or {})


def identity(span: ReadableSpan) -> str:
    assert span.context is not None
    return f"{span.context.span_id:016x}"


def parent(span: ReadableSpan) -> str:
    assert span.parent is not None
    return f"{span.parent.span_id:016x}"


async def test_a_start_is_a_span_in_its_callers_trace_with_a_child_for_each_step(
    here: World, collected: Collected
) -> None:
    here.pool()
    (pod,) = here.pods(1)
    gateway = await here.gateway(tracing=collected.tracing)
    started = (await gateway.start({"traceparent": TRACEPARENT})).json()
    request = collected.one("POST /start")
    assert {f"{span.context.trace_id:032x}" for span in collected.spans if span.context} == {TRACE}
    assert parent(request) == CALLER
    assert request.kind is SpanKind.SERVER
    assert request.status.status_code is StatusCode.UNSET
    assert attributes(request) == {
        "http.request.method": "POST",
        "http.route": "/start",
        "http.response.status_code": 200,
        "voicepool.pool": f"{NAMESPACE}/{POOL}",
        "voicepool.session": started["sessionId"],
        "voicepool.pod": pod,
        "voicepool.cold_start": False,
    }
    steps = {span.name: attributes(span) for span in collected.spans if parent(span) == identity(request)}
    assert steps == {
        "wait for a pod": {"voicepool.policy": "Queue", "voicepool.pod": pod},
        "room": {},
        "bind": {"voicepool.pod": pod, "voicepool.outcome": "bound"},
        "delivery": {"voicepool.pod": pod, "voicepool.outcome": "accepted"},
    }


async def test_the_agent_goes_on_with_the_trace_of_the_request(here: World, collected: Collected) -> None:
    here.pool()
    (pod,) = here.pods(1)
    await (await here.gateway(tracing=collected.tracing)).start({"traceparent": TRACEPARENT})
    (claims,) = here.agents.of(pod).claims
    assert claims["traceparent"] == f"00-{TRACE}-{identity(collected.one('POST /start'))}-01"


async def test_a_caller_without_a_trace_begins_one(here: World, collected: Collected) -> None:
    here.pool()
    here.pods(1)
    await (await here.gateway(tracing=collected.tracing)).start()
    assert collected.one("POST /start").parent is None
    assert len({span.context.trace_id for span in collected.spans if span.context}) == 1


async def test_a_caller_who_samples_nothing_is_not_recorded_and_neither_is_the_agent(
    here: World, collected: Collected
) -> None:
    here.pool()
    (pod,) = here.pods(1)
    await (await here.gateway(tracing=collected.tracing)).start({"traceparent": TRACEPARENT[:-2] + "00"})
    assert collected.spans == ()
    (claims,) = here.agents.of(pod).claims
    assert claims["traceparent"].startswith(f"00-{TRACE}-")
    assert claims["traceparent"].endswith("-00")


async def test_without_a_collector_the_agent_gets_the_callers_own_traceparent(here: World) -> None:
    here.pool()
    (pod,) = here.pods(1)
    await (await here.gateway(tracing=Tracing())).start({"traceparent": TRACEPARENT})
    (claims,) = here.agents.of(pod).claims
    assert claims["traceparent"] == TRACEPARENT


async def test_a_bind_that_lost_is_a_step_of_its_own_and_counted(here: World, collected: Collected) -> None:
    here.pool(onEmpty={"policy": "Reject"})
    (name,) = here.pods(1)
    gateway = await here.gateway(tracing=collected.tracing)
    here.kube.quiet = True
    here.kube.edit(PODS, name, {"status": pod_status(0, ready=False)})
    assert (await gateway.start()).status_code == 429
    assert attributes(collected.one("bind"))["voicepool.outcome"] == "conflict"
    request = collected.one("POST /start")
    assert attributes(request)["voicepool.conflicts"] == 1
    assert attributes(request)["http.response.status_code"] == 429
    assert attributes(request)["error.type"] == "NO_WARM_AGENT"
    assert request.status.status_code is StatusCode.UNSET, "there being no agent is no error of the gateway's"


async def test_an_agent_that_refuses_is_a_delivery_of_its_own(here: World, collected: Collected) -> None:
    here.pool()
    here.pods(2)
    here.agents.refuse_next = [(503, "NOT_PARKED")]
    assert (await (await here.gateway(tracing=collected.tracing)).start()).status_code == 200
    outcomes = [attributes(span)["voicepool.outcome"] for span in collected.named("delivery")]
    assert outcomes == ["not_parked", "accepted"]


async def test_a_start_that_failed_says_at_which_step_and_with_which_code(here: World, collected: Collected) -> None:
    here.pool()
    here.pods(1)
    here.rooms.down = True
    assert (await (await here.gateway(tracing=collected.tracing)).start()).status_code == 503
    for name in ("room", "POST /start"):
        span = collected.one(name)
        assert span.status.status_code is StatusCode.ERROR
        assert attributes(span)["error.type"] == "LIVEKIT_UNAVAILABLE"
        assert span.events == ()


async def test_waiting_for_the_agent_to_join_is_a_step(here: World, collected: Collected) -> None:
    here.pool()
    here.pods(1)
    await (await here.gateway(tracing=collected.tracing)).start(waitFor="joined")
    assert attributes(collected.one("joined")) == {"voicepool.state": "joined"}


async def test_no_key_no_token_and_nothing_of_the_body_is_in_a_span(here: World, collected: Collected) -> None:
    here.pool()
    (pod,) = here.pods(1)
    gateway = await here.gateway(tracing=collected.tracing)
    started = (await gateway.start(body={"name": "canary-of-a-body"})).json()
    (claims,) = here.agents.of(pod).claims
    written = "".join(span.to_json() for span in collected.spans)
    secrets = (API_KEY, LIVEKIT_SECRET, "canary-of-a-body", started["token"], claims["token"])
    assert [secret for secret in secrets if secret in written] == []


@pytest.mark.parametrize(
    ("environment", "on"),
    [
        ({}, False),
        (COLLECTOR, True),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://collector.example:4318/v1/traces"}, True),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": ""}, False),
        ({"OTEL_SERVICE_NAME": "gateway"}, False),
        ({**COLLECTOR, "OTEL_SDK_DISABLED": "true"}, False),
        ({**COLLECTOR, "OTEL_TRACES_EXPORTER": "none"}, False),
        ({**COLLECTOR, "OTEL_TRACES_EXPORTER": "otlp"}, True),
    ],
)
def test_it_is_on_where_the_standard_environment_names_a_collector(environment: dict[str, str], on: bool) -> None:
    assert is_on(environment) is on


def test_a_protocol_that_is_not_spoken_is_said_once_and_leaves_tracing_off(caplog: pytest.LogCaptureFixture) -> None:
    tracing = make_tracing({**COLLECTOR, "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, instance="gateway-1")
    assert not isinstance(tracing, RecordedTracing)
    assert [record.getMessage() for record in caplog.records] == [
        "no traces: the protocol to the collector is grpc, and only http/protobuf is spoken here"
    ]


def test_without_a_collector_nothing_of_the_sdk_is_imported() -> None:
    program = (
        "import sys; from voicepool.gateway import server, tracing;"
        "tracing.make_tracing({}, instance='').request('/start', None).child('bind').note(outcome='bound');"
        "print([name for name in sys.modules if name.startswith(('opentelemetry.sdk', 'opentelemetry.exporter'))])"
    )
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


async def test_a_collector_that_is_away_is_told_once_and_holds_up_no_start(
    here: World, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        nobody = f"http://127.0.0.1:{taken.getsockname()[1]}"
    for name, value in {
        "OTEL_EXPORTER_OTLP_ENDPOINT": nobody,
        "OTEL_EXPORTER_OTLP_TIMEOUT": "0.2",
        "OTEL_BSP_SCHEDULE_DELAY": "10",
    }.items():
        monkeypatch.setenv(name, value)
    here.pool()
    here.pods(3)
    tracing = make_tracing({"OTEL_EXPORTER_OTLP_ENDPOINT": nobody}, instance="gateway-1")
    gateway = await here.gateway(tracing=tracing)
    assert [(await gateway.start()).status_code for _ in range(3)] == [200, 200, 200]
    with caplog.at_level(logging.WARNING):
        await tracing.close()
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert warnings == ["the collector of traces does not take spans; they are dropped until it does"]
