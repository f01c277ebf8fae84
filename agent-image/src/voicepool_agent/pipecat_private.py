"""Every name of the pinned Pipecat (1.14), and of its LiveKit client, that its documentation does not promise, in one place.

Parking has to reach what Pipecat keeps to itself: the workers that a runner holds, the LiveKit client inside a
transport (its address, token and room are read when it connects, not when it is made), the models inside the turn
detection, the time limit of a pipeline's set-up, and how services connect and their sockets. Watching a call needs
more: where heartbeats arrive and what goes over the bus between workers, what a caller's client is told of metrics, and
how long a pipeline may be idle and what becomes of it then.
`tests/unit/test_agent_pipecat_contract.py` holds each name down, so that an upgrade fails there and nowhere else.
Nothing outside this module may touch an underscored name of Pipecat.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import numpy as np
import onnxruntime  # type: ignore[import-untyped]
from livekit import rtc
from livekit.rtc._ffi_client import FfiClient
from livekit.rtc._proto import ffi_pb2 as proto_ffi
from pipecat.audio.turn.smart_turn.local_smart_turn_v3 import LocalSmartTurnAnalyzerV3
from pipecat.audio.vad.vad_analyzer import VADAnalyzer
from pipecat.bus.bridge_processor import BusBridgeProcessor, _BusEdgeProcessor
from pipecat.frames.frames import HeartbeatFrame, InputAudioRawFrame, OutputAudioRawFrame
from pipecat.pipeline.base_pipeline import BasePipeline
from pipecat.pipeline.service_switcher import ServiceSwitcher
from pipecat.pipeline.worker import IDLE_TIMEOUT_SECS, PipelineWorker
from pipecat.processors.frame_processor import FrameProcessor, FrameProcessorSetup
from pipecat.processors.frameworks.rtvi import RTVIObserver
from pipecat.services.llm_service import LLMService
from pipecat.services.stt_service import STTService
from pipecat.services.tts_service import TTSService
from pipecat.services.websocket_service import WebsocketService
from pipecat.transports.livekit.transport import LiveKitInputTransport, LiveKitOutputTransport, LiveKitTransport
from pipecat.turns.user_stop.turn_analyzer_user_turn_stop_strategy import TurnAnalyzerUserTurnStopStrategy
from pipecat.workers.runner import WorkerRunner
from websockets.asyncio.client import ClientConnection
from websockets.protocol import State

LIVEKIT_ENDS = (LiveKitInputTransport, LiveKitOutputTransport)

SMART_TURN_SECONDS = 8
SMART_TURN_RATE = 16_000
NEVER_SECONDS = 1e6


def pipeline_workers(runner: WorkerRunner) -> list[PipelineWorker]:
    """The pipeline workers that were added to a runner."""
    return [entry.worker for entry in runner._entries.values() if isinstance(entry.worker, PipelineWorker)]


def processors(worker: PipelineWorker, *, closed: tuple[type[FrameProcessor], ...] = ()) -> Iterator[FrameProcessor]:
    """All processors of a worker's pipeline, however deep, but for what is inside of a `closed` kind."""
    pending: list[FrameProcessor] = [worker.pipeline]
    while pending:
        processor = pending.pop()
        yield processor
        if not isinstance(processor, closed):
            pending.extend(processor.processors)


def unusable(worker: PipelineWorker) -> list[FrameProcessor]:
    """What a pipeline cannot do its work without, and that cannot do its own.

    A switcher speaks for its services: one of them that has failed is what the others are there for.
    """
    return [one for one in processors(worker, closed=(ServiceSwitcher,)) if not one.is_usable]


def talks(processor: FrameProcessor) -> bool:
    """Whether without it a caller hears nothing, or is not heard: the other ones a call can do without."""
    return isinstance(processor, (STTService, LLMService, TTSService, ServiceSwitcher, *LIVEKIT_ENDS))


def measure(worker: PipelineWorker) -> None:
    """Let the services of a pipeline that is not set up yet measure latency and usage.

    Where the bot has not asked for that itself, its callers' clients are told as little of it as before: neither the
    figures, nor that there are any.
    """
    parameters = worker.params
    if not parameters.enable_metrics:
        parameters.send_initial_empty_metrics = False
        for observer in worker._observer._observers:
            if isinstance(observer, RTVIObserver):
                observer._params.metrics_enabled = False
        if worker._capabilities_override.metrics is None:
            worker._capabilities_override = worker._capabilities_override.model_copy(update={"metrics": False})
    parameters.enable_metrics = True
    parameters.enable_usage_metrics = True


