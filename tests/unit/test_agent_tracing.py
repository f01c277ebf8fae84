"""The trace of a session: its spans, whose children they are, what they say, and that it harms nothing."""

from __future__ import annotations

import io
import socket
from collections.abc import Iterator
from concurrent import futures
from dataclasses import replace

import pytest
from loguru import logger
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from voicepool_agent.settings import read_settings
from voicepool_agent.summary import Reason, Summary
from voicepool_agent.tracing import Part, RecordedTracing, Trace, make_tracing

TRACE, DELIVERY = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = f"00-{TRACE}-{DELIVERY}-01"
COLLECTOR = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector.example:4318"}
SETTINGS = read_settings(
    {
        "VOICEPOOL_POD_UID": "uid-1",
        "VOICEPOOL_POD_NAME": "demo-0a1b2c3d-0",
        "VOICEPOOL_POD_NAMESPACE": "calls",
        "VOICEPOOL_ASSIGNMENT_PUBLIC_KEY": "-----BEGIN PUBLIC KEY-----",
    }
)
SUMMARY = Summary(
    session="s-1",
    reason=Reason.CALLER_LEFT,
    duration_seconds=60.0,
    turns=3,
    joined_seconds=0.25,
    first_audio_seconds=0.5,
    errors=("GroqLLMService: canary",),
    interruptions=1,
)
SECOND = 1_000_000_000


class Recorder:
    """Tracing into memory, at times that the test sets."""

    def __init__(self) -> None:
        self.now = 1_700_000_000 * SECOND
        self.exporter = InMemorySpanExporter()
        self.tracing = RecordedTracing(self._provider, pod="demo-0a1b2c3d-0", clock=lambda: self.now)

    def _provider(self) -> TracerProvider:
        provider = TracerProvider(shutdown_on_exit=False)
        provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        return provider

    def begin(self, traceparent: str | None = TRACEPARENT) -> Trace:
        return self.tracing.session("s-1", "calls/demo", traceparent)

    def pass_seconds(self, seconds: float) -> None:
        self.now += round(seconds * SECOND)

    def spans(self) -> dict[str, ReadableSpan]:
        self.tracing.leave().result(10)
        return {span.name: span for span in self.exporter.get_finished_spans()}


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
def warnings() -> Iterator[io.StringIO]:
    """What is logged in the meantime."""
    stream = io.StringIO()
    sink = logger.add(stream, level="WARNING", format="{message}")
    yield stream
    logger.remove(sink)


def identity(span: ReadableSpan) -> str:
    assert span.context is not None
    return f"{span.context.span_id:016x}"


def parent(span: ReadableSpan) -> str:
    assert span.parent is not None
    return f"{span.parent.span_id:016x}"


def seconds(span: ReadableSpan) -> tuple[float, float]:
    """Beginning and end, from the bind on."""
    assert span.start_time is not None
    assert span.end_time is not None
    first = 1_700_000_000 * SECOND
    return (span.start_time - first) / SECOND, (span.end_time - first) / SECOND


def test_a_session_is_a_child_of_its_delivery_from_the_bind_to_the_end(recorder: Recorder) -> None:
    trace = recorder.begin()
    recorder.pass_seconds(60)
    trace.end(SUMMARY)
    session = recorder.spans()["session"]
    assert session.context is not None
    assert f"{session.context.trace_id:032x}" == TRACE
    assert parent(session) == DELIVERY
    assert seconds(session) == (0.0, 60.0)
    assert dict(session.attributes or {}) == {
        "voicepool.session": "s-1",
        "voicepool.pool": "calls/demo",
        "voicepool.pod": "demo-0a1b2c3d-0",
        "voicepool.reason": "caller-left",
        "voicepool.turns": 3,
        "voicepool.interruptions": 1,
        "voicepool.errors": 1,
        "voicepool.joined_seconds": 0.25,
        "voicepool.first_audio_seconds": 0.5,
    }
    assert session.status.status_code is StatusCode.UNSET


def test_each_step_is_a_child_and_the_parts_of_a_turn_are_its_children(recorder: Recorder) -> None:
    trace = recorder.begin()
    recorder.pass_seconds(0.25)
    trace.step("joining", 0.25)
    recorder.pass_seconds(9.75)
    turn_began = recorder.now / SECOND - 0.7
    parts = [
        Part("transcription", "AssemblyAISTTService#0", turn_began, 0.3),
        Part("llm_inference", "GroqLLMService#0", turn_began + 0.3, 0.4),
    ]
    trace.step("turn", 0.7, parts)
    trace.end(SUMMARY)
    spans = recorder.spans()
    assert {name for name, span in spans.items() if parent(span) == identity(spans["session"])} == {"joining", "turn"}
    assert seconds(spans["joining"]) == (0.0, 0.25)
    assert seconds(spans["turn"]) == pytest.approx((9.3, 10.0))
    turns_parts = {name: span for name, span in spans.items() if parent(span) == identity(spans["turn"])}
    assert {name: dict(span.attributes or {}) for name, span in turns_parts.items()} == {
        "transcription": {"voicepool.owner": "AssemblyAISTTService#0"},
        "llm_inference": {"voicepool.owner": "GroqLLMService#0"},
    }
    assert seconds(turns_parts["llm_inference"]) == pytest.approx((9.6, 10.0), abs=1e-5)


