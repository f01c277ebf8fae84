"""One session: when it counts as joined, what ends it, and what the summary says. Time is set by the test."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest
from livekit import rtc
from livekit.rtc.event_emitter import EventEmitter
from pipecat.frames.frames import (
    BotSpeakingFrame,
    BotStartedSpeakingFrame,
    BotStoppedSpeakingFrame,
    ErrorFrame,
    Frame,
    HeartbeatFrame,
    InterruptionFrame,
    LLMTextFrame,
    MetricsFrame,
    OutputAudioRawFrame,
    TranscriptionFrame,
    UserStoppedSpeakingFrame,
)
from pipecat.metrics.metrics import (
    LLMTokenUsage,
    LLMUsageMetricsData,
    STTUsage,
    STTUsageMetricsData,
    TTFBMetricsData,
    TTSUsageMetricsData,
)
from pipecat.observers.user_bot_latency_observer import (
    LatencyBreakdown,
    LatencyContribution,
    LatencyOwnerKind,
    MeasuredFrom,
)
from pipecat.pipeline.pipeline import Pipeline
from pipecat.pipeline.worker import IDLE_TIMEOUT_SECS, PipelineWorker
from pipecat.processors.frame_processor import FrameDirection, FrameProcessor
from pipecat.services.assemblyai.stt import AssemblyAISTTService
from pipecat.transports.livekit.transport import LiveKitParams, LiveKitTransport
from pipecat.utils.errors import ErrorCategory

from voicepool_agent import pipecat_private, session
from voicepool_agent.host import State
from voicepool_agent.logs import Redactor
from voicepool_agent.metrics import Metrics
from voicepool_agent.session import Session
from voicepool_agent.settings import read_settings
from voicepool_agent.summary import Reason, Summary, Usage
from voicepool_agent.tracing import Part, Trace

SETTINGS = read_settings(
    {
        "VOICEPOOL_POD_UID": "uid-1",
        "VOICEPOOL_ASSIGNMENT_PUBLIC_KEY": "-----BEGIN PUBLIC KEY-----",
        "VOICEPOOL_SESSION_MAX_DURATION_SECONDS": "600",
        "VOICEPOOL_SESSION_IDLE_TIMEOUT_SECONDS": "45",
        "VOICEPOOL_SESSION_JOIN_TIMEOUT_SECONDS": "30",
        "VOICEPOOL_SESSION_CONNECT_TIMEOUT_SECONDS": "20",
        "VOICEPOOL_SESSION_CALLER_LEFT_GRACE_SECONDS": "3",
    }
)


class Timer:
    """A call that was scheduled."""

    def __init__(self, at: float, call: Callable[[], None]) -> None:
        self.at = at
        self.call = call
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True


class Time:
    """A clock and its scheduler."""

    def __init__(self) -> None:
        self.now = 100.0
        self.timers: list[Timer] = []

    def clock(self) -> float:
        return self.now

    def schedule(self, seconds: float, call: Callable[[], None]) -> Timer:
        self.timers.append(Timer(self.now + seconds, call))
        return self.timers[-1]

    def pass_to(self, seconds: float) -> None:
        """Go on to so many seconds after the bind."""
        self.now = 100.0 + seconds
        for timer in sorted(self.timers, key=lambda one: one.at):
            if timer.at <= self.now and not timer.cancelled:
                timer.cancel()
                timer.call()


class Told(Trace):
    """What a trace was told."""

    def __init__(self) -> None:
        self.steps: list[tuple[str, float, tuple[Part, ...]]] = []
        self.summaries: list[Summary] = []

    def step(self, name: str, seconds: float, parts: Sequence[Part] = ()) -> None:
        self.steps.append((name, seconds, tuple(parts)))

    def end(self, summary: Summary) -> None:
        self.summaries.append(summary)


class Room(EventEmitter[str]):
    """A LiveKit room with the agent's voice in it, which each test says who hears."""

    def __init__(self) -> None:
        super().__init__()
        self.remote_participants: dict[str, object] = {}
        self.subscribed = asyncio.Event()
        voice = SimpleNamespace(kind=rtc.TrackKind.KIND_AUDIO, wait_for_subscription=self.subscribed.wait)
        face = SimpleNamespace(kind=rtc.TrackKind.KIND_VIDEO)
        self.local_participant = SimpleNamespace(track_publications={"TR_face": face, "TR_voice": voice})


