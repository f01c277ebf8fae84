"""Plays the kubelet and the agents of a pool on a cluster without a node.

Each pod gets a loopback address of its own and an agent that listens there, answers as the contract says and ends its session after a while; what the
agent does is written to the pod's status, as a kubelet would. A pod that is deleted loses its agent at once, whatever it does: that is what is
watched for.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import aiohttp
import jwt
from aiohttp import web
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from tests.cluster.chaos.judge import Acceptance
from voicepool.kube.api import PODS, Json, KubeApi, KubeApiError
from voicepool.kube.convert import pod_from_json
from voicepool.kube.informer import Informer
from voicepool.model import AGENT_PORT, LABEL_POOL, BindState, Key, PodFact

START_SECONDS = (0.05, 0.15)
SESSION_SECONDS = (1.0, 2.0)
RETRY_SECONDS = 0.1


@dataclass(slots=True)
class Agent:
    """One agent, and the whole truth about it."""

    uid: str
    pod: str
    address: str
    state: str = "starting"
    session: str = ""
    killed: bool = False
    """Its pod was deleted while it had a session."""
    accepted_at: datetime | None = None
    accepted: asyncio.Event = field(default_factory=asyncio.Event)
    orders: int = 0
    """Assignments that were brought to it."""
    looked_at: int = 0
    """How many of them it has looked at."""
    told_to_end: bool = False
    joined: bool | None = None
    """Whether LiveKit let it into the room; None where it has not tried."""
    clock_behind_seconds: float = 0.0
    """How wrong its idea is of when an order is over."""
    answers_after_seconds: float = 0.0
    """How long it takes from accepting a session to saying so."""
    thawed: asyncio.Event = field(default_factory=asyncio.Event)
    """Unless this is set its process stands still."""

    def __post_init__(self) -> None:
        self.thawed.set()

    def freeze(self, seconds: float) -> None:
        """Stand still for a while; what comes meanwhile is looked at after that."""
        self.thawed.clear()
        asyncio.get_running_loop().call_later(seconds, self.thawed.set)

    @property
    def in_call(self) -> bool:
        """Whether a caller would notice its end."""
        return self.state == "accepted"


class Agents:
    """All agents of a namespace. An async context manager.

    Args:
        api: the API server, with the kubelet's rights.
        namespace: where the pods are.
        public_key: of the gateways.
        network: first two numbers of the loopback addresses, such as ``127.21``.
        chance: lengths of starts and sessions.
        http: with it agents ask LiveKit to be let in; None: they are taken to be.
    """

    def __init__(
        self,
        api: KubeApi,
        namespace: str,
        public_key: Ed25519PublicKey,
        network: str,
        chance: random.Random,
        http: aiohttp.ClientSession | None = None,
    ) -> None:
        self.pods: Informer[PodFact] = Informer(api, PODS, namespace, LABEL_POOL, pod_from_json)
        self.by_uid: dict[str, Agent] = {}
        """All agents that there ever were."""
        self.last_accepted_at = 0.0
        """When a caller got an agent, by the event loop's clock."""
        self.errors: list[BaseException] = []
        """What went wrong with this play itself."""
        self.session_seconds = SESSION_SECONDS
        """Shortest and longest call."""
        self.on_order: Callable[[Agent], None] = lambda _agent: None
        """Told of each assignment that arrives, before its agent looks at it."""
        self._api = api
        self._namespace = namespace
        self._public_key = public_key
        self._network = network
        self._chance = chance
        self._by_address: dict[str, Agent] = {}
        self._servers: dict[str, asyncio.Server] = {}
        self._lives: dict[str, asyncio.Task[None]] = {}
        self._joining: set[asyncio.Task[None]] = set()
        self._deaf: list[socket.socket] = []
        self._http = http
        self._used: set[str] = set()
        self.pods.handlers.append(self._pod_changed)

    async def __aenter__(self) -> Agents:
        application = web.Application()
        application.add_routes(
            [web.post("/bind", self._bind), web.post("/end", self._end), web.get("/status", self._status)]
        )
        self._runner = web.AppRunner(application, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        self._following = asyncio.create_task(self.pods.run())
        self._following.add_done_callback(self._done)
        await self.pods.synced.wait()
        return self

    async def __aexit__(self, *_: object) -> None:
        tasks = [self._following, *self._lives.values(), *self._joining]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for deaf in self._deaf:
            deaf.close()
        for agent in self.by_uid.values():
            self._close(agent)
        await self._runner.cleanup()

    @property
    def accepted(self) -> dict[str, Acceptance]:
        """What agents ever accepted, by the uid of their pod; who was not let into the room has no call."""
        return {
            agent.uid: Acceptance(agent.session, agent.accepted_at)
            for agent in self.by_uid.values()
            if agent.accepted_at is not None and agent.joined is not False
        }

    def killed(self) -> list[str]:
        """The calls that were cut off."""
        return [f"{agent.session} in {agent.pod}" for agent in self.by_uid.values() if agent.killed]

    def with_session(self, session: str) -> list[Agent]:
        """The agents that accepted a session."""
        return [agent for agent in self.by_uid.values() if agent.session == session]

    def in_calls(self) -> int:
        """How many calls go on."""
        return sum(agent.in_call for agent in self._by_address.values())

    def unbound(self) -> list[PodFact]:
        """Pods without a session, warm or starting."""
        return [pod for pod in self.pods if pod.state is BindState.WARM and not pod.deleting and not pod.finished]

    def warm(self) -> list[PodFact]:
        """Pods that a caller could get."""
        return [pod for pod in self.unbound() if pod.ready]

    def ended(self) -> list[PodFact]:
        """Pods whose session is over, and that are still there."""
        return [pod for pod in self.pods if pod.finished]

    def undelivered(self) -> list[PodFact]:
        """Pods that are bound to a session which never came to their agent."""
        return [pod for pod in self.pods if pod.state is BindState.BOUND and not self.by_uid[pod.uid].session]

    def has_gone(self, agent: Agent) -> bool:
        """Whether an agent's pod is known to be no longer there."""
        return agent.uid not in self._servers

    async def cut_off(self, agent: Agent) -> None:
        """Let nothing reach an agent any more: to whoever connects it is as if its node had gone."""
        self._close(agent)
        # Its listener is closed in the next turn of the event loop.
        await asyncio.sleep(0)
        deaf = socket.create_server((agent.address, AGENT_PORT), backlog=0)
        self._deaf.append(deaf)
        for _ in range(2):
            # What does not fit into the queue of a socket that nobody takes anything from is dropped without a word.
            filler = socket.socket()
            filler.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                filler.connect((agent.address, AGENT_PORT))
            self._deaf.append(filler)

    # The kubelet.

    def _pod_changed(self, key: Key, old: PodFact | None, new: PodFact | None) -> None:
        if old is not None and (new is None or new.uid != old.uid):
            self._remove(old.uid)
        if new is not None and new.uid not in self.by_uid and not new.deleting and not new.finished:
            number = len(self.by_uid) + 1
            agent = Agent(new.uid, new.name, f"{self._network}.{number // 250}.{number % 250 + 1}")
            self.by_uid[new.uid] = agent
            life = asyncio.create_task(self._live(agent))
            life.add_done_callback(self._done)
            self._lives[new.uid] = life

    def _done(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self.errors.append(error)

    def _remove(self, uid: str) -> None:
        agent = self.by_uid.get(uid)
        if agent is None:
            return
        agent.killed = agent.in_call
        if (life := self._lives.pop(uid, None)) is not None:
            life.cancel()
        self._close(agent)

    def _close(self, agent: Agent) -> None:
        self._by_address.pop(agent.address, None)
        if (server := self._servers.pop(agent.uid, None)) is not None:
            loop = asyncio.get_running_loop()
            for listening in server.sockets:
                loop.remove_reader(listening.fileno())
            # A connection that has just been accepted is still to be attached to its server; asyncio leaks it where that is closed already.
            loop.call_soon(self._hang_up, agent, server)

    def _hang_up(self, agent: Agent, server: asyncio.Server) -> None:
        """What the kernel does with the sockets of a process that has ended."""
        server.close()
        assert self._runner.server is not None
        for connection in self._runner.server.connections:
            transport = connection.transport
            if transport is not None and transport.get_extra_info("sockname")[0] == agent.address:
                transport.abort()

    async def _live(self, agent: Agent) -> None:
        await asyncio.sleep(self._chance.uniform(*START_SECONDS))
        assert self._runner.server is not None
        listening = socket.create_server((agent.address, AGENT_PORT))
        # Nothing is waited for until it is known, or the end of the pod in that moment would leave it open.
        server = await asyncio.get_running_loop().create_server(
            self._runner.server, sock=listening, start_serving=False
        )
        self._servers[agent.uid] = server
        await server.start_serving()
        self._by_address[agent.address] = agent
        agent.state = "parked"
        started = _moment()
        await self._write(agent, _running(agent, started, ready=True))
        await agent.accepted.wait()
        ends = asyncio.create_task(asyncio.sleep(self._chance.uniform(*self.session_seconds)))
        await self._write(agent, _running(agent, started, ready=False))
        await ends
        agent.state = "ending"
        self._close(agent)
        await self._write(agent, _ended(agent))
        self._lives.pop(agent.uid, None)

    async def _write(self, agent: Agent, status: Json) -> None:
        body = {"metadata": {"uid": agent.uid}, "status": status}
        while True:
            try:
                await self._api.merge_patch(PODS, self._namespace, agent.pod, body, subresource="status")
            except KubeApiError:
                # Away, busy, or the pod is gone: then this is cancelled as soon as that is seen.
                await asyncio.sleep(RETRY_SECONDS)
            else:
                return

    # The agents.

    async def _called(self, request: web.Request) -> Agent:
        if request.transport is None:
            raise web.HTTPGone
        agent = self._by_address.get(request.transport.get_extra_info("sockname")[0])
        if agent is not None and request.path == "/bind":
            agent.orders += 1
            self.on_order(agent)
        if agent is not None:
            # What a process that stands still was sent lies in its socket's buffer, also when the sender has hung up.
            await request.read()
            await agent.thawed.wait()
        if agent is None or agent.address not in self._by_address:
            # Its process has ended with this connection open.
            if request.transport is not None:
                request.transport.abort()
            raise web.HTTPGone
        return agent

    async def _claims(self, request: web.Request, agent: Agent) -> dict[str, Any] | None:
        try:
            claims: dict[str, Any] = jwt.decode(
                await request.read(),
                self._public_key,
                algorithms=["EdDSA"],
                issuer="voicepool-gateway",
                audience=agent.uid,
                leeway=agent.clock_behind_seconds,
                options={"require": ["exp", "iat", "jti"]},
            )
        except jwt.InvalidTokenError:
            return None
        if claims["jti"] in self._used:
            return None
        self._used.add(claims["jti"])
        return claims

    async def _bind(self, request: web.Request) -> web.Response:
        agent = await self._called(request)
        claims = await self._claims(request, agent)
        agent.looked_at += 1
        if claims is None:
            return _refusal(401, "INVALID_ASSIGNMENT")
        if agent.state == "parked":
            agent.state, agent.session = "accepted", claims["session"]
            agent.accepted_at = datetime.now(UTC)
            agent.accepted.set()
            self.last_accepted_at = asyncio.get_running_loop().time()
            if self._http is not None:
                joining = asyncio.create_task(self._join(self._http, agent, claims["url"], claims["token"]))
                joining.add_done_callback(self._joining.discard)
                joining.add_done_callback(self._done)
                self._joining.add(joining)
            await asyncio.sleep(agent.answers_after_seconds)
            return web.json_response({"state": "accepted", "session": agent.session}, status=202)
        if agent.state == "accepted" and agent.session == claims["session"]:
            return web.json_response({"state": "accepted", "session": agent.session})
        return _refusal(409, "ALREADY_BOUND") if agent.session else _refusal(503, "NOT_PARKED")

    async def _join(self, http: aiohttp.ClientSession, agent: Agent, url: str, token: str) -> None:
        where = f"{url.replace('ws', 'http', 1)}/rtc/validate"
        async with http.get(where, params={"access_token": token}) as answer:
            agent.joined = answer.status == 200

    async def _end(self, request: web.Request) -> web.Response:
        agent = await self._called(request)
        claims = await self._claims(request, agent)
        if claims is None or claims["session"] != agent.session:
            return _refusal(401, "INVALID_ASSIGNMENT")
        agent.told_to_end = True
        # Let go on to its own end: an end on request would hide a pod that is taken away.
        return web.json_response({"state": "ending"}, status=202)

    async def _status(self, request: web.Request) -> web.Response:
        agent = await self._called(request)
        words = {"state": agent.state, "session": agent.session or None, "pod_uid": agent.uid, "since_seconds": 1}
        return web.json_response(words)


def _refusal(status: int, code: str) -> web.Response:
    return web.json_response({"error": code, "code": code}, status=status)


def _moment() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def _container(state: Json, *, ready: bool) -> Json:
    image = {"image": "localhost/agent:1", "imageID": ""}
    return {"name": "agent", "ready": ready, "restartCount": 0, **image, "state": state}


def _running(agent: Agent, started: str, *, ready: bool) -> Json:
    return {
        "phase": "Running",
        "podIP": agent.address,
        "podIPs": [{"ip": agent.address}],
        "startTime": started,
        "containerStatuses": [_container({"running": {"startedAt": started}}, ready=ready)],
        "conditions": [{"type": "Ready", "status": str(ready), "lastTransitionTime": _moment()}],
    }


def _ended(agent: Agent) -> Json:
    finished = {"exitCode": 0, "reason": "Completed", "finishedAt": _moment(), "message": '{"reason":"caller_left"}'}
    return {
        "phase": "Succeeded",
        "containerStatuses": [_container({"terminated": finished}, ready=False)],
        "conditions": [{"type": "Ready", "status": "False", "lastTransitionTime": _moment()}],
    }
