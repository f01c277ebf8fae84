"""The seam to the Kubernetes API: one Protocol, one tree of errors.

Everything above this module is written against :class:`KubeApi`; the process uses the aiohttp client in ``kube/client.py``,
tests and the simulation use their own. Objects are plain JSON dictionaries: no model is built on the hot path.

KubeApiError
+-- Conflict            409: a precondition (uid, resourceVersion) or an optimistic write lost
|   +-- AlreadyExists   409 with reason AlreadyExists: the name is taken
+-- NotFound            404
+-- Gone                410: the list or watch position is too old
+-- Unprocessable       422: a JSON patch's test failed, or the object is invalid
+-- Forbidden           401 and 403
+-- TooManyRequests     429, with the seconds to wait
+-- ServerFault         5xx
+-- Unreachable         no answer: refused, reset, or timed out. The write may have happened
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

Json = dict[str, Any]


class KubeApiError(Exception):
    """The API server did not do what was asked."""

    def __init__(self, message: str, *, status: int = 0, reason: str = "") -> None:
        super().__init__(message)
        self.status = status
        self.reason = reason


class Conflict(KubeApiError):
    """409: someone else was faster."""


class AlreadyExists(Conflict):
    """409 with reason AlreadyExists."""


class NotFound(KubeApiError):
    """404."""


class Gone(KubeApiError):
    """410: list again."""


class Unprocessable(KubeApiError):
    """422: a test of a JSON patch failed, or the API server refuses the object; the message says which."""


class Forbidden(KubeApiError):
    """401 or 403."""


class TooManyRequests(KubeApiError):
    """429."""

    def __init__(self, message: str, *, retry_after_seconds: float, status: int = 429, reason: str = "") -> None:
        super().__init__(message, status=status, reason=reason)
        self.retry_after_seconds = retry_after_seconds


class ServerFault(KubeApiError):
    """5xx."""


class Unreachable(KubeApiError):
    """No answer came. Whether a write happened is not known."""


@dataclass(frozen=True, slots=True)
class Resource:
    """Names one kind of object in URLs."""

    group: str
    version: str
    plural: str
    fields: type[Any] | None = field(default=None, compare=False)
    """What lists and watches read of its objects, as a TypedDict; the rest may be left out of them. None reads all."""

    def path(self, namespace: str | None, name: str | None = None, subresource: str | None = None) -> str:
        """The URL path of the collection, of one object, or of its subresource."""
        prefix = f"/apis/{self.group}/{self.version}" if self.group else f"/api/{self.version}"
        parts = [prefix]
        if namespace:
            parts.append(f"namespaces/{namespace}")
        parts.append(self.plural)
        if name:
            parts.append(name)
        if subresource:
            parts.append(subresource)
        return "/".join(parts)


PODS = Resource("", "v1", "pods")
BUDGETS = Resource("policy", "v1", "poddisruptionbudgets")
EVENTS = Resource("events.k8s.io", "v1", "events")
LEASES = Resource("coordination.k8s.io", "v1", "leases")
SECRETS = Resource("", "v1", "secrets")
CONFIG_MAPS = Resource("", "v1", "configmaps")
ENDPOINT_SLICES = Resource("discovery.k8s.io", "v1", "endpointslices")
POOLS = Resource("voicepool.dev", "v1alpha1", "voiceagentpools")


@dataclass(frozen=True, slots=True)
class WatchEvent:
    """One line of a watch."""

    type: Literal["ADDED", "MODIFIED", "DELETED", "BOOKMARK", "ERROR"]
    object: Json


class KubeApi(Protocol):
    """What voicepool asks of an API server. Every method raises :class:`KubeApiError`."""

    async def get(self, resource: Resource, namespace: str | None, name: str) -> Json:
        """Read one object."""
        ...

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
        """Read one page of a list; ``metadata.continue`` of the answer leads to the next. Its ``items`` can be gone through once."""
        ...

    def watch(
        self,
        resource: Resource,
        namespace: str | None,
        *,
        resource_version: str,
        label_selector: str = "",
        timeout_seconds: int = 290,
    ) -> AsyncIterator[WatchEvent]:
        """Follow changes after ``resource_version``, with bookmarks; ends when the server ends it."""
        ...

    async def create(
        self, resource: Resource, namespace: str, body: Mapping[str, Any], *, dry_run: bool = False
    ) -> Json:
        """Create an object and return it as stored."""
        ...

    async def json_patch(
        self, resource: Resource, namespace: str, name: str, operations: Sequence[Mapping[str, Any]]
    ) -> Json:
        """Apply an RFC 6902 patch atomically and return the object as stored; a failed test is :class:`Unprocessable`."""
        ...

    async def merge_patch(
        self, resource: Resource, namespace: str, name: str, body: Mapping[str, Any], *, subresource: str | None = None
    ) -> Json:
        """Apply an RFC 7386 patch and return the object as stored; with a resourceVersion in it, :class:`Conflict` for any other. A uid guards no status."""
        ...

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
        """Delete that very object in that very version. There is no delete without preconditions."""
        ...


class LogApi(Protocol):
    """What is asked for the logs of containers; apart from :class:`KubeApi`, as most have no use for it."""

    def pod_log(
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
    ) -> AbstractAsyncContextManager[AsyncIterator[bytes]]:
        """The lines of a container's log, each with its time before it; raises :class:`KubeApiError` on entering and while reading.

        Args:
            namespace: of the pod.
            name: of the pod.
            container: of the pod.
            follow: go on with what is written later, until the container ends.
            tail_lines: only so many of the lines that there are.
            since: only lines from this RFC 3339 time on, to the second.
            limit_bytes: the end of it after so many.
            timeout_seconds: until the answer begins; also for each further part, where it is not followed.
        """
        ...


async def pages(
    api: KubeApi, resource: Resource, namespace: str | None, *, label_selector: str = ""
) -> AsyncIterator[Json]:
    """All pages of a list, of one moment: that of the first, as it is asked for without a resource version.

    Raises:
        KubeApiError: a page did not come.
    """
    token = ""
    while True:
        page = await api.list_page(resource, namespace, label_selector=label_selector, continue_token=token)
        yield page
        token = page["metadata"].get("continue") or ""
        if not token:
            return