class Call:
    """A session with one worker and one transport, and Pipecat's part played by the test."""

    def __init__(self, *, max_duration_seconds: float | None = None, **of_the_worker: Any) -> None:
        self.time = Time()
        self.metrics = Metrics([state.value for state in State])
        self.transport = LiveKitTransport(
            "", "", "", params=LiveKitParams(audio_in_enabled=True, audio_out_enabled=True)
        )
        self.aside = FrameProcessor()
        pipeline = Pipeline([self.transport.input(), self.aside, self.transport.output()])
        self.worker = PipelineWorker(pipeline, **of_the_worker)
        self.clean = Redactor()
        self.trace = Told()
        self.clean.add("canary")
        self.session = Session(
            "s-1",
            SETTINGS,
            self.metrics,
            clean=self.clean.quoted,
            speech=self.clean.speech,
            trace=self.trace,
            clock=self.time.clock,
            schedule=self.time.schedule,
            max_duration_seconds=max_duration_seconds,
        )
        self.session.expect([self.worker], [self.transport])
        self.room = Room()
        self.transport._client._room = cast("rtc.Room", self.room)
        self.session.attach(self.worker)

    async def tell(self, source: Any, event: str, *arguments: Any) -> None:
        """Let Pipecat raise one of its events, and wait for the handlers."""
        for handler in source._event_handlers[event].handlers:
            if getattr(handler, "__self__", None) is self.session:
                await handler(source, *arguments)

    async def join(self) -> None:
        await self.tell(self.transport, "on_connected")
        await self.tell(self.worker, "on_pipeline_started", None)

    async def caller_comes(self, identity: str = "caller") -> None:
        self.room.remote_participants[identity] = object()
        await self.tell(self.transport, "on_participant_connected", identity)

    async def speak(self) -> None:
        """The agent says something, which Pipecat tells before it writes it."""
        self.session.heard(BotStartedSpeakingFrame(), FrameDirection.DOWNSTREAM)
        await self.write()

    async def write(self) -> None:
        """Pipecat writes audio: words or not."""
        output = self.transport.output()
        await output.write_audio_frame(OutputAudioRawFrame(audio=bytes(320), sample_rate=16_000, num_channels=1))

    async def caller_leaves(self, identity: str = "caller") -> None:
        self.room.remote_participants.pop(identity, None)
        await self.tell(self.transport, "on_participant_disconnected", identity)


@pytest.fixture
async def call() -> Call:
    return Call()


async def test_the_trace_is_told_of_joining_of_the_first_audio_and_of_the_end(call: Call) -> None:
    call.time.pass_to(0.25)
    await call.join()
    await call.caller_comes()
    call.room.subscribed.set()
    call.time.pass_to(0.5)
    await call.speak()
    await call.speak()
    assert call.trace.steps == [("joining", 0.25, ()), ("first audio", 0.5, ())]
    call.session.conclude(Reason.CANCELLED)
    summary = call.session.close(None)
    assert call.trace.summaries == [summary]


async def test_the_trace_is_told_what_a_turn_was_spent_on(call: Call) -> None:
    part = LatencyContribution(
        key="llm_inference",
        label="LLM inference",
        owner="GroqLLMService#0",
        owner_kind=LatencyOwnerKind.SERVICE,
        start_time=1_700_000_000.0,
        duration_secs=0.4,
    )
    greeting = LatencyBreakdown(contributions=[part], measured_from=MeasuredFrom.CLIENT_CONNECTED, total_secs=0.4)
    await call.session._on_turn(None, greeting)
    assert call.trace.steps == []
    turn = LatencyBreakdown(contributions=[part], measured_from=MeasuredFrom.USER_SILENCE, total_secs=0.4)
    await call.session._on_turn(None, turn)
    assert call.trace.steps == [("turn", 0.4, (Part("llm_inference", "GroqLLMService#0", 1_700_000_000.0, 0.4),))]


async def test_a_summary_so_far_ends_nothing(call: Call) -> None:
    await call.join()
    call.session.conclude(Reason.DRAINED)
    call.time.pass_to(2)
    early = call.session.so_far(Reason.DRAINED)
    call.time.pass_to(5)
    assert not call.trace.summaries
    assert (early.reason, early.duration_seconds) == (Reason.DRAINED, 2)
    assert call.session.close(None).duration_seconds == 5


async def test_joined_needs_the_pipeline_and_the_room(call: Call) -> None:
    call.time.now += 0.25
    await call.tell(call.worker, "on_pipeline_started", None)
    assert not call.session.joined.is_set()
    await call.tell(call.transport, "on_connected")
    assert call.session.joined.is_set()
    assert call.session.close(None).joined_seconds == pytest.approx(0.25)


async def test_a_started_pipeline_with_an_unusable_processor_has_not_joined(call: Call) -> None:
    await call.transport.output().set_usable(False)
    await call.join()
    assert not call.session.joined.is_set()
    assert call.session.reason is Reason.NOT_JOINED
    assert "LiveKitOutputTransport" in call.session.close(None).errors[0]


async def test_a_processor_that_fails_for_good_before_joining_ends_the_session_at_once(call: Call) -> None:
    processor = call.transport.input()
    await processor.set_usable(False)
    frame = ErrorFrame("the key canary is refused", processor=processor, category=ErrorCategory.AUTHENTICATION)
    await call.tell(call.worker, "on_pipeline_error", frame)
    assert call.session.reason is Reason.NOT_JOINED
    assert call.session.close(None).errors == (
        "LiveKitInputTransport cannot be used",
        "LiveKitInputTransport: authentication: the key [hidden] is refused",
    )


