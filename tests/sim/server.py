"""An API server in memory with the semantics that count, and a way to it that can fail.

:class:`Server` is the truth: synchronous and atomic, as etcd behind an API server is. :class:`Client` is the way of one process to it, a
:class:`~voicepool.kube.api.KubeApi`: calls take time, get lost before or after the commit, are refused, or are the last thing the process does;
watch events come late, twice, or not at all. What happens to a call is for :class:`Network` to say.

Invariants: stored objects are never changed in place; one revision for every write and one write for every revision; a write that changes nothing
is none.
"""

from __future__ import annotations

import asyncio
import copy
import itertools
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from email.utils import format_datetime
from enum import Enum, auto
from typing import Any, Literal, Protocol, TypeVar

from voicepool.kube.api import (
    PODS,
    POOLS,
    AlreadyExists,
    Conflict,
    Gone,
    Json,
    NotFound,
    Resource,
    ServerFault,
    TooManyRequests,
    Unprocessable,
    Unreachable,
    WatchEvent,
)
from voicepool.kube.clock import ServerClock

from .loop import Process
from .semantics import json_patch, merge_patch, selects

T = TypeVar("T")
Key = tuple[str, str]

BOOKMARK_SECONDS = 60.0
BOOKMARK_BEFORE_END_SECONDS = 2.0
REFUSED_IMAGE = "refused "
"""The space makes a pod with this image invalid, so that a template can be."""
FOREGROUND = "foregroundDeletion"
NEXT_PAGE = "list the next page of"
"""The verb of a list's second and later pages, which a token leads to."""


@dataclass(frozen=True, slots=True)
class Change:
    """One write, as it was stored."""

    revision: int
    kind: Literal["ADDED", "MODIFIED", "DELETED"]
    resource: Resource
    old: Json | None
    new: Json
    """For DELETED the last state, in the revision of the delete."""
    actor: str


