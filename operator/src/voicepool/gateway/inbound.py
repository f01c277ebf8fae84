"""Calls that come by themselves: somebody has joined a room of LiveKit, by telephone as a rule, and a webhook tells of it.

Invariants:

* Nothing of a webhook is believed before its signature is: the issuer only says which keys to try. Its server decides which pools it may speak for.
* A caller in a room gets one agent, however often and at how many gateways the webhook arrives: the session's id follows from the room alone.
* A room of another session is never given an agent, whatever prefix a pool has.
* A webhook is answered when its caller is seen to, not before: what a gateway that dies leaves undone LiveKit brings to another one.
* A caller who cannot get an agent within the pool's limits is not left in silence: the room is deleted, unless an agent is in it or on its way.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import jwt
from google.protobuf.json_format import ParseError
from livekit import api as livekit_api
from livekit.protocol.webhook import WebhookEvent

from voicepool.gateway.background import Background
from voicepool.gateway.errors import BadRequest, ClusterUnavailable, GatewayError, Unauthenticated
from voicepool.gateway.livekit import CALLER_KINDS, LiveKitServers, Rooms, agent_identity
from voicepool.gateway.metrics import GatewayMetrics
from voicepool.gateway.requests import CallersRoom, StartRequest, room_name, words
from voicepool.gateway.sessions import Sessions
from voicepool.gateway.view import ClusterView, is_live
from voicepool.model import PoolFact

log = logging.getLogger("voicepool.gateway")

_INBOUND_SESSIONS = uuid.UUID("0b6a4f9e-6c0c-5b7e-9b56-6a1f1c7f2d31")
"""Namespace of the session ids that are derived from a caller's room; any constant would do."""
_SIP = "sip."


@dataclass(frozen=True, slots=True)
class Webhook:
    """A webhook whose signature is good."""

    event: WebhookEvent
    pools: tuple[PoolFact, ...]
    """The pools with an inbound prefix that are on the server that signed."""


class InboundCalls:
    """Gives callers who come by themselves their agents.

    Args:
        view: what the informers know.
        sessions: starts them.
        servers: the LiveKit server of each pool.
        rooms: their rooms.
        metrics: what is counted.
    """

    def __init__(
        self, *, view: ClusterView, sessions: Sessions, servers: LiveKitServers, rooms: Rooms, metrics: GatewayMetrics
    ) -> None:
        self._view = view
        self._sessions = sessions
        self._servers = servers
        self._rooms = rooms
        self._metrics = metrics
        self._background = Background()

    async def verified(self, body: bytes, token: str) -> Webhook:
        """Read a webhook that a LiveKit server of ours has signed.

        Raises:
            Unauthenticated: it has not: an unknown key, a wrong or expired signature, or one of another body.
            BadRequest: it has, but what it says cannot be read.
        """
        pools = [pool for pool in self._view.pools.values() if pool.spec.inbound.room_prefix and not pool.deleting]
        key = _issuer(token)
        for secret, of_secret in (await self._servers.with_key(key, pools)).items():
            receiver = livekit_api.WebhookReceiver(livekit_api.TokenVerifier(key, secret))
            try:
                event = receiver.receive(body.decode(), token)
            except ParseError:
                raise BadRequest("The webhook is signed well, but is no event of LiveKit's.") from None
            except Exception:  # noqa: S112 -- the library raises a plain one; the next secret may fit
                continue
            return Webhook(event, tuple(of_secret))
        self._metrics.webhooks.labels("refused").inc()
        raise Unauthenticated(
            "The webhook is not signed with a key of a LiveKit server of this gateway, or has expired; "
            "set 'webhook.api_key' of the server to the key that the gateway has.",
            code="INVALID_WEBHOOK",
        )

    async def heard(self, webhook: Webhook) -> Literal["started", "ignored"]:
        """Do what follows from a webhook; returns when the caller has an agent, or has been seen to without one.

        LiveKit waits for the answer, and sends a webhook again where none comes: a gateway that is killed meanwhile loses no caller. Who stops waiting here
        stops nothing.
        """
        request = self._request(webhook)
        outcome: Literal["started", "ignored"] = "ignored" if request is None else "started"
        self._metrics.webhooks.labels(outcome).inc()
        if request is not None:
            await asyncio.shield(self._background.spawn(self._start(request)))
        return outcome

    def _request(self, webhook: Webhook) -> StartRequest | None:
        event = webhook.event
        # Not `room_started`: the room may be made long before anybody comes, and who has come is only in this one.
        if event.event != "participant_joined" or event.participant.kind not in CALLER_KINDS:
            return None
        room = event.room
        pool = chosen_pool(room.name, webhook.pools)
        if pool is None or not room.sid:
            return None
        session_id = inbound_session_id(room.name, room.sid)
        if self._has_session(room.name, session_id):
            log.debug("somebody joined a room that has a session", extra={"room": room.name})
            return None
        return StartRequest(
            namespace=pool.namespace,
            pool=pool.name,
            session_id=session_id,
            keyed=True,
            callers_room=CallersRoom(room.name, room.sid),
            body=inbound_body(event.participant),
        )

    def _has_session(self, room: str, session_id: str) -> bool:
        """Whether a room is that of another session: one that the gateway made, or one that an agent has been sent to."""
        if any(room.startswith(room_name(*key, "")) for key in self._view.pools):
            return True
        return any(pod.session != session_id for pod in self._view.pods_in_room(room) if is_live(pod))

    async def _start(self, request: StartRequest) -> None:
        try:
            await self._sessions.start(request)
        except GatewayError as error:
            if error.code not in ("ROOM_ENDED", "SESSION_ENDED"):
                await self._hang_up(request)

    async def _hang_up(self, request: StartRequest) -> None:
        """End a call that got no agent. Another gateway may have been luckier with the same webhook."""
        try:
            carriers = await self._sessions.carriers(request.namespace, request.session_id)
        except ClusterUnavailable:
            carriers = []
        if any(is_live(pod) and not pod.deleting for pod in carriers):
            return
        try:
            server = await self._servers.of(self._sessions.pool(request.key))
            found = await self._rooms.find(server, request.room)
            if found is None or request.callers_room is None or found.sid != request.callers_room.sid:
                return
            if await self._rooms.has(server, request.room, agent_identity(request.session_id)):
                return
            await self._rooms.delete(server, request.room)
        except GatewayError as error:
            self._metrics.rooms.labels(*request.key, "failed").inc()
            log.error("a caller without an agent could not be hung up on: %s", error.detail, extra=words(request))
            return
        self._metrics.rooms.labels(*request.key, "hung_up").inc()
        log.warning("a caller got no agent; the call is ended", extra=words(request) | {"room": request.room})

    async def close(self, *, timeout_seconds: float) -> None:
        """Wait for the starts that are under way, then stop them."""
        await self._background.close(timeout_seconds=timeout_seconds)

    async def settled(self) -> None:
        """Wait until no start is under way."""
        await self._background.settled()


