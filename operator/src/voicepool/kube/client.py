"""The API server over aiohttp: plain JSON in and out, typed errors, no model on the way.

Invariants: every failure is a :class:`~voicepool.kube.api.KubeApiError`, and an answer that did not come is
:class:`~voicepool.kube.api.Unreachable` (the write may have happened); no write is ever repeated here, since only the caller knows whether
that is safe; a delete always carries preconditions.
Credentials come from the official client's configuration loading and are asked for anew with each request, so that a rotated token is used at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import ssl
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, Literal, Self, TypeVar

import aiohttp
import msgspec
from aiohttp.connector import NEEDS_CLEANUP_CLOSED

from voicepool.kube.api import (
    PODS,
    AlreadyExists,
    Conflict,
    Forbidden,
    Gone,
    Json,
    KubeApiError,
    NotFound,
    Resource,
    ServerFault,
    TooManyRequests,
    Unprocessable,
    Unreachable,
    WatchEvent,
)
from voicepool.kube.clock import ServerClock

JSON_PATCH = "application/json-patch+json"
MERGE_PATCH = "application/merge-patch+json"

DEFAULT_REQUEST_TIMEOUT_SECONDS = 30.0
DEFAULT_SILENCE_SECONDS = 90.0
"""The API server sends a bookmark about once a minute; a watch that has been silent for longer is dead, whatever its socket says."""
DEFAULT_CONNECTIONS = 64
MAX_LOG_LINE_BYTES = 64 * 1024


T = TypeVar("T")


class _List(msgspec.Struct):
    metadata: Json
    items: list[msgspec.Raw] = []


class _Event(msgspec.Struct, Generic[T]):
    type: Literal["ADDED", "MODIFIED", "DELETED", "BOOKMARK"]
    object: T


class _ErrorEvent(msgspec.Struct):
    type: Literal["ERROR"]
    object: Json


def event_reader(resource: Resource) -> Callable[[bytes], WatchEvent]:
    """Reads one line of a watch; what it returns raises ValueError for a line that is no event."""
    fields: Any = resource.fields or Json
    decoder = msgspec.json.Decoder(_Event[fields])

    def read(line: bytes) -> WatchEvent:
        try:
            event = decoder.decode(line)
        except msgspec.ValidationError:
            # The object of an error is not one of those that are watched.
            error = msgspec.json.decode(line, type=_ErrorEvent)
            return WatchEvent(error.type, error.object)
        return WatchEvent(event.type, event.object)

    return read


def _list_reader(fields: Any) -> Callable[[bytes], Json]:
    """Reads a page of a list, and skips what has no place in the fields of its items.

    Such items are read one by one as they are asked for, and once: as Python objects a page is many times larger than as bytes, and what is kept of it
    would lie between the holes that it leaves.
    """
    if fields is None:
        return msgspec.json.decode
    page_decoder, item_decoder = msgspec.json.Decoder(_List), msgspec.json.Decoder(fields)

    def items(page: _List) -> Iterator[Json]:
        try:
            for item in page.items:
                yield item_decoder.decode(item)
        except ValueError as error:
            raise Unreachable(f"an item of a list is none: {error}") from error

    def read(data: bytes) -> Json:
        page = page_decoder.decode(data)
        return {"metadata": page.metadata, "items": items(page)}

    return read


class ConnectionSettingsError(Exception):
    """No way to the API server is configured; the message says what was looked for."""


@dataclass(frozen=True, slots=True)
class Connection:
    """Where the API server is and how to speak to it."""

    server: str
    """For example ``https://10.96.0.1:443``, without a slash at the end."""
    ssl_context: ssl.SSLContext | None
    """None for plain HTTP."""
    authorization: Callable[[], str | None]
    """The value of the Authorization header now; None where a client certificate speaks for us."""
    proxy: str | None = None