def limit_silence(worker: PipelineWorker, seconds: float) -> None:
    """Set the idle timeout of a pipeline that has not started and in which callers are, unless the bot has set one."""
    if worker._idle_timeout_secs == IDLE_TIMEOUT_SECS and livekit_transports(worker):
        worker._idle_timeout_secs = seconds


def ends_call_when_idle(worker: PipelineWorker) -> bool:
    """Whether a worker that has told of its idle timeout is cancelled for it, and the call with it."""
    alone = not worker._cancel_runner_on_idle_timeout and not livekit_transports(worker)
    return worker._cancel_on_idle_timeout and not alone


def watch_heartbeats(worker: PipelineWorker, beat: Callable[[], None]) -> None:
    """Call `beat` for each heartbeat that has come through a pipeline that is not set up yet.

    Pipecat's own complaint in the log stays as the bot wants it: without `enable_heartbeats` it is put off for longer
    than any call lasts.
    """
    parameters = worker.params
    if not parameters.enable_heartbeats:
        parameters.enable_heartbeats = True
        parameters.heartbeats_monitor_secs = NEVER_SECONDS
    worker._heartbeat_queue = _Beats(beat)
    for processor in processors(worker):
        if isinstance(processor, (BusBridgeProcessor, _BusEdgeProcessor)):
            # Over the bus they would go through other pipelines, and theirs through this one: each would beat for all.
            processor._exclude_frames = (*processor._exclude_frames, HeartbeatFrame)


class _Beats(asyncio.Queue[HeartbeatFrame]):
    """The queue in which a pipeline's end leaves heartbeats for the worker."""

    def __init__(self, beat: Callable[[], None]) -> None:
        super().__init__()
        self._beat = beat

    async def put(self, item: HeartbeatFrame) -> None:
        self._beat()
        await super().put(item)


def held_up(worker: PipelineWorker) -> list[FrameProcessor]:
    """The processors in which heartbeats wait: each has not come back from a frame before them."""
    late = frames_taken_by_late(worker)
    return [one for one in processors(worker) if one in late or one.has_queued_frame(HeartbeatFrame)]


def frames_taken_by_late(worker: PipelineWorker) -> dict[FrameProcessor, int]:
    """How many frames each processor has taken so far, of those in which heartbeats wait behind frames of the system.

    Sound is such frames. A processor that is slower than sound comes (its node has no CPU left for it) never gets to a heartbeat, and moves all the same.
    """
    return {
        one: queue._FrameProcessorQueue__counter - queue.qsize()
        for one in processors(worker)
        if _heartbeats_in(queue := one._FrameProcessor__input_queue) > 1  # type: ignore[attr-defined]  # one may have just come
    }


def _heartbeats_in(queue: asyncio.PriorityQueue[Any]) -> int:
    return sum(isinstance(item[2][0], HeartbeatFrame) for item in queue._queue)  # type: ignore[attr-defined]


def livekit_transports(worker: PipelineWorker) -> list[LiveKitTransport]:
    """The LiveKit transports whose ends are in a worker's pipeline, each once."""
    found: list[LiveKitTransport] = []
    for processor in processors(worker):
        if isinstance(processor, LIVEKIT_ENDS):
            transport = processor._transport
            if isinstance(transport, LiveKitTransport) and transport not in found:
                found.append(transport)
    return found


def works_over_bus(worker: PipelineWorker) -> bool:
    """Whether a worker takes part in the call of another one: all frames that it has of it come and go over the bus."""
    return worker.bridged and not livekit_transports(worker)


def sends_over_bus(worker: PipelineWorker) -> bool:
    """Whether what goes through a worker's pipeline leaves it for another one's and comes back, but for its end."""
    return any(isinstance(processor, BusBridgeProcessor) for processor in processors(worker))


def point_at_room(transport: LiveKitTransport, *, url: str, token: str, room: str) -> None:
    """Tell a transport that has not connected yet where to go."""
    client = transport._client
    client._url = url
    client._token = token
    client._room_name = room