class Server:
    """See the module.

    Args:
        now: the server's clock.
    """

    def __init__(self, now: Callable[[], datetime]) -> None:
        self.log: list[Change] = []
        self.compacted = 0
        self.observers: list[Callable[[Change], None]] = []
        self._now = now
        self._objects: dict[str, dict[Key, Json]] = defaultdict(dict)
        self._uids = itertools.count(1)
        self._pages: dict[str, tuple[int, list[Json], int]] = {}
        self._wakers: defaultdict[str, dict[asyncio.Event, None]] = defaultdict(dict)
        """By the plural of what is waited for."""

    @property
    def revision(self) -> int:
        """Of the last write."""
        return len(self.log)

    def date(self) -> str:
        """The time as HTTP tells it."""
        return format_datetime(self._now(), usegmt=True)

    def all(self, resource: Resource) -> list[Json]:
        """Every object of a kind."""
        return list(self._objects[resource.plural].values())

    def find(self, resource: Resource, namespace: str | None, name: str) -> Json:
        """One object.

        Raises:
            NotFound: it is not there.
        """
        try:
            return self._objects[resource.plural][namespace or "", name]
        except KeyError:
            raise NotFound(f'{resource.plural} "{name}" not found', status=404, reason="NotFound") from None

    def list_page(
        self,
        resource: Resource,
        namespace: str | None,
        selector: str,
        limit: int,
        continue_token: str,
        at_revision: int | None = None,
    ) -> Json:
        """One page; all pages of a list show one revision."""
        selects(selector, None)
        if continue_token:
            revision, rest, limit = self._pages[continue_token]
            if revision < self.compacted:
                raise Gone("the provided continue parameter is too old", status=410, reason="Expired")
        else:
            revision = self.revision if at_revision is None else at_revision
            objects = self._objects[resource.plural] if at_revision is None else self._state_at(resource, at_revision)
            rest = [
                obj
                for (space, _), obj in sorted(objects.items())
                if namespace in (None, space) and _selected(obj, selector)
            ]
        metadata: Json = {"resourceVersion": str(revision)}
        if len(rest) > limit:
            token = f"page-{len(self._pages)}"
            self._pages[token] = (revision, rest[limit:], limit)
            metadata["continue"] = token
        return {"metadata": metadata, "items": rest[:limit]}

    def create(
        self, resource: Resource, namespace: str, body: Mapping[str, Any], actor: str, *, dry_run: bool = False
    ) -> Json:
        """Store a new object."""
        obj = copy.deepcopy(dict(body))
        metadata = obj["metadata"]
        for container in obj["spec"].get("containers") or () if resource == PODS else ():
            if container["image"] != container["image"].strip():
                words = f"Pod is invalid: spec.containers[0].image: Invalid value: {container['image']!r}"
                raise Unprocessable(words, status=422, reason="Invalid")
        if (namespace, metadata["name"]) in self._objects[resource.plural]:
            raise AlreadyExists(f'"{metadata["name"]}" already exists', status=409, reason="AlreadyExists")
        metadata.update(namespace=namespace, uid=f"uid-{next(self._uids)}", creationTimestamp=_second(self._now()))
        metadata["generation"] = 1
        obj.pop("status", None)
        if resource == PODS:
            obj["status"] = {"phase": "Pending"}
        _drop_empty(metadata)
        return obj if dry_run else self._store("ADDED", resource, None, obj, actor)

    def json_patch(
        self, resource: Resource, namespace: str, name: str, operations: Iterable[Mapping[str, Any]], actor: str
    ) -> Json:
        """All operations, or none of them."""
        old = self.find(resource, namespace, name)
        return self._update(resource, old, json_patch(old, operations), actor)

    def merge_patch(
        self,
        resource: Resource,
        namespace: str,
        name: str,
        body: Mapping[str, Any],
        actor: str,
        subresource: str | None,
    ) -> Json:
        """RFC 7386. The status is only reached as a subresource, and nothing else that way, nor looked at; scale is the warm target alone."""
        old = self.find(resource, namespace, name)
        sent = body.get("metadata") or {}
        if sent.get("resourceVersion", old["metadata"]["resourceVersion"]) != old["metadata"]["resourceVersion"]:
            raise Conflict("the object has been modified; please apply your changes to the latest version", status=409)
        if subresource == "status":
            new = merge_patch(old, {"status": body.get("status") or {}})
            return self._replace(resource, old, new, actor)
        if subresource == "scale":
            new = merge_patch(old, {"spec": {"replicas": body["spec"]["replicas"]}})
            return _scale(self._update(resource, old, new, actor))
        return self._update(resource, old, merge_patch(old, body), actor)

    def delete(
        self,
        resource: Resource,
        namespace: str,
        name: str,
        actor: str,
        *,
        uid: str | None = None,
        resource_version: str | None = None,
        grace_period_seconds: int | None = None,
        foreground: bool = False,
    ) -> None:
        """Delete, or mark what has finalizers or a process that may still say goodbye."""
        old = self.find(resource, namespace, name)
        metadata = old["metadata"]
        for wanted, there, what in (
            (uid, metadata["uid"], "UID"),
            (resource_version, metadata["resourceVersion"], "ResourceVersion"),
        ):
            if wanted is not None and wanted != there:
                raise Conflict(f"Precondition failed: {what} in precondition: {wanted}", status=409, reason="Conflict")
        before = metadata.get("deletionGracePeriodSeconds")
        grace = 0
        if before is not None and grace_period_seconds is None:
            # Whoever says nothing agrees with what was said.
            grace = before
        elif resource == PODS and "nodeName" in old["spec"] and old["status"]["phase"] not in ("Succeeded", "Failed"):
            default = old["spec"].get("terminationGracePeriodSeconds", 30)
            grace = default if grace_period_seconds is None else grace_period_seconds
        if grace == 0 and not metadata.get("finalizers") and not foreground:
            self._store("DELETED", resource, old, copy.deepcopy(old), actor)
            return
        if before is not None and grace >= before:
            return
        new = copy.deepcopy(old)
        # A shorter grace counts from the first request, too.
        asked_at = (
            self._now()
            if before is None
            else datetime.fromisoformat(metadata["deletionTimestamp"]) - timedelta(seconds=before)
        )
        new["metadata"]["deletionTimestamp"] = _second(asked_at + timedelta(seconds=grace))
        new["metadata"]["deletionGracePeriodSeconds"] = grace
        new["metadata"]["generation"] += before is None
        if foreground:
            new["metadata"].setdefault("finalizers", []).append(FOREGROUND)
        self._store("MODIFIED", resource, old, new, actor)

    def change(self, resource: Resource, key: Key, uid: str, actor: str, change: Callable[[Json], None]) -> bool:
        """What a component of Kubernetes does to an object, whatever its part; whether that object was there."""
        old = self._objects[resource.plural].get(key)
        if old is None or old["metadata"]["uid"] != uid:
            return False
        new = copy.deepcopy(old)
        change(new)
        self._replace(resource, old, new, actor)
        return True

    def remove(self, resource: Resource, key: Key, uid: str, actor: str) -> None:
        """The last step of a delete: the object goes."""
        old = self._objects[resource.plural].get(key)
        if old is not None and old["metadata"]["uid"] == uid:
            self._store("DELETED", resource, old, copy.deepcopy(old), actor)

    def collect_garbage(self) -> None:
        """What the garbage collector does: whatever has owners, none of which exists, is deleted; a pool that waits for that goes."""
        owners = {pool["metadata"]["uid"]: pool for pool in self.all(POOLS)}
        for pod in self.all(PODS):
            metadata = pod["metadata"]
            references = metadata.get("ownerReferences") or ()
            absent = [
                reference["uid"] not in owners
                or FOREGROUND in (owners[reference["uid"]]["metadata"].get("finalizers") or ())
                for reference in references
            ]
            if absent and all(absent) and "deletionTimestamp" not in metadata:
                self.delete(PODS, metadata["namespace"], metadata["name"], "garbage collector", uid=metadata["uid"])
        for uid, pool in owners.items():
            if FOREGROUND in (pool["metadata"].get("finalizers") or ()):
                # None of our references blocks the owner's deletion.
                self.remove(POOLS, (pool["metadata"]["namespace"], pool["metadata"]["name"]), uid, "garbage collector")

    def waker(self, resource: Resource) -> asyncio.Event:
        """An event that is set with each write to that kind of object, until :meth:`forget_waker`."""
        event = asyncio.Event()
        self._wakers[resource.plural][event] = None
        return event

    def forget_waker(self, resource: Resource, event: asyncio.Event) -> None:
        """See :meth:`waker`."""
        self._wakers[resource.plural].pop(event, None)

    def _state_at(self, resource: Resource, revision: int) -> dict[Key, Json]:
        state: dict[Key, Json] = {}
        for change in self.log[:revision]:
            if change.resource == resource:
                key = (change.new["metadata"]["namespace"], change.new["metadata"]["name"])
                if change.kind == "DELETED":
                    state.pop(key, None)
                else:
                    state[key] = change.new
        return state

    def _update(self, resource: Resource, old: Json, new: Json, actor: str) -> Json:
        """A write to the main resource: not to the status, and for a pod hardly to the spec."""
        new.pop("status", None)
        if "status" in old:
            new["status"] = old["status"]
        metadata = new["metadata"]
        _drop_empty(metadata)
        if metadata["uid"] != old["metadata"]["uid"]:
            raise Unprocessable("metadata.uid: Invalid value: field is immutable", status=422, reason="Invalid")
        if resource == PODS:
            spec_before, spec_after = dict(old["spec"]), dict(new["spec"])
            before, after = (spec.pop("activeDeadlineSeconds", None) for spec in (spec_before, spec_after))
            if spec_before != spec_after or (before is not None and (after is None or after > before)):
                raise Unprocessable("Pod is invalid: spec: Forbidden: pod updates may not change fields", status=422)
        if new.get("spec") != old.get("spec"):
            metadata["generation"] = old["metadata"]["generation"] + 1
        if metadata.get("deletionGracePeriodSeconds") == 0 and "finalizers" not in metadata:
            return self._store("DELETED", resource, old, new, actor)
        return self._replace(resource, old, new, actor)

    def _replace(self, resource: Resource, old: Json, new: Json, actor: str) -> Json:
        return old if new == old else self._store("MODIFIED", resource, old, new, actor)

    def _store(
        self,
        kind: Literal["ADDED", "MODIFIED", "DELETED"],
        resource: Resource,
        old: Json | None,
        new: Json,
        actor: str,
    ) -> Json:
        metadata = new["metadata"]
        change = Change(self.revision + 1, kind, resource, old, new, actor)
        metadata["resourceVersion"] = str(change.revision)
        key = (metadata["namespace"], metadata["name"])
        if kind == "DELETED":
            del self._objects[resource.plural][key]
        else:
            self._objects[resource.plural][key] = new
        self.log.append(change)
        for waker in self._wakers[resource.plural]:
            waker.set()
        for observer in self.observers:
            observer(change)
        return new


