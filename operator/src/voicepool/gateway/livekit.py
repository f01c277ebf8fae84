"""LiveKit: which server a pool uses, rooms, and tokens with exactly the grants that are meant.

Invariants: every grant is written out, since the library's tokens allow nearly everything for six hours by default; a token is for one room; secrets
are in no representation and no log.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import datetime
import functools
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, Protocol, TypeVar

import aiohttp
import jwt
from google.protobuf.message import DecodeError
from livekit import api as livekit_api

from voicepool.gateway.errors import LiveKitUnavailable
from voicepool.kube.api import (
    SECRETS,
    Json,
    KubeApi,
    KubeApiError,
    NotFound,
    ServerFault,
    TooManyRequests,
    Unreachable,
)
from voicepool.model import PoolFact

T = TypeVar("T")

_KEYS = ("url", "api-key", "api-secret")

_UNREADABLE_SECONDS = 5.0
_READ_SECONDS = 5.0
"""How long a Secret may take to be read: a caller waits, and the one that was read before is as good as ever."""
_NO_ANSWER = (aiohttp.ClientError, TimeoutError, DecodeError)
"""A server that does not answer, or whose answer is not LiveKit's: something else has its address."""

_Kind = Literal["standard", "agent"]
"""Of a participant, in LiveKit's words."""

CALLER_KINDS = (livekit_api.ParticipantInfo.Kind.STANDARD, livekit_api.ParticipantInfo.Kind.SIP)
"""The kinds of participants that are people; the others are agents, recorders and sources of media."""


@dataclass(frozen=True, slots=True)
class LiveKitServer:
    """One LiveKit server and the key to it."""

    url: str
    api_key: str = field(repr=False)
    api_secret: str = field(repr=False)
    public_url: str = ""
    """The address that callers use, where it differs from the agents'."""

    @property
    def caller_url(self) -> str:
        """Where a caller connects."""
        return self.public_url or self.url


@dataclass(frozen=True, slots=True)
class RoomState:
    """A room that is there."""

    sid: str
    """LiveKit's own id: a room that is made again under the same name has another one."""
    created_at: datetime.datetime
    """In whole seconds, by the LiveKit server's clock."""


class Rooms(Protocol):
    """What the gateway asks of a LiveKit server."""

    async def create(self, server: LiveKitServer, room: str, *, empty_timeout_seconds: int) -> None:
        """Make a room, or find it there.

        Raises:
            LiveKitUnavailable: the server did not do it.
        """
        ...

    async def has(self, server: LiveKitServer, room: str, identity: str) -> bool:
        """Whether a participant is in a room; raises as `create` does."""
        ...

    async def find(self, server: LiveKitServer, room: str) -> RoomState | None:
        """A room, None when it is not there; raises as `create` does."""
        ...

    async def callers(self, server: LiveKitServer, room: str) -> int:
        """How many people are in a room, by browser or telephone; raises as `create` does."""
        ...

    async def delete(self, server: LiveKitServer, room: str) -> bool:
        """Delete a room, which ends everybody's connection to it; False when it was not there. Raises as `create` does."""
        ...


class LiveKitRooms:
    """Rooms of real LiveKit servers, over one HTTP session.

    Args:
        http: the session; it belongs to the caller.
        timeout_seconds: for one request.
    """

    def __init__(self, http: aiohttp.ClientSession, *, timeout_seconds: float) -> None:
        self._http = http
        self._timeout_seconds = timeout_seconds

    async def create(self, server: LiveKitServer, room: str, *, empty_timeout_seconds: int) -> None:
        """See `Rooms.create`."""
        # No limit on participants: a colleague whom the agent brings in, a supervisor or a recorder must be able to join.
        request = livekit_api.CreateRoomRequest(name=room, empty_timeout=empty_timeout_seconds, departure_timeout=20)
        try:
            await self._in_time(self._client(server).room.create_room(request))
        except (livekit_api.TwirpError, *_NO_ANSWER) as error:
            raise _unavailable(server, error) from None

    async def has(self, server: LiveKitServer, room: str, identity: str) -> bool:
        """See `Rooms.has`."""
        return any(participant.identity == identity for participant in await self._participants(server, room))

    async def find(self, server: LiveKitServer, room: str) -> RoomState | None:
        """See `Rooms.find`."""
        try:
            request = livekit_api.ListRoomsRequest(names=[room])
            answer = await self._in_time(self._client(server).room.list_rooms(request))
        except (livekit_api.TwirpError, *_NO_ANSWER) as error:
            raise _unavailable(server, error) from None
        for found in answer.rooms:
            if found.name == room:
                return RoomState(found.sid, datetime.datetime.fromtimestamp(found.creation_time, datetime.UTC))
        return None

    async def callers(self, server: LiveKitServer, room: str) -> int:
        """See `Rooms.callers`."""
        return sum(participant.kind in CALLER_KINDS for participant in await self._participants(server, room))

    async def delete(self, server: LiveKitServer, room: str) -> bool:
        """See `Rooms.delete`."""
        try:
            await self._in_time(self._client(server).room.delete_room(livekit_api.DeleteRoomRequest(room=room)))
        except livekit_api.TwirpError as error:
            if error.code == "not_found":
                return False
            raise _unavailable(server, error) from None
        except _NO_ANSWER as error:
            raise _unavailable(server, error) from None
        return True

    async def _participants(self, server: LiveKitServer, room: str) -> Sequence[livekit_api.ParticipantInfo]:
        try:
            request = livekit_api.ListParticipantsRequest(room=room)
            answer = await self._in_time(self._client(server).room.list_participants(request))
        except livekit_api.TwirpError as error:
            if error.code == "not_found":
                return ()
            raise _unavailable(server, error) from None
        except _NO_ANSWER as error:
            raise _unavailable(server, error) from None
        return tuple(answer.participants)

    async def _in_time(self, request: Awaitable[T]) -> T:
        # The library asks with a limit of its own, which is none: that of the session does not count for it.
        async with asyncio.timeout(self._timeout_seconds):
            return await request

    def _client(self, server: LiveKitServer) -> livekit_api.LiveKitAPI:
        return livekit_api.LiveKitAPI(
            server.url,
            server.api_key,
            server.api_secret,
            session=self._http,
            failover=False,
        )


