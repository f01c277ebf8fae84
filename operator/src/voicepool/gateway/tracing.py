"""Traces of starts, for whoever collects them: OpenTelemetry over HTTP, where the standard environment names a collector.

Invariants: without a collector nothing of OpenTelemetry's SDK is imported, and a span is an object that does nothing; a collector that is slow or away holds
up nothing and fails nothing; no span holds a key, a token or anything of a caller's body, and no error's words, only its code.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from voicepool import __version__
from voicepool.gateway.errors import GatewayError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
    from opentelemetry.trace import Span as Recorded

log = logging.getLogger("voicepool.gateway")

SERVICE_NAME = "voicepool-gateway"
"""Unless the environment has another one."""
FLUSH_SECONDS = 3.0
"""How long the last spans may take to leave when the process ends."""
_PROTOCOL = "http/protobuf"
_OFF = ("none", "console")


class Span:
    """One step of a start; this one is not recorded, and only knows the `traceparent` to hand on.

    Used as a context manager, it ends with the block, with the code of the exception that leaves it.
    """

    __slots__ = ("_traceparent",)

    def __init__(self, traceparent: str | None = None) -> None:
        self._traceparent = traceparent

    @property
    def traceparent(self) -> str | None:
        """In the form of W3C's Trace Context, for whoever goes on from here."""
        return self._traceparent

    def child(self, name: str, **attributes: str | float) -> Span:
        """A step of this step; attributes are named ``voicepool.<name>``."""
        return self

    def note(self, **attributes: str | float) -> None:
        """Add attributes, named ``voicepool.<name>``."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: TracebackType | None) -> None:
        return None


class Tracing:
    """Begins the spans of requests; this one records nothing."""

    def request(self, route: str, traceparent: str | None) -> Span:
        """A span for one POST, in its caller's trace."""
        return Span(traceparent)

    async def close(self) -> None:
        """Let the last spans leave, for as long as `FLUSH_SECONDS`."""


def make_tracing(environment: Mapping[str, str], *, instance: str) -> Tracing:
    """Tracing as the environment says, in OpenTelemetry's own variables.

    Args:
        environment: usually ``os.environ``. That it is on is decided here; all else the SDK reads from the process's environment itself.
        instance: this process's name.
    """
    if not is_on(environment):
        return Tracing()
    protocol = environment.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL") or environment.get("OTEL_EXPORTER_OTLP_PROTOCOL")
    if protocol not in (None, "", _PROTOCOL):
        log.warning("no traces: the protocol to the collector is %s, and only %s is spoken here", protocol, _PROTOCOL)
        return Tracing()
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    # What the exporter says of each try, and the queue of each span, is said once by `_telling`.
    for name in ("opentelemetry.exporter", "opentelemetry.sdk._shared_internal"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        exporter = OTLPSpanExporter()
    except Exception as error:
        log.warning("no traces: the exporter cannot be made (%s); look at the OTEL_ variables", type(error).__name__)
        return Tracing()
    provider = _provider(instance)
    provider.add_span_processor(BatchSpanProcessor(_telling(exporter)))
    return RecordedTracing(provider)


def is_on(environment: Mapping[str, str]) -> bool:
    """Whether the environment names a collector of traces, and does not switch tracing off."""
    named = environment.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT") or environment.get("OTEL_EXPORTER_OTLP_ENDPOINT")
    disabled = environment.get("OTEL_SDK_DISABLED", "").lower() == "true"
    return bool(named) and not disabled and environment.get("OTEL_TRACES_EXPORTER", "").lower() not in _OFF


class RecordedTracing(Tracing):
    """Tracing that records.

    Args:
        provider: where the spans go; not made the process's own, so that no library's spans leave with them.
    """

    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("voicepool.gateway", __version__)

    def request(self, route: str, traceparent: str | None) -> Span:
        """See `Tracing.request`."""
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        context = TraceContextTextMapPropagator().extract({"traceparent": traceparent} if traceparent else {})
        attributes = {"http.request.method": "POST", "http.route": route}
        span = self._tracer.start_span(f"POST {route}", context, SpanKind.SERVER, attributes)
        return RecordedRequest(self._tracer, span)

    async def close(self) -> None:
        """See `Tracing.close`."""
        # A thread that the process does not wait for: the SDK itself would take half a minute for a collector that is away.
        closing = threading.Thread(target=self._provider.shutdown, name="voicepool-traces", daemon=True)
        closing.start()
        loop = asyncio.get_running_loop()
        until = loop.time() + FLUSH_SECONDS
        while closing.is_alive() and loop.time() < until:  # noqa: ASYNC110 -- a thread has no event for its end
            await asyncio.sleep(0.01)


class RecordedSpan(Span):
    """A span that is recorded."""

    __slots__ = ("_span", "_tracer")

    def __init__(self, tracer: Any, span: Recorded) -> None:
        super().__init__()
        self._tracer = tracer
        self._span = span

    @property
    def traceparent(self) -> str | None:
        """See `Span.traceparent`."""
        context = self._span.get_span_context()
        return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"

    def child(self, name: str, **attributes: str | float) -> Span:
        """See `Span.child`."""
        from opentelemetry.trace import set_span_in_context

        return RecordedSpan(
            self._tracer, self._tracer.start_span(name, set_span_in_context(self._span), attributes=_named(attributes))
        )

    def note(self, **attributes: str | float) -> None:
        """See `Span.note`."""
        self._span.set_attributes(_named(attributes))

    def __exit__(self, kind: object, error: BaseException | None, trace: TracebackType | None) -> None:
        from opentelemetry.trace import StatusCode

        if error is not None:
            self._span.set_attribute(
                "error.type", error.code if isinstance(error, GatewayError) else type(error).__name__
            )
        # As OpenTelemetry has it for servers: what the caller has done wrong is no error of ours.
        if error is not None and getattr(error, "status", 500) >= 500:
            self._span.set_status(StatusCode.ERROR)
        self._span.end()


class RecordedRequest(RecordedSpan):
    """A request that is recorded."""

    __slots__ = ()

    def __exit__(self, kind: object, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None or isinstance(error, GatewayError):
            self._span.set_attribute("http.response.status_code", error.status if error else 200)
        super().__exit__(kind, error, trace)


def _named(attributes: Mapping[str, str | float]) -> dict[str, str | float]:
    return {f"voicepool.{name}": value for name, value in attributes.items()}


def _provider(instance: str) -> TracerProvider:
    from opentelemetry.sdk.resources import OTELResourceDetector, Resource
    from opentelemetry.sdk.trace import TracerProvider

    said = OTELResourceDetector().detect().attributes
    ours = {"service.name": SERVICE_NAME, "service.version": __version__, "service.instance.id": instance}
    resource = Resource.create({name: value for name, value in ours.items() if name not in said})
    return TracerProvider(resource=resource, shutdown_on_exit=False)


def _telling(exporter: SpanExporter) -> SpanExporter:
    """The exporter, but with one warning when the collector does not take spans, until it does again."""
    from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

    class Telling(SpanExporter):
        failing = False

        def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
            result = exporter.export(spans)
            failed = result is not SpanExportResult.SUCCESS
            if failed and not self.failing:
                log.warning("the collector of traces does not take spans; they are dropped until it does")
            self.failing = failed
            return result

        def shutdown(self) -> None:
            exporter.shutdown()

    return Telling()