class Fate(Enum):
    """What becomes of one call."""

    ANSWERED = auto()
    LOST_BEFORE = auto()
    LOST_AFTER = auto()
    """Committed, and the answer is lost."""
    COMMITTED_LATE = auto()
    """The caller gives up, and later it is committed after all."""
    THROTTLED = auto()
    FAILED_BEFORE = auto()
    FAILED_AFTER = auto()
    """Committed, and answered with an error of the server."""
    EXPIRED = auto()
    """410: the token of a list's next page is too old."""
    CRASH_BEFORE = auto()
    CRASH_AFTER = auto()
    """Committed, and the process dies before it learns that."""


class EventFate(Enum):
    """What becomes of one watch event."""

    TOLD = auto()
    TOLD_TWICE = auto()
    DROPPED = auto()
    CUT = auto()
    """The connection breaks instead."""


class Network(Protocol):
    """Decides what happens on the way."""

    def call(self, process: Process, verb: str, words: str) -> tuple[Fate, float]:
        """The fate of a call, and seconds each way."""
        ...

    def event(self, process: Process) -> tuple[EventFate, float]:
        """The fate of a watch event, and its delay in seconds."""
        ...

    def list_age(self, process: Process) -> int:
        """How many revisions old an informer's list is."""
        ...

    def down(self) -> bool:
        """Whether the API server is away."""
        ...

    def crash(self, process: Process) -> None:
        """The process dies now."""
        ...


