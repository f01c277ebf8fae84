"""The private names of the pinned Pipecat that parking needs. An upgrade of Pipecat fails here first."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
from collections.abc import AsyncIterator
from importlib.metadata import version
from types import SimpleNamespace
from typing import cast

import pytest
from livekit import rtc
from livekit.rtc._ffi_client import FfiClient
from livekit.rtc._proto import ffi_pb2 as proto_ffi
from pipecat.audio.turn.smart_turn.local_smart_turn_v3 import LocalSmartTurnAnalyzerV3
from pipecat.audio.vad.silero import SileroVADAnalyzer
from pipecat.bus import BusBridgeProcessor, WorkerBus
from pipecat.frames.frames import EndFrame, Frame, InputAudioRawFrame, StartFrame, TextFrame
from pipecat.pipeline.parallel_pipeline import ParallelPipeline
from pipecat.pipeline.pipeline import Pipeline
from pipecat.pipeline.service_switcher import ServiceSwitcher, ServiceSwitcherStrategyFailover
from pipecat.pipeline.worker import IDLE_TIMEOUT_SECS, PipelineParams, PipelineWorker
from pipecat.processors.aggregators.llm_context import LLMContext
from pipecat.processors.aggregators.llm_response_universal import LLMContextAggregatorPair, LLMUserAggregatorParams
from pipecat.processors.audio.vad_processor import VADProcessor
from pipecat.processors.frame_processor import FrameDirection, FrameProcessor, FrameProcessorSetup
from pipecat.processors.frameworks.rtvi import RTVIObserver
from pipecat.runner.types import LiveKitRunnerArguments
from pipecat.services import websocket_service
from pipecat.services.assemblyai.stt import AssemblyAISTTService
from pipecat.transports.livekit.transport import LiveKitParams, LiveKitTransport, LiveKitTransportClient
from pipecat.turns.user_stop import TurnAnalyzerUserTurnStopStrategy
from pipecat.turns.user_turn_strategies import UserTurnStrategies
from pipecat.workers.runner import WorkerRunner
from websockets.asyncio.client import ClientConnection
from websockets.protocol import State

from voicepool_agent import pipecat_private
from voicepool_agent.connections import Connections


def transport() -> LiveKitTransport:
    return LiveKitTransport("", "", "", params=LiveKitParams(audio_in_enabled=True, audio_out_enabled=True))


def worker(*processors: FrameProcessor) -> PipelineWorker:
    return PipelineWorker(Pipeline(list(processors)))


def test_the_pinned_version_is_the_one_that_was_read() -> None:
    assert version("pipecat-ai").startswith("1.14."), "read pipecat_private.py again, then raise this"


async def test_a_runner_shows_the_workers_that_were_added() -> None:
    ours = worker(transport().input())
    runner = WorkerRunner(handle_sigint=False)
    await runner.add_workers(ours)
    assert pipecat_private.pipeline_workers(runner) == [ours]


async def test_a_transport_is_found_once_however_deep_its_ends_are() -> None:
    ours = transport()
    branches = ParallelPipeline([ours.output()], [FrameProcessor()])  # type: ignore[no-untyped-call]
    assert pipecat_private.livekit_transports(worker(ours.input(), branches)) == [ours]


async def test_a_service_that_failed_counts_unless_another_one_can_do_its_work() -> None:
    alone, first, second = FrameProcessor(), FrameProcessor(), FrameProcessor()
    switcher = ServiceSwitcher([first, second], ServiceSwitcherStrategyFailover)
    ours = worker(alone, switcher)
    assert pipecat_private.unusable(ours) == []
    await first.set_usable(False)
    assert pipecat_private.unusable(ours) == []
    await second.set_usable(False)
    assert pipecat_private.unusable(ours) == [switcher]
    await alone.set_usable(False)
    assert set(pipecat_private.unusable(ours)) == {switcher, alone}


async def test_somebody_who_is_told_of_twice_has_come_once_until_he_goes() -> None:
    ours = transport()
    told: list[str] = []

    async def came(_transport: LiveKitTransport, client: dict[str, str]) -> None:
        told.append(client["id"])

    ours.add_event_handler("on_client_connected", came)

    def there(identity: str) -> rtc.RemoteParticipant:
        return cast("rtc.RemoteParticipant", SimpleNamespace(identity=identity))

    client = ours._client
    client._room = cast("rtc.Room", SimpleNamespace(remote_participants={}))
    pipecat_private.tell_once(ours)
    await client._async_on_participant_connected(there("caller"))
    await client._participant_connected("caller")
    await client._async_on_participant_connected(there("another"))
    await asyncio.sleep(0)  # handlers are tasks
    assert told == ["caller", "another"]
    await client._async_on_participant_disconnected(there("caller"))
    await client._async_on_participant_connected(there("caller"))
    await asyncio.sleep(0)
    assert told == ["caller", "another", "caller"]
    connect = inspect.unwrap(LiveKitTransportClient.connect)
    assert "_participant_connected" in connect.__code__.co_names, (
        "connect() no longer tells of who is there in this way"
    )


async def test_who_hears_and_who_speaks_is_known() -> None:
    ours = transport()
    heard, other = ours.input(), FrameProcessor()
    assert [pipecat_private.talks(one) for one in (heard, ours.output(), other)] == [True, True, False]


async def test_a_transport_goes_to_the_room_that_it_is_pointed_at_after_it_was_built() -> None:
    ours = transport()
    worker(ours.input(), ours.output())
    pipecat_private.point_at_room(ours, url="ws://there", token="a-token", room="a-room")
    client = ours._client
    assert (client._url, client._token, client._room_name) == ("ws://there", "a-token", "a-room")
    connect = inspect.unwrap(LiveKitTransportClient.connect)
    read = set(connect.__code__.co_names)
    assert {"_url", "_token", "_room_name"} <= read, "connect() no longer reads what point_at_room() writes"


class Recorder(FrameProcessor):
    """Remembers that it was set up, and that it was started."""

    def __init__(self) -> None:
        super().__init__()
        self.was_set_up = asyncio.Event()
        self.was_started = asyncio.Event()

    async def setup(self, setup: FrameProcessorSetup) -> None:  # type: ignore[override]  # as Pipecat's own
        await super().setup(setup)
        self.was_set_up.set()

    async def process_frame(self, frame: Frame, direction: FrameDirection) -> None:
        await super().process_frame(frame, direction)
        if isinstance(frame, StartFrame):
            self.was_started.set()
        await self.push_frame(frame, direction)


async def test_a_held_pipeline_is_set_up_and_neither_joins_nor_starts_before_the_release() -> None:
    ours, before, behind = transport(), Recorder(), Recorder()
    joined: list[str] = []

    async def connect() -> None:
        joined.append("joined")

    ours._client.connect = connect  # type: ignore[assignment]
    held, release = worker(before, ours.input(), behind, ours.output()), asyncio.Event()
    pipecat_private.hold_start(held, release)
    runner = WorkerRunner(handle_sigint=False)
    await runner.add_workers(held)
    running = asyncio.create_task(runner.run())
    await before.was_set_up.wait()
    await behind.was_set_up.wait()
    assert (joined, before.was_started.is_set(), behind.was_started.is_set()) == ([], False, False)
    release.set()
    await before.was_started.wait()
    await behind.was_started.wait()
    assert joined == ["joined", "joined"], "once for each end"
    await runner.cancel()
    await running


async def test_what_is_set_up_before_the_start_is_every_processor_that_is_not_held() -> None:
    ours, plain, first, second = transport(), FrameProcessor(), FrameProcessor(), FrameProcessor()
    held = worker(ours.input(), plain, ServiceSwitcher([first, second], ServiceSwitcherStrategyFailover), ours.output())
    awaited = pipecat_private.set_up_before_start(held)
    assert {plain, first, second, held.pipeline.processors[-1]} <= set(awaited)
    assert not {ours.input(), ours.output(), held.pipeline, held.pipeline.processors[0]} & set(awaited)


async def test_a_pipelines_set_up_has_one_time_limit_which_is_read_when_it_begins() -> None:
    assert worker()._setup_timeout_secs == 20
    assert "_setup_timeout_secs" in PipelineWorker._watch_pipeline_setup.__code__.co_names


async def test_a_service_with_a_socket_shows_it_once_it_is_connected() -> None:
    assert issubclass(websocket_service._BoundedConnection, ClientConnection)
    service = AssemblyAISTTService(api_key="a-key")
    assert pipecat_private.socket(service) is None
    service._websocket = ClientConnection.__new__(ClientConnection)
    assert pipecat_private.socket(service) is service._websocket
    assert pipecat_private.socket(FrameProcessor()) is None


async def test_services_are_disconnected_until_their_socket_is_open_but_for_those_of_a_switcher() -> None:
    alone, one, other = (AssemblyAISTTService(api_key="a-key") for _ in range(3))
    ours = worker(alone, FrameProcessor(), ServiceSwitcher([one, other], ServiceSwitcherStrategyFailover))
    assert pipecat_private.disconnected(ours) == [alone]
    connection = ClientConnection.__new__(ClientConnection)
    connection.protocol = SimpleNamespace(state=State.CONNECTING)  # type: ignore[assignment]
    alone._websocket = connection
    assert pipecat_private.disconnected(ours) == [alone]
    connection.protocol.state = State.OPEN
    assert pipecat_private.disconnected(ours) == []


async def test_a_room_is_left_by_the_very_request_that_its_own_disconnect_makes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ours = transport()
    requests: list[proto_ffi.FfiRequest] = []
    monkeypatch.setattr(FfiClient.instance, "request", requests.append)
    pipecat_private.leave_room(ours)
    assert requests == [], "it was in no room"
    ours._client._room = rtc.Room()
    monkeypatch.setattr(ours._client._room, "isconnected", lambda: True)
    ours._client._room._ffi_handle = SimpleNamespace(handle=7)  # type: ignore[assignment]
    pipecat_private.leave_room(ours)
    ours._client._room._ffi_handle = None
    (request,) = requests
    assert request.disconnect.room_handle == 7
    assert {"_ffi_handle", "room_handle", "FfiClient", "request"} <= set(rtc.Room.disconnect.__code__.co_names)


@pytest.mark.parametrize("with_processor", [True, False], ids=["in a VADProcessor", "in the user aggregator"])
async def test_models_are_found_and_answer(with_processor: bool) -> None:
    vad, turn = SileroVADAnalyzer(), LocalSmartTurnAnalyzerV3()
    strategies = UserTurnStrategies(stop=[TurnAnalyzerUserTurnStopStrategy(turn_analyzer=turn)])
    parameters = LLMUserAggregatorParams(vad_analyzer=None if with_processor else vad, user_turn_strategies=strategies)
    user = LLMContextAggregatorPair(LLMContext(), user_params=parameters).user()
    ours = worker(*([VADProcessor(vad_analyzer=vad)] if with_processor else []), user)
    assert pipecat_private.vad_analyzers(ours) == [vad]
    assert pipecat_private.smart_turn_analyzers(ours) == [turn]
    assert 0 <= pipecat_private.infer_smart_turn(turn) <= 1


async def test_smart_turn_is_found_where_nobody_asked_for_it() -> None:
    user = LLMContextAggregatorPair(LLMContext()).user()
    assert len(pipecat_private.smart_turn_analyzers(worker(user))) == 1


def test_runner_arguments_can_be_filled_after_the_bot_has_seen_them() -> None:
    arguments = LiveKitRunnerArguments(room_name="", url="", token="", body={}, session_id=None)
    body = arguments.body
    arguments.session_id, arguments.room_name = "s-1", "r-1"
    assert arguments.body is body


class Remembers(FrameProcessor):
    """Knows how it was set up, and holds up what it is told to."""

    def __init__(self, holds: type[Frame] | None = None) -> None:
        super().__init__()
        self._holds = holds
        self.arrived = asyncio.Event()

    async def process_frame(self, frame: Frame, direction: FrameDirection) -> None:
        await super().process_frame(frame, direction)
        if self._holds is not None and isinstance(frame, self._holds):
            self.arrived.set()
            await asyncio.Event().wait()
        await self.push_frame(frame, direction)


@contextlib.asynccontextmanager
async def running(*ours: PipelineWorker, runner: WorkerRunner | None = None) -> AsyncIterator[None]:
    """Workers at work, by themselves."""
    runner = runner or WorkerRunner(handle_sigint=False)
    await runner.add_workers(*ours)
    task = asyncio.create_task(runner.run())
    try:
        yield
    finally:
        await runner.cancel()
        await task


async def first(*events: asyncio.Event) -> None:
    async with asyncio.timeout(10):
        for event in events:
            await event.wait()


@pytest.mark.parametrize("asked", [True, False])
async def test_services_measure_although_the_bot_has_not_asked_and_its_clients_are_told_as_little_as_before(
    asked: bool,
) -> None:
    processor, started = Remembers(), asyncio.Event()
    ours = PipelineWorker(Pipeline([processor]), params=PipelineParams(enable_metrics=asked), cancel_timeout_secs=1)
    (rtvi,) = (one for one in ours._observer._observers if isinstance(one, RTVIObserver))
    ours.add_event_handler("on_pipeline_started", lambda *_: started.set())
    pipecat_private.measure(ours)
    async with running(ours):
        await first(started)
        assert processor.metrics_enabled
        assert processor.usage_metrics_enabled
    assert rtvi._params.metrics_enabled is asked
    assert ours.capabilities.metrics is asked


async def test_a_pipeline_with_callers_and_no_idle_timeout_of_the_bots_own_is_idle_after_the_one_that_it_is_given() -> (
    None
):
    ours = worker(FrameProcessor())
    pipecat_private.limit_silence(ours, 0.01)
    assert ours._idle_timeout_secs == IDLE_TIMEOUT_SECS, "there are no callers in it"
    ends, idle = transport(), asyncio.Event()
    ours = PipelineWorker(Pipeline([Remembers()]), cancel_on_idle_timeout=False, cancel_timeout_secs=1)
    ours.add_event_handler("on_idle_timeout", lambda *_: idle.set())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipecat_private, "livekit_transports", lambda _worker: [ends])
        pipecat_private.limit_silence(ours, 0.01)
    async with running(ours):
        await first(idle)


async def test_what_becomes_of_an_idle_pipeline_is_read_when_it_is_idle() -> None:
    read = set(PipelineWorker._idle_timeout_detected.__code__.co_names)
    assert {"_cancel_on_idle_timeout", "_cancel_runner_on_idle_timeout"} <= read
    assert pipecat_private.ends_call_when_idle(worker(FrameProcessor()))


async def test_services_that_connect_before_there_is_a_session_measure_as_well() -> None:
    ours, release = worker(FrameProcessor()), asyncio.Event()
    Connections([ours], release, print).hold(ours)
    assert (ours.params.enable_metrics, ours.params.enable_usage_metrics) == (True, True)


async def test_heartbeats_are_seen_until_a_processor_holds_them_up_and_it_is_known_which() -> None:
    sender, holder = Remembers(), Remembers(holds=TextFrame)
    ours = PipelineWorker(
        Pipeline([sender, holder]),
        params=PipelineParams(enable_heartbeats=True, heartbeats_period_secs=0.01),
        cancel_timeout_secs=1,
    )
    beats: asyncio.Queue[None] = asyncio.Queue()
    pipecat_private.watch_heartbeats(ours, lambda: beats.put_nowait(None))
    async with running(ours):
        async with asyncio.timeout(10):
            await beats.get()
            await ours.queue_frame(TextFrame("words"))
            await holder.arrived.wait()
            # One that is on its way may be in the sender's queue for a moment.
            while pipecat_private.held_up(ours) != [holder]:  # noqa: ASYNC110 - nobody tells when a heartbeat begins to wait
                await asyncio.sleep(0.01)


class Late(FrameProcessor):
    """Works a piece of sound off when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.done = asyncio.Semaphore(0)

    async def process_frame(self, frame: Frame, direction: FrameDirection) -> None:
        await super().process_frame(frame, direction)
        if isinstance(frame, InputAudioRawFrame):
            await self.done.acquire()
        await self.push_frame(frame, direction)


