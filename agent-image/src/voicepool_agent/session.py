"""One session, from the bind to its end: what happened, and the first cause to end it.

Reads Pipecat's events and frames through handlers and an observer; touches neither the bot nor the pipeline.
Invariants: the first cause counts, later ones are consequences; joined means that every pipeline has started, every
transport has connected and every processor is usable; errors are kept without secrets and without speech.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

from livekit import rtc
from loguru import logger
from pipecat.frames.frames import (
    BotSpeakingFrame,
    BotStartedSpeakingFrame,
    BotStoppedSpeakingFrame,
    ErrorFrame,
    Frame,
    InterruptionFrame,
    LLMTextFrame,
    LLMThoughtTextFrame,
    MetricsFrame,
    TextFrame,
    TranscriptionFrame,
    TTSSpeakFrame,
    UserStoppedSpeakingFrame,
)
from pipecat.observers.base_observer import BaseObserver, FramePushed
from pipecat.observers.user_bot_latency_observer import LatencyBreakdown, MeasuredFrom, UserBotLatencyObserver
from pipecat.pipeline.worker import PipelineWorker
from pipecat.processors.frame_processor import FrameDirection, FrameProcessor
from pipecat.transports.livekit.transport import LiveKitTransport

from voicepool_agent import pipecat_private
from voicepool_agent.metrics import Metrics
from voicepool_agent.pulse import Pulse
from voicepool_agent.settings import Settings
from voicepool_agent.speech import Speech
from voicepool_agent.summary import Reason, Summary
from voicepool_agent.tracing import Part, Trace
from voicepool_agent.usage import Meter

ROOM_IS_CLOSED = (
    rtc.DisconnectReason.ROOM_DELETED,
    rtc.DisconnectReason.ROOM_CLOSED,
    rtc.DisconnectReason.PARTICIPANT_REMOVED,
)

CONNECTION_CHECK_SECONDS = 0.25

MAX_ERRORS = 10
MAX_ERROR_LENGTH = 200
PULSE_CHECK_SECONDS = 1.0
REUNION_SECONDS = 15.0
"""How long the caller may take to be back in the room after the agent is, when both have lost LiveKit."""

AUDIENCE_SECONDS = 5.0
"""How long the first words wait for somebody who is in the room and does not hear the agent yet. Pipecat gives a write 10 s."""

UNANSWERED_SECONDS = 10.0
"""A caller who has waited for so long has not been answered, and not just hung up after the last word."""

_IDENTIFIER = re.compile(r"\b[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\b")


class Handle(Protocol):
    """A call that was scheduled."""

    def cancel(self) -> None:
        """Never make it."""


class Session:
    """What is known about the session this pod carries.

    Args:
        session_id: its id.
        settings: the limits.
        metrics: counted as things happen.
        clean: makes a text fit to be kept: no secrets, nothing that was said.
        speech: told what is said, for that.
        trace: told what took how long.
        clock: seconds, monotonic; the session begins now.
        schedule: calls something later, as `loop.call_later` does.
        max_duration_seconds: of this session, in the place of the limit in the settings.
    """

    def __init__(
        self,
        session_id: str,
        settings: Settings,
        metrics: Metrics,
        *,
        clean: Callable[[str], str],
        speech: Speech,
        trace: Trace,
        clock: Callable[[], float],
        schedule: Callable[[float, Callable[[], None]], Handle],
        max_duration_seconds: float | None = None,
    ) -> None:
        self.id = session_id
        self.joined = asyncio.Event()
        self.over = asyncio.Event()
        self.hurried = asyncio.Event()
        self.reason: Reason | None = None
        self._settings = settings
        self._metrics = metrics
        self._clean = clean
        self._speech = speech
        self._trace = trace
        self._clock = clock
        self._schedule = schedule
        self._began = clock()
        self._awaited: set[object] = set()
        self._failing: set[FrameProcessor] = set()
        """What has had an error before the agent had joined."""
        self._workers: list[PipelineWorker] = []
        self._present: set[str] = set()
        self._caller_came = False
        self._cut_off = False
        self._turns = 0
        self._joined_seconds: float | None = None
        self._first_audio_seconds: float | None = None
        self._has_audience = False
        self._errors: list[str] = []
        self._meter = Meter(metrics)
        self._unanswered_since: float | None = None
        self._came_of_it = "no transcript came of it"
        self._speaking = False
        self._interruptions = 0
        self._pulses: dict[PipelineWorker, Pulse] = {}
        self._pulse_timers: dict[PipelineWorker, Handle] = {}
        self._timers = [
            schedule(max_duration_seconds or settings.max_duration_seconds, lambda: self.conclude(Reason.MAX_DURATION)),
            schedule(settings.join_timeout_seconds, self._join_timeout),
            schedule(settings.connect_timeout_seconds, self._connect_timeout),
        ]

    def expect(self, workers: Sequence[PipelineWorker], transports: Sequence[LiveKitTransport]) -> None:
        """What has to start and to connect before the agent has joined."""
        self._awaited.update(workers, transports)
        self._workers.extend(workers)

    def attach(self, worker: PipelineWorker) -> None:
        """Listen to a worker and to the transports in its pipeline."""
        worker.add_event_handler("on_pipeline_started", self._on_started)
        worker.add_event_handler("on_pipeline_error", self._on_error)
        worker.add_event_handler("on_idle_timeout", self._on_idle)
        if pipecat_private.livekit_transports(worker) and worker not in self._workers:
            self._workers.append(worker)
        pipecat_private.measure(worker)
        pipecat_private.limit_silence(worker, self._settings.idle_timeout_seconds)
        self._feel(worker)
        if pipecat_private.works_over_bus(worker):
            return  # all of it goes through the pipeline with the transport as well, and counts there
        latency = UserBotLatencyObserver()
        latency.add_event_handler("on_latency_measured", self._on_latency)
        latency.add_event_handler("on_latency_breakdown", self._on_turn)
        worker.add_observer(latency)
        worker.add_observer(_Listener(self))
        pipecat_private.before_audio(worker, self._find_audience)
        for transport in pipecat_private.livekit_transports(worker):
            pipecat_private.tell_once(transport)
            transport.add_event_handler("on_connected", self._on_connected)
            transport.add_event_handler("on_participant_connected", self._on_came)
            transport.add_event_handler("on_participant_disconnected", self._on_left)

    @property
    def has_listener(self) -> bool:
        """Whether somebody is there to hear last words."""
        return self.joined.is_set() and bool(self._present)

    def conclude(self, reason: Reason) -> None:
        """The session is to end, for this reason; only the first one counts.

        A later one for which nobody waits for last words sets `hurried`.
        """
        if not reason.allows_last_words:
            self.hurried.set()
        if self.reason is None:
            self.reason = reason
            self.over.set()

    def fail(self, reason: Reason, words: str) -> None:
        """As `conclude`, with an error for the summary, where the cause comes first."""
        if self.reason is None:
            self._note_cause(words)
        self.conclude(reason)

    def note(self, words: str) -> None:
        """Keep an error for the summary: without secrets, short, once, and not too many of them."""
        self._keep(*self._errors, self._fit(words))

    def _note_cause(self, words: str) -> None:
        self._keep(self._fit(words), *self._errors)

    def _keep(self, *errors: str) -> None:
        self._errors = list(dict.fromkeys(errors))[:MAX_ERRORS]

    def _fit(self, words: str) -> str:
        return self._clean(" ".join(_IDENTIFIER.sub("...", words).split()))[:MAX_ERROR_LENGTH]

    def close(self, bot_error: str | None) -> Summary:
        """The bot has returned, or raised `bot_error`: the summary, and no more timers."""
        for timer in (*self._timers, *self._pulse_timers.values()):
            timer.cancel()
        has_left = self._caller_came and not self._present
        if bot_error is not None:
            self.fail(Reason.BOT_FAILED, bot_error)
        elif not self.joined.is_set():
            reason, who = (Reason.CALLER_LEFT, "caller left") if has_left else (Reason.NOT_JOINED, "bot returned")
            self.fail(reason, f"the {who} before the agent had joined, still waiting for {self._missing()}")
        elif self._cut_off:
            self.fail(Reason.LIVEKIT_LOST, "the bot ended while the agent was reconnecting to LiveKit")
        elif not has_left:
            self._still_unusable()  # then that is why the bot ended, or Pipecat for it
        self.conclude(Reason.CALLER_LEFT if has_left else Reason.BOT_ENDED)
        return self._end(self.reason or Reason.BOT_ENDED)

    def cut_off(self, reason: Reason, words: str) -> Summary:
        """The summary of a session that cannot be ended in order; may be called from another thread."""
        if self.reason is None:
            self._note_cause(words)
        else:
            self.note(words)
        return self._end(self.reason or reason)

    def _end(self, reason: Reason) -> Summary:
        now = self._clock()
        if self._unanswered_since is not None and now - self._unanswered_since >= UNANSWERED_SECONDS:
            waited = round(now - self._unanswered_since)
            self.note(f"what the caller said was not answered for {waited} s: {self._came_of_it}")
        summary = self.so_far(reason)
        self._trace.end(summary)
        return summary

    def so_far(self, reason: Reason) -> Summary:
        """The summary as it would be if the session ended now, for this reason; ends nothing."""
        return Summary(
            session=self.id,
            reason=reason,
            duration_seconds=self._clock() - self._began,
            turns=self._turns,
            joined_seconds=self._joined_seconds,
            first_audio_seconds=self._first_audio_seconds,
            errors=tuple(self._errors),
            interruptions=self._interruptions,
            usage=self._meter.usage,
        )

    def heard(self, frame: Frame, direction: FrameDirection) -> None:
        """A frame went by, seen once for each of its two directions."""
        if isinstance(frame, BotSpeakingFrame):
            for pulse in self._pulses.values():
                pulse.moved()
        elif isinstance(frame, (LLMTextFrame, LLMThoughtTextFrame)):
            self._came_of_it = "nothing of the answer was spoken"
            self._speech.hear_piece(frame.text)
        elif isinstance(frame, (TextFrame, TTSSpeakFrame)):
            if isinstance(frame, TranscriptionFrame):
                self._came_of_it = "the language model wrote nothing"
            self._speech.hear(frame.text)
        elif isinstance(frame, MetricsFrame):
            self._meter.read(frame.data)
        elif isinstance(frame, BotStartedSpeakingFrame):
            self._speaking = True
            self._unanswered_since = None
            self._came_of_it = "no transcript came of it"
            self._note_first_audio()
        elif isinstance(frame, BotStoppedSpeakingFrame):
            self._speaking = False
        elif isinstance(frame, InterruptionFrame) and self._speaking:
            self._speaking = False  # the frame goes both ways; one of them counts
            self._interruptions += 1
            self._metrics.interruptions.inc()
        elif isinstance(frame, UserStoppedSpeakingFrame) and direction is FrameDirection.DOWNSTREAM:
            self._turns += 1
            self._metrics.turns.inc()
            self._unanswered_since = self._unanswered_since or self._clock()

    async def _find_audience(self, room: rtc.Room | None) -> None:
        """Return when somebody hears what is said, or nobody is there to hear it.

        LiveKit tells of a participant before the connections are agreed on over which it hears the others, and keeps
        nothing for it: a greeting could be over by then, and its caller would wait for it in vain.
        """
        if self._has_audience or room is None or not room.remote_participants:
            return
        voices = [
            one for one in room.local_participant.track_publications.values() if one.kind == rtc.TrackKind.KIND_AUDIO
        ]
        try:
            async with asyncio.timeout(AUDIENCE_SECONDS):
                for voice in voices:
                    await voice.wait_for_subscription()
        except TimeoutError:
            logger.warning(f"in {AUDIENCE_SECONDS:g} s nobody in the room has subscribed to the agent; it speaks on")
        self._has_audience = True
        self._note_first_audio()

    def _note_first_audio(self) -> None:
        if self._first_audio_seconds is None and self._speaking and self._has_audience:
            self._first_audio_seconds = self._clock() - self._began
            self._metrics.first_audio_seconds.set(self._first_audio_seconds)
            self._trace.step("first audio", self._first_audio_seconds)
            logger.bind(seconds=round(self._first_audio_seconds, 3)).info("first audio")

    # -- what Pipecat tells ------------------------------------------------------------------------------------

    async def _on_started(self, worker: PipelineWorker, _frame: Any) -> None:
        self._arrived(worker)

    async def _on_connected(self, transport: LiveKitTransport) -> None:
        room = pipecat_private.room(transport)
        if room is not None:
            room.on("disconnected", self._on_disconnected)
            room.on("reconnecting", self._on_reconnecting)
            room.on("reconnected", self._on_reconnected)
        self._arrived(transport)

    async def _on_error(self, worker: PipelineWorker, frame: ErrorFrame) -> None:
        processor = type(frame.processor).__name__ if frame.processor else "pipeline"
        category = frame.category.value if frame.category else "unknown"
        owners = [one for one in self._pulses if frame.processor in set(pipecat_private.processors(one))]
        if owners and worker not in owners:
            return  # it has come over the bus, and is told by its own worker as well
        self._metrics.errors.labels(processor, category).inc()
        self.note(f"{processor}: {category}: {frame.error}")
        if frame.processor and not self.joined.is_set():
            self._failing.add(frame.processor)
        if not (unusable := self._unusable()):
            return
        if self.joined.is_set():
            # Pipecat goes on without it, as its own policy is by default, and the caller would talk to nobody.
            self._timers.append(self._schedule(self._settings.provider_grace_seconds, self._still_unusable))
        else:
            self.fail(Reason.NOT_JOINED, f"{unusable} cannot be used")

    async def _on_idle(self, worker: PipelineWorker) -> None:
        # A bot may ask whether anybody is still there, and a worker at the side may end alone.
        if pipecat_private.ends_call_when_idle(worker):
            self.conclude(Reason.IDLE)

    async def _on_latency(self, _observer: Any, seconds: float) -> None:
        self._metrics.latency_seconds.observe(seconds)

    async def _on_turn(self, _observer: Any, turn: LatencyBreakdown) -> None:
        if turn.measured_from is MeasuredFrom.USER_SILENCE:
            parts = [Part(one.key, one.owner, one.start_time, one.duration_secs) for one in turn.contributions]
            self._trace.step("turn", turn.total_secs, parts)

    def _on_disconnected(self, why: rtc.DisconnectReason.ValueType) -> None:
        if why == rtc.DisconnectReason.CLIENT_INITIATED:
            return  # the pipeline ends, and leaves the room
        if why in ROOM_IS_CLOSED:
            # LiveKit closes a room in which there are only agents, as it is after a caller who came and went unseen.
            self.conclude(Reason.ROOM_CLOSED if self._caller_came else Reason.NOBODY_JOINED)
        elif why == rtc.DisconnectReason.DUPLICATE_IDENTITY:
            self.fail(Reason.REPLACED, "another agent has joined the room in the place of this one")
        else:
            self.fail(Reason.LIVEKIT_LOST, f"disconnected from LiveKit: {rtc.DisconnectReason.Name(why)}")

    def _on_reconnecting(self) -> None:
        # Everybody seems to have left now, the agent too.
        self._cut_off = True
        logger.warning("LiveKit does not answer; reconnecting")

    def _on_reconnected(self) -> None:
        self._cut_off = False
        logger.info("reconnected to LiveKit")
        if self._caller_came and not self._present:
            self._timers.append(self._schedule(REUNION_SECONDS, self._still_empty))

    async def _on_came(self, _transport: LiveKitTransport, identity: str) -> None:
        self._caller_came = True
        self._present.add(identity)

    async def _on_left(self, _transport: LiveKitTransport, identity: str) -> None:
        self._present.discard(identity)
        if not self._present:
            self._timers.append(self._schedule(self._settings.caller_left_grace_seconds, self._still_empty))

    # -- what follows from it ------------------------------------------------------------------------------------

    def _arrived(self, what: object) -> None:
        self._awaited.discard(what)
        if self._awaited or self.joined.is_set() or self.reason is not None:
            return
        if unusable := self._unusable():
            self.fail(Reason.NOT_JOINED, f"started, but cannot be used: {unusable}")
            return
        if self._offline():
            # Pipecat starts all the same and tries to connect again, while the caller would wait for a word.
            self._timers.append(self._schedule(CONNECTION_CHECK_SECONDS, lambda: self._arrived(None)))
            return
        self._joined_seconds = self._clock() - self._began
        self._metrics.joined_seconds.set(self._joined_seconds)
        self._trace.step("joining", self._joined_seconds)
        logger.bind(seconds=round(self._joined_seconds, 3)).info("joined")
        self.joined.set()

    @property
    def _carriers(self) -> list[PipelineWorker]:
        """The workers that the call goes through now: those with its transports, and those that answer them over the bus."""
        active = [one for one in self._pulses if pipecat_private.works_over_bus(one) and one.active]
        # One that has finished may have been replaced by another one; where none has, the call lacks it.
        return [*self._workers, *([one for one in active if not one.has_finished()] or active)]

    def _unusable(self, counts: Callable[[FrameProcessor], bool] = lambda _processor: True) -> str:
        """The names of processors that can no longer do their work, of those that count; empty when there is none."""
        found = [one for worker in self._carriers for one in pipecat_private.unusable(worker) if counts(one)]
        return _names(found)

    def _offline(self) -> str:
        """The names of services whose connection failed before the agent had joined, and is not there again."""
        found = [one for worker in self._carriers for one in pipecat_private.disconnected(worker)]
        return _names(one for one in found if one in self._failing)

    def _still_unusable(self) -> None:
        # A call that has begun goes on without what it can do without.
        if unusable := self._unusable(pipecat_private.talks):
            self.fail(Reason.PROVIDER_FAILED, f"{unusable} can no longer be used")

    def _join_timeout(self) -> None:
        if not self._caller_came:
            self.conclude(Reason.NOBODY_JOINED)

    def _connect_timeout(self) -> None:
        if not self.joined.is_set():
            self.fail(Reason.NOT_JOINED, f"not joined in time, still waiting for {self._missing()}")

    @property
    def waiting_for(self) -> str | None:
        """What has not come yet of what makes an agent joined, in words; None when all is there."""
        return self._missing() if not self.joined.is_set() and (self._awaited or self._offline()) else None

    def _missing(self) -> str:
        transports = any(isinstance(one, LiveKitTransport) for one in self._awaited)
        pipelines = any(isinstance(one, PipelineWorker) for one in self._awaited)
        # Without the room the pipeline does not start either; with it, something else holds it up.
        return (
            "LiveKit"
            if transports
            else "the pipeline to start (a provider that does not answer?)"
            if pipelines
            else f"{offline} to connect"
            if (offline := self._offline())
            else "the bot to build its pipeline"
        )

    def _feel(self, worker: PipelineWorker) -> None:
        """Look every second whether a worker's pipeline still moves."""
        pulse = self._pulses[worker] = Pulse(self._clock, self._settings.stuck_timeout_seconds)
        pipecat_private.watch_heartbeats(worker, pulse.beat)
        taken: dict[FrameProcessor, int] = {}

        def look() -> None:
            nonlocal taken
            if worker.has_finished():
                return
            if worker not in self._carriers:
                pulse.moved()  # it may wait for as long as it likes
            before, taken = taken, pipecat_private.frames_taken_by_late(worker)
            if pulse.is_stuck:
                words = f"nothing has come through the pipeline for {self._settings.stuck_timeout_seconds:g} s"
                if late := _names(one for one, count in taken.items() if count > before.get(one, count)):
                    self.note(f"{words}: {late} cannot keep up: slow, or without CPU")
                    pulse.moved()
                else:
                    names = _names(pipecat_private.held_up(worker))
                    self.fail(Reason.STUCK, f"{words}: {names} held it up" if names else words)
            if self.reason is None:
                self._pulse_timers[worker] = self._schedule(PULSE_CHECK_SECONDS, look)

        look()

    def _still_empty(self) -> None:
        if not self._present and not self._cut_off:
            self.conclude(Reason.CALLER_LEFT)


def _names(processors: Iterable[FrameProcessor]) -> str:
    return ", ".join(sorted({type(one).__name__ for one in processors}))


class _Listener(BaseObserver):
    """Sees frames go by, each once."""

    def __init__(self, session: Session) -> None:
        super().__init__(observe_every_push=False)
        self._session = session

    async def on_push_frame(self, data: FramePushed) -> None:
        self._session.heard(data.frame, data.direction)
