"""A very small API server in memory: one counter of versions, lists in pages, watches, preconditions."""

from __future__ import annotations

import asyncio
import copy
import itertools
from collections.abc import AsyncIterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from tests.sim.semantics import json_patch, merge_patch

from voicepool.kube.api import (
    BUDGETS,
    AlreadyExists,
    Conflict,
    Gone,
    Json,
    KubeApiError,
    NotFound,
    Resource,
    WatchEvent,
)

Key = tuple[str, str, str]


class ApiServer:
    """Implements :class:`~voicepool.kube.api.KubeApi`."""

    def __init__(self) -> None:
        self.objects: dict[Key, Json] = {}
        self.history: list[tuple[int, str, str, Json]] = []
        """Version, plural, type and object of every change."""
        self.calls: list[tuple[str, str]] = []
        """Operation and name of every write that was asked for, dry runs apart."""
        self.failures: dict[str, list[KubeApiError]] = {}
        """Per operation (``list``, ``watch``, ``create``, ``create budget``, ``delete``, ``dry_run``, ``status``): errors for the next calls."""
        self.compacted = 0
        """Watches from before this version get 410."""
        self.muted = False
        """Watches say nothing more, as if the network had gone."""
        self.lingers = False
        """Pods that are deleted stay for the grace that they are given."""
        self.now = datetime(2026, 3, 1, 12, tzinfo=UTC)
        self._versions = itertools.count(1)
        self._version = 0
        self._changed = asyncio.Event()

    # What a test does to the cluster.

    def put(self, resource: Resource, obj: Mapping[str, Any]) -> Json:
        """Create or replace an object."""
        stored = copy.deepcopy(dict(obj))
        metadata = stored.setdefault("metadata", {})
        key = (resource.plural, metadata.setdefault("namespace", "calls"), metadata["name"])
        known = self.objects.get(key)
        metadata.setdefault("uid", known["metadata"]["uid"] if known else f"uid-{self._version + 1}")
        metadata.setdefault("creationTimestamp", self.now.isoformat())
        self._store(key, stored, "MODIFIED" if known else "ADDED")
        return copy.deepcopy(stored)

    def change(self, resource: Resource, name: str, namespace: str = "calls", **parts: Any) -> None:
        """Merge ``parts`` (``metadata``, ``status``, ``spec``) into an object."""
        obj = merge_patch(self.objects[(resource.plural, namespace, name)], parts)
        self._store((resource.plural, namespace, name), obj, "MODIFIED")

    def vanish(self, resource: Resource, name: str, namespace: str = "calls") -> None:
        """Remove an object."""
        key = (resource.plural, namespace, name)
        obj = self.objects.pop(key)
        self._version = next(self._versions)
        obj = copy.deepcopy(obj)
        obj["metadata"]["resourceVersion"] = str(self._version)
        self._record(resource.plural, "DELETED", obj)

    def forget_history(self) -> None:
        """Compact: whoever watches from an older version has to list again."""
        self.compacted = self._version
        self._wake()

    def names(self, resource: Resource) -> list[str]:
        """The names of all objects of that kind."""
        return sorted(name for plural, _, name in self.objects if plural == resource.plural)

    # The API.

    async def get(self, resource: Resource, namespace: str | None, name: str) -> Json:
        try:
            return copy.deepcopy(self.objects[(resource.plural, namespace or "", name)])
        except KeyError:
            raise NotFound(f"{name} not found", status=404) from None

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
        self._fail("list")
        await asyncio.sleep(0)
        found = [
            obj
            for (plural, space, _), obj in sorted(self.objects.items())
            if plural == resource.plural and (namespace is None or space == namespace)
        ]
        begin = int(continue_token or 0)
        page = copy.deepcopy(found[begin : begin + limit])
        more = str(begin + limit) if begin + limit < len(found) else ""
        return {"metadata": {"resourceVersion": str(self._version), "continue": more}, "items": page}

    async def watch(
        self,
        resource: Resource,
        namespace: str | None,
        *,
        resource_version: str,
        label_selector: str = "",
        timeout_seconds: int = 290,
    ) -> AsyncIterator[WatchEvent]:
        self._fail("watch")
        position = int(resource_version)
        if position < self.compacted:
            raise Gone("too old resource version", status=410)
        while True:
            if self.failures.get("stream"):
                self._fail("stream")
            changed = self._changed
            if not self.muted:
                for version, plural, kind, obj in list(self.history):
                    if plural == resource.plural and version > position:
                        position = version
                        yield WatchEvent(kind, copy.deepcopy(obj))  # type: ignore[arg-type]
                if position < self.compacted:
                    yield WatchEvent("ERROR", {"kind": "Status", "code": 410, "message": "too old resource version"})
                    return
            await changed.wait()

    async def create(
        self, resource: Resource, namespace: str, body: Mapping[str, Any], *, dry_run: bool = False
    ) -> Json:
        self._fail("dry_run" if dry_run else "create budget" if resource == BUDGETS else "create")
        key = (resource.plural, namespace, body["metadata"]["name"])
        if dry_run:
            return copy.deepcopy(dict(body))
        self.calls.append(("create", key[2]))
        if key in self.objects:
            raise AlreadyExists(f"{key[2]} already exists", status=409, reason="AlreadyExists")
        return self.put(resource, {**body, "metadata": {"namespace": namespace, **body["metadata"]}})

    async def json_patch(
        self, resource: Resource, namespace: str, name: str, operations: Sequence[Mapping[str, Any]]
    ) -> Json:
        self._fail("json_patch")
        self.calls.append(("json_patch", name))
        obj = json_patch(await self.get(resource, namespace, name), operations)
        self._store((resource.plural, namespace, name), obj, "MODIFIED")
        return await self.get(resource, namespace, name)

    async def merge_patch(
        self, resource: Resource, namespace: str, name: str, body: Mapping[str, Any], *, subresource: str | None = None
    ) -> Json:
        self._fail(subresource or "patch")
        self.calls.append((subresource or "patch", name))
        obj = await self.get(resource, namespace, name)
        for field in ("uid", "resourceVersion"):
            wanted = body.get("metadata", {}).get(field)
            if wanted and wanted != obj["metadata"][field]:
                raise Conflict(f"{field} mismatch", status=409)
        obj = merge_patch(obj, {subresource: body[subresource]} if subresource else body)
        self._store((resource.plural, namespace, name), obj, "MODIFIED")
        return await self.get(resource, namespace, name)

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
        self._fail("delete")
        self.calls.append(("delete", name))
        metadata = (await self.get(resource, namespace, name))["metadata"]
        if metadata["uid"] != uid or metadata["resourceVersion"] != resource_version:
            raise Conflict("the object has been modified", status=409)
        if self.lingers:
            self.change(resource, name, namespace, metadata={"deletionGracePeriodSeconds": grace_period_seconds})
        else:
            self.vanish(resource, name, namespace)

    def _fail(self, operation: str) -> None:
        waiting = self.failures.get(operation)
        if waiting:
            raise waiting.pop(0)

    def _store(self, key: Key, obj: Json, kind: str) -> None:
        self._version = next(self._versions)
        obj["metadata"]["resourceVersion"] = str(self._version)
        self.objects[key] = obj
        self._record(key[0], kind, copy.deepcopy(obj))

    def _record(self, plural: str, kind: str, obj: Json) -> None:
        self.history.append((self._version, plural, kind, obj))
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


async def until(condition: Any) -> None:
    """Let the others work until something holds."""
    for _ in range(2000):
        if condition():
            return
        await asyncio.sleep(0.001)
    raise AssertionError("it did not happen")