async def test_a_processor_in_which_heartbeats_wait_behind_sound_is_known_and_how_much_it_has_taken_of_it() -> None:
    late = Late()
    ours = PipelineWorker(
        Pipeline([Remembers(), late]),
        params=PipelineParams(enable_heartbeats=True, heartbeats_period_secs=0.01),
        cancel_timeout_secs=1,
    )
    beats: asyncio.Queue[None] = asyncio.Queue()
    pipecat_private.watch_heartbeats(ours, lambda: beats.put_nowait(None))
    async with running(ours), asyncio.timeout(10):
        await beats.get()
        for _ in range(3):
            await ours.queue_frame(InputAudioRawFrame(bytes(320), 16_000, 1))
        while not (taken := pipecat_private.frames_taken_by_late(ours)):  # noqa: ASYNC110 - as above
            await asyncio.sleep(0.01)
        assert pipecat_private.held_up(ours) == [late]
        late.done.release()
        while pipecat_private.frames_taken_by_late(ours) != {late: taken[late] + 1}:  # noqa: ASYNC110
            await asyncio.sleep(0.01)


def one_call(bus: WorkerBus, before: FrameProcessor, answers: FrameProcessor) -> tuple[PipelineWorker, PipelineWorker]:
    """The worker that holds a call, and the one that answers over the bus."""
    params = PipelineParams(enable_heartbeats=True, heartbeats_period_secs=0.01)
    bridge = BusBridgeProcessor(bus=bus, worker_name="call")
    return (
        PipelineWorker(Pipeline([before, bridge, Remembers()]), name="call", params=params, cancel_timeout_secs=1),
        PipelineWorker(Pipeline([answers]), bridged=(), params=params, cancel_timeout_secs=1),
    )