class LiveKitServers:
    """Finds the LiveKit server of a pool: the gateway's own, with what ``spec.livekit`` says otherwise.

    Args:
        kube: reads the Secret that a pool names.
        folder: the gateway's own server: files ``url``, ``api-key``, ``api-secret`` and, where callers use another address, ``public-url``.
        monotonic: seconds that never go back.
        cache_seconds: how long a Secret that was read, or the folder, is used.
    """

    def __init__(self, kube: KubeApi, folder: Path, *, monotonic: Callable[[], float], cache_seconds: float) -> None:
        self._kube = kube
        self._folder = folder
        self._monotonic = monotonic
        self._cache_seconds = cache_seconds
        self._secrets: dict[tuple[str, str], tuple[float, dict[str, str]]] = {}
        self._unreadable: dict[tuple[str, str], float] = {}
        self._own_read: tuple[float, dict[str, str]] | None = None
        """Until when it is good, and what it is."""

    async def of(self, pool: PoolFact) -> LiveKitServer:
        """The server of a pool.

        Raises:
            LiveKitUnavailable: something is missing; the message says what, and where it belongs.
        """
        wanted = pool.spec.livekit
        if wanted.secret_name:
            place = f"Secret {pool.namespace}/{wanted.secret_name}"
            values = await self._secret(pool, wanted.secret_name)
        else:
            place = "gateway's own LiveKit Secret"
            values = self._own()
        if wanted.url:
            values = {name: value for name, value in values.items() if name != "public-url"} | {"url": wanted.url}
        missing = [name for name in _KEYS if not values.get(name)]
        if missing:
            raise LiveKitUnavailable(
                f"The {place} lacks {', '.join(missing)}; the pool {pool.namespace}/{pool.name} has no LiveKit server.",
                code="LIVEKIT_NOT_CONFIGURED",
                retry_after_seconds=_UNREADABLE_SECONDS,
            )
        return LiveKitServer(
            url=values["url"],
            api_key=values["api-key"],
            api_secret=values["api-secret"],
            public_url=values.get("public-url", ""),
        )

    async def with_key(self, api_key: str, pools: Iterable[PoolFact]) -> dict[str, list[PoolFact]]:
        """The secrets that go with a key, each with the pools whose server has both; servers that are not configured are passed over.

        The gateway's own secret is among them, also where it is no pool's. Whoever asks may be anybody: a Secret that could not be read is
        not tried again for `_UNREADABLE_SECONDS`.
        """
        found: dict[str, list[PoolFact]] = {}
        own = self._own()
        if own.get("api-key") == api_key and own.get("api-secret"):
            found[own["api-secret"]] = []
        for pool in pools:
            place = (pool.namespace, pool.spec.livekit.secret_name or "")
            if self._monotonic() < self._unreadable.get(place, 0.0):
                continue
            try:
                server = await self.of(pool)
            except LiveKitUnavailable:
                if place[1]:
                    self._unreadable[place] = self._monotonic() + _UNREADABLE_SECONDS
                continue
            self._unreadable.pop(place, None)
            if server.api_key == api_key:
                found.setdefault(server.api_secret, []).append(pool)
        return found

    def _own(self) -> dict[str, str]:
        if self._own_read is not None and self._monotonic() < self._own_read[0]:
            return self._own_read[1]
        values = {}
        for name in (*_KEYS, "public-url"):
            try:
                values[name] = (self._folder / name).read_text().strip()
            except (OSError, UnicodeDecodeError):
                continue
        # What is not whole yet is looked at again at once.
        if all(values.get(name) for name in _KEYS):
            self._own_read = (self._monotonic() + self._cache_seconds, values)
        return values

    async def _secret(self, pool: PoolFact, name: str) -> dict[str, str]:
        key = (pool.namespace, name)
        known = self._secrets.get(key)
        if known is not None and self._monotonic() < known[0]:
            return known[1]
        try:
            async with asyncio.timeout(_READ_SECONDS):
                secret = await self._kube.get(SECRETS, pool.namespace, name)
        except NotFound:
            raise LiveKitUnavailable(
                f"The Secret {pool.namespace}/{name}, which spec.livekit.secretName of the pool {pool.name} names, does not exist.",
                code="LIVEKIT_NOT_CONFIGURED",
                retry_after_seconds=_UNREADABLE_SECONDS,
            ) from None
        except (Unreachable, ServerFault, TooManyRequests, TimeoutError) as error:
            if known is not None:
                # What was true a moment ago is better than nothing, and not every caller shall wait for as long.
                self._secrets[key] = (self._monotonic() + _UNREADABLE_SECONDS, known[1])
                return known[1]
            raise LiveKitUnavailable(
                f"The Secret {pool.namespace}/{name} of the pool {pool.name} cannot be read now: "
                f"the Kubernetes API does not answer as it should ({type(error).__name__}).",
                code="CLUSTER_UNAVAILABLE",
                retry_after_seconds=2,
            ) from None
        except KubeApiError as error:
            raise LiveKitUnavailable(
                f"The Secret {pool.namespace}/{name} of the pool {pool.name} cannot be read ({type(error).__name__}); "
                "may the gateway's account get it?",
                code="LIVEKIT_NOT_CONFIGURED",
                retry_after_seconds=_UNREADABLE_SECONDS,
            ) from None
        values = _decoded(secret)
        self._secrets[key] = (self._monotonic() + self._cache_seconds, values)
        return values


