"""The client for programs with an event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from datetime import datetime
from types import TracebackType
from typing import Any, Self, TypeVar

import httpx2

from voicepool.client import calls
from voicepool.client.calls import Call, EndMode, Selector, State, WaitFor
from voicepool.client.errors import StreamBroken, VoicepoolError
from voicepool.client.shell import LIMITS, TIMEOUT_SECONDS, ApiKey, Shell
from voicepool.client.streams import LogStream, PoolStream, SessionNews, StateStream, Stream
from voicepool.session_api import LogLine, PoolCounts, Session, SessionRecord, Terminated, TokenAnswer

T = TypeVar("T")


class AsyncVoicepool(Shell):
    """The session API of a gateway.

    Each call raises :class:`~voicepool.client.errors.VoicepoolError`, and ValueError for an argument that makes no sense. Pools are named ``name`` (in
    the gateway's default namespace) or ``namespace.name``.

    Args:
        url: of the gateway; everything before ``/start``.
        api_key: an API key, or a token where the gateway takes tokens; or a function that gives the current one. None where it asks for none.
        timeout_seconds: for a call with all its attempts, unless the call is given its own. Streams: until one is connected (again).
        retry: try again what failed in passing, when the gateway says, until the time is up. Then each start gets an ``idempotency_key``, so that it
            never gets two agents.
        http_client: an httpx client of your own, for certificates, proxies and limits; it stays open.

    Raises:
        ValueError: url or api_key cannot be one.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: ApiKey,
        timeout_seconds: float = TIMEOUT_SECONDS,
        retry: bool = True,
        http_client: httpx2.AsyncClient | None = None,
    ) -> None:
        super().__init__(url, api_key=api_key, timeout_seconds=timeout_seconds, retry=retry)
        self._own = http_client is None
        self._http = http_client or httpx2.AsyncClient(limits=LIMITS)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close all connections; those of an ``http_client`` of your own are yours to close."""
        if self._own:
            await self._http.aclose()

    async def start(
        self,
        pool: str | None = None,
        *,
        body: Any = None,
        pools: Sequence[str] | None = None,
        selector: Selector | None = None,
        namespace: str | None = None,
        session_id: str | None = None,
        idempotency_key: str | None = None,
        wait_for: WaitFor = "accepted",
        traceparent: str | None = None,
        timeout_seconds: float | None = None,
    ) -> Session:
        """Start a session with a warm agent. Who is cancelled meanwhile leaves the queue.

        Args:
            pool: which; without this, ``pools`` and ``selector`` the gateway's default pool, or the only one that the key may use.
            body: JSON for the bot.
            pools: up to ten that will do, the best first.
            selector: labels of pools that will do, as a map or as ``kubectl -l`` takes them.
            namespace: of the pools that ``selector`` is about.
            session_id: of your own; the same one again gets the same agent.
            idempotency_key: as ``session_id``, where the id itself does not matter.
            wait_for: ``joined`` waits up to 20 s until the agent is in the room.
            traceparent: of the trace that the session belongs to (W3C Trace Context).
            timeout_seconds: for this call with all its attempts.
        """
        call = calls.start(
            pool,
            body=body,
            pools=pools,
            selector=selector,
            namespace=namespace,
            session_id=session_id,
            idempotency_key=idempotency_key,
            wait_for=wait_for,
            traceparent=traceparent,
            make_key=self._retry,
        )
        return await self._answer(call, timeout_seconds)

    async def livekit_token(
        self,
        pool: str,
        *,
        body: Any = None,
        room_name: str | None = None,
        participant_identity: str | None = None,
        participant_name: str | None = None,
        participant_metadata: str | None = None,
        participant_attributes: Mapping[str, str] | None = None,
        idempotency_key: str | None = None,
        traceparent: str | None = None,
        timeout_seconds: float | None = None,
    ) -> TokenAnswer:
        """Start a session in the words of LiveKit's standard token endpoint, for a caller who is to have a name or attributes.

        Args:
            pool: which.
            body: JSON for the bot.
            room_name: your own name of the session; the same one again gets the same agent. It is not the name of the room.
            participant_identity: of the caller.
            participant_name: as others in the room see the caller.
            participant_metadata: for the bot to read.
            participant_attributes: for the bot to read.
            idempotency_key: as ``room_name``, where there is none.
            traceparent: of the trace that the session belongs to (W3C Trace Context).
            timeout_seconds: for this call with all its attempts.
        """
        call = calls.livekit_token(
            pool,
            body=body,
            room_name=room_name,
            participant_identity=participant_identity,
            participant_name=participant_name,
            participant_metadata=participant_metadata,
            participant_attributes=participant_attributes,
            idempotency_key=idempotency_key,
            traceparent=traceparent,
            make_key=self._retry,
        )
        return await self._answer(call, timeout_seconds)

    async def session(self, pool: str, session_id: str, *, timeout_seconds: float | None = None) -> SessionRecord:
        """One session: what its pod shows and what its agent says; of one that has ended, its agent's summary."""
        return await self._answer(calls.session(pool, session_id), timeout_seconds)

    async def sessions(
        self,
        pool: str,
        *,
        state: State | None = None,
        end_state: str | None = None,
        created_after: datetime | None = None,
        created_before: datetime | None = None,
        deployment_id: str | None = None,
        page_size: int = 100,
        timeout_seconds: float | None = None,
    ) -> AsyncGenerator[SessionRecord]:
        """The sessions of a pool that run, and those that ended and are still kept; the newest first, page by page as they are read.

        Args:
            pool: whose.
            state: ``active`` is every state but ``ended``.
            end_state: how they ended, see :attr:`~voicepool.session_api.SessionRecord.end_state`.
            created_after: with a time zone.
            created_before: with a time zone.
            deployment_id: agents made from this template only.
            page_size: 1 to 1000.
            timeout_seconds: for each page.
        """
        cursor: str | None = None
        while True:
            call = calls.sessions(
                pool,
                state=state,
                end_state=end_state,
                created_after=created_after,
                created_before=created_before,
                deployment_id=deployment_id,
                page_size=page_size,
                cursor=cursor,
            )
            page = await self._answer(call, timeout_seconds)
            for record in page.sessions:
                yield record
            cursor = page.next_cursor
            if cursor is None:
                return

    async def end(
        self, pool: str, session_id: str, *, mode: EndMode = "cancel", timeout_seconds: float | None = None
    ) -> Terminated:
        """End a session: ``drain`` lets the agent say goodbye, ``cancel`` ends it now. One that has ended already is no error."""
        return await self._answer(calls.end(pool, session_id, mode), timeout_seconds)

    async def log(
        self, pool: str, session_id: str, *, tail: int = 100, timeout_seconds: float | None = None
    ) -> list[LogLine]:
        """The last lines that a session's agent has written: ``tail`` of them, at most 5000."""
        return await self._answer(calls.log(pool, session_id, tail), timeout_seconds)

    def follow_log(
        self, pool: str, session_id: str, *, tail: int = 100, timeout_seconds: float | None = None
    ) -> AsyncGenerator[LogLine]:
        """The last lines of a session's agent, and each that it writes, until its end. A connection that breaks is made again where it was.

        Close it (``contextlib.aclosing``) where you leave it before its end.
        """
        return self._follow(LogStream(pool, session_id, tail), timeout_seconds)

    def watch(
        self, pool: str, session_id: str, *, timeout_seconds: float | None = None
    ) -> AsyncGenerator[SessionRecord]:
        """A session's record, now and whenever its state goes on, until it has ended. A connection that breaks is made again.

        Close it (``contextlib.aclosing``) where you leave it before its end.
        """
        return self._follow(StateStream(pool, session_id), timeout_seconds)

    def watch_pool(
        self, pool: str, *, timeout_seconds: float | None = None
    ) -> AsyncGenerator[PoolCounts | SessionNews]:
        """A pool's counts, now and whenever they are others, and each session that begins or ends.

        A connection that breaks is ``StreamBroken``, since nobody tells what happened in between; watch again, and read the list.
        Close it (``contextlib.aclosing``) where you leave it.
        """
        return self._follow(PoolStream(pool), timeout_seconds)

    async def _answer(self, call: Call[T], timeout_seconds: float | None) -> T:
        attempts = self._attempts(call, timeout_seconds)
        while True:
            try:
                with self._errors(call, attempts):
                    answer = await self._http.request(**self._request(call, attempts))
                return self._read(call, answer)
            except VoicepoolError as error:
                pause_seconds = attempts.pause_seconds(error)
                if pause_seconds is None:
                    raise
            await asyncio.sleep(pause_seconds)

    async def _follow(self, stream: Stream[T], timeout_seconds: float | None) -> AsyncGenerator[T]:
        following = self._following(stream, timeout_seconds)
        while True:
            call, attempts = following.call, following.attempts
            try:
                with self._errors(call, attempts):
                    async with self._http.stream(**self._request(call, attempts)) as answer:
                        if answer.status_code != call.status:
                            await answer.aread()
                            raise self._error(call, answer)
                        following.connected()
                        async for event in httpx2.EventSource(answer):
                            if (told := self._took(following, event)) is not None:
                                yield told
                            if stream.over:
                                return
                raise StreamBroken(f"{self._what(call)}: the stream ended too early.")
            except VoicepoolError as error:
                pause_seconds = following.pause_seconds(error)
                if pause_seconds is None:
                    raise
            await asyncio.sleep(pause_seconds)