class Client:
    """The way of one process to the server; see the module.

    Args:
        server: the truth.
        network: what is between.
        process: whose way it is.
        clock: told the time by every answer.
    """

    def __init__(self, server: Server, network: Network, process: Process, clock: ServerClock | None = None) -> None:
        self._server = server
        self._network = network
        self._process = process
        self._clock = clock or ServerClock()

    async def get(self, resource: Resource, namespace: str | None, name: str) -> Json:
        """See `KubeApi`."""
        return await self._call("get", name, lambda: self._server.find(resource, namespace, name))

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
        """See `KubeApi`. Only what informers ask for may be old: a question for one value is asked of the latest state."""

        def answer() -> Json:
            age = 0 if "=" in label_selector or continue_token else self._network.list_age(self._process)
            revision = max(self._server.compacted, self._server.revision - age) if age else None
            # Small pages, so that there is more than one.
            return self._server.list_page(resource, namespace, label_selector, min(limit, 4), continue_token, revision)

        return await self._call(
            NEXT_PAGE if continue_token else "list", f"{resource.plural} {label_selector}".strip(), answer
        )

    async def watch(
        self,
        resource: Resource,
        namespace: str | None,
        *,
        resource_version: str,
        label_selector: str = "",
        timeout_seconds: int = 290,
    ) -> AsyncIterator[WatchEvent]:
        """See `KubeApi`."""
        await self._call("watch", resource.plural, lambda: None)
        position = int(resource_version)
        if position < self._server.compacted:
            if position % 2:
                # An API server says it in either way.
                yield WatchEvent("ERROR", {"code": 410, "reason": "Expired", "message": "too old resource version"})
                return
            raise Gone("too old resource version", status=410, reason="Expired")
        loop = asyncio.get_running_loop()
        ends = loop.time() + timeout_seconds
        bookmark = min(loop.time() + BOOKMARK_SECONDS, ends - BOOKMARK_BEFORE_END_SECONDS)
        waker = self._server.waker(resource)
        try:
            while loop.time() < ends:
                waker.clear()
                while position < self._server.revision:
                    change = self._server.log[position]
                    position = change.revision
                    event = _event(change, resource, namespace, label_selector)
                    if event is None:
                        continue
                    fate, delay_seconds = self._network.event(self._process)
                    if delay_seconds:
                        await asyncio.sleep(delay_seconds)
                    self._still_alive()
                    if fate is EventFate.CUT or self._network.down():
                        raise Unreachable("the watch broke off")
                    if fate is not EventFate.DROPPED:
                        yield event
                    if fate is EventFate.TOLD_TWICE:
                        yield event
                if self._network.down():
                    raise Unreachable("the watch broke off")
                if loop.time() >= bookmark:
                    bookmark = loop.time() + BOOKMARK_SECONDS
                    yield WatchEvent("BOOKMARK", {"metadata": {"resourceVersion": str(position)}})
                try:
                    async with asyncio.timeout_at(min(bookmark, ends)):
                        await waker.wait()
                except TimeoutError:
                    pass
                self._still_alive()
        finally:
            self._server.forget_waker(resource, waker)

    async def create(
        self, resource: Resource, namespace: str, body: Mapping[str, Any], *, dry_run: bool = False
    ) -> Json:
        """See `KubeApi`."""
        return await self._call(
            "dry run" if dry_run else "create",
            body["metadata"]["name"],
            lambda: self._server.create(resource, namespace, body, self._process.name, dry_run=dry_run),
        )

    async def json_patch(
        self, resource: Resource, namespace: str, name: str, operations: Sequence[Mapping[str, Any]]
    ) -> Json:
        """See `KubeApi`."""
        return await self._call(
            "patch", name, lambda: self._server.json_patch(resource, namespace, name, operations, self._process.name)
        )

    async def merge_patch(
        self, resource: Resource, namespace: str, name: str, body: Mapping[str, Any], *, subresource: str | None = None
    ) -> Json:
        """See `KubeApi`."""
        return await self._call(
            subresource or "merge",
            name,
            lambda: self._server.merge_patch(resource, namespace, name, body, self._process.name, subresource),
        )

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
        """See `KubeApi`."""
        await self._call(
            "delete",
            name,
            lambda: self._server.delete(
                resource,
                namespace,
                name,
                self._process.name,
                uid=uid,
                resource_version=resource_version,
                grace_period_seconds=grace_period_seconds,
            ),
        )

    async def _call(self, verb: str, words: str, do: Callable[[], T]) -> T:
        self._still_alive()
        fate, seconds = self._network.call(self._process, verb, words)
        asked_at = self._clock.monotonic()
        await asyncio.sleep(seconds)
        self._still_alive()
        if fate is Fate.LOST_BEFORE or self._network.down():
            raise Unreachable("connection refused")
        if fate is Fate.THROTTLED:
            raise TooManyRequests("too many requests", retry_after_seconds=1.0)
        if fate is Fate.FAILED_BEFORE:
            raise ServerFault("internal error", status=500)
        if fate is Fate.EXPIRED:
            raise Gone("the provided continue parameter is too old", status=410, reason="Expired")
        if fate is Fate.CRASH_BEFORE:
            self._network.crash(self._process)
            raise asyncio.CancelledError
        if fate is Fate.COMMITTED_LATE:
            asyncio.get_running_loop().call_later(seconds * 10, _quietly, do)
            raise Unreachable("timed out")
        try:
            date = self._server.date()
            result = do()
        finally:
            if fate is Fate.CRASH_AFTER:
                self._network.crash(self._process)
        await asyncio.sleep(seconds)
        self._still_alive()
        if fate is Fate.LOST_AFTER:
            raise Unreachable("connection reset")
        if fate is Fate.FAILED_AFTER:
            raise ServerFault("etcdserver: request timed out", status=500)
        self._clock.heard(date, asked_at)
        return result

    def _still_alive(self) -> None:
        if not self._process.alive:
            raise asyncio.CancelledError