def hold_start(worker: PipelineWorker, release: asyncio.Event) -> None:
    """Let a worker that is about to be set up connect its services, but neither join a room nor start, until then.

    Pipecat sets all processors up side by side, in which services connect and a LiveKit transport joins its room, and
    a processor keeps the StartFrame until its own set-up is done. So the source of the pipeline is held after its
    set-up, and each end of a LiveKit transport before it. Pipecat's time limit on the set-up is taken off: the host
    has one of its own.
    """
    worker._setup_timeout_secs = None  # type: ignore[assignment]  # asyncio.wait_for() takes it for no limit
    source = worker.pipeline.processors[0]
    set_up_source = source.setup

    async def held_source(setup: FrameProcessorSetup) -> None:
        await set_up_source(setup)
        await release.wait()

    source.setup = held_source  # type: ignore[method-assign]
    for processor in processors(worker):
        if isinstance(processor, LIVEKIT_ENDS):
            _hold_setup(processor, release)


def _hold_setup(processor: FrameProcessor, release: asyncio.Event) -> None:
    set_up = processor.setup

    async def held(setup: FrameProcessorSetup) -> None:
        await release.wait()
        await set_up(setup)

    processor.setup = held  # type: ignore[method-assign]


def set_up_before_start(worker: PipelineWorker) -> list[FrameProcessor]:
    """The processors of a worker whose set-up is over while `hold_start` holds it: what is no pipeline and not held."""
    source = worker.pipeline.processors[0]
    return [one for one in processors(worker) if not isinstance(one, (BasePipeline, *LIVEKIT_ENDS)) and one != source]


def share_tls_context(worker: PipelineWorker, context: ssl.SSLContext) -> None:
    """Give the WebSocket services of a worker, for all their connections, a TLS context that is made already.

    Left to itself each connection makes one, and reads all certificate authorities for it: 0.04 s in which nothing else
    happens, in the middle of the bind.
    """
    for processor in processors(worker):
        if isinstance(processor, WebsocketService):
            _connect_with(processor, context)


def _connect_with(service: WebsocketService, context: ssl.SSLContext) -> None:
    connect = service._websocket_connect

    async def connect_with_context(uri: str, **options: Any) -> Any:
        if uri.startswith("wss:"):
            options.setdefault("ssl", context)
        return await connect(uri, **options)

    service._websocket_connect = connect_with_context  # type: ignore[method-assign]


def socket(processor: FrameProcessor) -> ClientConnection | None:
    """The connection to a provider, of a service that has one of Pipecat's own WebSocket kind."""
    connection = processor._websocket if isinstance(processor, WebsocketService) else None
    return connection if isinstance(connection, ClientConnection) else None


def disconnected(worker: PipelineWorker) -> list[FrameProcessor]:
    """The services of that kind in a worker's pipeline that have no open connection at this moment.

    Those inside of a switcher are left out: they are there for each other.
    """
    services = (one for one in processors(worker, closed=(ServiceSwitcher,)) if isinstance(one, WebsocketService))
    return [one for one in services if (there := socket(one)) is None or there.state is not State.OPEN]


def before_audio(worker: PipelineWorker, ready: Callable[[rtc.Room | None], Awaitable[None]]) -> None:
    """Wait for `ready`, given the room, before each piece of audio of a pipeline that is not set up yet goes to LiveKit."""
    for processor in processors(worker):
        if isinstance(processor, LiveKitOutputTransport):
            _hold_output(processor, ready)


def _hold_output(processor: LiveKitOutputTransport, ready: Callable[[rtc.Room | None], Awaitable[None]]) -> None:
    write = processor.write_audio_frame

    async def held(frame: OutputAudioRawFrame) -> bool:
        await ready(processor._client._room)
        return await write(frame)

    processor.write_audio_frame = held  # type: ignore[method-assign]


def tap_audio(
    worker: PipelineWorker,
    heard: Callable[[str, bytes, int, int], None],
    played: Callable[[bytes, int, int], None],
) -> None:
    """Be told of all audio of a pipeline that is not set up yet, as it comes from LiveKit and as it goes there.

    Args:
        worker: whose.
        heard: whose voice (empty: that of all callers together), 16-bit samples, samples per second, channels.
        played: the same of the agent, when LiveKit is about to take them.
    """
    for processor in processors(worker):
        if isinstance(processor, LiveKitInputTransport):
            _tap_input(processor, heard)
        elif isinstance(processor, LiveKitOutputTransport):
            _tap_output(processor, played)


def _tap_input(processor: LiveKitInputTransport, heard: Callable[[str, bytes, int, int], None]) -> None:
    push = processor.push_audio_frame

    async def tapped(frame: InputAudioRawFrame) -> None:
        heard(getattr(frame, "user_id", ""), frame.audio, frame.sample_rate, frame.num_channels)
        await push(frame)

    processor.push_audio_frame = tapped  # type: ignore[method-assign]


