"""A live copy of one kind of object: listed in pages, followed by a watch, reduced to facts at the door.

Invariants:

* Whatever vanished while nobody looked is dropped by the next list (Replace semantics): the copy holds no phantoms.
* A version never replaces a newer one, wherever it comes from: list, watch, or the answer to a write of our own (:meth:`Informer.apply`).
* Every change reaches the handlers once, in the order in which this copy took it, and never before the copy itself shows it.
* Nothing here blocks, and nothing here gives up: after an error it goes on from where it was, after a gap (410) it lists again.

Resource versions are compared as numbers, which the API server guarantees for one kind of object (KEP-5504).
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncIterator, Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from voicepool.kube.api import Gone, Json, KubeApi, KubeApiError, Resource, ServerFault, TooManyRequests
from voicepool.model import Key

logger = logging.getLogger(__name__)

T = TypeVar("T")

Handler = Callable[[Key, T | None, T | None], None]
"""Called with key, old and new; None is "not there". Must return at once, and must not raise: an error in it ends the informer."""

BACKOFF_FIRST_SECONDS = 0.2
BACKOFF_MAX_SECONDS = 10.0
WATCH_FAILURES_BEFORE_LIST = 3
DEFAULT_PAGE_SIZE = 500
"""As Kubernetes' own clients ask for. Each page costs the API server some milliseconds, however few objects it has."""


@dataclass(slots=True)
class _Entry(Generic[T]):
    uid: str
    version: int
    value: T
    ours: bool
    """Stored from the answer to a write; no list or watch has confirmed it yet."""


def key_of(obj: Json) -> Key:
    """Namespace and name of a JSON object."""
    metadata = obj["metadata"]
    return metadata.get("namespace", ""), metadata["name"]


def version_of(obj: Json) -> int:
    """The resource version as a number."""
    return int(obj["metadata"]["resourceVersion"])