@pytest.fixture
async def offline(call: Call, monkeypatch: pytest.MonkeyPatch) -> set[FrameProcessor]:
    """What has no connection to its provider, of a call whose aside could not connect."""
    offline: set[FrameProcessor] = {call.aside}
    monkeypatch.setattr(pipecat_private, "disconnected", lambda _worker: sorted(offline, key=id))
    frame = ErrorFrame("timed out", processor=call.aside, category=ErrorCategory.CONNECTIVITY)
    await call.tell(call.worker, "on_pipeline_error", frame)
    await call.join()
    return offline


async def test_an_agent_with_a_service_that_could_not_connect_joins_when_it_has(
    call: Call, offline: set[FrameProcessor]
) -> None:
    assert call.session.waiting_for == "FrameProcessor to connect"
    call.time.pass_to(5)
    assert not call.session.joined.is_set()
    offline.clear()
    call.time.pass_to(6)
    assert call.session.joined.is_set()
    assert call.session.waiting_for is None


async def test_an_agent_with_a_service_that_cannot_connect_has_not_joined_in_time(
    call: Call, offline: set[FrameProcessor]
) -> None:
    for second in range(1, 21):
        call.time.pass_to(second)
    summary = call.session.close(None)
    assert summary.reason is Reason.NOT_JOINED
    assert summary.errors == (
        "not joined in time, still waiting for FrameProcessor to connect",
        "FrameProcessor: connectivity: timed out",
    )


async def test_a_service_that_connects_when_it_is_needed_is_not_waited_for(
    call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipecat_private, "disconnected", lambda _worker: [call.aside])
    await call.join()
    assert call.session.joined.is_set()


async def test_an_error_in_the_call_is_kept_and_ends_nothing(call: Call) -> None:
    await call.join()
    await call.tell(call.worker, "on_pipeline_error", ErrorFrame("a hiccup"))
    assert call.session.reason is None
    assert call.session.close(None).errors == ("pipeline: unknown: a hiccup",)


@pytest.fixture
async def deaf_call(call: Call) -> Call:
    """A call whose input has failed for good."""
    await call.join()
    await call.caller_comes()
    processor = call.transport.input()
    await processor.set_usable(False)
    frame = ErrorFrame("the key canary is refused", processor=processor, category=ErrorCategory.AUTHENTICATION)
    await call.tell(call.worker, "on_pipeline_error", frame)
    return call


async def test_a_processor_that_fails_for_good_in_the_call_ends_the_session_after_the_grace(deaf_call: Call) -> None:
    deaf_call.time.pass_to(4.9)
    assert not deaf_call.session.over.is_set()
    deaf_call.time.pass_to(5)
    summary = deaf_call.session.close(None)
    assert summary.reason is Reason.PROVIDER_FAILED
    assert summary.errors == (
        "LiveKitInputTransport can no longer be used",
        "LiveKitInputTransport: authentication: the key [hidden] is refused",
    )


async def test_a_bot_that_ends_since_a_provider_has_failed_for_good_has_not_just_ended(deaf_call: Call) -> None:
    summary = deaf_call.session.close(None)
    assert summary.reason is Reason.PROVIDER_FAILED
    assert summary.errors[0] == "LiveKitInputTransport can no longer be used"


async def test_a_caller_who_leaves_an_agent_whose_provider_has_failed_has_left(deaf_call: Call) -> None:
    await deaf_call.caller_leaves()
    assert deaf_call.session.close(None).reason is Reason.CALLER_LEFT


async def test_a_call_goes_on_without_a_processor_that_neither_hears_nor_speaks(call: Call) -> None:
    await call.join()
    await call.aside.set_usable(False)
    await call.tell(call.worker, "on_pipeline_error", ErrorFrame("gone", processor=call.aside))
    call.time.pass_to(60)
    assert call.session.reason is not Reason.PROVIDER_FAILED
    assert call.session.close(None).errors == ("FrameProcessor: unknown: gone",)


async def test_a_processor_that_the_bot_brings_back_within_the_grace_ends_nothing(deaf_call: Call) -> None:
    await deaf_call.transport.input().set_usable(True)
    deaf_call.time.pass_to(60)
    assert deaf_call.session.reason is None


@pytest.mark.parametrize("reason", list(Reason))
async def test_last_words_are_cut_short_by_an_end_that_has_no_time_for_them(call: Call, reason: Reason) -> None:
    call.session.conclude(Reason.DRAINED)
    assert not call.session.hurried.is_set()
    call.session.conclude(reason)
    assert call.session.hurried.is_set() is not reason.allows_last_words
    assert call.session.reason is Reason.DRAINED