def caller_token(
    server: LiveKitServer,
    *,
    room: str,
    identity: str,
    ttl_seconds: float,
    name: str = "",
    metadata: str = "",
    attributes: Mapping[str, str] = MappingProxyType({}),
) -> str:
    """A token for a caller: one room, the microphone, listening and data; nothing else, and for minutes."""
    told = {"name": name, "metadata": metadata, "attributes": dict(attributes)}
    return _token(
        server, "standard", room, identity, ttl_seconds, {word: value for word, value in told.items() if value}
    )


def agent_token(server: LiveKitServer, *, room: str, identity: str, ttl_seconds: float) -> str:
    """A token for an agent: one room, audio and data both ways. ``ttl_seconds`` may be negative, see `GatewayOptions`."""
    return _token(server, "agent", room, identity, ttl_seconds, {})


def _token(
    server: LiveKitServer, kind: _Kind, room: str, identity: str, ttl_seconds: float, told: Mapping[str, Any]
) -> str:
    now = time.time()
    standing = _standing_claims(kind)
    claims = {
        "iss": server.api_key,
        "sub": identity,
        "nbf": int(now),
        "exp": int(now + ttl_seconds),
        "kind": kind,
        "video": {**standing["video"], "room": room},
        **told,
    }
    return jwt.encode(claims, server.api_secret, algorithm="HS256")


@functools.cache
def _standing_claims(kind: _Kind) -> Mapping[str, Any]:
    """What every token of a kind says, in the words of LiveKit's SDK. To put them together takes the SDK four times as long as to sign them."""
    token = livekit_api.AccessToken("nobody", "0" * 32).with_identity("nobody").with_kind(kind)
    return MappingProxyType(jwt.decode(token.with_grants(_grants(kind)).to_jwt(), options={"verify_signature": False}))


def agent_identity(session_id: str) -> str:
    """The agent's name in the room: the same for every pod that the session is given to, so that two can never be in it at once."""
    return f"agent-{session_id}"


def _grants(kind: _Kind) -> livekit_api.VideoGrants:
    return livekit_api.VideoGrants(
        room_create=False,
        room_list=False,
        room_record=False,
        room_admin=False,
        room_join=True,
        room="nowhere",
        can_publish=True,
        can_subscribe=True,
        can_publish_data=True,
        can_publish_sources=["microphone"],
        can_update_own_metadata=False,
        ingress_admin=False,
        hidden=False,
        recorder=False,
        agent=kind == "agent",
    )


def _decoded(secret: Json) -> dict[str, str]:
    values = {}
    for name, value in (secret.get("data") or {}).items():
        try:
            values[name] = base64.b64decode(value).decode().strip()
        except (binascii.Error, UnicodeDecodeError):
            continue
    return values


def _unavailable(server: LiveKitServer, error: Exception) -> LiveKitUnavailable:
    return LiveKitUnavailable(
        f"The LiveKit server at {server.url} did not answer as it should ({type(error).__name__}); is it up, and is the key right?",
        retry_after_seconds=2,
    )
