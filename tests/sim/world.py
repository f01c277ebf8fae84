"""One simulated story: operators, gateways, callers, and everything that happens to them.

The parts under test are the real ones (Controller, Informer, PoolStore, Sessions, Allocator); only what is at the edges is played: the API server, the
machines and agents, rooms, and kopf, in whose place a small watch hands pools to the controller.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from prometheus_client import CollectorRegistry

from voicepool.controller import Controller, ControllerSettings
from voicepool.copies import PoolStore, budget_informer, pod_informer
from voicepool.gateway.allocator import Allocator
from voicepool.gateway.assignments import Signer
from voicepool.gateway.errors import GatewayError
from voicepool.gateway.livekit import LiveKitServer, LiveKitServers
from voicepool.gateway.metrics import GatewayMetrics
from voicepool.gateway.options import GatewayOptions
from voicepool.gateway.requests import Started, StartRequest
from voicepool.gateway.server import _cold_pods, _pod_handler, _pool_handler
from voicepool.gateway.sessions import Sessions
from voicepool.gateway.view import ClusterView
from voicepool.kube.api import BUDGETS, LEASES, PODS, POOLS, Gone, Json, KubeApiError, NotFound
from voicepool.kube.clock import ServerClock
from voicepool.kube.convert import pod_from_json, pool_from_json
from voicepool.kube.informer import Informer
from voicepool.kube.lease import Election
from voicepool.metrics import OperatorMetrics
from voicepool.model import LABEL_POOL, BindState, PodFact, PoolFact
from voicepool.podspec import PodSettings

from .cluster import Cluster, SimulatedCourier, SimulatedRooms
from .evictions import Evictions
from .history import History
from .invariants import Calls, Invariants
from .loop import Process, SeededLoop
from .server import NEXT_PAGE, REFUSED_IMAGE, Change, Client, EventFate, Fate, Server

NAMESPACE, POOL = "calls", "demo"
EPOCH = datetime(2026, 1, 1, tzinfo=UTC)
SETTLING_SECONDS = 4000.0
"""Longer than the informers' periodic list, which repairs dropped events, and than the longest back-off."""
LAST_CALL_SECONDS = 300.0
QUIET_SECONDS = 2 * 3600.0
MOST_REPLICAS = 5
MOST_PODS = 11
WRITES_WITHOUT_CAUSE = 50
"""Deadlines and back-offs pass without a write of anybody's."""

_KEY = Ed25519PrivateKey.from_private_bytes(b"voicepool simulation, 32 bytes. ")
POD_SETTINGS = PodSettings(_KEY.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode())
_LIVEKIT = LiveKitServer("ws://livekit.example", "key", "a secret that is long enough for HMAC")


class _Servers(LiveKitServers):
    def __init__(self) -> None:
        """One server for all."""

    async def of(self, pool: PoolFact) -> LiveKitServer:
        return _LIVEKIT


@dataclass
class Gateway:
    """One gateway process."""

    process: Process
    sessions: Sessions
    view: ClusterView


@dataclass
class Call:
    """One caller."""

    session: str
    keyed: bool
    stays: bool = False
    """It never hangs up."""
    tasks: list[asyncio.Task[Any]] = field(default_factory=list)
    outcomes: list[str] = field(default_factory=list)


@dataclass
class Turn:
    """What becomes of one call that is to come; see `World.at_next_call`."""

    process: str
    verb: str
    about: str
    fate: Fate
    seconds: float | None

    def fits(self, process: str, verb: str, words: str) -> bool:
        """Whether this is the call."""
        return (process, verb) == (self.process, self.verb) and self.about in words


@dataclass
class Weather:
    """How much goes wrong on the way, as chances."""

    call: float = 0.0
    event: float = 0.0
    slow: float = 0.0
    stale_list: float = 0.0


CALM = Weather()
STORM = Weather(call=0.15, event=0.05, slow=0.1, stale_list=0.5)