class Informer(Generic[T]):
    """Keeps facts about all objects of one kind.

    Args:
        api: the API server.
        resource: which kind, and which fields of it `convert` reads.
        namespace: one namespace, or None for all.
        label_selector: applied by the API server.
        convert: from JSON to a fact; None is an object that does not concern us. Must not raise.
        indexes: name to function; :meth:`by` looks objects up by what the function returns.
        page_size: objects in one page of a list.
        relist_seconds: a full list at least this often, as a net under lost events.
        on_list: called with a reason (``start``, ``gone``, ``error``, ``periodic``) before each list, for metrics.
        jitter: source of randomness for the back-off.
    """

    def __init__(
        self,
        api: KubeApi,
        resource: Resource,
        namespace: str | None,
        label_selector: str,
        convert: Callable[[Json], T | None],
        *,
        indexes: Mapping[str, Callable[[T], Hashable]] | None = None,
        page_size: int = DEFAULT_PAGE_SIZE,
        relist_seconds: float = 1800.0,
        on_list: Callable[[str], None] = lambda reason: None,
        jitter: random.Random | None = None,
    ) -> None:
        self.synced = asyncio.Event()
        """Set after the first complete list."""
        self.handlers: list[Handler[T]] = []
        self._api = api
        self._resource = resource
        self._namespace = namespace
        self._label_selector = label_selector
        self._convert = convert
        self._index_functions = dict(indexes or {})
        self._page_size = page_size
        self._relist_seconds = relist_seconds
        self._on_list = on_list
        self._jitter = jitter or random.Random()
        self._entries: dict[Key, _Entry[T]] = {}
        self._indexes: dict[str, dict[Hashable, dict[Key, None]]] = {name: {} for name in self._index_functions}
        self._position = 0
        self._last_contact: float | None = None

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[T]:
        """All facts."""
        return (entry.value for entry in self._entries.values())

    def get(self, namespace: str, name: str) -> T | None:
        """One fact, or None."""
        entry = self._entries.get((namespace, name))
        return entry.value if entry else None

    def by(self, index: str, value: Hashable) -> list[T]:
        """All facts for which the index's function returned ``value``, in the same order in every process that saw the same."""
        return [self._entries[key].value for key in self._indexes[index].get(value, ())]

    def values_of(self, index: str) -> list[Hashable]:
        """The values that an index has now."""
        return list(self._indexes[index])

    def silence_seconds(self) -> float:
        """Seconds since the API server was last heard, bookmarks included; infinite before the first list."""
        return float("inf") if self._last_contact is None else asyncio.get_running_loop().time() - self._last_contact

    def apply(self, obj: Json) -> None:
        """Store the answer to a write of our own at once, unless the copy already knows better."""
        key = key_of(obj)
        entry = self._entries.get(key)
        version = version_of(obj)
        if entry is None and version <= self._position:
            # The watch is already past this version and the object is not there: it has been deleted since.
            return
        self._store(key, obj, version, ours=True)

    def update(self, namespace: str, name: str, uid: str, change: Callable[[T], T]) -> None:
        """Change a fact that a write of our own has made untrue, in the version it has; a newer version replaces it.

        For a write that is answered without the object, as a delete.
        """
        key = (namespace, name)
        entry = self._entries.get(key)
        if entry is not None and entry.uid == uid:
            self._put(key, _Entry(uid=uid, version=entry.version, value=change(entry.value), ours=entry.ours))

    def forget(self, namespace: str, name: str, uid: str) -> None:
        """Drop an object that the API server says is not there."""
        entry = self._entries.get((namespace, name))
        if entry is not None and entry.uid == uid:
            self._drop((namespace, name))

    async def run(self) -> None:
        """List and watch until cancelled."""
        reason = "start"
        backoff_seconds = 0.0
        while True:
            try:
                await self._list(reason)
                backoff_seconds = 0.0
                reason = await self._follow()
            except KubeApiError as error:
                backoff_seconds = self._next_backoff(backoff_seconds, error)
                logger.warning(
                    "listing failed, trying again",
                    extra={
                        "resource": self._resource.plural,
                        "error": str(error),
                        "retry_seconds": round(backoff_seconds, 2),
                    },
                )
                reason = "error"
                await asyncio.sleep(backoff_seconds)

    async def _list(self, reason: str) -> None:
        self._on_list(reason)
        found: set[Key] = set()
        position = 0
        async for page in self._pages():
            position = position or int(page["metadata"]["resourceVersion"])
            for obj in page.get("items") or ():
                key, version = key_of(obj), version_of(obj)
                found.add(key)
                self._store(key, obj, version, ours=False)
        for key, entry in list(self._entries.items()):
            # A write of our own that is younger than the list is not missing from it: the watch will show it.
            if key not in found and not (entry.ours and entry.version > position):
                self._drop(key)
        self._position = position
        self._heard()
        self.synced.set()

    async def _pages(self) -> AsyncIterator[Json]:
        """The pages of a list. The API server makes the next one while one is taken in, which must not await."""
        coming: asyncio.Task[Json] | None = asyncio.create_task(self._page(""))
        try:
            while coming is not None:
                page = await coming
                token = page["metadata"].get("continue")
                coming = asyncio.create_task(self._page(token)) if token else None
                # Lets the request go out.
                await asyncio.sleep(0)
                yield page
        finally:
            if coming is not None:
                coming.cancel()

    async def _page(self, token: str) -> Json:
        return await self._api.list_page(
            self._resource,
            self._namespace,
            label_selector=self._label_selector,
            limit=self._page_size,
            continue_token=token,
        )

    async def _follow(self) -> str:
        """Watch from the current position until a list is needed, and say why."""
        listed_at = asyncio.get_running_loop().time()
        failures = 0
        backoff_seconds = 0.0
        while True:
            if asyncio.get_running_loop().time() - listed_at >= self._relist_seconds:
                return "periodic"
            position = self._position
            try:
                async for event in self._api.watch(
                    self._resource,
                    self._namespace,
                    resource_version=str(self._position),
                    label_selector=self._label_selector,
                ):
                    self._heard()
                    if event.type == "ERROR":
                        message = str(event.object.get("message", "the API server ended the watch"))
                        raise Gone(message, status=410) if event.object.get("code") == 410 else ServerFault(message)
                    self._take(event.type, event.object)
                self._heard()
                failures, backoff_seconds = 0, 0.0
            except Gone:
                return "gone"
            except KubeApiError as error:
                failures = 1 if self._position != position else failures + 1
                if failures >= WATCH_FAILURES_BEFORE_LIST:
                    return "error"
                backoff_seconds = self._next_backoff(0.0 if failures == 1 else backoff_seconds, error)
                logger.info(
                    "watch interrupted, going on from where it was",
                    extra={
                        "resource": self._resource.plural,
                        "error": str(error),
                        "retry_seconds": round(backoff_seconds, 2),
                    },
                )
                await asyncio.sleep(backoff_seconds)

    def _take(self, kind: str, obj: Json) -> None:
        version = version_of(obj)
        if version <= self._position:
            # A stream only goes forward: this was seen already.
            return
        if kind == "DELETED":
            entry = self._entries.get(key_of(obj))
            if entry is not None and entry.version <= version:
                self._drop(key_of(obj))
        elif kind != "BOOKMARK":
            self._store(key_of(obj), obj, version, ours=False)
        self._position = version

    def _store(self, key: Key, obj: Json, version: int, *, ours: bool) -> None:
        entry = self._entries.get(key)
        if entry is not None and entry.version >= version:
            if entry.version == version:
                entry.ours = entry.ours and ours
            return
        value = self._convert(obj)
        if value is None:
            if entry is not None:
                self._drop(key)
            return
        self._put(key, _Entry(uid=obj["metadata"]["uid"], version=version, value=value, ours=ours))

    def _put(self, key: Key, entry: _Entry[T]) -> None:
        old = self._entries.get(key)
        self._entries[key] = entry
        if old is not None:
            if old.value == entry.value:
                return
            self._unindex(key, old.value)
        for name, function in self._index_functions.items():
            self._indexes[name].setdefault(function(entry.value), {})[key] = None
        self._tell(key, old.value if old else None, entry.value)

    def _drop(self, key: Key) -> None:
        entry = self._entries.pop(key)
        self._unindex(key, entry.value)
        self._tell(key, entry.value, None)

    def _unindex(self, key: Key, value: T) -> None:
        for name, function in self._index_functions.items():
            index = self._indexes[name]
            indexed = function(value)
            keys = index[indexed]
            keys.pop(key, None)
            if not keys:
                del index[indexed]

    def _tell(self, key: Key, old: T | None, new: T | None) -> None:
        for handler in self.handlers:
            handler(key, old, new)

    def _heard(self) -> None:
        self._last_contact = asyncio.get_running_loop().time()

    def _next_backoff(self, last_seconds: float, error: KubeApiError) -> float:
        if isinstance(error, TooManyRequests):
            return error.retry_after_seconds
        grown = min(BACKOFF_MAX_SECONDS, max(BACKOFF_FIRST_SECONDS, last_seconds * 2))
        return grown * self._jitter.uniform(0.8, 1.2)
