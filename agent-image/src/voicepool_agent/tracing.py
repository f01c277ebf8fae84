"""The trace of a session: OpenTelemetry over HTTP, where the standard environment names a collector.

All of OpenTelemetry's SDK runs in one thread, which imports it when the agent has parked: neither the time to Ready
nor the event loop of a call is touched, whatever the collector does. Invariants: without a collector nothing of the
SDK is imported; a failure here is one warning and nothing more; no span holds a key, a token or a word that was said,
and Pipecat's own spans, which hold all of it, never leave this way.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from loguru import logger

from voicepool_agent.settings import Settings
from voicepool_agent.summary import Reason, Summary

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
    from opentelemetry.trace import Span

SERVICE_NAME = "voicepool-agent"
"""Unless the environment has another one."""

FLUSH_SECONDS = 3.0
"""How long the last spans may take to leave when the session is over; the summary is written before."""

PROTOCOL = "http/protobuf"
OFF = ("none", "console")

FAILURES = frozenset(
    {
        Reason.BOT_FAILED,
        Reason.NOT_JOINED,
        Reason.LIVEKIT_LOST,
        Reason.REPLACED,
        Reason.PROVIDER_FAILED,
        Reason.STUCK,
    }
)
"""Ends that make the session's span an error."""

Clock = Callable[[], int]
"""Nanoseconds since the epoch."""


@dataclass(frozen=True, slots=True)
class Part:
    """What some of a step's time was spent on."""

    name: str
    owner: str
    began_seconds: float
    """Since the epoch."""
    seconds: float


class Trace:
    """The trace of one session; this one records nothing."""

    def step(self, name: str, seconds: float, parts: Sequence[Part] = ()) -> None:
        """Something took so long and ends now."""

    def end(self, summary: Summary) -> None:
        """The session is over."""


class Tracing:
    """Makes traces; this one makes none."""

    def prepare(self) -> None:
        """There is time now to import what is needed."""

    def session(self, session_id: str, pool: str, traceparent: str | None) -> Trace:
        """A trace that begins now, as a part of its caller's."""
        return Trace()

    def leave(self) -> Future[None]:
        """Send what is left; done when it has left, or cannot leave."""
        done: Future[None] = Future()
        done.set_result(None)
        return done


def make_tracing(environment: Mapping[str, str], settings: Settings) -> Tracing:
    """Tracing as the environment says, in OpenTelemetry's own variables.

    Args:
        environment: usually `os.environ`. That it is on is decided here; all else the SDK itself reads from the
            process's environment.
        settings: which pod this is.
    """
    named = environment.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT") or environment.get("OTEL_EXPORTER_OTLP_ENDPOINT")
    disabled = environment.get("OTEL_SDK_DISABLED", "").lower() == "true"
    if not named or disabled or environment.get("OTEL_TRACES_EXPORTER", "").lower() in OFF:
        return Tracing()
    protocol = environment.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL") or environment.get("OTEL_EXPORTER_OTLP_PROTOCOL")
    if protocol and protocol != PROTOCOL:
        logger.warning(f"no traces: the protocol to the collector is {protocol}, and only {PROTOCOL} is spoken here")
        return Tracing()
    return RecordedTracing(partial(_provider, settings), pod=settings.pod_name)


class RecordedTracing(Tracing):
    """Tracing that records.

    Args:
        make_provider: makes where the spans go, and may take its time; it is called once, in the thread. The provider
            is not made the process's own: what a bot or a library records goes where they send it, never here.
        pod: this pod's name.
        clock: wall-clock time.
    """

    def __init__(self, make_provider: Callable[[], TracerProvider], *, pod: str, clock: Clock = time.time_ns) -> None:
        self._make_provider = make_provider
        self._pod = pod
        self._clock = clock
        self._provider: TracerProvider | None = None
        self._broken = False
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="voicepool-traces")

    def prepare(self) -> None:
        """See `Tracing.prepare`."""
        self.later(lambda _provider: None)

    def session(self, session_id: str, pool: str, traceparent: str | None) -> Trace:
        """See `Tracing.session`."""
        attributes = {"voicepool.session": session_id, "voicepool.pool": pool, "voicepool.pod": self._pod}
        return RecordedTrace(self, attributes, traceparent, self._clock)

    def leave(self) -> Future[None]:
        """See `Tracing.leave`."""
        return self._thread.submit(self._shut_down)

    def later(self, work: Callable[[TracerProvider], None]) -> Future[None]:
        """Do it in the thread, after all that was to be done before."""
        return self._thread.submit(self._do, work)

    def _do(self, work: Callable[[TracerProvider], None]) -> None:
        if self._broken:
            return
        try:
            if self._provider is None:
                self._provider = self._make_provider()
            work(self._provider)
        except Exception as error:
            self._broken = True
            logger.warning(f"no traces ({type(error).__name__}); look at the OTEL_ variables")

    def _shut_down(self) -> None:
        if self._provider is not None:
            self._provider.shutdown()


