"""The agent's life, in one direction: starting, parked, accepted, joined, ending.

Owns the bot's task, the state, and the exit code. Invariants: Ready means parked, and only then is an assignment
accepted; one session in a life; a build that fails is never Ready and exits with 1; whatever the bot does, a session
that is to end does end, within bounded time; no log line decides anything.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import math
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from concurrent import futures
from datetime import UTC, datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from loguru import logger

from voicepool_agent import parking, process
from voicepool_agent.assignments import Assignment, EndOrder
from voicepool_agent.body import EarlyBody
from voicepool_agent.bot_routes import BotRoutes
from voicepool_agent.bots import Bot, BotError, bot_folder, load_bot
from voicepool_agent.logs import Logs, Redactor
from voicepool_agent.metrics import Metrics
from voicepool_agent.settings import Settings, Warmth
from voicepool_agent.summary import Reason, write_termination_message
from voicepool_agent.tracing import FLUSH_SECONDS, Tracing
from voicepool_agent.watchdog import Watchdog, place_of

if TYPE_CHECKING:
    from pipecat.pipeline.worker import PipelineWorker
    from pipecat.runner.types import LiveKitRunnerArguments
    from pipecat.transports.livekit.transport import LiveKitTransport
    from pipecat.workers.runner import WorkerRunner

    from voicepool_agent.connections import Connections
    from voicepool_agent.recording import Recording
    from voicepool_agent.session import Session

CANCEL_SECONDS = 8.0
"""How long Pipecat may take to cancel a pipeline before its task is cancelled under it."""

ABANDON_SECONDS = 2.0
"""And how long that may take before the process exits all the same."""

EXIT_SECONDS = CANCEL_SECONDS + ABANDON_SECONDS + 1.0
"""What has to be left of the pod's grace when the last words are over."""

OTHERS_SECONDS = 0.1
"""The least that the other workers have when the pipelines with callers have finished."""

LEAVE_SECONDS = 0.5
"""For LiveKit's client to tell its server that the agent leaves, when the event loop can no longer wait for it."""

ENDING_SECONDS = EXIT_SECONDS + 15.0
"""Past the time for last words: an agent that is still ending by then hangs."""


class State(StrEnum):
    """Where the agent is in its life."""

    STARTING = "starting"
    PARKED = "parked"
    ACCEPTED = "accepted"
    JOINED = "joined"
    ENDING = "ending"


class AlreadyBound(Exception):
    """The pod carries another session."""


class NotParked(Exception):
    """The pod takes no session now: still starting, or ending."""


class NotBound(Exception):
    """The pod does not carry the session that is to end."""


