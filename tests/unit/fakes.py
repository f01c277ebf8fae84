"""What a gateway meets, in small: an API server in memory with real patch semantics, agents that verify their orders, LiveKit rooms."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import copy
import itertools
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

import jwt
from aiohttp import web
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from tests.sim.semantics import json_patch, merge_patch, selects

from voicepool.gateway.errors import LiveKitUnavailable
from voicepool.gateway.livekit import LiveKitServer, RoomState
from voicepool.kube.api import (
    PODS,
    POOLS,
    SECRETS,
    AlreadyExists,
    Conflict,
    Json,
    KubeApiError,
    NotFound,
    Resource,
    WatchEvent,
)
from voicepool_agent.assignments import MAX_ORDER_BYTES

NAMESPACE = "calls"
POOL = "demo"
HASH = "aaaaaaaa"

T = TypeVar("T")


class FakeLog:
    """The log of one container: what it has written, and whether it has ended."""

    def __init__(self) -> None:
        self.lines: list[bytes] = []
        self.asked: list[tuple[str, bool, int | None, str | None]] = []
        self.readers = 0
        """Who reads it now."""
        self.read_lines = 0
        self.breaks: KubeApiError | None = None
        self._ended = False
        self._news = asyncio.Event()

    def write(self, text: str, second: int = 0) -> None:
        self.lines.append(f"2026-03-01T12:00:{second:02}.000000000Z {text}".encode())
        self._news.set()

    def end(self) -> None:
        self._ended = True
        self._news.set()

    def break_off(self, error: KubeApiError) -> None:
        self.breaks = error
        self._news.set()

    async def read(self, follow: bool, tail_lines: int | None) -> AsyncIterator[bytes]:
        position = 0 if tail_lines is None else max(0, len(self.lines) - tail_lines)
        while True:
            while position < len(self.lines):
                position += 1
                self.read_lines += 1
                yield self.lines[position - 1]
            if self.breaks is not None:
                raise self.breaks
            if self._ended or not follow:
                return
            self._news.clear()
            await self._news.wait()


class FakeKube:
    """A `KubeApi`: uids, versions, label selectors, watches, preconditions, and JSON patches whose failed test is a 422."""

    def __init__(self) -> None:
        self.objects: dict[tuple[str, str, str], Json] = {}
        self.events: list[tuple[int, str, WatchEvent]] = []
        self.requests: list[tuple[str, str]] = []
        self.before: dict[str, list[KubeApiError]] = defaultdict(list)
        """Errors to answer with instead of doing it."""
        self.after: dict[str, list[KubeApiError]] = defaultdict(list)
        """Errors to answer with although it was done."""
        self.quiet = False
        """Watches say nothing: whoever looks sees what was."""
        self.hold_patch: asyncio.Event | None = None
        self.logs: defaultdict[str, FakeLog] = defaultdict(FakeLog)
        """By the pod's name."""
        self._versions = itertools.count(1)
        self._version = 0
        self._uids = itertools.count(1)
        self._changed = asyncio.Condition()

    def put(self, resource: Resource, obj: Mapping[str, Any]) -> Json:
        stored = copy.deepcopy(dict(obj))
        metadata = stored["metadata"]
        metadata.setdefault("namespace", NAMESPACE)
        metadata.setdefault("creationTimestamp", datetime.now(UTC).isoformat())
        metadata["uid"] = f"uid-{next(self._uids)}"
        return self._store(resource, stored, "ADDED")

    def edit(self, resource: Resource, name: str, change: Mapping[str, Any], namespace: str = NAMESPACE) -> Json:
        stored = merge_patch(self.objects[resource.plural, namespace, name], change)
        return self._store(resource, stored, "MODIFIED")

    def pod(self, name: str, namespace: str = NAMESPACE) -> Json:
        return self.objects[PODS.plural, namespace, name]

    def pods(self) -> list[Json]:
        return [obj for (plural, _, _), obj in self.objects.items() if plural == PODS.plural]

    def bound(self) -> list[Json]:
        return [pod for pod in self.pods() if pod["metadata"]["labels"]["voicepool.dev/state"] == "bound"]

    async def get(self, resource: Resource, namespace: str | None, name: str) -> Json:
        return await self._call("get", lambda: copy.deepcopy(self._find(resource, namespace, name)))

    async def list_page(
        self,
        resource: Resource,
        namespace: str | None,
        *,
        label_selector: str = "",
        limit: int = 500,
        continue_token: str = "",
        resource_version: str = "",
    ) -> Json:
        def found() -> Json:
            items = [
                copy.deepcopy(obj)
                for (plural, space, _), obj in self.objects.items()
                if plural == resource.plural
                and namespace in (None, space)
                and selects(label_selector, obj["metadata"].get("labels"))
            ]
            return {"metadata": {"resourceVersion": str(self._version)}, "items": items}

        return await self._call("list", found)

    async def watch(
        self,
        resource: Resource,
        namespace: str | None,
        *,
        resource_version: str,
        label_selector: str = "",
        timeout_seconds: int = 290,
    ) -> AsyncIterator[WatchEvent]:
        position, told = int(resource_version), 0
        while True:
            async with self._changed:
                while self.quiet or len(self.events) <= told:
                    await self._changed.wait()
            for version, plural, event in self.events[told:]:
                if plural == resource.plural and version > position:
                    yield copy.deepcopy(event)
            told = len(self.events)

    async def create(
        self, resource: Resource, namespace: str, body: Mapping[str, Any], *, dry_run: bool = False
    ) -> Json:
        def made() -> Json:
            if (resource.plural, namespace, body["metadata"]["name"]) in self.objects:
                raise AlreadyExists("already exists", status=409, reason="AlreadyExists")
            return self.put(resource, body)

        return await self._call("create", made)

    async def json_patch(
        self, resource: Resource, namespace: str, name: str, operations: Sequence[Mapping[str, Any]]
    ) -> Json:
        if self.hold_patch is not None:
            await self.hold_patch.wait()

        def patched() -> Json:
            stored = json_patch(self._find(resource, namespace, name), operations)
            return self._store(resource, stored, "MODIFIED")

        return await self._call("patch", patched)

    async def merge_patch(
        self, resource: Resource, namespace: str, name: str, body: Mapping[str, Any], *, subresource: str | None = None
    ) -> Json:
        return await self._call("merge", lambda: self.edit(resource, name, body, namespace))

    async def delete(
        self,
        resource: Resource,
        namespace: str,
        name: str,
        *,
        uid: str,
        resource_version: str,
        grace_period_seconds: int | None = None,
    ) -> None:
        def deleted() -> None:
            metadata = self._find(resource, namespace, name)["metadata"]
            if (metadata["uid"], metadata["resourceVersion"]) != (uid, resource_version):
                raise Conflict("the precondition does not hold", status=409)
            gone = self.objects.pop((resource.plural, namespace, name))
            self._record(resource, gone, "DELETED")

        await self._call("delete", deleted)

    @contextlib.asynccontextmanager
    async def pod_log(
        self,
        namespace: str,
        name: str,
        *,
        container: str,
        follow: bool,
        tail_lines: int | None = None,
        since: str | None = None,
        limit_bytes: int | None = None,
        timeout_seconds: float = 10.0,
    ) -> AsyncIterator[AsyncIterator[bytes]]:
        log = self.logs[name]
        log.asked.append((container, follow, tail_lines, since))
        if self.before["log"]:
            raise self.before["log"].pop(0)
        log.readers += 1
        try:
            yield log.read(follow, tail_lines)
        finally:
            log.readers -= 1

    async def _call(self, verb: str, do: Callable[[], T]) -> T:
        self.requests.append((verb, ""))
        await asyncio.sleep(0)
        if self.before[verb]:
            raise self.before[verb].pop(0)
        result = do()
        await asyncio.sleep(0)
        if self.after[verb]:
            raise self.after[verb].pop(0)
        return result

    def _find(self, resource: Resource, namespace: str | None, name: str) -> Json:
        try:
            return self.objects[resource.plural, namespace or "", name]
        except KeyError:
            raise NotFound(f"{name} not found", status=404) from None

    def _store(self, resource: Resource, obj: Json, kind: Any) -> Json:
        self.objects[resource.plural, obj["metadata"]["namespace"], obj["metadata"]["name"]] = obj
        self._record(resource, obj, kind)
        return copy.deepcopy(obj)

    def _record(self, resource: Resource, obj: Json, kind: Any) -> None:
        self._version = next(self._versions)
        obj["metadata"]["resourceVersion"] = str(self._version)
        self.events.append((self._version, resource.plural, WatchEvent(kind, copy.deepcopy(obj))))
        self.wake()

    def wake(self) -> None:
        async def notify() -> None:
            async with self._changed:
                self._changed.notify_all()

        try:
            task = asyncio.get_running_loop().create_task(notify())
        except RuntimeError:
            return
        task.add_done_callback(lambda _task: None)