class RecordedTrace(Trace):
    """A trace that is recorded: when things happened is noted at once, spans are made of it in the thread."""

    def __init__(
        self, tracing: RecordedTracing, attributes: Mapping[str, str], traceparent: str | None, clock: Clock
    ) -> None:
        self._tracing = tracing
        self._clock = clock
        self._tracer: Any = None
        self._session: Span | None = None
        tracing.later(partial(self._begin, attributes, traceparent, clock()))

    def step(self, name: str, seconds: float, parts: Sequence[Part] = ()) -> None:
        """See `Trace.step`."""
        ended = self._clock()
        self._tracing.later(partial(self._add, name, ended - _nanoseconds(seconds), ended, parts))

    def end(self, summary: Summary) -> None:
        """See `Trace.end`."""
        self._tracing.later(partial(self._end, summary, self._clock()))

    def _begin(
        self, attributes: Mapping[str, str], traceparent: str | None, began: int, provider: TracerProvider
    ) -> None:
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        from voicepool_agent import __name__ as scope

        self._tracer = provider.get_tracer(scope)
        parent = TraceContextTextMapPropagator().extract({"traceparent": traceparent} if traceparent else {})
        self._session = self._tracer.start_span("session", parent, SpanKind.SERVER, attributes, start_time=began)

    def _add(self, name: str, began: int, ended: int, parts: Sequence[Part], _provider: TracerProvider) -> None:
        step = self._child(self._session, name, began)
        for part in parts:
            start = _nanoseconds(part.began_seconds)
            child = self._child(step, part.name, start)
            child.set_attribute("voicepool.owner", part.owner)
            child.end(start + _nanoseconds(part.seconds))
        step.end(ended)

    def _child(self, parent: Span | None, name: str, began: int) -> Span:
        from opentelemetry.trace import set_span_in_context

        if parent is None:
            raise RuntimeError("a step before the beginning")
        span: Span = self._tracer.start_span(name, set_span_in_context(parent), start_time=began)
        return span

    def _end(self, summary: Summary, ended: int, _provider: TracerProvider) -> None:
        from opentelemetry.trace import StatusCode

        if self._session is None:
            return
        told = {
            "reason": summary.reason.value,
            "turns": summary.turns,
            "interruptions": summary.interruptions,
            "errors": len(summary.errors),  # their words stay in the summary
            "joined_seconds": summary.joined_seconds,
            "first_audio_seconds": summary.first_audio_seconds,
        }
        self._session.set_attributes({f"voicepool.{name}": value for name, value in told.items() if value is not None})
        if summary.reason in FAILURES:
            self._session.set_attribute("error.type", summary.reason.value)
            self._session.set_status(StatusCode.ERROR)
        self._session.end(ended)


def _nanoseconds(seconds: float) -> int:
    return round(seconds * 1e9)


def _provider(settings: Settings) -> TracerProvider:
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import OTELResourceDetector, Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    # What the exporter says of each try, and the queue of each span, is said once by `_telling`.
    for name in ("opentelemetry.exporter", "opentelemetry.sdk._shared_internal"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    said = OTELResourceDetector().detect().attributes
    ours = {
        "service.name": SERVICE_NAME,
        "service.instance.id": settings.pod_uid,
        "k8s.pod.uid": settings.pod_uid,
        "k8s.pod.name": settings.pod_name,
        "k8s.namespace.name": settings.pod_namespace,
    }
    resource = Resource.create({name: value for name, value in ours.items() if value and name not in said})
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(_telling(OTLPSpanExporter())))
    return provider


def _telling(exporter: SpanExporter) -> SpanExporter:
    """The exporter, but with one warning when the collector does not take spans, until it does again."""
    from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

    class Telling(SpanExporter):
        failing = False

        def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
            result = exporter.export(spans)
            failed = result is not SpanExportResult.SUCCESS
            if failed and not self.failing:
                logger.warning("the collector of traces does not take spans; they are dropped until it does")
            self.failing = failed
            return result

        def shutdown(self) -> None:
            exporter.shutdown()

    return Telling()