@pytest.mark.parametrize("where", ["before the bus", "behind the bus"])
async def test_a_heartbeat_is_of_one_pipeline_also_where_others_are_in_the_call(where: str) -> None:
    runner = WorkerRunner(handle_sigint=False)
    holder = Remembers(holds=TextFrame)
    before, answers = (holder, Remembers()) if where == "before the bus" else (Remembers(), holder)
    call, answering = one_call(runner.bus, before, answers)
    beats: dict[PipelineWorker, asyncio.Queue[None]] = {call: asyncio.Queue(), answering: asyncio.Queue()}
    for one, queue in beats.items():
        pipecat_private.watch_heartbeats(one, functools.partial(queue.put_nowait, None))
    stuck, moves = (call, answering) if where == "before the bus" else (answering, call)
    async with running(call, answering, runner=runner), asyncio.timeout(10):
        for queue in beats.values():
            await queue.get()
        await call.queue_frame(TextFrame("words"))
        await holder.arrived.wait()
        while pipecat_private.held_up(stuck) != [holder]:  # noqa: ASYNC110 - as above
            await asyncio.sleep(0.01)
        for queue in beats.values():
            while not queue.empty():
                queue.get_nowait()
        for _ in range(5):
            await beats[moves].get()
        assert beats[stuck].empty()