FATES = (
    Fate.LOST_BEFORE,
    Fate.LOST_AFTER,
    Fate.COMMITTED_LATE,
    Fate.THROTTLED,
    Fate.FAILED_BEFORE,
    Fate.FAILED_AFTER,
)
"""What can become of a call in bad weather."""
FATES_OF_PAGES = (*FATES, Fate.EXPIRED, Fate.EXPIRED)


class World:
    """Everything, and the network between it.

    Args:
        seed: of the interleaving and of all that happens.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.loop = SeededLoop(seed)
        self.chance = random.Random(f"world {seed}")
        self.story: list[str] = []
        self.problems: list[str] = []
        self.server = Server(self.now)
        self.server.observers.append(self._write_down)
        self.cluster = Cluster(self.server, self.loop, self.chance, self.now, self.tell, self.wrong)
        self.evictions = Evictions(self.server, self.loop, self.chance, self.tell)
        self.calls = Calls()
        history = History(self.server, self.now, POD_SETTINGS)
        self.invariants = Invariants(
            self.server, self.cluster, self.evictions, history, self.calls, self.now, self.wrong
        )
        self.leases = False
        """Whether operators ask for the Lease; without it each of them leads."""
        self.weather = CALM
        self.down_until = 0.0
        self.crash_at: dict[str, tuple[int, Fate]] = {}
        """Process to the number of calls until its crash, and on which side of the commit."""
        self.turns: list[Turn] = []
        """Calls to come whose fate is written; each happens once."""
        self.event_at: dict[str, tuple[int, EventFate]] = {}
        """Process to the number of watch events until one of which the fate is written, and that fate."""
        self.old_lists: dict[str, int] = {}
        """Process to the number of revisions that its lists are old."""
        self.call_counts: dict[str, int] = {}
        self.deaf: set[str] = set()
        """Processes whose watches show nothing of what happens."""
        self.event_seconds = 0.01
        """What a watch event may take in calm weather."""
        self.restarts = True
        self.callers: dict[str, Call] = {}
        self.gateways: dict[str, Gateway] = {}
        self.processes: dict[str, Process] = {}
        self._candidates = 0
        self.leaks = 0
        """Bound pods at the end to whose agents the session never came."""
        self.unplayed = False
        """A planned crash, or what was planned for an event, did not come: there were fewer."""

    # -- time and words ------------------------------------------------------------------------------------------------------------

    def now(self) -> datetime:
        """True time."""
        return EPOCH + timedelta(seconds=self.loop.time())

    def tell(self, who: str, words: str) -> None:
        """One line of the story."""
        self.story.append(f"{self.loop.time():10.3f}  {who:<18} {words}")

    def wrong(self, words: str) -> None:
        """An invariant does not hold."""
        self.problems.append(words)
        self.tell("!!!", words)

    def _write_down(self, change: Change) -> None:
        if _is_routine(change):
            return
        metadata = change.new["metadata"]
        labels = metadata.get("labels") or {}
        verb = {"ADDED": "creates", "MODIFIED": "changes", "DELETED": "removes"}[change.kind]
        words = f"{verb} {metadata['name']} ({metadata['uid']}, revision {change.revision})"
        if change.resource == PODS:
            ready = any(entry.get("ready") for entry in change.new["status"].get("containerStatuses") or ())
            words += f": {labels.get('voicepool.dev/state')}, {change.new['status']['phase']}"
            words += ", Ready" if ready else ""
            words += f", session {labels['voicepool.dev/session']}" if "voicepool.dev/session" in labels else ""
            words += ", to be deleted" if "deletionTimestamp" in metadata else ""
        elif change.resource == LEASES:
            words += f": held by {change.new['spec']['holderIdentity'] or 'nobody'}"
        self.tell(change.actor, words)

    # -- the network (see `Network`) -----------------------------------------------------------------------------------------------

    def call(self, process: Process, verb: str, words: str) -> tuple[Fate, float]:
        """See `Network`."""
        seconds = self.chance.uniform(0.001, 0.01)
        if self.chance.random() < self.weather.slow:
            seconds = self.chance.uniform(0.05, 4.0)
        self.call_counts[process.name] = self.call_counts.get(process.name, 0) + 1
        planned = self.crash_at.get(process.name)
        if planned is not None:
            left, fate = planned
            if left <= 0:
                del self.crash_at[process.name]
                side = "after" if fate is Fate.CRASH_AFTER else "before"
                self.tell(process.name, f"will die right {side} the commit of: {verb} {words}")
                return fate, seconds
            self.crash_at[process.name] = (left - 1, fate)
        for turn in self.turns:
            if turn.fits(process.name, verb, words):
                self.turns.remove(turn)
                self._tell_fate(process, verb, words, turn.fate)
                return turn.fate, seconds if turn.seconds is None else turn.seconds
        fate = Fate.ANSWERED
        if self.chance.random() < self.weather.call:
            fate = self.chance.choice(FATES_OF_PAGES if verb == NEXT_PAGE else FATES)
            self._tell_fate(process, verb, words, fate)
        return fate, seconds

    def _tell_fate(self, process: Process, verb: str, words: str, fate: Fate) -> None:
        self.tell(process.name, f"{verb} {words}: {fate.name.lower().replace('_', ' ')}")

    def at_next_call(
        self, process: str, verb: str, fate: Fate, *, about: str = "", seconds: float | None = None
    ) -> None:
        """Write what becomes of the next call with that verb and these words in it.

        Args:
            process: whose call.
            verb: as the story tells it: get, list, patch, status, create, delete, ... and ``NEXT_PAGE``.
            fate: what becomes of it.
            about: part of the words that follow the verb in the story.
            seconds: how long it takes each way; None is as long as any.
        """
        self.turns.append(Turn(process, verb, about, fate, seconds))

    async def until(self, holds: Callable[[], bool], *, seconds: float = 60.0) -> None:
        """Let time pass until something holds; that it never does is a problem."""
        ends = self.loop.time() + seconds
        while not holds():
            if self.loop.time() > ends:
                self.wrong(f"what the story waits for does not come within {seconds:.0f} s")
                return
            await asyncio.sleep(0.0005)

    def event(self, process: Process) -> tuple[EventFate, float]:
        """See `Network`."""
        if process.name in self.deaf:
            return EventFate.DROPPED, 0.0
        if process.name in self.event_at:
            left, fate = self.event_at.pop(process.name)
            if left <= 0:
                self.tell(process.name, f"a watch event is {fate.name.lower().replace('_', ' ')}")
                return fate, 0.0
            self.event_at[process.name] = (left - 1, fate)
        delay = self.chance.uniform(0.0, self.event_seconds)
        if self.chance.random() < self.weather.event:
            delay = self.chance.uniform(0.01, 20.0)
        if self.chance.random() < self.weather.event:
            fate = self.chance.choice((EventFate.TOLD_TWICE, EventFate.DROPPED, EventFate.CUT))
            self.tell(process.name, f"a watch event is {fate.name.lower().replace('_', ' ')}")
            return fate, delay
        return EventFate.TOLD, delay

    def list_age(self, process: Process) -> int:
        """See `Network`."""
        if process.name in self.old_lists:
            return self.old_lists[process.name]
        if self.chance.random() < self.weather.stale_list:
            age = self.chance.randrange(1, 20)
            self.tell(process.name, f"is given a list that is {age} revisions old")
            return age
        return 0

    def down(self) -> bool:
        """See `Network`."""
        return self.loop.time() < self.down_until

    def crash(self, process: Process) -> None:
        """See `Network`."""
        self.kill(process.name)

    # -- processes -----------------------------------------------------------------------------------------------------------------

    def start(self, name: str) -> None:
        """Start ``operator-...`` or ``gateway-...``."""
        process = Process(name)
        if name in self.processes:
            # Its machine still has the same clock.
            process.clock_offset_seconds = self.processes[name].clock_offset_seconds
        self.processes[name] = process
        self.tell(name, "starts")
        main = self._operator if name.startswith("operator") else self._gateway
        self.loop.spawn(process, self._guarded(process, main))

    def kill(self, name: str, restart_seconds: float | None = None) -> None:
        """SIGKILL; it is started again later."""
        process = self.processes[name]
        if not process.alive:
            return
        self.tell(name, "is killed")
        process.kill()
        self.loop.thaw(process)
        self.gateways.pop(name, None)
        if self.restarts:
            seconds = self.chance.uniform(0.1, 20.0) if restart_seconds is None else restart_seconds
            self.loop.call_later(seconds, self._start_again, name)

    def _start_again(self, name: str) -> None:
        if not self.processes[name].alive:
            self.start(name)

    def freeze(self, name: str, seconds: float) -> None:
        """SIGSTOP, and SIGCONT later: it does not know that time has passed."""
        process = self.processes[name]
        if process.alive and not process.frozen:
            self.tell(name, f"is frozen for {seconds:.0f} s")
            process.frozen = True
            self.loop.call_later(seconds, self.loop.thaw, process)

    async def _guarded(self, process: Process, main: Callable[[Process], Coroutine[Any, Any, None]]) -> None:
        try:
            await main(process)
        except asyncio.CancelledError:
            raise
        except BaseException as error:
            if process.alive:
                self.wrong(f"{process.name} ended by itself: {_leaf(error)!r}")

    def _clock(self, process: Process) -> ServerClock:
        return ServerClock(
            lambda: self.now() + timedelta(seconds=process.clock_offset_seconds), monotonic=self.loop.time
        )

    async def _operator(self, process: Process) -> None:
        clock = self._clock(process)
        client = Client(self.server, self, process, clock)
        pods = pod_informer(client, None, jitter=self.chance)
        budgets = budget_informer(client, None, jitter=self.chance)
        election = self._election(process, clock) if self.leases else None
        controller = Controller(
            client,
            pods,
            PoolStore(),
            POD_SETTINGS,
            OperatorMetrics(CollectorRegistry()),
            clock.now,
            ControllerSettings(workers=2, orphan_retention_seconds=60, resync_seconds=300.0),
            may_write=lambda: election is None or election.leading(),
            jitter=self.chance,
            budgets=budgets,
            ask_agent=SimulatedCourier(self.cluster, process, self.chance).status,
        )

        async def work() -> None:
            if election is None:
                await controller.work()
            else:
                await pods.synced.wait()
                await controller.pools_listed.wait()
                await election.run(controller.work)

        async with asyncio.TaskGroup() as group:
            group.create_task(pods.run())
            group.create_task(budgets.run())
            group.create_task(controller.watch())
            group.create_task(work())
            group.create_task(_watch_pools(client, controller))

    def _election(self, process: Process, clock: ServerClock) -> Election:
        self._candidates += 1
        return Election(
            Client(self.server, self, process, clock),
            NAMESPACE,
            "voicepool",
            # A process that is started again is another candidate.
            f"{process.name}/{self._candidates}",
            clock=self.loop.time,
            now=clock.now,
            jitter=self.chance,
        )

    async def _gateway(self, process: Process) -> None:
        clock = self._clock(process)
        client = Client(self.server, self, process, clock)
        view = ClusterView()
        pools: Informer[PoolFact] = Informer(client, POOLS, None, "", pool_from_json, jitter=self.chance)
        pods: Informer[PodFact] = Informer(client, PODS, None, LABEL_POOL, pod_from_json, jitter=self.chance)
        pools.handlers.append(_pool_handler(view))
        pods.handlers.append(_pod_handler(view))
        signer = Signer(_KEY, clock.now)
        sessions = Sessions(
            kube=client,
            view=view,
            allocator=Allocator(view, monotonic=self.loop.time, identity=process.name),
            courier=SimulatedCourier(self.cluster, process, self.chance),
            signer=signer,
            servers=_Servers(),
            rooms=SimulatedRooms(self.cluster),
            options=GatewayOptions(),
            metrics=GatewayMetrics(),
            identity=process.name,
            pod_fact=pod_from_json,
            cold_pod=_cold_pods(signer),
            now=clock.now,
            jitter=self.chance.random,
        )
        async with asyncio.TaskGroup() as group:
            group.create_task(pools.run())
            group.create_task(pods.run())
            await pools.synced.wait()
            await pods.synced.wait()
            self.gateways[process.name] = Gateway(process, sessions, view)

    # -- what people do ------------------------------------------------------------------------------------------------------------

    def create_pool(self, name: str = POOL, **spec: Any) -> None:
        """Apply a pool; by default the one that all else here is about."""
        body = {**_template(1), **{field: value for field, value in spec.items() if value is not None}}
        self.server.create(POOLS, NAMESPACE, {"metadata": {"name": name}, "spec": body}, "user")

    def change_pool(self, **spec: Any) -> None:
        """Change fields of its spec, if it is there."""
        try:
            self.server.merge_patch(POOLS, NAMESPACE, POOL, {"spec": spec}, "user", None)
        except NotFound:
            return
        shown = {name: value for name, value in spec.items() if name != "template"}
        image = spec["template"]["spec"]["containers"][0]["image"] if "template" in spec else None
        self.tell("user", f"sets {shown or image}")

    def new_image(self, number: int | str) -> None:
        """Change the pod template."""
        self.change_pool(**_template(number))

    def delete_pool(self, *, foreground: bool = False) -> None:
        """Delete the pool; the garbage collector sees to its pods."""
        try:
            self.server.delete(POOLS, NAMESPACE, POOL, "user", foreground=foreground)
        except NotFound:
            return
        self.loop.call_later(self.chance.uniform(0.1, 10.0), self.server.collect_garbage)

    def pool(self) -> Json | None:
        """The pool, if it exists."""
        return next((pool for pool in self.server.all(POOLS) if pool["metadata"]["name"] == POOL), None)

    def start_session(
        self, session: str, *, keyed: bool, gateway: str | None = None, stays: bool = False
    ) -> Call | None:
        """A caller asks one of the gateways that work; again, if the session is known already."""
        names = sorted(self.gateways)
        if not names:
            return None
        chosen = self.gateways[gateway or self.chance.choice(names)]
        call = self.callers.setdefault(session, Call(session, keyed, stays))
        self.tell("caller", f"asks {chosen.process.name} for session {session}{' (keyed)' if keyed else ''}")
        call.tasks.append(self.loop.spawn(chosen.process, self._call(chosen, call)))
        return call

    async def _call(self, gateway: Gateway, call: Call) -> None:
        try:
            started = await gateway.sessions.start(
                StartRequest(NAMESPACE, POOL, call.session, call.keyed, body={}, caller=call.session[-1])
            )
        except GatewayError as error:
            call.outcomes.append(error.code)
            self.tell("caller", f"{call.session} is told {error.code}: {error.detail}")
            return
        except Exception as error:
            if gateway.process.alive:
                self.wrong(f"{gateway.process.name} failed on session {call.session}: {error!r}")
            return
        self._answered(call, started)

    def _answered(self, call: Call, started: Started) -> None:
        uid = started.pod.uid
        call.outcomes.append("started")
        self.tell("caller", f"{call.session} is told to have {started.pod.name} ({uid})")
        agent = self.cluster.agents.get(uid)
        if agent is None or (agent.alive and agent.session != call.session):
            self.wrong(f"{call.session} was told to have {started.pod.name}, whose agent does not have the session")
            return
        before = self.calls.answered.get(call.session)
        other = self.cluster.agents.get(before or uid)
        if before not in (None, uid) and other is not None and other.in_session:
            self.wrong(f"session {call.session} was given {started.pod.name} while {other.key[1]} has it")
        self.calls.answered[call.session] = uid
        agent.claimed = True
        if before != uid and not call.stays:
            long = self.chance.random() < 0.1 and call.session != "last"
            self.loop.call_later(self.chance.uniform(1.0, 900.0 if long else 60.0), self._hang_up, call.session, uid)

    def _hang_up(self, session: str, uid: str) -> None:
        agent = self.cluster.agents[uid]
        if agent.session == session and agent.in_session:
            self.calls.given_up.add(session)
            self.tell("caller", f"{session} hangs up")
            self.cluster.finish(agent, "the caller left")

    def caller_goes(self, call: Call) -> None:
        """The caller's connection to the gateway breaks before the answer."""
        for task in call.tasks:
            if not task.done():
                self.tell("caller", f"{call.session} goes before the answer")
                self.calls.given_up.add(call.session)
                task.cancel()

    def end_session(self, session: str) -> None:
        """``DELETE /sessions/{id}``."""
        names = sorted(self.gateways)
        uid = self.calls.answered.get(session)
        fact = next((fact for fact in map(pod_from_json, self.server.all(PODS)) if fact and fact.uid == uid), None)
        if not names or fact is None:
            return
        gateway = self.gateways[self.chance.choice(names)]
        self.calls.ended.add(session)
        self.tell("caller", f"ends session {session} at {gateway.process.name}")

        async def end(pod: PodFact = fact) -> None:
            try:
                await gateway.sessions.end(pod, session, "cancel")
            except GatewayError as error:
                self.tell("caller", f"{session} is not ended: {error.code}")

        self.loop.spawn(gateway.process, end())

    # -- the frame -----------------------------------------------------------------------------------------------------------------

    def run(self, story: Callable[[World], Any]) -> None:
        """Run a coroutine function of this world in its loop, and clear everything away."""
        asyncio.set_event_loop(self.loop)
        try:
            self.loop.run_until_complete(story(self))
        finally:
            self.restarts = False
            self.loop.set_exception_handler(lambda _loop, _context: None)
            for process in self.processes.values():
                process.kill()
            for _ in range(3):
                tasks = asyncio.all_tasks(self.loop)
                for task in tasks:
                    task.cancel()
                if tasks:
                    self.loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
            self.loop.run_until_complete(self.loop.shutdown_asyncgens())
            asyncio.set_event_loop(None)
            self.loop.close()

    async def settle(self, settling_seconds: float = SETTLING_SECONDS, quiet_seconds: float = QUIET_SECONDS) -> None:
        """All trouble ends, but for clocks that are wrong. The pool must become what its spec says, serve a caller, and then be left alone."""
        self.tell("world", "all trouble ends")
        self.weather, self.down_until = CALM, 0.0
        self.crash_at.clear()
        self.cluster.healthy, self.cluster.delivery_trouble, self.cluster.rooms_down = 1.0, 0.0, False
        for name, process in self.processes.items():
            if process.frozen:
                self.loop.thaw(process)
            if not process.alive:
                self._start_again(name)
        pool = self.pool()
        if pool is not None and _image(pool) == REFUSED_IMAGE:
            self.new_image("good")
        await asyncio.sleep(settling_seconds)
        self.server.collect_garbage()
        await asyncio.sleep(60.0)
        self.invariants.calm = True
        for call in self.callers.values():
            if any(not task.done() for task in call.tasks):
                self.wrong(f"nobody ever answers the caller of {call.session}")
        self._check_converged()
        if self.problems:
            return
        if self.pool() is not None and self._warm():
            last = self.start_session("last", keyed=False)
            await asyncio.sleep(5.0)
            if last is None or last.outcomes != ["started"]:
                self.wrong(f"a caller of a settled pool with warm pods is told {last.outcomes if last else 'nothing'}")
            await asyncio.sleep(LAST_CALL_SECONDS)
            self._check_converged()
        self.leaks = sum(
            agent.state == "parked" and fact.state is BindState.BOUND
            for fact in filter(None, map(pod_from_json, self.server.all(PODS)))
            if (agent := self.cluster.agents.get(fact.uid)) is not None
        )
        self._check_no_storm()
        self.tell("world", "from here on nobody has a reason to write")
        revision = self.server.revision
        await asyncio.sleep(quiet_seconds)
        since = [change for change in self.server.log[revision:] if change.resource != LEASES]
        # A pod that reaches its deadline is news, and is written down.
        if since and since[0].actor in self.processes:
            self.wrong(f"{since[0].actor} wrote to a settled pool")

    def _check_no_storm(self) -> None:
        """An operator writes about as often as something happens. Of two that lead for good only the statuses are judged.

        While one of those has missed an event, it may create what the other deletes: the Lease is there so that this cannot go on.
        """
        operators = [name for name in self.processes if name.startswith("operator")]
        changes = [change for change in self.server.log if change.resource != LEASES]
        written = [change for change in changes if change.actor in operators]
        others = len(changes) - len(written)
        judged = sum(self.leases or len(operators) == 1 or change.resource == POOLS for change in written)
        if judged > len(operators) * (2 * others + WRITES_WITHOUT_CAUSE):
            self.wrong(f"the operators wrote {judged} times, while {others} writes of others gave them reason to")

    def _warm(self) -> bool:
        return any(fact.ready for fact in map(pod_from_json, self.server.all(PODS)) if fact and not fact.session)

    def _check_converged(self) -> None:
        for words in self.invariants.not_converged():
            self.wrong(f"not converged: {words}")