def pool_object(name: str = POOL, namespace: str = NAMESPACE, **spec: Any) -> Json:
    template = {"spec": {"containers": [{"name": "agent", "image": "example.org/agent:1"}]}}
    return {
        "apiVersion": "voicepool.dev/v1alpha1",
        "kind": "VoiceAgentPool",
        "metadata": {"name": name, "namespace": namespace, "generation": 1},
        "spec": {"template": template, **spec},
        "status": {"templateHash": HASH},
    }


def pod_object(number: int, *, ready: bool = True, pool: str = POOL, namespace: str = NAMESPACE) -> Json:
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": f"{pool}-{HASH}-{number}",
            "namespace": namespace,
            "labels": {"voicepool.dev/pool": pool, "voicepool.dev/state": "warm", "voicepool.dev/template": HASH},
            "annotations": {"voicepool.dev/start-attempt": "0"},
            "ownerReferences": [{"kind": "VoiceAgentPool", "name": pool, "uid": "pool-uid"}],
        },
        "spec": {"containers": [{"name": "agent", "image": "example.org/agent:1"}]},
        "status": pod_status(number, ready=ready),
    }


def pod_status(number: int, *, ready: bool = True) -> Json:
    return {
        "phase": "Running",
        "podIP": f"127.1.{number // 250}.{number % 250 + 1}",
        "startTime": (datetime.now(UTC) - timedelta(seconds=30)).isoformat(),
        "containerStatuses": [{"name": "agent", "ready": ready, "state": {"running": {}}}],
    }