async def test_an_error_that_quotes_what_was_said_is_kept_without_it(call: Call) -> None:
    hear, error = call.session.heard, ErrorFrame("cannot go on after: My secret word is kookaburra, and the kingfisher")
    hear(TranscriptionFrame("my secret word is kookaburra", "caller", ""), FrameDirection.DOWNSTREAM)
    for piece in ("and", " the", " king", "fisher"):
        hear(LLMTextFrame(piece), FrameDirection.DOWNSTREAM)
    await call.tell(call.worker, "on_pipeline_error", error)
    assert call.session.close("the bot failed: ValueError: and the kingfisher").errors == (
        "the bot failed: ValueError: [...]",
        "pipeline: unknown: cannot go on after: [...]",
    )


async def test_many_errors_are_kept_short_and_few(call: Call) -> None:
    for number in range(30):
        await call.tell(call.worker, "on_pipeline_error", ErrorFrame(f"{number}" + "x" * 1000))
    errors = call.session.close(None).errors
    assert len(errors) == 10
    assert max(map(len, errors)) == 200


async def test_of_many_errors_the_one_that_ended_the_session_comes_first(call: Call) -> None:
    for number in range(30):
        await call.tell(call.worker, "on_pipeline_error", ErrorFrame(f"{number}"))
    call.session.fail(Reason.STUCK, "nothing moves")
    call.session.fail(Reason.BOT_FAILED, "a consequence")
    summary = call.session.close(None)
    assert summary.errors == ("nothing moves", *(f"pipeline: unknown: {number}" for number in range(9)))


async def test_what_cuts_a_session_off_is_the_first_error_unless_it_was_ending_already(call: Call) -> None:
    call.session.note("a hiccup")
    assert call.session.cut_off(Reason.STUCK, "the loop is held up").errors == ("the loop is held up", "a hiccup")
    call.session.fail(Reason.BOT_FAILED, "the bot failed")
    assert call.session.cut_off(Reason.STUCK, "held up again").errors[0] == "the bot failed"


async def test_a_room_that_cannot_be_joined_ends_the_session_with_what_is_missing(call: Call) -> None:
    call.time.pass_to(20)
    assert call.session.reason is Reason.NOT_JOINED
    assert call.session.close(None).errors == ("not joined in time, still waiting for LiveKit",)


async def test_a_provider_that_does_not_answer_is_what_a_joined_room_still_waits_for(call: Call) -> None:
    await call.tell(call.transport, "on_connected")
    call.time.pass_to(20)
    assert "a provider that does not answer" in call.session.close(None).errors[0]


async def test_a_bot_that_returns_before_it_has_joined_has_not_joined(call: Call) -> None:
    assert call.session.close(None).reason is Reason.NOT_JOINED


async def test_a_caller_who_leaves_before_the_agent_has_joined_is_no_failure_of_it(call: Call) -> None:
    await call.caller_comes()
    await call.caller_leaves()
    summary = call.session.close(None)
    assert (summary.reason, summary.errors) == (
        Reason.CALLER_LEFT,
        ("the caller left before the agent had joined, still waiting for LiveKit",),
    )


async def test_a_caller_who_never_comes_ends_the_session(call: Call) -> None:
    await call.join()
    call.time.pass_to(29)
    assert call.session.reason is None
    call.time.pass_to(30)
    assert call.session.reason is Reason.NOBODY_JOINED


async def test_a_caller_who_came_and_went_is_not_nobody(call: Call) -> None:
    await call.join()
    await call.caller_comes()
    call.time.pass_to(599)
    assert call.session.reason is None


async def test_an_empty_room_ends_the_session_after_the_grace(call: Call) -> None:
    await call.join()
    await call.caller_comes()
    call.time.pass_to(40)
    await call.caller_leaves()
    call.time.pass_to(42.9)
    assert call.session.reason is None
    call.time.pass_to(43)
    assert call.session.reason is Reason.CALLER_LEFT


async def test_a_caller_who_comes_back_within_the_grace_is_kept(call: Call) -> None:
    await call.join()
    await call.caller_comes()
    await call.caller_leaves()
    await call.caller_comes()
    call.time.pass_to(60)
    assert call.session.reason is None


async def test_one_of_two_callers_may_leave(call: Call) -> None:
    await call.join()
    await call.caller_comes("one")
    await call.caller_comes("two")
    await call.caller_leaves("one")
    call.time.pass_to(60)
    assert call.session.reason is None


async def test_the_maximum_duration_ends_whatever_is_going_on(call: Call) -> None:
    await call.join()
    await call.caller_comes()
    call.time.pass_to(600)
    assert call.session.reason is Reason.MAX_DURATION


async def test_a_session_has_the_maximum_duration_that_it_was_bound_with() -> None:
    call = Call(max_duration_seconds=90)
    await call.join()
    await call.caller_comes()
    call.time.pass_to(89)
    assert call.session.reason is None
    call.time.pass_to(90)
    assert call.session.reason is Reason.MAX_DURATION


async def test_silence_that_pipecat_reports_ends_as_idle(call: Call) -> None:
    await call.join()
    await call.tell(call.worker, "on_idle_timeout")
    assert call.session.reason is Reason.IDLE