async def test_an_end_waits_for_what_is_on_the_bus_when_the_pipeline_is_flushed() -> None:
    runner = WorkerRunner(handle_sigint=False)
    call, answering = one_call(runner.bus, Remembers(), Remembers())
    assert [pipecat_private.sends_over_bus(one) for one in (call, answering)] == [True, False]
    assert [pipecat_private.works_over_bus(one) for one in (call, answering)] == [False, True]
    reached: list[type[Frame]] = []
    call.set_reached_downstream_filter((TextFrame, EndFrame))
    call.add_event_handler("on_frame_reached_downstream", lambda _, frame: reached.append(type(frame)))
    async with running(call, answering, runner=runner), asyncio.timeout(10):
        await call.queue_frame(TextFrame("words"))
        assert await call.flush_pipeline()
        await call.stop_when_done()  # type: ignore[no-untyped-call]
        await call.wait()
    assert reached == [TextFrame, EndFrame]


async def test_a_bot_that_has_not_asked_for_heartbeats_reads_no_complaint_about_them() -> None:
    ours, theirs = (
        worker(FrameProcessor()),
        PipelineWorker(Pipeline([FrameProcessor()]), params=PipelineParams(enable_heartbeats=True)),
    )
    for one in (ours, theirs):
        pipecat_private.watch_heartbeats(one, lambda: None)
        assert one.params.enable_heartbeats
    assert ours.params.heartbeats_monitor_secs > 86400 > theirs.params.heartbeats_monitor_secs