@dataclass
class FakeAgent:
    """One agent, by its address."""

    uid: str
    state: str = "parked"
    session: str | None = None
    refuses: tuple[int, str] | None = None
    silent_for: int = 0
    """Orders that are read and never answered."""
    deaf: bool = False
    """Orders that are not answered are not obeyed either."""
    claims: list[dict[str, Any]] = field(default_factory=list)
    answered_at: list[datetime] = field(default_factory=list)
    ends: list[str] = field(default_factory=list)
    routed: list[web.Request] = field(default_factory=list)
    """Requests to the bot's own routes."""


class Agents:
    """The agents of all pods: one server, told apart by the address that was called. Verifies orders as an agent must."""

    def __init__(self, kube: FakeKube, public_key: Ed25519PublicKey) -> None:
        self._kube = kube
        self._public_key = public_key
        self._agents: dict[str, FakeAgent] = {}
        self._used: set[str] = set()
        self._runner: web.AppRunner | None = None
        self._release = asyncio.Event()
        self.port = 0
        self.refuse_next: list[tuple[int, str]] = []
        """What the next orders are answered with, whichever agent they reach."""
        self.bot: Callable[[web.Request], Awaitable[web.StreamResponse]] = _echo
        """What answers on bots' own routes."""

    async def __aenter__(self) -> Agents:
        app = web.Application(client_max_size=MAX_ORDER_BYTES)
        app.router.add_post("/bind", self._bind)
        app.router.add_post("/end", self._end)
        app.router.add_get("/status", self._status)
        app.router.add_route("*", "/{path:.*}", self._route)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "0.0.0.0", 0)
        await site.start()
        self.port = self._runner.addresses[0][1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._release.set()
        assert self._runner is not None
        await self._runner.cleanup()

    def of(self, pod_name: str) -> FakeAgent:
        return self._at(self._kube.pod(pod_name)["status"]["podIP"])

    def all(self) -> list[FakeAgent]:
        return [self._at(pod["status"]["podIP"]) for pod in self._kube.pods() if pod["status"].get("podIP")]

    def with_session(self, session_id: str) -> list[FakeAgent]:
        return [agent for agent in self._agents.values() if agent.session == session_id]

    def _at(self, address: str) -> FakeAgent:
        if address not in self._agents:
            uid = next(pod["metadata"]["uid"] for pod in self._kube.pods() if pod["status"].get("podIP") == address)
            self._agents[address] = FakeAgent(uid)
        return self._agents[address]

    def _called(self, request: web.Request) -> FakeAgent:
        assert request.transport is not None
        return self._at(request.transport.get_extra_info("sockname")[0])

    async def _claims(self, request: web.Request, agent: FakeAgent) -> dict[str, Any] | None:
        assert request.content_type == "application/jwt"
        return self._verified((await request.read()).decode(), agent)

    def _verified(self, order: str, agent: FakeAgent) -> dict[str, Any] | None:
        try:
            claims: dict[str, Any] = jwt.decode(
                order,
                self._public_key,
                algorithms=["EdDSA"],
                issuer="voicepool-gateway",
                audience=agent.uid,
                options={"require": ["exp", "iat", "jti"]},
            )
        except jwt.InvalidTokenError:
            return None
        if claims["jti"] in self._used or claims["exp"] <= datetime.now(UTC).timestamp():
            return None
        self._used.add(claims["jti"])
        return claims

    async def _bind(self, request: web.Request) -> web.Response:
        agent = self._called(request)
        try:
            claims = await self._claims(request, agent)
        except web.HTTPRequestEntityTooLarge:
            return _error(413, "TOO_LARGE")
        if claims is None:
            return _error(401, "INVALID_ASSIGNMENT")
        agent.claims.append(claims)
        agent.answered_at.append(datetime.now(UTC))
        if self.refuse_next:
            return _error(*self.refuse_next.pop())
        if agent.refuses:
            return _error(*agent.refuses)
        if agent.silent_for:
            agent.silent_for -= 1
            if not agent.deaf:
                agent.state, agent.session = "accepted", claims["session"]
            await self._release.wait()
        if agent.state == "accepted":
            return (
                web.json_response({"state": "accepted", "session": agent.session})
                if agent.session == claims["session"]
                else _error(409, "ALREADY_BOUND")
            )
        agent.state, agent.session = "accepted", claims["session"]
        return web.json_response({"state": "accepted", "session": agent.session}, status=202)

    async def _end(self, request: web.Request) -> web.Response:
        agent = self._called(request)
        claims = await self._claims(request, agent)
        if claims is None or claims["session"] != agent.session:
            return _error(401, "INVALID_ASSIGNMENT")
        agent.ends.append(claims["action"])
        agent.state = "ending"
        return web.json_response({"state": "ending"}, status=202)

    async def _route(self, request: web.Request) -> web.StreamResponse:
        agent = self._called(request)
        agent.routed.append(request)
        claims = self._verified(request.headers.get("Voicepool-Order", ""), agent)
        if claims is None or claims["route"] is not True or claims["session"] != agent.session:
            return _error(401, "INVALID_ASSIGNMENT", {"Voicepool-Refused": "INVALID_ASSIGNMENT"})
        return await self.bot(request)

    async def _status(self, request: web.Request) -> web.Response:
        agent = self._called(request)
        state = "joined" if request.query.get("wait") == "joined" and agent.state == "accepted" else agent.state
        return web.json_response({"state": state, "session": agent.session, "pod_uid": agent.uid, "since_seconds": 1})


async def _echo(request: web.Request) -> web.StreamResponse:
    return web.json_response({"path": request.raw_path, "body": await request.text()})


def _error(status: int, code: str, headers: Mapping[str, str] | None = None) -> web.Response:
    return web.json_response({"error": code, "code": code}, status=status, headers=headers)


class FakeRooms:
    """LiveKit rooms that can be down."""

    def __init__(self) -> None:
        self.made: list[str] = []
        self.deleted: list[str] = []
        self.down = False
        self.states: dict[str, RoomState] = {}
        self.present: dict[str, list[str]] = {}
        """Who is in a room, by identity."""
        self.servers: list[str] = []
        """The address of the server of each deletion."""
        self.asked = 0
        self.hold: asyncio.Event | None = None
        """Answers wait for it."""
        self._sids = itertools.count(1)

    def open(self, room: str, *identities: str) -> RoomState:
        """Somebody has made a room and is in it."""
        self.states[room] = RoomState(f"RM_{next(self._sids)}", datetime.now(UTC) - timedelta(seconds=5))
        self.present[room] = list(identities)
        return self.states[room]

    async def create(self, server: LiveKitServer, room: str, *, empty_timeout_seconds: int) -> None:
        await self._answer(server)
        self.made.append(room)
        if room not in self.states:
            self.open(room)

    async def has(self, server: LiveKitServer, room: str, identity: str) -> bool:
        await self._answer(server)
        return identity in self.present.get(room, ())

    async def find(self, server: LiveKitServer, room: str) -> RoomState | None:
        await self._answer(server)
        return self.states.get(room)

    async def callers(self, server: LiveKitServer, room: str) -> int:
        await self._answer(server)
        return sum(not identity.startswith("agent-") for identity in self.present.get(room, ()))

    async def delete(self, server: LiveKitServer, room: str) -> bool:
        await self._answer(server)
        if self.states.pop(room, None) is None:
            return False
        self.present.pop(room, None)
        self.deleted.append(room)
        self.servers.append(server.url)
        return True

    async def _answer(self, server: LiveKitServer) -> None:
        self.asked += 1
        await asyncio.sleep(0)
        if self.hold is not None:
            await self.hold.wait()
        if self.down:
            raise LiveKitUnavailable(f"The LiveKit server at {server.url} did not answer.", retry_after_seconds=2)


def secret_object(name: str, **values: str) -> Json:
    data = {key.replace("_", "-"): base64.b64encode(value.encode()).decode() for key, value in values.items()}
    return {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name, "namespace": NAMESPACE}, "data": data}


__all__ = ["POOLS", "SECRETS", "Agents", "FakeKube", "FakeRooms", "pod_object", "pool_object", "secret_object"]
