"""The machines: a scheduler, kubelets, and an agent in each pod that takes orders and joins rooms.

Agents keep the contract: an order is for one pod uid, good until its expiry and used once; one session in a life; the room refuses a token that has
expired. Everything that can go wrong with a machine can go wrong here: a pod fails, hangs, cannot pull its image, is evicted, or vanishes with its node.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, Literal

import jwt

from voicepool.agents import AgentStatus
from voicepool.gateway.delivery import Accepted, Call, Courier, NotReached, Outcome, Refused, Unknown
from voicepool.gateway.livekit import LiveKitServer, RoomState
from voicepool.kube.api import PODS, Json
from voicepool.model import AGENT_CONTAINER, PodFact

from .loop import Process, SeededLoop
from .server import Change, Key, Server

Start = Literal["well", "fails", "hangs"]

JOIN_TIMEOUT_SECONDS = 30.0
NODE_SILENT_SECONDS = 10.0
"""From the death of a node until its pods are said not to be Ready."""
NODE_LOST_SECONDS = 40.0
"""From the death of a node to the removal of its pods (minutes in a real cluster)."""


@dataclass
class Agent:
    """The process in one pod."""

    uid: str
    key: Key
    node: str
    address: str
    state: str = "starting"
    session: str | None = None
    token_expires: datetime | None = None
    claimed: bool = False
    """A caller is, or will be, in the room."""
    used: set[str] = field(default_factory=set)

    @property
    def alive(self) -> bool:
        """Its process runs."""
        return self.state != "exited"

    @property
    def in_session(self) -> bool:
        """It has taken a session that is not over."""
        return self.state in ("accepted", "joined")


class Cluster:
    """See the module.

    Args:
        server: where pods are read and their status is written.
        loop: timers.
        chance: the world's randomness.
        now: true time.
        tell: the story.
        wrong: an invariant does not hold.
    """

    def __init__(
        self,
        server: Server,
        loop: SeededLoop,
        chance: random.Random,
        now: Callable[[], datetime],
        tell: Callable[[str, str], None],
        wrong: Callable[[str], None],
    ) -> None:
        self.agents: dict[str, Agent] = {}
        """Every agent that ever ran, by pod uid."""
        self.nodes: dict[str, bool] = {f"node-{number}": True for number in range(3)}
        self.healthy = 1.0
        """The share of pods that start as they should."""
        self.starts: deque[Start] = deque()
        """How the next pods start, one after the other; once it is empty chance decides."""
        self.delivery_trouble = 0.0
        self.rooms_down = False
        self.ended_by_order: Callable[[Agent], None] = lambda agent: None
        self._server = server
        self._loop = loop
        self._chance = chance
        self._now = now
        self._tell = tell
        self._wrong = wrong
        server.observers.append(self._changed)

    # -- pods ----------------------------------------------------------------------------------------------------------------------

    def _changed(self, change: Change) -> None:
        if change.resource != PODS:
            return
        metadata = change.new["metadata"]
        uid, key = metadata["uid"], (metadata["namespace"], metadata["name"])
        if change.kind == "ADDED":
            self._loop.call_later(self._chance.uniform(0.01, 0.5), self._schedule, uid, key)
        elif change.kind == "DELETED":
            agent = self.agents.get(uid)
            if agent is not None and agent.alive:
                agent.state = "exited"
        else:
            grace = metadata.get("deletionGracePeriodSeconds")
            before = (change.old or {})["metadata"].get("deletionGracePeriodSeconds")
            if grace is not None and before != grace:
                self._loop.call_later(self._chance.uniform(0.05, 0.5), self._terminate, uid, key, float(grace))
            deadline = change.new["spec"].get("activeDeadlineSeconds")
            if deadline is not None and "activeDeadlineSeconds" not in (change.old or {})["spec"]:
                started = datetime.fromisoformat(change.new["status"]["startTime"])
                left = (started + timedelta(seconds=deadline) - self._now()).total_seconds()
                self._loop.call_later(max(0.0, left), self.fail, uid, "DeadlineExceeded")

    def _schedule(self, uid: str, key: Key) -> None:
        up = [name for name, is_up in self.nodes.items() if is_up]
        if not up:
            condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "no node"}
            if self._server.change(
                PODS, key, uid, "scheduler", lambda pod: pod["status"].update(conditions=[condition])
            ):
                self._loop.call_later(5.0, self._schedule, uid, key)
            return
        node = self._chance.choice(up)

        def assign(pod: Json) -> None:
            pod["spec"]["nodeName"] = node
            _set_condition(pod, "PodScheduled", True, self._now())

        if self._server.change(PODS, key, uid, "scheduler", assign):
            delay = self._chance.uniform(0.1, 1.0)
            if self._chance.random() < (1.0 - self.healthy) / 4:
                self._loop.call_later(delay, self._image_error, uid, key, node)
            else:
                self._loop.call_later(delay, self._run, uid, key, node)

    def _image_error(self, uid: str, key: Key, node: str) -> None:
        waiting = {"waiting": {"reason": "ErrImagePull", "message": "no such image"}}
        if self._update(uid, key, node, "Pending", ready=False, state=waiting):
            self._tell("kubelet", f"cannot pull the image of {key[1]}")
            self._loop.call_later(self._chance.uniform(1.0, 60.0), self._run, uid, key, node)

    def _run(self, uid: str, key: Key, node: str) -> None:
        taken = {agent.address for agent in self.agents.values() if agent.alive}
        # The lowest free address: one that a dead pod had a moment ago is used again at once.
        address = next(a for n in range(1, 10_000) if (a := f"10.0.0.{n}") not in taken)
        agent = Agent(uid, key, node, address)
        if not self._update(uid, key, node, "Running", ready=False, state=self._running(), address=address):
            return
        self.agents[uid] = agent
        match self.starts.popleft() if self.starts else self._start_by_chance():
            case "fails":
                self._loop.call_later(self._chance.uniform(0.2, 3.0), self.fail, uid, "could not build its pipeline")
            case "well":
                self._loop.call_later(self._chance.uniform(0.3, 3.0), self._parked, uid)
            case "hangs":
                self._tell("kubelet", f"{key[1]} hangs while it starts")

    def _start_by_chance(self) -> Start:
        if self._chance.random() <= self.healthy:
            return "well"
        return "fails" if self._chance.random() < 0.5 else "hangs"

    def _parked(self, uid: str) -> None:
        agent = self.agents[uid]
        if agent.state == "starting" and self.nodes[agent.node]:
            agent.state = "parked"
            self._readiness(uid, True)

    def _readiness(self, uid: str, ready: bool) -> None:
        agent = self.agents[uid]
        if agent.alive and ready == (agent.state == "parked"):
            self._update(
                uid, agent.key, agent.node, "Running", ready=ready, state=self._running(), address=agent.address
            )

    def _running(self) -> Json:
        return {"running": {"startedAt": self._now().isoformat()}}

    def _update(
        self, uid: str, key: Key, node: str, phase: str, *, ready: bool, state: Json, address: str | None = None
    ) -> bool:
        if not self.nodes[node]:
            return False
        now = self._now().isoformat()

        def write(pod: Json) -> None:
            status = pod["status"]
            if status["phase"] in ("Succeeded", "Failed"):
                return
            status.setdefault("startTime", now)
            status["phase"] = phase
            status["podIP"] = address
            old = (status.get("containerStatuses") or [{}])[0]
            old_state = old.get("state") or {}
            merged = old_state if "running" in state and "running" in old_state else state
            status["containerStatuses"] = [{"name": AGENT_CONTAINER, "ready": ready, "state": merged}]
            for kind in ("Ready", "ContainersReady"):
                _set_condition(pod, kind, ready, self._now())

        return self._server.change(PODS, key, uid, "kubelet", write)

    def exit(self, uid: str, code: int, why: str, *, silently: bool = False) -> None:
        """The agent's process exits, and says why unless it has nothing to say."""
        agent = self.agents.get(uid)
        if agent is None or not agent.alive:
            return
        agent.state = "exited"
        self._tell("agent", f"{agent.key[1]} exits with {code}: {why}")
        if not self.nodes[agent.node]:
            return
        words = {} if silently else {"message": why}
        reason = "Error" if code else "Completed"
        ended = {
            "terminated": {"exitCode": code, "reason": reason, "finishedAt": self._now().isoformat(), **words},
        }
        phase = "Failed" if code else "Succeeded"
        self._update(uid, agent.key, agent.node, phase, ready=False, state=ended)
        self._loop.call_later(0.1, self._remove_if_deleted, uid, agent.key)

    def fail(self, uid: str, why: str) -> None:
        """The pod dies of something outside of voicepool."""
        self.exit(uid, 137, why)

    def _remove_if_deleted(self, uid: str, key: Key) -> None:
        pod = next((pod for pod in self._server.all(PODS) if pod["metadata"]["uid"] == uid), None)
        if pod is not None and "deletionTimestamp" in pod["metadata"]:
            self._server.remove(PODS, key, uid, "kubelet")

    def _terminate(self, uid: str, key: Key, grace_seconds: float) -> None:
        """SIGTERM: an agent without a session goes at once, one with a session when it is over or the grace is."""
        agent = self.agents.get(uid)
        if agent is None or not agent.alive:
            self._server.remove(PODS, key, uid, "kubelet")
        elif not self.nodes[agent.node]:
            return
        elif agent.in_session:
            self._loop.call_later(grace_seconds, self.exit, uid, 137, "its grace was over")
        else:
            self.exit(uid, 0, "SIGTERM", silently=True)

    def lose_node(self, node: str) -> None:
        """The machine is gone with all that ran on it; later its pods are removed."""
        self.nodes[node] = False
        for agent in self.agents.values():
            if agent.node == node and agent.alive:
                agent.state = "exited"
        self._loop.call_later(NODE_SILENT_SECONDS, self._say_not_ready, node)
        self._loop.call_later(NODE_LOST_SECONDS, self._collect_lost, node)

    def _say_not_ready(self, node: str) -> None:
        """Of the pods of a node that is silent one condition is changed; what its kubelet said of their containers stays as it was."""

        def mark(pod: Json) -> None:
            if any(condition["type"] == "Ready" for condition in pod["status"].get("conditions") or ()):
                _set_condition(pod, "Ready", False, self._now())

        for pod in self._server.all(PODS):
            if pod["spec"].get("nodeName") == node:
                key = (pod["metadata"]["namespace"], pod["metadata"]["name"])
                self._server.change(PODS, key, pod["metadata"]["uid"], "node controller", mark)

    def _collect_lost(self, node: str) -> None:
        for pod in self._server.all(PODS):
            if pod["spec"].get("nodeName") == node and not self._runs(pod):
                key = (pod["metadata"]["namespace"], pod["metadata"]["name"])
                self._server.remove(PODS, key, pod["metadata"]["uid"], "pod garbage collector")
        self.nodes[node] = True

    def _runs(self, pod: Json) -> bool:
        agent = self.agents.get(pod["metadata"]["uid"])
        return agent is not None and agent.alive

    # -- orders --------------------------------------------------------------------------------------------------------------------

    def at(self, address: str | None) -> Agent | None:
        """Who listens at an address now."""
        return next((agent for agent in self.agents.values() if agent.alive and agent.address == address), None)

    def take(self, agent: Agent, order: str) -> Outcome:
        """``POST /bind`` at an agent."""
        claims: dict[str, Any] = jwt.decode(order, options={"verify_signature": False})
        expires = datetime.fromtimestamp(claims["exp"], tz=self._now().tzinfo)
        if claims["aud"] != agent.uid or expires <= self._now() or claims["jti"] in agent.used:
            return Refused("INVALID_ASSIGNMENT")
        agent.used.add(claims["jti"])
        if agent.in_session:
            return Accepted() if agent.session == claims["session"] else Refused("ALREADY_BOUND")
        if agent.state != "parked":
            return Refused("NOT_PARKED")
        agent.state, agent.session, agent.token_expires = "accepted", claims["session"], expires
        self._tell("agent", f"{agent.key[1]} takes session {agent.session}")
        pod = next((pod for pod in self._server.all(PODS) if pod["metadata"]["uid"] == agent.uid), None)
        if pod is None or pod["metadata"]["labels"].get("voicepool.dev/session") != agent.session:
            self._wrong(f"{agent.key[1]} was brought session {agent.session} without being bound to it")
        self._loop.call_later(self._chance.uniform(0.0, 1.5), self._readiness, agent.uid, False)
        slow = self._chance.random() < self.delivery_trouble
        self._loop.call_later(self._chance.uniform(0.05, 20.0 if slow else 0.8), self._join, agent)
        return Accepted()

    def _join(self, agent: Agent) -> None:
        if agent.state != "accepted":
            return
        if agent.token_expires is None or agent.token_expires <= self._now() or self.rooms_down:
            self.exit(agent.uid, 1, "could not join its room")
            return
        for other in self.agents.values():
            if other is not agent and other.session == agent.session and other.state == "joined":
                self._wrong(f"session {agent.session} has two agents: {other.key[1]} and {agent.key[1]}")
        agent.state = "joined"
        self._loop.call_later(JOIN_TIMEOUT_SECONDS, self._nobody_came, agent)

    def _nobody_came(self, agent: Agent) -> None:
        if agent.state == "joined" and not agent.claimed:
            self.finish(agent, "nobody came")

    def finish(self, agent: Agent, why: str) -> None:
        """The session is over; the agent says goodbye."""
        if agent.in_session:
            agent.state = "ending"
            self._loop.call_later(self._chance.uniform(0.1, 1.0), self.exit, agent.uid, 0, why)