def _tap_output(processor: LiveKitOutputTransport, played: Callable[[bytes, int, int], None]) -> None:
    write = processor.write_audio_frame

    async def tapped(frame: OutputAudioRawFrame) -> bool:
        played(frame.audio, frame.sample_rate, frame.num_channels)
        return await write(frame)

    processor.write_audio_frame = tapped  # type: ignore[method-assign]


def tell_once(transport: LiveKitTransport) -> None:
    """Raise the events of somebody's coming once for each time that somebody comes.

    Of who comes after the agent has connected and before its tracks are published, which takes a few round trips, Pipecat tells at once, and again
    when it goes through all who are there: a bot would greet such a caller twice.
    """
    client = transport._client
    tell_of_coming, tell_of_going = client._participant_connected, client._async_on_participant_disconnected
    here: set[str] = set()

    async def came(participant_id: str) -> None:
        if participant_id not in here:
            here.add(participant_id)
            await tell_of_coming(participant_id)

    async def went(participant: rtc.RemoteParticipant) -> None:
        here.discard(participant.identity)
        await tell_of_going(participant)

    client._participant_connected = came  # type: ignore[method-assign]
    client._async_on_participant_disconnected = went  # type: ignore[method-assign]


def room(transport: LiveKitTransport) -> rtc.Room | None:
    """The LiveKit room of a transport, None until it is set up. Unlike Pipecat it tells why it was disconnected."""
    return transport._client._room


def leave_room(transport: LiveKitTransport) -> None:
    """Tell LiveKit that this agent leaves, without the event loop, from any thread; returns before it is told.

    LiveKit would keep the place of an agent whose connection just breaks for some 15 s, and its caller in the room
    with nobody.
    """
    client = room(transport)
    if client is None or client._ffi_handle is None or not client.isconnected():
        return
    request = proto_ffi.FfiRequest()
    request.disconnect.room_handle = client._ffi_handle.handle
    request.disconnect.reason = rtc.DisconnectReason.CLIENT_INITIATED
    FfiClient.instance.request(request)


def vad_analyzers(worker: PipelineWorker) -> list[VADAnalyzer]:
    """The voice detection models in a worker's pipeline."""
    found: list[VADAnalyzer] = []
    for processor in processors(worker):
        controller = getattr(processor, "_vad_controller", None)
        analyzer = getattr(controller, "_vad_analyzer", None)
        if isinstance(analyzer, VADAnalyzer) and analyzer not in found:
            found.append(analyzer)
    return found


def smart_turn_analyzers(worker: PipelineWorker) -> list[LocalSmartTurnAnalyzerV3]:
    """The Smart Turn models in a worker's pipeline."""
    found: list[LocalSmartTurnAnalyzerV3] = []
    for processor in processors(worker):
        controller = getattr(processor, "_user_turn_controller", None)
        strategies: Any = getattr(controller, "_user_turn_strategies", None)
        for strategy in getattr(strategies, "stop", None) or ():
            if isinstance(strategy, TurnAnalyzerUserTurnStopStrategy):
                analyzer = strategy._turn_analyzer
                if isinstance(analyzer, LocalSmartTurnAnalyzerV3) and analyzer not in found:
                    found.append(analyzer)
    return found


def openai_clients(worker: PipelineWorker) -> list[Any]:
    """The `openai` clients in a worker's pipeline; OpenAI, Groq and most other language models have one."""
    clients = [getattr(processor, "_client", None) for processor in processors(worker)]
    return [client for client in clients if type(client).__module__.partition(".")[0] == "openai"]


def infer_smart_turn(analyzer: LocalSmartTurnAnalyzerV3) -> float:
    """One inference over eight seconds of silence; returns the probability that the turn is over.

    What the model needed for it (11 MB) goes back to the system, since the agent may wait for hours; the next
    inference takes it again, in about a millisecond.
    """
    silence = np.zeros(SMART_TURN_SECONDS * SMART_TURN_RATE, dtype=np.float32)
    model = analyzer._session
    analyzer._session = _Shrinking(model)
    try:
        return float(analyzer._predict_endpoint(silence)["probability"])
    finally:
        analyzer._session = model


class _Shrinking:
    """An ONNX session that gives its working memory back after each run."""

    def __init__(self, model: onnxruntime.InferenceSession) -> None:
        self._model = model
        self._options = onnxruntime.RunOptions()
        self._options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")

    def run(self, names: list[str] | None, inputs: dict[str, Any]) -> Any:
        """As the session's own."""
        return self._model.run(names, inputs, self._options)
