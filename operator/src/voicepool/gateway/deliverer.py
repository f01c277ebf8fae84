"""Brings a session to the agent of a pod that was bound for it, and knows afterwards whether the agent has it.

Invariants: an agent counts as not having the session only after its own word, or past the expiry of everything that it was sent; no assignment is good for
longer than :data:`~voicepool.binding.DELIVERY_DEADLINE_SECONDS` after the bind, also from a gateway that was frozen before it signed.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal, Self

from voicepool.binding import DELIVERY_DEADLINE_SECONDS
from voicepool.gateway.assignments import Assignment, Letter, Signer
from voicepool.gateway.delivery import Accepted, Call, Courier, NotReached, Outcome, Refused, Unknown
from voicepool.gateway.errors import LiveKitUnavailable
from voicepool.gateway.livekit import LiveKitServer, Rooms, agent_identity, agent_token
from voicepool.gateway.options import GatewayOptions
from voicepool.gateway.requests import Hold, StartRequest, words
from voicepool.model import PodFact, PoolFact

log = logging.getLogger("voicepool.gateway")

SETTLE_SECONDS = 2.0
"""Past an assignment's expiry, before its agent is taken at its word that it never got it: the two clocks are not one."""


def last_delivery(pod: PodFact, otherwise: datetime) -> datetime:
    """Until when an assignment for a bound pod may be good."""
    return (pod.bound_at or otherwise) + timedelta(seconds=DELIVERY_DEADLINE_SECONDS)


@dataclass(slots=True)
class Errand:
    """What can be done of a delivery while the pod is being bound. Nothing of it is left open in the end."""

    letter: Letter | None = None
    call: Call | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.call is not None:
            self.call.hang_up()


class Deliverer:
    """Delivers.

    Args:
        courier: talks to agents.
        signer: signs their orders.
        rooms: the LiveKit rooms, to look for an agent that does not answer.
        options: times and limits.
        now: the current time, with its zone.
    """

    def __init__(
        self, *, courier: Courier, signer: Signer, rooms: Rooms, options: GatewayOptions, now: Callable[[], datetime]
    ) -> None:
        self._courier = courier
        self._signer = signer
        self._rooms = rooms
        self._options = options
        self._now = now

    def prepare(
        self, errand: Errand, pod: PodFact, pool: PoolFact, request: StartRequest, server: LiveKitServer
    ) -> None:
        """Write the assignment of a pod that is not bound yet, and connect to its agent."""
        errand.letter = self._letter(pod, pool, request, server)
        errand.call = self._courier.call(pod, errand.letter.order)

    def _letter(self, pod: PodFact, pool: PoolFact, request: StartRequest, server: LiveKitServer) -> Letter:
        # The agent goes on with the request's trace.
        now = self._now()
        expires_at = min(now + timedelta(seconds=self._options.assignment_seconds), last_delivery(pod, now))
        return Letter(self._order(pod, pool, request, server, expires_at), expires_at)

    def _is_fresh(self, letter: Letter, pod: PodFact) -> bool:
        """Whether a letter that was written before the bind leaves the agent as good as all of its time, and no more than the bind allows."""
        left = (letter.expires_at - self._now()).total_seconds()
        return left > self._options.assignment_seconds / 2 and letter.expires_at <= last_delivery(pod, self._now())

    async def deliver(
        self, hold: Hold, pool: PoolFact, request: StartRequest, server: LiveKitServer, errand: Errand
    ) -> str | None:
        """Bring the assignment to the agent; None when it was accepted, else why it certainly was not.

        When no answer comes, the agent is asked until the assignment has expired, and is brought it again if it says that it is parked (the same
        session twice is harmless there). Only past the expiry, from which on agent and LiveKit server refuse it, is the session free for another pod.
        """
        letter, call = errand.letter, errand.call
        if letter is None or not self._is_fresh(letter, hold.pod):
            letter, call = self._letter(hold.pod, pool, request, server), None
        expires_at = letter.expires_at
        if expires_at <= self._now():
            # The API server took so long with the bind that nothing may be sent any more.
            return "TOO_LATE"
        bringing = call.bring() if call is not None else self._courier.bind(hold.pod, letter.order)
        under_way = False
        while True:
            hold.sent_until = expires_at
            match await bringing:
                case Accepted():
                    return None
                case Refused("ALREADY_BOUND" as code):
                    # Whatever it does, it does not do it for us; it is not ours to delete.
                    return code
                case Refused(code) if not under_way:
                    hold.sent_until = None
                    return code
                case NotReached() if not under_way:
                    hold.sent_until = None
                    return "NOT_REACHED"
                case Unknown():
                    under_way = True
                    log.warning("an agent did not answer; it is asked", extra=words(request, hold.pod))
                case _:
                    # What is said of this letter tells nothing of the one before, which may still be read.
                    await asyncio.sleep(self._options.status_interval_seconds)
            while (left := (expires_at - self._now()).total_seconds()) > 0:
                status = await self._courier.status(hold.pod)
                if status is not None and status.has(request.session_id):
                    return None
                if status is not None and status.state == "ending":
                    return "ENDING"
                if status is not None and status.state == "parked" and left > self._options.status_interval_seconds:
                    # A letter is good for once.
                    bringing = self._courier.bind(hold.pod, self._order(hold.pod, pool, request, server, expires_at))
                    break
                await asyncio.sleep(min(self._options.status_interval_seconds, max(0.0, left)))
            else:
                return await self._after_expiry(hold, request, server)

    async def _after_expiry(self, hold: Hold, request: StartRequest, server: LiveKitServer) -> str | None:
        status = await self._courier.status(hold.pod)
        if status is not None:
            return None if status.has(request.session_id) else "TIMED_OUT"
        # It cannot be asked, but it may be in the room for all that.
        try:
            present = await self._rooms.has(server, request.room, agent_identity(request.session_id))
        except LiveKitUnavailable:
            present = False
        return None if present else "TIMED_OUT"

    def _order(
        self, pod: PodFact, pool: PoolFact, request: StartRequest, server: LiveKitServer, expires_at: datetime
    ) -> str:
        ttl_seconds = (expires_at - self._now()).total_seconds() - self._options.livekit_token_leeway_seconds
        token = agent_token(
            server, room=request.room, identity=agent_identity(request.session_id), ttl_seconds=ttl_seconds
        )
        assignment = Assignment(
            session_id=request.session_id,
            pool=f"{request.namespace}/{request.pool}",
            room=request.room,
            url=server.url,
            token=token,
            body=request.body,
            max_duration_seconds=pool.spec.session.max_duration_seconds,
            traceparent=request.span.traceparent,
        )
        return self._signer.assignment(pod.uid, assignment, expires_at=expires_at)

    async def end(self, pod: PodFact, session_id: str, mode: Literal["drain", "cancel"]) -> Outcome:
        """Bring the order to end a session."""
        expires_at = self._now() + timedelta(seconds=self._options.assignment_seconds)
        return await self._courier.end(pod, self._signer.end(pod.uid, session_id, mode, expires_at=expires_at))