class SimulatedCourier(Courier):
    """Brings orders over a network that loses requests and answers."""

    def __init__(self, cluster: Cluster, process: Process, chance: random.Random) -> None:
        self._cluster = cluster
        self._process = process
        self._chance = chance

    async def bind(self, pod: PodFact, order: str) -> Outcome:
        return await self._bring(pod, lambda agent: self._cluster.take(agent, order), lost_seconds=4.0)

    def call(self, pod: PodFact, order: str) -> Call:
        async def bring(body: AsyncIterator[bytes]) -> Outcome:
            async for _ in body:
                return await self.bind(pod, order)
            raise AssertionError("an order has one piece")

        return Call(bring, order, 4.0)

    async def end(self, pod: PodFact, order: str) -> Outcome:
        claims: dict[str, Any] = jwt.decode(order, options={"verify_signature": False})

        def end(agent: Agent) -> Outcome:
            if claims["aud"] != agent.uid or claims["session"] != agent.session:
                return Refused("INVALID_ASSIGNMENT")
            self._cluster.ended_by_order(agent)
            self._cluster.finish(agent, f"the order to {claims['action']}")
            return Accepted()

        return await self._bring(pod, end, lost_seconds=4.0)

    async def status(self, pod: PodFact) -> AgentStatus | None:
        await self._way()
        agent = self._cluster.at(pod.pod_ip)
        if agent is None or agent.uid != pod.uid or self._trouble():
            await asyncio.sleep(1.0)
            return None
        return AgentStatus(agent.state, agent.session, agent.uid)

    async def wait_joined(self, pod: PodFact, seconds: float) -> AgentStatus | None:
        await asyncio.sleep(seconds)
        return await self.status(pod)

    async def _bring(self, pod: PodFact, obey: Any, *, lost_seconds: float) -> Outcome:
        await self._way()
        agent = self._cluster.at(pod.pod_ip)
        if agent is None:
            return NotReached()
        if not self._trouble():
            outcome: Outcome = obey(agent)
            await self._way()
            return outcome
        match self._chance.randrange(4):
            case 0:
                return NotReached()
            case 1:
                obey(agent)
            case 2:
                # It lies in a buffer of a machine that is busy, and is read when nobody waits for the answer any more.
                loop = asyncio.get_running_loop()
                loop.call_later(self._chance.uniform(4.0, 15.0), lambda: obey(agent) if agent.alive else None)
            case _:
                pass
        await asyncio.sleep(lost_seconds)
        return Unknown()

    def _trouble(self) -> bool:
        return self._chance.random() < self._cluster.delivery_trouble

    async def _way(self) -> None:
        await asyncio.sleep(self._chance.uniform(0.001, 0.01))
        if not self._process.alive:
            raise asyncio.CancelledError


