"""What both clients have in common: where the gateway is, requests as httpx takes them, and answers as values or errors. No I/O."""

from __future__ import annotations

import contextlib
import ssl
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import httpx2
from pydantic import ValidationError

from voicepool import __version__
from voicepool.client.attempts import Attempts
from voicepool.client.calls import Call
from voicepool.client.errors import (
    ConnectionFailed,
    NotUnderstood,
    StreamBroken,
    Timeout,
    TlsFailed,
    VoicepoolError,
    refused,
)
from voicepool.client.streams import Following, Stream
from voicepool.session_api import ErrorAnswer

T = TypeVar("T")

ApiKey = str | Callable[[], str] | None

TIMEOUT_SECONDS = 60.0
# A start that waits in a pool's queue holds a connection all the time, so their number has no limit of ours.
# What stands before a gateway closes what is idle, most of it after a minute, and a request that meets that costs an attempt.
LIMITS = httpx2.Limits(max_connections=None, max_keepalive_connections=20, keepalive_expiry=30.0)


class Shell:
    """Holds what each call needs.

    Args:
        url: of the gateway; everything before ``/start``.
        api_key: or a token; or a function that gives the current one; None where the gateway asks for none.
        timeout_seconds: for a call with all its attempts, unless it is given its own.
        retry: whether calls are tried again.

    Raises:
        ValueError: url or api_key cannot be one.
    """

    def __init__(self, url: str, *, api_key: ApiKey, timeout_seconds: float, retry: bool) -> None:
        if not _is_address(url):
            raise ValueError(
                "The gateway's address is like https://voice.example.com, with a path or without, and nothing else."
            )
        if api_key is not None and not callable(api_key) and not api_key.strip():
            raise ValueError("api_key is empty; None is for a gateway that asks for none.")
        self.url = url.rstrip("/")
        self._api_key = api_key
        self._timeout_seconds = timeout_seconds
        self._retry = retry

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.url!r})"

    def _attempts(self, call: Call[Any], timeout_seconds: float | None) -> Attempts:
        seconds = self._timeout_seconds if timeout_seconds is None else timeout_seconds
        return Attempts(seconds, repeatable=self._retry and call.repeatable)

    def _request(self, call: Call[Any], attempts: Attempts) -> dict[str, Any]:
        """As ``httpx.Client.request`` takes it."""
        headers = {"User-Agent": f"voicepool-client/{__version__}", **call.headers}
        key = self._api_key() if callable(self._api_key) else self._api_key
        if key is not None:
            # What is read from a file often ends with a line feed, which no header may have.
            headers["Authorization"] = f"Bearer {key.strip()}"
        if call.content is not None:
            headers["Content-Type"] = "application/json"
        return {
            "method": call.method,
            "url": self.url + call.path,
            "params": dict(call.query),
            "headers": headers,
            "content": call.content,
            "extensions": {"timeout": attempts.left},
        }

    @contextlib.contextmanager
    def _errors(self, call: Call[Any], attempts: Attempts) -> Iterator[None]:
        """Turn what httpx raises into this package's words.

        Raises:
            Timeout: the call's time is up.
            TlsFailed: whoever is there is not trusted.
            StreamBroken: a stream that had begun does not go on.
            ConnectionFailed: there is no answer, or only a part of one.
        """
        try:
            yield
        except httpx2.SSEError as error:
            raise NotUnderstood(
                f"{self._what(call)}: what came is no stream of events ({error}).", status=200
            ) from error
        except httpx2.HTTPError as error:
            reason = str(error) or type(error).__name__
            if attempts.left.streaming:
                raise StreamBroken(f"{self._what(call)}: the stream broke ({reason}).") from error
            if not isinstance(error, httpx2.TimeoutException):
                kind = TlsFailed if _is_tls(error) else ConnectionFailed
                raise kind(f"{self._what(call)}: {reason}.") from error
            within = f"{attempts.timeout_seconds:g} s" + (f" and {attempts.made} attempts" if attempts.made > 1 else "")
            raise Timeout(f"{self._what(call)}: no answer within {within}.") from (attempts.earlier or error)

    def _read(self, call: Call[T], answer: httpx2.Response) -> T:
        """What the answer says.

        Raises:
            Refused: an error.
            NotUnderstood: nothing that the session API says.
        """
        if answer.status_code != call.status:
            raise self._error(call, answer)
        try:
            return call.read(answer.content)
        except ValueError as error:
            raise self._not_understood(call, answer, error) from error

    def _error(self, call: Call[Any], answer: httpx2.Response) -> VoicepoolError:
        retry_after_seconds = _seconds(answer.headers.get("Retry-After"))
        try:
            said = ErrorAnswer.model_validate_json(answer.content)
        except ValidationError as error:
            return self._not_understood(call, answer, error, retry_after_seconds)
        return refused(said.code, answer.status_code)(
            said.detail, status=answer.status_code, code=said.code, retry_after_seconds=retry_after_seconds
        )

    def _not_understood(
        self, call: Call[Any], answer: httpx2.Response, error: ValueError, retry_after_seconds: float | None = None
    ) -> NotUnderstood:
        kind = answer.headers.get("Content-Type") or "of no type"
        return NotUnderstood(
            f"{self._what(call)}: the answer ({kind}) is none of the session API{_places(error)}.",
            status=answer.status_code,
            retry_after_seconds=retry_after_seconds,
        )

    def _following(self, stream: Stream[T], timeout_seconds: float | None) -> Following[T]:
        return Following(stream, lambda call: self._attempts(call, timeout_seconds))

    def _took(self, following: Following[T], event: httpx2.ServerSentEvent) -> T | None:
        """What an event of a stream says.

        Raises:
            NotUnderstood: it is none of the session API's.
        """
        try:
            return following.take(event.event, event.data, event.id)
        except ValueError as error:
            what = f"an event {event.event!r} is none of the session API{_places(error)}"
            raise NotUnderstood(f"{self._what(following.call)}: {what}.", status=200) from error

    def _what(self, call: Call[Any]) -> str:
        return f"{call.method} {self.url}{call.path}"


def _is_tls(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, ssl.SSLError):
            # The other side's end while both still agree is no word on its certificate.
            return not isinstance(error, (ssl.SSLEOFError, ssl.SSLZeroReturnError, ssl.SSLSyscallError))
        error = error.__cause__ or error.__context__
    return False


def _is_address(url: str) -> bool:
    try:
        parts = httpx2.URL(url)
    except httpx2.InvalidURL:
        return False
    return (
        parts.scheme in ("http", "https") and bool(parts.host) and not (parts.userinfo or parts.query or parts.fragment)
    )


def _seconds(header: str | None) -> float | None:
    """``Retry-After`` in seconds; proxies may send a date, which is left aside."""
    return float(header) if header is not None and header.isdecimal() else None


def _places(error: ValueError) -> str:
    """Which fields are wrong. Not their values: they may be what nobody should see in an error."""
    if not isinstance(error, ValidationError):
        return ""
    places = (".".join(map(str, problem["loc"])) or problem["type"] for problem in error.errors())
    return f" ({', '.join(places)})"