async def _watch_pools(client: Client, controller: Controller) -> None:
    """What kopf does for the operator: list, then watch, and hand on what is seen; what vanished meanwhile it does not notice."""
    while True:
        try:
            token = ""
            version = ""
            while True:
                page = await client.list_page(POOLS, None, continue_token=token)
                version = version or page["metadata"]["resourceVersion"]
                for obj in page["items"]:
                    _hand_on("ADDED", obj, controller)
                token = page["metadata"].get("continue") or ""
                if not token:
                    break
            while True:
                async for event in client.watch(POOLS, None, resource_version=version):
                    if event.type == "ERROR":
                        raise Gone("too old resource version", status=410)
                    version = event.object["metadata"]["resourceVersion"]
                    if event.type != "BOOKMARK":
                        _hand_on(event.type, event.object, controller)
        except Gone:
            continue
        except KubeApiError:
            await asyncio.sleep(1.0)


def _hand_on(kind: str, obj: Json, controller: Controller) -> None:
    metadata = obj["metadata"]
    pool = pool_from_json(obj)
    if kind == "DELETED":
        controller.pool_deleted((metadata["namespace"], metadata["name"]), metadata["uid"])
    elif pool is not None:
        controller.pool_changed(pool)


def _is_routine(change: Change) -> bool:
    """The renewal of a Lease, or a count in a budget."""
    if change.old is None or change.kind == "DELETED":
        return False
    before, after = change.old["spec"], change.new["spec"]
    if change.resource == LEASES:
        return bool(before["holderIdentity"] == after["holderIdentity"])
    return change.resource == BUDGETS and bool(before == after)


def _template(number: int | str) -> Json:
    image = REFUSED_IMAGE if number == REFUSED_IMAGE else f"example.org/agent:{number}"
    return {"template": {"spec": {"containers": [{"name": "agent", "image": image}]}}}


def _image(pool: Json) -> str:
    return str(pool["spec"]["template"]["spec"]["containers"][0]["image"])


def _leaf(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