@pytest.mark.parametrize(
    ("with_livekit", "cancels", "reason"),
    [
        (True, {"cancel_on_idle_timeout": False}, None),
        (True, {"cancel_runner_on_idle_timeout": False}, Reason.IDLE),
        (False, {}, Reason.IDLE),
        (False, {"cancel_on_idle_timeout": False}, None),
        (False, {"cancel_runner_on_idle_timeout": False}, None),
    ],
)
async def test_silence_ends_a_call_only_where_pipecat_ends_its_pipeline_then(
    with_livekit: bool, cancels: dict[str, Any], reason: Reason | None
) -> None:
    call = Call(**cancels if with_livekit else {})
    worker = call.worker
    if not with_livekit:
        worker = PipelineWorker(Pipeline([FrameProcessor()]), **cancels)
        call.session.attach(worker)
    await call.join()
    await call.caller_comes()
    await call.tell(worker, "on_idle_timeout")
    assert call.session.reason is reason


@pytest.mark.parametrize(
    ("own", "seconds"), [({}, 45), ({"idle_timeout_secs": 20}, 20), ({"idle_timeout_secs": None}, None)]
)
async def test_a_bot_that_sets_no_idle_timeout_has_the_pools(own: dict[str, Any], seconds: float | None) -> None:
    assert Call(**own).worker._idle_timeout_secs == seconds


async def test_a_worker_without_a_caller_keeps_pipecats_idle_timeout(call: Call) -> None:
    aside = PipelineWorker(Pipeline([FrameProcessor()]))
    call.session.attach(aside)
    assert aside._idle_timeout_secs == IDLE_TIMEOUT_SECS


@pytest.mark.parametrize(
    ("why", "came", "reason"),
    [
        ("SIGNAL_CLOSE", True, Reason.LIVEKIT_LOST),
        ("SERVER_SHUTDOWN", True, Reason.LIVEKIT_LOST),
        ("ROOM_DELETED", True, Reason.ROOM_CLOSED),
        ("ROOM_CLOSED", False, Reason.NOBODY_JOINED),
        ("DUPLICATE_IDENTITY", True, Reason.REPLACED),
        ("CLIENT_INITIATED", True, None),
    ],
)
async def test_a_disconnect_in_the_call_ends_the_session_with_its_cause(
    call: Call, why: str, came: bool, reason: Reason | None
) -> None:
    await call.join()
    if came:
        await call.caller_comes()
    call.room.emit("disconnected", rtc.DisconnectReason.Value(why))
    assert call.session.reason is reason


async def test_a_caller_is_not_taken_for_gone_while_the_agent_itself_has_lost_livekit(call: Call) -> None:
    await call.join()
    await call.caller_comes()
    call.room.emit("reconnecting")
    await call.caller_leaves()
    call.time.pass_to(20)
    assert call.session.reason is None
    call.room.emit("reconnected")
    call.time.pass_to(34)
    assert call.session.reason is None
    call.time.pass_to(35)
    assert call.session.reason is Reason.CALLER_LEFT


async def test_a_caller_who_is_back_after_the_agent_is_kept(call: Call) -> None:
    await call.join()
    await call.caller_comes()
    call.room.emit("reconnecting")
    await call.caller_leaves()
    call.time.pass_to(20)
    call.room.emit("reconnected")
    call.time.pass_to(30)
    await call.caller_comes()
    call.time.pass_to(60)
    assert call.session.reason is None


async def test_a_bot_that_hangs_up_since_everybody_seems_gone_has_lost_livekit(call: Call) -> None:
    await call.join()
    await call.caller_comes()
    call.room.emit("reconnecting")
    await call.caller_leaves()
    summary = call.session.close(None)
    assert summary.reason is Reason.LIVEKIT_LOST
    assert summary.errors == ("the bot ended while the agent was reconnecting to LiveKit",)


# A pipeline that no longer moves


async def heartbeat(call: Call) -> None:
    await call.worker._heartbeat_queue.put(HeartbeatFrame(timestamp=0))