def inbound_session_id(room: str, sid: str) -> str:
    """The session of a caller's room: the same at every gateway, and another one when the room is made again."""
    return str(uuid.uuid5(_INBOUND_SESSIONS, f"{room}\0{sid}"))


def chosen_pool(room: str, pools: Iterable[PoolFact]) -> PoolFact | None:
    """The pool of a room's name: that of the longest prefix, and of equal ones the first by namespace and name, with a warning."""
    fitting = [
        pool for pool in pools if pool.spec.inbound.room_prefix and room.startswith(pool.spec.inbound.room_prefix)
    ]
    if not fitting:
        return None
    longest = max(len(pool.spec.inbound.room_prefix or "") for pool in fitting)
    first, *others = sorted(
        (pool for pool in fitting if len(pool.spec.inbound.room_prefix or "") == longest),
        key=lambda pool: (pool.namespace, pool.name),
    )
    if others:
        log.warning(
            "several pools have the same spec.inbound.roomPrefix; the first by name gets the calls",
            extra={
                "prefix": first.spec.inbound.room_prefix,
                "pool": f"{first.namespace}/{first.name}",
                "others": [f"{pool.namespace}/{pool.name}" for pool in others],
            },
        )
    return first


def inbound_body(participant: livekit_api.ParticipantInfo) -> dict[str, Any]:
    """What the bot is told of its caller. Attributes are the SIP service's word for a telephone only; any other participant may have made them up."""
    if participant.kind != livekit_api.ParticipantInfo.Kind.SIP:
        return {}
    attributes = {name: value for name, value in participant.attributes.items() if name.startswith(_SIP)}
    return {"sip": {name.removeprefix(_SIP): value for name, value in sorted(attributes.items())}}


def _issuer(token: str) -> str:
    """The key that a token says it is signed with; nothing of it is believed yet."""
    try:
        issuer = jwt.decode(token, options={"verify_signature": False}).get("iss")
    except jwt.InvalidTokenError:
        issuer = None
    return issuer if isinstance(issuer, str) else ""