@pytest.mark.parametrize("reason", [Reason.BOT_FAILED, Reason.PROVIDER_FAILED, Reason.STUCK])
def test_an_end_that_nobody_wanted_is_an_error(recorder: Recorder, reason: Reason) -> None:
    recorder.begin().end(replace(SUMMARY, reason=reason, joined_seconds=None, first_audio_seconds=None))
    session = recorder.spans()["session"]
    assert session.status.status_code is StatusCode.ERROR
    assert (session.attributes or {})["error.type"] == reason.value
    assert "voicepool.joined_seconds" not in (session.attributes or {})


def test_the_words_of_an_error_are_in_no_span(recorder: Recorder) -> None:
    recorder.begin().end(SUMMARY)
    assert "canary" not in recorder.spans()["session"].to_json()


@pytest.mark.parametrize("traceparent", [None, "", "nonsense", f"00-{TRACE}-{DELIVERY}"])
def test_without_a_trace_to_go_on_with_the_session_begins_one(recorder: Recorder, traceparent: str | None) -> None:
    recorder.begin(traceparent).end(SUMMARY)
    assert recorder.spans()["session"].parent is None


def test_what_the_caller_does_not_sample_is_not_recorded(recorder: Recorder) -> None:
    trace = recorder.begin(TRACEPARENT[:-2] + "00")
    trace.step("joining", 0.1)
    trace.end(SUMMARY)
    assert recorder.spans() == {}


def test_a_library_that_records_by_itself_does_not_reach_our_collector(recorder: Recorder) -> None:
    from opentelemetry import trace as process_wide

    trace = recorder.begin()
    with process_wide.get_tracer("pipecat").start_as_current_span("llm") as span:
        span.set_attribute("input", "canary")
    trace.end(SUMMARY)
    assert set(recorder.spans()) == {"session"}


def test_tracing_that_cannot_be_set_up_is_one_warning_and_nothing_more(warnings: io.StringIO) -> None:
    def fails() -> TracerProvider:
        raise ValueError("canary")

    tracing = RecordedTracing(fails, pod="demo-0a1b2c3d-0")
    tracing.prepare()
    trace = tracing.session("s-1", "calls/demo", TRACEPARENT)
    trace.step("joining", 0.1)
    trace.end(SUMMARY)
    tracing.leave().result(10)
    assert warnings.getvalue() == "no traces (ValueError); look at the OTEL_ variables\n"


def test_an_agent_that_was_never_parked_makes_nothing_ready_only_to_leave(recorder: Recorder) -> None:
    def never() -> TracerProvider:
        raise AssertionError("nobody needs it any more")

    RecordedTracing(never, pod="demo-0a1b2c3d-0").leave().result(10)


def test_a_collector_that_is_away_is_told_once(warnings: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        nobody = f"http://127.0.0.1:{taken.getsockname()[1]}"
    for name, value in {
        "OTEL_EXPORTER_OTLP_ENDPOINT": nobody,
        "OTEL_EXPORTER_OTLP_TIMEOUT": "0.2",
        "OTEL_BSP_SCHEDULE_DELAY": "10",
    }.items():
        monkeypatch.setenv(name, value)
    tracing = make_tracing({"OTEL_EXPORTER_OTLP_ENDPOINT": nobody}, SETTINGS)
    trace = tracing.session("s-1", "calls/demo", TRACEPARENT)
    for _ in range(20):
        trace.step("turn", 0.1)
        futures.wait([tracing.later(lambda _: None)])  # type: ignore[attr-defined]
    trace.end(SUMMARY)
    tracing.leave().result(10)
    assert warnings.getvalue() == "the collector of traces does not take spans; they are dropped until it does\n"


@pytest.mark.parametrize(
    ("environment", "on"),
    [
        ({}, False),
        (COLLECTOR, True),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://collector.example:4318/v1/traces"}, True),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": ""}, False),
        ({"OTEL_SERVICE_NAME": "agent"}, False),
        ({**COLLECTOR, "OTEL_SDK_DISABLED": "true"}, False),
        ({**COLLECTOR, "OTEL_TRACES_EXPORTER": "none"}, False),
    ],
)
def test_it_is_on_where_the_standard_environment_names_a_collector(environment: dict[str, str], on: bool) -> None:
    assert isinstance(make_tracing(environment, SETTINGS), RecordedTracing) is on


def test_a_protocol_that_is_not_spoken_is_said_and_leaves_tracing_off(warnings: io.StringIO) -> None:
    tracing = make_tracing({**COLLECTOR, "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, SETTINGS)
    assert not isinstance(tracing, RecordedTracing)
    assert "the protocol to the collector is grpc" in warnings.getvalue()