def load_connection(kubeconfig: Path | None = None, context: str | None = None) -> Connection:
    """Find the API server: an explicit kubeconfig, the pod's own service account, or the user's kubeconfig, in this order.

    Args:
        kubeconfig: a file; None looks around.
        context: a context of the kubeconfig; None is the current one.

    Raises:
        ConnectionSettingsError: nothing usable was found.
    """
    # Slow to import (0.2 s) and needed once.
    from kubernetes.client import Configuration
    from kubernetes.config import ConfigException, load_incluster_config, load_kube_config

    configuration = Configuration()
    in_cluster = kubeconfig is None and bool(os.environ.get("KUBERNETES_SERVICE_HOST"))
    try:
        if in_cluster:
            load_incluster_config(client_configuration=configuration)  # type: ignore[no-untyped-call]
        else:
            load_kube_config(  # type: ignore[no-untyped-call]
                config_file=str(kubeconfig) if kubeconfig else None, context=context, client_configuration=configuration
            )
    except (ConfigException, OSError) as error:
        looked_at = "the pod's service account" if in_cluster else str(kubeconfig or "$KUBECONFIG or ~/.kube/config")
        raise ConnectionSettingsError(f"No Kubernetes API server is configured in {looked_at}: {error}") from error

    def authorization() -> str | None:
        # Reads a projected token again each minute and runs an exec plugin when its token has expired.
        value: str | None = configuration.get_api_key_with_prefix("BearerToken", alias="authorization")
        return value.strip() if value else None

    return Connection(
        server=str(configuration.host).rstrip("/"),
        ssl_context=_ssl_context(configuration),
        authorization=authorization,
        proxy=configuration.proxy or None,
    )


def _ssl_context(configuration: Any) -> ssl.SSLContext | None:
    if not str(configuration.host).startswith("https://"):
        return None
    context = ssl.create_default_context(cafile=configuration.ssl_ca_cert or None)
    # From Python 3.13 on, certificates without an Authority Key Identifier are refused; clusters have such, and Kubernetes' own clients take them.
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    if not configuration.verify_ssl:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    if configuration.cert_file:
        context.load_cert_chain(configuration.cert_file, configuration.key_file or None)
    return context


def make_session(
    connection: Connection,
    *,
    request_timeout_seconds: float = DEFAULT_REQUEST_TIMEOUT_SECONDS,
    connections: int = DEFAULT_CONNECTIONS,
) -> aiohttp.ClientSession:
    """An HTTP session that authorises each request with the credentials of that moment.

    Args:
        connection: from :func:`load_connection`.
        request_timeout_seconds: for one whole request; watches set their own.
        connections: kept open at most; watches count.
    """

    async def authorise(request: aiohttp.ClientRequest, handler: aiohttp.ClientHandlerType) -> aiohttp.ClientResponse:
        value = connection.authorization()
        if value:
            request.headers["Authorization"] = value
        return await handler(request)

    return aiohttp.ClientSession(
        base_url=connection.server,
        connector=aiohttp.TCPConnector(
            limit=connections,
            ssl=connection.ssl_context if connection.ssl_context else True,
            keepalive_timeout=60,
            # A server that is frozen never says goodbye, which older Pythons wait for.
            enable_cleanup_closed=NEEDS_CLEANUP_CLOSED,
        ),
        # The API server packs what is large, which costs both more CPU than a cluster's network costs time.
        headers={"Accept": "application/json", "Accept-Encoding": "identity", "User-Agent": "voicepool"},
        timeout=aiohttp.ClientTimeout(total=request_timeout_seconds, sock_connect=10),
        middlewares=(authorise,),
        proxy=connection.proxy,
        trust_env=False,
    )