async def test_a_pipeline_that_no_longer_moves_ends_the_session_with_the_processor_that_holds_it_up(
    call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    await call.join()
    await call.caller_comes()
    await heartbeat(call)
    monkeypatch.setattr(call.aside, "has_queued_frame", lambda kind: kind is HeartbeatFrame)
    call.time.pass_to(59)
    assert call.session.reason is None
    call.time.pass_to(60)
    summary = call.session.close(None)
    assert summary.reason is Reason.STUCK
    assert summary.errors == ("nothing has come through the pipeline for 60 s: FrameProcessor held it up",)


@pytest.mark.parametrize("sign", ["heartbeat", "voice"])
async def test_a_pipeline_with_signs_of_life_is_not_stuck(call: Call, sign: str) -> None:
    await call.join()
    await call.caller_comes()
    await heartbeat(call)
    call.time.pass_to(50)
    if sign == "heartbeat":
        await heartbeat(call)
    else:
        call.session.heard(BotSpeakingFrame(), FrameDirection.DOWNSTREAM)
    call.time.pass_to(109)
    assert call.session.reason is None
    call.time.pass_to(110)
    assert call.session.reason is Reason.STUCK


async def test_a_pipeline_that_is_only_late_is_not_stuck_until_it_does_nothing_any_more(
    call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = 0
    monkeypatch.setattr(pipecat_private, "frames_taken_by_late", lambda _worker: {call.aside: taken})
    await call.join()
    await call.caller_comes()
    await heartbeat(call)
    for seconds in range(1, 100):
        taken += 1
        call.time.pass_to(seconds)
    for seconds in range(100, 120):
        call.time.pass_to(seconds)
        assert call.session.reason is None
    call.time.pass_to(120)
    assert call.session.close(None).errors == (
        "nothing has come through the pipeline for 60 s: FrameProcessor held it up",
        "nothing has come through the pipeline for 60 s: FrameProcessor cannot keep up: slow, or without CPU",
    )
    assert call.session.reason is Reason.STUCK


async def test_a_pipeline_through_which_no_heartbeat_has_ever_come_is_not_judged(call: Call) -> None:
    await call.join()
    await call.caller_comes()
    call.session.heard(BotSpeakingFrame(), FrameDirection.DOWNSTREAM)
    for seconds in range(0, 590, 10):
        call.time.pass_to(seconds)
    assert call.session.reason is None


async def test_a_pipeline_that_has_finished_while_others_go_on_is_not_stuck(
    call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    await call.join()
    await call.caller_comes()
    await heartbeat(call)
    monkeypatch.setattr(call.worker, "has_finished", lambda: True)
    for seconds in range(0, 590, 10):
        call.time.pass_to(seconds)
    assert call.session.reason is None


# Several workers


class Answering:
    """A worker that takes part in a call over the bus, or does something at its side."""

    def __init__(self, call: Call, *, bridged: bool = True, active: bool = True) -> None:
        self.call = call
        self.service = AssemblyAISTTService(api_key="a-key")
        self.worker = PipelineWorker(
            Pipeline([self.service]), bridged=() if bridged else None, active=active, idle_timeout_secs=None
        )
        call.session.attach(self.worker)

    async def fail(self) -> None:
        """Its provider refuses the key, which goes over the bus as well."""
        await self.service.set_usable(False)
        error = ErrorFrame("refused", processor=self.service, category=ErrorCategory.AUTHENTICATION)
        for worker in (self.worker, self.call.worker):
            await self.call.tell(worker, "on_pipeline_error", error)

    async def beat(self) -> None:
        """A heartbeat comes through."""
        await self.worker._heartbeat_queue.put(HeartbeatFrame(timestamp=0))


TAKES_PART = pytest.mark.parametrize(
    ("bridged", "active", "matters"),
    [(True, True, True), (True, False, False), (False, True, False)],
    ids=["answers", "does not answer now", "is at the side"],
)
"""Whether the call goes through another worker."""


@TAKES_PART
async def test_a_worker_without_its_provider_ends_the_call_that_goes_through_it(
    call: Call, *, bridged: bool, active: bool, matters: bool
) -> None:
    other = Answering(call, bridged=bridged, active=active)
    await call.join()
    await call.caller_comes()
    await other.fail()
    call.time.pass_to(6)
    assert call.session.reason is (Reason.PROVIDER_FAILED if matters else None)
    errors = call.session.so_far(Reason.CANCELLED).errors
    assert errors[-1] == "AssemblyAISTTService: authentication: refused"


@pytest.mark.parametrize(("replaced", "reason"), [(True, None), (False, Reason.PROVIDER_FAILED)])
async def test_a_worker_that_has_finished_is_missed_where_no_other_has_taken_its_turn(
    call: Call, monkeypatch: pytest.MonkeyPatch, *, replaced: bool, reason: Reason | None
) -> None:
    other = Answering(call)
    await call.join()
    await call.caller_comes()
    await other.fail()
    monkeypatch.setattr(other.worker, "has_finished", lambda: True)
    if replaced:
        Answering(call)
    call.time.pass_to(6)
    assert call.session.reason is reason


async def test_a_pipeline_with_which_a_bot_goes_on_carries_the_call(
    call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    await call.join()
    await call.caller_comes()
    monkeypatch.setattr(call.worker, "has_finished", lambda: True)
    service = AssemblyAISTTService(api_key="a-key")
    again = PipelineWorker(Pipeline([call.transport.input(), service, call.transport.output()]))
    call.session.attach(again)
    await again._heartbeat_queue.put(HeartbeatFrame(timestamp=0))
    call.time.pass_to(59)
    assert call.session.reason is None
    await service.set_usable(False)
    error = ErrorFrame("refused", processor=call.transport.input(), category=ErrorCategory.AUTHENTICATION)
    await call.tell(again, "on_pipeline_error", error)
    assert call.session.so_far(Reason.CANCELLED).errors == ("LiveKitInputTransport: authentication: refused",)
    call.time.pass_to(70)
    assert call.session.reason is Reason.STUCK


async def test_an_error_that_comes_over_the_bus_counts_once(call: Call) -> None:
    await Answering(call).fail()
    name = 'voicepool_agent_errors_total{category="authentication",processor="AssemblyAISTTService"}'
    assert sample(call, name) == "1.0"


async def test_what_comes_over_the_bus_is_listened_to_where_it_is_heard(call: Call) -> None:
    asked = PipelineWorker(Pipeline([FrameProcessor()]), bridged=())
    before = list(asked._observer._observers)
    call.session.attach(asked)
    assert asked._observer._observers == before


@TAKES_PART
async def test_a_worker_that_is_stuck_ends_the_call_that_goes_through_it(
    call: Call, *, bridged: bool, active: bool, matters: bool
) -> None:
    other = Answering(call, bridged=bridged, active=active)
    await call.join()
    await call.caller_comes()
    await other.beat()
    for seconds in range(100):
        await heartbeat(call)
        call.time.pass_to(seconds)
    assert call.session.reason is (Reason.STUCK if matters else None)


async def test_a_worker_whose_turn_it_was_not_has_all_the_time_when_it_is(call: Call) -> None:
    other = Answering(call, active=False)
    await call.join()
    await call.caller_comes()
    await other.beat()
    for seconds in range(200):
        await heartbeat(call)
        call.time.pass_to(seconds)
        other.worker._active = seconds >= 100
        assert (call.session.reason is Reason.STUCK) is (seconds >= 160)


# A caller who is not answered


@pytest.mark.parametrize(
    ("frames", "words"),
    [
        ([], "no transcript came of it"),
        ([TranscriptionFrame("words", "caller", "")], "the language model wrote nothing"),
        ([TranscriptionFrame("words", "caller", ""), LLMTextFrame("more")], "nothing of the answer was spoken"),
    ],
)
async def test_a_caller_who_was_not_answered_is_an_error_that_tells_how_far_it_came(
    call: Call, frames: list[Frame], words: str
) -> None:
    await call.join()
    for frame in (BotStartedSpeakingFrame(), UserStoppedSpeakingFrame(), *frames):
        call.session.heard(frame, FrameDirection.DOWNSTREAM)
    call.time.now += 5
    call.session.heard(UserStoppedSpeakingFrame(), FrameDirection.DOWNSTREAM)
    call.time.now += 8
    call.session.conclude(Reason.IDLE)
    assert call.session.close(None).errors == (f"what the caller said was not answered for 13 s: {words}",)


@pytest.mark.parametrize(("answered", "seconds"), [(True, 60), (False, 9)])
async def test_a_caller_who_was_answered_or_has_just_spoken_is_no_error(
    call: Call, answered: bool, seconds: float
) -> None:
    await call.join()
    call.session.heard(UserStoppedSpeakingFrame(), FrameDirection.DOWNSTREAM)
    if answered:
        call.session.heard(BotStartedSpeakingFrame(), FrameDirection.DOWNSTREAM)
    call.time.now += seconds
    assert call.session.close(None).errors == ()


async def test_an_error_with_another_id_each_time_is_kept_once(call: Call) -> None:
    for digit in "123":
        call.session.note(f"TTS context {digit * 8}-a499-4150-b97b-6c58a472b547 completed with no audio")
    assert call.session.close("over").errors == ("over", "TTS context ... completed with no audio")


# What it used


def sample(call: Call, name: str) -> str:
    return next(line.split()[-1] for line in call.metrics.render().decode().splitlines() if line.startswith(name + " "))


async def test_what_services_measure_is_added_up_for_the_summary_and_for_prometheus(call: Call) -> None:
    tokens = LLMTokenUsage(prompt_tokens=10, completion_tokens=4, total_tokens=14)
    for _ in range(2):
        frame = MetricsFrame(
            data=[
                TTFBMetricsData(processor="GroqLLMService#0", value=0.0),
                TTFBMetricsData(processor="GroqLLMService#0", value=0.004),
                LLMUsageMetricsData(processor="GroqLLMService#0", value=tokens),
                TTSUsageMetricsData(processor="InworldTTSService#1", value=30),
                STTUsageMetricsData(processor="AssemblyAISTTService#0", value=STTUsage(audio_seconds=1.25)),
            ]
        )
        call.session.heard(frame, FrameDirection.DOWNSTREAM)
    assert call.session.close("over").usage == Usage(20, 8, 60, 2.5)
    latency = "voicepool_agent_provider_latency_seconds"
    assert sample(call, latency + '_count{processor="GroqLLMService"}') == "2.0"
    assert sample(call, latency + '_bucket{le="0.0025",processor="GroqLLMService"}') == "0.0"
    assert sample(call, latency + '_bucket{le="0.005",processor="GroqLLMService"}') == "2.0"
    assert sample(call, 'voicepool_agent_llm_prompt_tokens_total{processor="GroqLLMService"}') == "20.0"
    assert sample(call, 'voicepool_agent_llm_completion_tokens_total{processor="GroqLLMService"}') == "8.0"
    assert sample(call, 'voicepool_agent_tts_characters_total{processor="InworldTTSService"}') == "60.0"
    assert sample(call, 'voicepool_agent_stt_audio_seconds_total{processor="AssemblyAISTTService"}') == "2.5"


async def test_what_no_service_has_measured_is_unknown(call: Call) -> None:
    assert call.session.close("over").usage == Usage(None, None, None, None)


async def test_only_a_caller_who_cuts_the_agent_short_interrupts_it(call: Call) -> None:
    hear = call.session.heard
    hear(InterruptionFrame(), FrameDirection.DOWNSTREAM)
    for _ in range(2):
        hear(BotStartedSpeakingFrame(), FrameDirection.DOWNSTREAM)
        hear(InterruptionFrame(), FrameDirection.DOWNSTREAM)
        hear(InterruptionFrame(), FrameDirection.UPSTREAM)
        hear(BotStoppedSpeakingFrame(), FrameDirection.DOWNSTREAM)
    hear(BotStartedSpeakingFrame(), FrameDirection.DOWNSTREAM)
    hear(BotStoppedSpeakingFrame(), FrameDirection.DOWNSTREAM)
    hear(InterruptionFrame(), FrameDirection.DOWNSTREAM)
    assert sample(call, "voicepool_agent_interruptions_total") == "2.0"
    assert call.session.close("over").interruptions == 2


async def test_the_first_cause_counts(call: Call) -> None:
    await call.join()
    await call.caller_comes()
    call.session.conclude(Reason.DRAINED)
    await call.caller_leaves()
    call.time.pass_to(700)
    assert call.session.close("the bot failed").reason is Reason.DRAINED


async def test_a_bot_that_hangs_up_when_the_caller_left_says_so(call: Call) -> None:
    await call.join()
    await call.caller_comes()
    await call.caller_leaves()
    assert call.session.close(None).reason is Reason.CALLER_LEFT


async def test_a_bot_that_hangs_up_by_itself_says_so(call: Call) -> None:
    await call.join()
    await call.caller_comes()
    assert call.session.close(None).reason is Reason.BOT_ENDED


async def test_a_bot_that_raises_says_what(call: Call) -> None:
    summary = call.session.close("the bot failed: canary")
    assert (summary.reason, summary.errors) == (Reason.BOT_FAILED, ("the bot failed: [hidden]",))


async def test_turns_and_first_audio_are_counted_once(call: Call) -> None:
    await call.caller_comes()
    call.room.subscribed.set()
    call.time.now += 0.5
    for _ in range(2):
        await call.speak()
        call.time.now += 10
        for direction in FrameDirection:
            call.session.heard(UserStoppedSpeakingFrame(), direction)
    summary = call.session.close(None)
    assert summary.first_audio_seconds == pytest.approx(0.5)
    assert summary.turns == 2


# The first words


async def test_the_first_words_wait_for_a_caller_who_is_in_the_room_and_hears_nothing_yet(call: Call) -> None:
    await call.join()
    await call.caller_comes()
    speaking = asyncio.create_task(call.speak())
    for _ in range(5):
        await asyncio.sleep(0)
    assert (speaking.done(), call.session.so_far(Reason.CANCELLED).first_audio_seconds) == (False, None)
    call.time.pass_to(0.7)
    call.room.subscribed.set()
    await speaking
    assert call.session.so_far(Reason.CANCELLED).first_audio_seconds == pytest.approx(0.7)


async def test_what_is_said_later_waits_for_nobody(call: Call) -> None:
    await call.join()
    await call.caller_comes()
    call.room.subscribed.set()
    await call.speak()
    call.room.subscribed.clear()
    await call.speak()


async def test_an_agent_that_speaks_in_an_empty_room_waits_for_nobody_and_is_not_heard(call: Call) -> None:
    await call.speak()
    call.transport._client._room = None
    await call.speak()
    assert call.session.so_far(Reason.CANCELLED).first_audio_seconds is None


async def test_background_sound_is_not_the_first_that_a_caller_hears_of_the_agent(call: Call) -> None:
    await call.caller_comes()
    call.room.subscribed.set()
    await call.write()
    assert call.session.so_far(Reason.CANCELLED).first_audio_seconds is None
    call.time.pass_to(2)
    await call.speak()
    assert call.session.so_far(Reason.CANCELLED).first_audio_seconds == pytest.approx(2)


async def test_a_caller_who_wants_no_sound_keeps_the_agent_from_nothing(
    call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "AUDIENCE_SECONDS", 0)
    await call.caller_comes()
    call.time.pass_to(1)
    await call.speak()
    assert call.session.so_far(Reason.CANCELLED).first_audio_seconds == pytest.approx(1)


async def test_a_closed_session_leaves_no_timer(call: Call) -> None:
    call.session.close(None)
    assert all(timer.cancelled for timer in call.time.timers)