class SimulatedRooms:
    """Rooms of a LiveKit server that always answers about them."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster

    async def create(self, server: LiveKitServer, room: str, *, empty_timeout_seconds: int) -> None:
        await asyncio.sleep(0.001)

    async def has(self, server: LiveKitServer, room: str, identity: str) -> bool:
        await asyncio.sleep(0.001)
        session = identity.removeprefix("agent-")
        return any(agent.state == "joined" and agent.session == session for agent in self._cluster.agents.values())

    async def find(self, server: LiveKitServer, room: str) -> RoomState | None:
        await asyncio.sleep(0.001)
        return None

    async def callers(self, server: LiveKitServer, room: str) -> int:
        await asyncio.sleep(0.001)
        return 0

    async def delete(self, server: LiveKitServer, room: str) -> bool:
        await asyncio.sleep(0.001)
        return False


def _set_condition(pod: Json, kind: str, value: bool, now: datetime) -> None:
    conditions: list[Json] = pod["status"].setdefault("conditions", [])
    word = "True" if value else "False"
    for condition in conditions:
        if condition["type"] == kind:
            if condition["status"] != word:
                condition.update(status=word, lastTransitionTime=now.isoformat())
            return
    conditions.append({"type": kind, "status": word, "lastTransitionTime": now.isoformat()})