def error_for(status: int, body: Mapping[str, Any], retry_after: str | None = None) -> KubeApiError:
    """The error that an HTTP status and a Kubernetes ``Status`` object stand for."""
    message = str(body.get("message") or f"the API server answered {status}")
    reason = str(body.get("reason") or "")
    if status == 409:
        kind = AlreadyExists if reason == "AlreadyExists" else Conflict
        return kind(message, status=status, reason=reason)
    if status == 429:
        details = body.get("details") or {}
        try:
            wait_seconds = float(retry_after or details.get("retryAfterSeconds") or 1)
        except ValueError:
            wait_seconds = 1.0
        return TooManyRequests(message, retry_after_seconds=wait_seconds, status=status, reason=reason)
    kinds: dict[int, type[KubeApiError]] = {
        401: Forbidden,
        403: Forbidden,
        404: NotFound,
        410: Gone,
        422: Unprocessable,
    }
    if status >= 500:
        return ServerFault(message, status=status, reason=reason)
    # 400 is how the API server refuses an object that it cannot even read (a wrong type, an unknown field): as final as 422.
    return kinds.get(status, Unprocessable if status == 400 else KubeApiError)(message, status=status, reason=reason)


class AiohttpKubeApi:
    """:class:`~voicepool.kube.api.KubeApi` over one aiohttp session. An async context manager; it closes its session.

    Args:
        session: from :func:`make_session`.
        silence_seconds: how long a watch may say nothing before it counts as dead.
        field_manager: who we are in ``managedFields``.
        clock: told the time by every answer.
    """

    def __init__(
        self,
        session: aiohttp.ClientSession,
        *,
        silence_seconds: float = DEFAULT_SILENCE_SECONDS,
        field_manager: str = "voicepool",
        clock: ServerClock | None = None,
    ) -> None:
        self.clock = clock or ServerClock()
        """The time at the API server."""
        self._session = session
        self._silence_seconds = silence_seconds
        self._field_manager = field_manager

    @classmethod
    def connect(cls, connection: Connection, *, clock: ServerClock | None = None, **session_options: Any) -> Self:
        """A client with a session of its own. Needs a running event loop."""
        return cls(make_session(connection, **session_options), clock=clock)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the session and with it every open watch."""
        await self._session.close()

    async def get(self, resource: Resource, namespace: str | None, name: str) -> Json:
        """Read one object."""
        return await self._request("GET", resource.path(namespace, name))

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
        query = {"limit": str(limit)}
        if label_selector:
            query["labelSelector"] = label_selector
        if continue_token:
            query["continue"] = continue_token
        elif resource_version:
            query["resourceVersion"] = resource_version
        read = _list_reader(resource.fields)
        return await self._request("GET", resource.path(namespace), query=query, read=read)

    async def watch(
        self,
        resource: Resource,
        namespace: str | None,
        *,
        resource_version: str,
        label_selector: str = "",
        timeout_seconds: int = 290,
    ) -> AsyncIterator[WatchEvent]:
        """Follow changes after ``resource_version``, with bookmarks; ends when the server ends it.

        Raises:
            Unreachable: the connection broke, or was silent for too long.
        """
        query = {
            "watch": "1",
            "allowWatchBookmarks": "true",
            "resourceVersion": resource_version,
            "timeoutSeconds": str(timeout_seconds),
        }
        if label_selector:
            query["labelSelector"] = label_selector
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=self._silence_seconds)
        read = event_reader(resource)
        asked_at = self.clock.monotonic()
        try:
            async with self._session.get(resource.path(namespace), params=query, timeout=timeout) as response:
                self.clock.heard(response.headers.get("Date"), asked_at)
                if response.status >= 400:
                    raise await _error_of(response)
                # Lines are put together here: aiohttp's own reader refuses lines longer than its buffer, and a pod may be larger.
                rest = b""
                async for chunk in response.content.iter_any():
                    *lines, rest = (rest + chunk).split(b"\n")
                    for line in lines:
                        if line:
                            yield read(line)
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            raise Unreachable(f"the watch of {resource.plural} broke: {_words(error)}") from error

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
        """The lines of a container's log, each with its time before it, cut at :data:`MAX_LOG_LINE_BYTES`. Leaving the context stops the reading.

        Raises:
            KubeApiError: there is no log to be had; while reading, that it broke.
        """
        query = {"container": container, "timestamps": "true"}
        if follow:
            query["follow"] = "true"
        for key, value in {"tailLines": tail_lines, "sinceTime": since, "limitBytes": limit_bytes}.items():
            if value is not None:
                query[key] = str(value)
        path = PODS.path(namespace, name, "log")
        # An agent may say nothing for as long as it likes, so only the first answer has a limit where it is followed.
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=None if follow else timeout_seconds)
        try:
            async with asyncio.timeout(timeout_seconds):
                response = await self._session.get(
                    path, params=query, timeout=timeout, headers={"Accept": "application/json, */*"}
                )
                if response.status >= 400:
                    raise await _error_of(response)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise Unreachable(f"GET {path}: {_words(error)}") from error
        try:
            yield _log_lines(response, path)
        finally:
            response.close()

    async def create(
        self, resource: Resource, namespace: str, body: Mapping[str, Any], *, dry_run: bool = False
    ) -> Json:
        """Create an object and return it as stored."""
        query = {"fieldManager": self._field_manager}
        if dry_run:
            # Strict, because the dry run is there to find a user's spelling mistakes.
            query |= {"dryRun": "All", "fieldValidation": "Strict"}
        return await self._request("POST", resource.path(namespace), query=query, body=body)

    async def json_patch(
        self, resource: Resource, namespace: str, name: str, operations: Sequence[Mapping[str, Any]]
    ) -> Json:
        """Apply an RFC 6902 patch atomically and return the object as stored; a failed test is :class:`Unprocessable`."""
        return await self._request(
            "PATCH",
            resource.path(namespace, name),
            query={"fieldManager": self._field_manager},
            body=operations,
            content_type=JSON_PATCH,
        )

    async def merge_patch(
        self, resource: Resource, namespace: str, name: str, body: Mapping[str, Any], *, subresource: str | None = None
    ) -> Json:
        """Apply an RFC 7386 patch and return the object as stored."""
        return await self._request(
            "PATCH",
            resource.path(namespace, name, subresource),
            query={"fieldManager": self._field_manager},
            body=body,
            content_type=MERGE_PATCH,
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
        """Delete that very object in that very version. There is no delete without preconditions."""
        options: Json = {
            "kind": "DeleteOptions",
            "apiVersion": "v1",
            "preconditions": {"uid": uid, "resourceVersion": resource_version},
        }
        if grace_period_seconds is not None:
            options["gracePeriodSeconds"] = grace_period_seconds
        await self._request("DELETE", resource.path(namespace, name), body=options)

    async def _request(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        body: Any = None,
        content_type: str = "application/json",
        read: Callable[[bytes], Json] = msgspec.json.decode,
    ) -> Json:
        data = None if body is None else msgspec.json.encode(body)
        headers = {} if data is None else {"Content-Type": content_type}
        asked_at = self.clock.monotonic()
        try:
            async with self._session.request(method, path, params=query, data=data, headers=headers) as response:
                self.clock.heard(response.headers.get("Date"), asked_at)
                if response.status >= 400:
                    raise await _error_of(response)
                return read(await response.read())
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            raise Unreachable(f"{method} {path}: {_words(error)}") from error


async def _error_of(response: aiohttp.ClientResponse) -> KubeApiError:
    text = await response.read()
    try:
        body = msgspec.json.decode(text)
    except ValueError:
        body = {"message": text.decode(errors="replace").strip()[:500]}
    return error_for(response.status, body if isinstance(body, dict) else {}, response.headers.get("Retry-After"))


async def _log_lines(response: aiohttp.ClientResponse, path: str) -> AsyncIterator[bytes]:
    rest, cut = b"", False
    try:
        async for chunk in response.content.iter_any():
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                if not cut:
                    yield line[:MAX_LOG_LINE_BYTES]
                cut = False
            if len(rest) > MAX_LOG_LINE_BYTES:
                # Told now, so that a line without an end is never held as a whole; its end is left out.
                if not cut:
                    yield rest[:MAX_LOG_LINE_BYTES]
                rest, cut = b"", True
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        raise Unreachable(f"GET {path}: {_words(error)}") from error
    if rest and not cut:
        yield rest


def _words(error: BaseException) -> str:
    return str(error) or type(error).__name__