def _quietly(do: Callable[[], Any]) -> None:
    try:
        do()
    except (Conflict, NotFound, Unprocessable):
        return


def _event(change: Change, resource: Resource, namespace: str | None, selector: str) -> WatchEvent | None:
    """What a watcher with this selector is told; an object that begins or ceases to match is added or deleted for it."""
    if change.resource != resource or namespace not in (None, change.new["metadata"]["namespace"]):
        return None
    before = change.old is not None and _selected(change.old, selector)
    after = change.kind != "DELETED" and _selected(change.new, selector)
    if not before and not after:
        return None
    if not after:
        # As it was when it still matched, in the version in which it ceased to.
        last = change.old or change.new
        version = change.new["metadata"]["resourceVersion"]
        return WatchEvent("DELETED", {**last, "metadata": last["metadata"] | {"resourceVersion": version}})
    return WatchEvent("MODIFIED" if before else "ADDED", change.new)


def _selected(obj: Json, selector: str) -> bool:
    return selects(selector, obj["metadata"].get("labels"))


def _drop_empty(metadata: Json) -> None:
    for name in ("labels", "annotations", "ownerReferences", "finalizers"):
        if not metadata.get(name, True):
            del metadata[name]
    # Who wrote which field is not played; this is how one asks for no more account of it.
    if metadata.get("managedFields") == [{}]:
        del metadata["managedFields"]


def _scale(obj: Json) -> Json:
    status = obj.get("status") or {}
    return {
        "kind": "Scale",
        "metadata": obj["metadata"],
        "spec": {"replicas": obj["spec"]["replicas"]},
        "status": {name: status[name] for name in ("replicas", "selector") if name in status},
    }


def _second(moment: datetime) -> str:
    return moment.replace(microsecond=0).isoformat().replace("+00:00", "Z")