class Host:
    """One agent.

    Args:
        settings: what it was told.
        metrics: what it shows.
        logs: set up again once the bot is loaded, and given the session's id.
        redact: told about tokens.
        bot_routes: the bot's own.
        tracing: of its session.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        settings: Settings,
        metrics: Metrics,
        logs: Logs,
        redact: Redactor,
        bot_routes: BotRoutes,
        tracing: Tracing,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings = settings
        self._metrics = metrics
        self._logs = logs
        self._redact = redact
        self._bot_routes = bot_routes
        self._tracing = tracing
        self._clock = clock
        self._state = State.STARTING
        self._since = clock()
        self._changed = asyncio.Condition()
        self._bot: Bot | None = None
        self._arguments: LiveKitRunnerArguments | None = None
        self._runner: WorkerRunner | None = None
        self._workers: list[PipelineWorker] = []
        self._transports: list[LiveKitTransport] = []
        self._connections: Connections | None = None
        self._connecting: asyncio.Task[None] | None = None
        self._session: Session | None = None
        self._recording: Recording | None = None
        self._failure: BotError | None = None
        self._objection: str | None = None
        self._folder = bot_folder(settings.bot)
        self._failed = asyncio.Event()
        self._parked = asyncio.Event()
        self._bound = asyncio.Event()
        self._stop = asyncio.Event()
        self._leave_by = math.inf
        self._phase_began = 0.0

    # -- asked by the server -------------------------------------------------------------------------------------

    @property
    def state(self) -> State:
        """Where it is."""
        return self._state

    @property
    def session_id(self) -> str | None:
        """The session that it carries."""
        return self._session.id if self._session else None

    @property
    def waiting_for(self) -> str | None:
        """What keeps it from having joined, in words; None when nothing does, or there is no session."""
        return self._session.waiting_for if self._session and self._state is State.ACCEPTED else None

    @property
    def since_seconds(self) -> float:
        """For how long it has been in this state."""
        return self._clock() - self._since

    @property
    def is_live(self) -> bool:
        """Whether it is not hanging at its end. That a pipeline is stuck is no matter of a restart: its session ends."""
        limit = self._settings.drain_timeout_seconds + ENDING_SECONDS
        return self._state is not State.ENDING or self.since_seconds < limit

    async def is_ready(self) -> bool:
        """Whether it can take a session: parked, and the bot's own `readyz()` agrees."""
        if self._unfit is not None or self._bot is None:
            return False
        try:
            objection = None if await self._bot.is_ready() else f"readyz() of the bot {self._bot.name} says no"
        except Exception as error:
            objection = self._bot.explain(error)
        if objection != self._objection:  # a probe asks every second
            self._objection = objection
            if objection is None:
                logger.info(f"readyz() of the bot {self._bot.name} agrees")
            else:
                logger.warning(f"{objection}; the agent is not Ready until it agrees")
        return objection is None

    def carries(self, session: str) -> bool:
        """Whether this very session was accepted here, and is not ending."""
        return self.session_id == session and self._state in (State.ACCEPTED, State.JOINED)

    def accept(self, assignment: Assignment) -> None:
        """Take a session; from here on the agent is not Ready, and joins.

        Raises:
            AlreadyBound: it carries another one.
            NotParked: it is still starting, or ending.
        """
        if self._session is not None and self._state is not State.ENDING:
            raise AlreadyBound(f"the pod carries session {self._session.id}")
        if self._unfit is not None:
            raise NotParked(self._unfit)
        from voicepool_agent.session import Session  # with Pipecat, which the bot has imported by now

        if self._arguments is None:
            raise NotParked("the bot is not built")  # cannot be, in this state
        self._redact.add(assignment.token)
        self._logs.session = assignment.session
        self._session = Session(
            assignment.session,
            self._settings,
            self._metrics,
            clean=self._redact.quoted,
            speech=self._redact.speech,
            trace=self._tracing.session(assignment.session, assignment.pool, assignment.traceparent),
            clock=self._clock,
            schedule=asyncio.get_running_loop().call_later,
            max_duration_seconds=assignment.max_duration_seconds,
        )
        if self._settings.recording_audio or self._settings.recording_transcript:
            from voicepool_agent.recording import Recording

            self._recording = Recording(
                assignment.session,
                self._settings,
                note=self._session.note,
                clock=self._clock,
                now=lambda: datetime.now(UTC),
            )
        self._session.expect(self._workers, self._transports)
        _fill(self._arguments, assignment)
        self._point(assignment)
        if self._connections is not None:
            self._connections.let_go()
            for worker in self._connections.workers:
                self._listen(self._session, worker)
        self._enter(State.ACCEPTED)
        self._bound.set()

    def end(self, order: EndOrder) -> None:
        """End the session: `drain` lets the agent finish its sentence and say goodbye, `cancel` does not.

        A cancel cuts a drain short that is under way. Twice is as good as once.

        Raises:
            NotBound: it does not carry that session.
        """
        if self._session is None or self._session.id != order.session:
            raise NotBound(f"the pod does not carry session {order.session}")
        self._session.conclude(Reason.DRAINED if order.action == "drain" else Reason.CANCELLED)

    async def wait_for_joined(self, timeout_seconds: float) -> None:
        """Return when it has joined or is ending, or when the time is over."""
        try:
            async with asyncio.timeout(timeout_seconds), self._changed:
                await self._changed.wait_for(lambda: self._state in (State.JOINED, State.ENDING))
        except TimeoutError:
            return

    def stop(self) -> None:
        """SIGTERM: an unbound agent exits at once, a bound one refuses all else and lets its call finish.

        The call ends by itself, or with a goodbye that is over before the kubelet kills.
        """
        if self._session is not None and not self._stop.is_set():
            session, grace = self._session, self._settings.termination_grace_seconds
            logger.bind(grace_seconds=grace).info("told to stop; the call goes on to its end")
            if grace is not None:
                self._leave_by = self._clock() + max(grace - EXIT_SECONDS, grace / 2)
                wait = self._leave_by - self._clock() - self._settings.drain_timeout_seconds
                asyncio.get_running_loop().call_later(max(wait, 0.0), lambda: session.conclude(Reason.DRAINED))
        self._stop.set()

    # -- called by Pipecat, through the setup file ---------------------------------------------------------------

    async def park(self, runner: WorkerRunner) -> None:
        """See `parking.Hooks`."""
        if self._bound.is_set() and self._runner is not None:
            return  # a second runner of the same session
        try:
            await self._park(runner)
        except BotError as error:
            self._fail(error)
        except Exception as error:
            self._fail(self._not_warm(error))
        if self._failed.is_set():
            await asyncio.Event().wait()  # a return would start the pipeline; the task is cancelled instead

    async def attach(self, worker: PipelineWorker) -> None:
        """See `parking.Hooks`."""
        if self._session is not None:
            self._listen(self._session, worker)
        elif self._connections is not None:
            try:
                self._connections.hold(worker)
            except Exception as error:
                self._disconnected(f"{type(error).__name__}: {error}")

    # -- its life ------------------------------------------------------------------------------------------------

    async def run(self) -> int:
        """Live. Returns the exit code: 0 after a session or an orderly stop, 1 when the bot could not be built."""
        parking.install(self, os.environ)
        self._take_signals()
        Watchdog(
            self._blocked_limit, self._note_blocked, self._leave_blocked, self._folder, lambda: self.is_live
        ).start()
        self._phase("interpreter", process.age_seconds())
        bot = asyncio.create_task(self._run_bot(), name="bot")
        try:
            await _first(bot, self._failed, self._parked, self._stop)
            if self._parked.is_set():
                await _first(bot, self._failed, self._bound, self._stop)
            if self._session is not None:
                await self._see_it_through(self._session, bot)
                return 0
            if self._stop.is_set():
                logger.info("told to stop, and not bound: exiting")
                return 0
            return self._give_up(bot)
        finally:
            await _abandon(bot)

    async def _run_bot(self) -> None:
        try:
            self._bot = load_bot(self._settings.bot)
        finally:
            self._redact.add_environment(os.environ)  # to which a bot may have added what is in a file (load_dotenv)
        self._logs.configure()  # a bot's module may have set loguru up as for its own terminal
        from pipecat.runner.types import LiveKitRunnerArguments

        self._arguments = LiveKitRunnerArguments(
            room_name="", url="", token="", body=EarlyBody(self._note_early_read), session_id=None
        )
        self._arguments.pipeline_idle_timeout_secs = self._settings.idle_timeout_seconds
        self._phase("imports")
        if self._settings.warmth is Warmth.IMPORTED:
            from voicepool_agent import warmup

            try:
                warmed = await warmup.warm_up_imported()
            except Exception as error:
                raise self._not_warm(error) from error
            self._rest(warmed)
            await self._bound.wait()
        async with self._bot_routes.serving():
            await self._bot.run(self._arguments)

    async def _park(self, runner: WorkerRunner) -> None:
        from voicepool_agent import warmup

        self._adopt(runner)
        if self._session is not None:
            warmup.share_tls_context(self._workers)
            self._session.expect(self._workers, self._transports)
            return  # the bot was built for the caller, who waits
        self._phase("build")
        warmed = await warmup.warm_up(self._workers)
        if self._failure is not None:
            raise self._failure
        if self._settings.warmth is Warmth.STARTED:
            self._phase("warm-up")
            from voicepool_agent import pipecat_private
            from voicepool_agent.connections import Connections

            workers = pipecat_private.pipeline_workers(runner)
            self._connections = Connections(workers, self._bound, self._disconnected)
            self._connecting = asyncio.create_task(self._connect(self._connections, warmed), name="connect")
            return  # the workers connect, and are held from there on
        self._rest(warmed)
        await self._bound.wait()

    def _adopt(self, runner: WorkerRunner) -> None:
        from voicepool_agent import pipecat_private

        self._take_signals()  # Pipecat's runner may have taken them, and would end a call at once
        self._logs.configure()
        self._runner = runner
        self._workers = [w for w in pipecat_private.pipeline_workers(runner) if pipecat_private.livekit_transports(w)]
        self._transports = [t for worker in self._workers for t in pipecat_private.livekit_transports(worker)]
        if not self._transports:
            raise BotError(
                f"the bot {self._settings.bot} runs a pipeline without a LiveKit transport; give create_transport()"
                ' an entry "livekit", and put transport.input() and transport.output() into the pipeline'
            )

    async def _connect(self, connections: Connections, warmed: list[str]) -> None:
        seconds = self._settings.connect_timeout_seconds
        try:
            async with asyncio.timeout(seconds):
                await connections.established()
        except TimeoutError:
            self._disconnected(f"not connected within {seconds:g} s: {connections.missing}")
        except Exception as error:
            self._disconnected(f"{type(error).__name__}: {error}")
        if not self._failed.is_set():
            self._rest(warmed, "connections")

    def _not_warm(self, error: Exception) -> BotError:
        return BotError(f"the bot {self._settings.bot} could not be warmed up: {type(error).__name__}: {error}")

    def _disconnected(self, words: str) -> None:
        self._fail(BotError(f"the bot {self._settings.bot} cannot wait with its providers connected: {words}"))

    def _rest(self, warmed: list[str], phase: str = "warm-up") -> None:
        """Everything is done that can be done before the bind."""
        process.release_memory()
        gc.freeze()  # what was built stays; later collections need not look at it
        gc.enable()
        self._phase(phase)
        parked_bytes = process.resident_bytes()
        self._metrics.parked_bytes.set(parked_bytes)
        self._enter(State.PARKED)
        logger.bind(
            seconds=round(process.age_seconds(), 3), megabytes=round(parked_bytes / 1e6, 1), warmed=warmed
        ).info("parked")
        self._parked.set()
        self._tracing.prepare()

    @property
    def _unfit(self) -> str | None:
        """Why no session can be taken now; None when one can."""
        if self._failed.is_set():
            return "the agent has failed"  # the log and the termination message say why, without secrets
        if self._state is not State.PARKED or self._stop.is_set():
            return f"the agent is {self._state}"
        return self._connections.problem if self._connections is not None else None

    async def _see_it_through(self, session: Session, bot: asyncio.Task[None]) -> None:
        joining = asyncio.create_task(self._note_joined(session))
        await _first(bot, session.over)
        joining.cancel()
        self._enter(State.ENDING)
        if session.reason is not None:
            # Whoever kills the process before the last words are over still finds why it was ending.
            self._tell(session.so_far(session.reason).as_json())
        if not bot.done():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._settings.drain_timeout_seconds + EXIT_SECONDS):
                    await self._end_bot(session, bot)
        if self._recording is not None:
            await self._recording.finish()
        summary = session.close(self._bot_error(bot))
        self._tell(summary.as_json())
        logger.bind(reason=summary.reason.value, turns=summary.turns, errors=list(summary.errors)).info(
            "the session has ended"
        )

    async def _note_joined(self, session: Session) -> None:
        await session.joined.wait()
        self._enter(State.JOINED)
        await self._end_others()

    async def _end_bot(self, session: Session, bot: asyncio.Task[None]) -> None:
        from pipecat.frames.frames import CancelFrame

        patience = CANCEL_SECONDS / 2 if session.joined.is_set() else CANCEL_SECONDS
        if session.reason is not None and session.reason.allows_last_words and session.joined.is_set():
            await self._take_leave(session, session.reason, bot)
            patience = 0.0
        if not bot.done() and self._runner is not None:
            await self._runner.cancel(reason=str(session.reason))
            await asyncio.wait({bot}, timeout=patience)
        if not bot.done() and session.joined.is_set():
            # Once a pipeline is ending, Pipecat's cancel waits in the queue behind the end. This one overtakes.
            for worker in self._workers:
                await worker.pipeline.queue_frame(CancelFrame(reason=str(session.reason)))
            await asyncio.wait({bot}, timeout=CANCEL_SECONDS / 2)
        if not bot.done():
            logger.warning("the pipeline does not end by itself; exiting without it")
            self._leave_rooms()

    async def _take_leave(self, session: Session, reason: Reason, bot: asyncio.Task[None]) -> None:
        """Let the bot say goodbye and the pipeline finish, within the time that there is."""
        seconds = max(0.0, min(self._settings.drain_timeout_seconds, self._leave_by - self._clock()))
        said = asyncio.Event()
        leaving = asyncio.create_task(self._leave(session, reason, said), name="goodbye")
        try:
            async with asyncio.timeout(seconds):
                await _first(bot, session.hurried)
        except TimeoutError:
            if not said.is_set():
                session.note(f"the bot's goodbye() did not return within {seconds:g} s")
            else:
                session.note(f"the pipeline did not come to its end within {seconds:g} s, and was cut off")
        leaving.cancel()

    async def _leave(self, session: Session, reason: Reason, said: asyncio.Event) -> None:
        await self._say_goodbye(session, reason)
        said.set()
        for worker in self._workers:
            await self._finish(worker)
        await self._end_others()

    async def _finish(self, worker: PipelineWorker) -> None:
        from voicepool_agent import pipecat_private

        if pipecat_private.sends_over_bus(worker) and not worker.has_finished():
            await worker.flush_pipeline()  # the end goes straight through, and would overtake the last words
        await worker.stop_when_done()  # type: ignore[no-untyped-call]

    async def _end_others(self) -> None:
        """When all pipelines with callers have finished, end the other workers, for which Pipecat's runner waits as well."""
        finished = False
        while not finished:
            await asyncio.gather(*(worker.wait() for worker in self._workers))
            # That is before what the bot does at a pipeline's end, which may be to go on with another one.
            await asyncio.sleep(max(self._settings.caller_left_grace_seconds, OTHERS_SECONDS))
            finished = all(worker.has_finished() for worker in self._workers)
        if self._runner is not None:
            await self._runner.cancel(reason="the call is over")

    async def _say_goodbye(self, session: Session, reason: Reason) -> None:
        if self._bot is not None and self._bot.goodbye is not None and session.has_listener:
            try:
                await self._bot.goodbye(self._workers[0], reason.value)
            except Exception as error:
                session.note(self._bot.explain(error))

    def _give_up(self, bot: asyncio.Task[None]) -> int:
        words = self._redact(self._bot_error(bot) or f"the bot {self._settings.bot} ended before it was bound")
        logger.opt(exception=self._exception(bot) if self._settings.debug else None).error(words)
        self._tell(words)
        return 1

    def _exception(self, bot: asyncio.Task[None]) -> BaseException | None:
        return self._failure or (bot.exception() if bot.done() and not bot.cancelled() else None)

    def _bot_error(self, bot: asyncio.Task[None]) -> str | None:
        """What is wrong with the bot, in one line; None when nothing is, or it has not come to that."""
        error = self._exception(bot)
        if isinstance(error, BotError) or (error is not None and self._bot is None):
            return str(error)
        if error is not None and self._bot is not None:
            return self._bot.explain(error)
        if bot.done() and not bot.cancelled() and self._runner is None:
            return (
                f"the bot {self._settings.bot} returned without running a pipeline; bot() must await WorkerRunner.run()"
            )
        return None

    def _listen(self, session: Session, worker: PipelineWorker) -> None:
        from voicepool_agent import pipecat_private

        try:
            if self._recording is not None:
                self._recording.attach(worker)
            if pipecat_private.livekit_transports(worker) and worker not in self._workers:
                self._workers.append(worker)  # the bot goes on with another pipeline
            session.attach(worker)  # last, so that nothing counts as played before somebody hears it
        except Exception as error:
            session.fail(Reason.BOT_FAILED, f"cannot listen to the pipeline: {type(error).__name__}: {error}")

    def _take_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.stop)

    def _fail(self, error: BotError) -> None:
        self._failure = self._failure or error
        self._failed.set()
        if self._session is not None:
            self._session.fail(Reason.BOT_FAILED, str(error))

    def _note_early_read(self, stack: traceback.StackSummary) -> None:
        """The bot reads the caller's body before there is one; it fails when it would park, or before."""
        self._failure = self._failure or BotError(
            f"the bot {self._settings.bot} reads runner_args.body while it is being built ({place_of(stack, self._folder)}),"
            " when there is no caller yet; set spec.warmth to Imported, or read it in on_client_connected"
        )

    def _leave_rooms(self) -> None:
        if self._transports:
            from voicepool_agent import pipecat_private

            for transport in self._transports:
                pipecat_private.leave_room(transport)
            time.sleep(LEAVE_SECONDS)

    # -- called by the watchdog, in its thread ---------------------------------------------------------------------

    def _blocked_limit(self) -> float:
        starting = self._state is State.STARTING
        return self._settings.startup_blocked_timeout_seconds if starting else self._settings.blocked_timeout_seconds

    def _note_blocked(self, place: str) -> None:
        logger.warning(f"the event loop is held up by {place}; await there, or put it into asyncio.to_thread()")

    def _leave_blocked(self, seconds: float, place: str) -> None:
        """Nothing that the loop would have to do can be done any more."""
        words = (
            f"the bot {self._settings.bot} has held up the event loop for {seconds:g} s in {place};"
            " await there, or put it into asyncio.to_thread()"
        )
        summary = self._session.cut_off(Reason.STUCK, words) if self._session else None
        self._tell(summary.as_json() if summary else words)
        logger.error(words)
        sys.stderr.flush()
        self._leave_rooms()
        futures.wait([self._tracing.leave()], FLUSH_SECONDS)
        os._exit(0 if summary else 1)

    def _point(self, assignment: Assignment) -> None:
        from voicepool_agent import pipecat_private

        for transport in self._transports:
            pipecat_private.point_at_room(transport, url=assignment.url, token=assignment.token, room=assignment.room)

    def _tell(self, text: str) -> None:
        problem = write_termination_message(self._settings.termination_message_path, text)
        if problem is not None:
            logger.warning(problem)

    def _phase(self, name: str, seconds: float | None = None) -> None:
        now = self._clock()
        self._metrics.startup_seconds.labels(name).set(now - self._phase_began if seconds is None else seconds)
        self._phase_began = now

    def _enter(self, state: State) -> None:
        self._state, self._since = state, self._clock()
        self._metrics.state.state(state.value)
        asyncio.get_running_loop().create_task(self._announce())

    async def _announce(self) -> None:
        async with self._changed:
            self._changed.notify_all()


def _fill(arguments: LiveKitRunnerArguments, assignment: Assignment) -> None:
    """Fill the arguments that the bot was built with: the same object, and the same dictionary."""
    arguments.session_id = assignment.session
    arguments.room_name = assignment.room
    arguments.url = assignment.url
    arguments.token = assignment.token
    body: Any = assignment.body
    if isinstance(arguments.body, EarlyBody):
        arguments.body.arrived()
    if isinstance(body, dict) and isinstance(arguments.body, dict):
        arguments.body.update(body)
    elif body is not None:
        arguments.body = body


async def _first(task: asyncio.Task[None], *events: asyncio.Event) -> None:
    """Return when the task is done or one of the events is set."""
    waiting = [asyncio.create_task(event.wait()) for event in events]
    try:
        await asyncio.wait({task, *waiting}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for one in waiting:
            one.cancel()


async def _abandon(bot: asyncio.Task[None]) -> None:
    if not bot.done():
        bot.cancel()
        await asyncio.wait({bot}, timeout=ABANDON_SECONDS)
