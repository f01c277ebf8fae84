"""When a session is free for another agent: never while a letter may still be read by the one before."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import cast

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from tests.unit.facts import bound, pool

from voicepool.agents import AgentStatus
from voicepool.gateway.assignments import Signer
from voicepool.gateway.deliverer import Deliverer, Errand
from voicepool.gateway.delivery import Accepted, Courier, NotReached, Outcome, Refused, Unknown
from voicepool.gateway.livekit import LiveKitServer, Rooms
from voicepool.gateway.options import GatewayOptions
from voicepool.gateway.requests import Hold, StartRequest

OPTIONS = GatewayOptions(assignment_seconds=0.3, status_interval_seconds=0.02, livekit_token_leeway_seconds=0)
SERVER = LiveKitServer("ws://livekit", "key", "secret-secret-secret-secret-secret")


class Scripted:
    """A courier, and the LiveKit rooms, of an agent whose answers are known beforehand."""

    def __init__(self, outcomes: Sequence[Outcome], states: Sequence[str]) -> None:
        self._outcomes = list(outcomes)
        self._states = list(states)
        self.brought = 0

    async def bind(self, _pod: object, _order: str) -> Outcome:
        self.brought += 1
        return self._outcomes.pop(0) if self._outcomes else NotReached()

    async def status(self, _pod: object) -> AgentStatus:
        """The last state stays."""
        state = self._states.pop(0) if len(self._states) > 1 else self._states[0]
        return AgentStatus(state, "s-1" if state == "accepted" else None, "uid")


async def deliver(agent: Scripted) -> tuple[str | None, Hold]:
    """What comes of a delivery, and what is known of the pod after it."""
    now = datetime.now(UTC)
    hold = Hold(dataclasses.replace(bound(0), bound_at=now))
    deliverer = Deliverer(
        courier=cast("Courier", agent),
        signer=Signer(Ed25519PrivateKey.generate(), lambda: datetime.now(UTC)),
        rooms=cast("Rooms", agent),
        options=OPTIONS,
        now=lambda: datetime.now(UTC),
    )
    request = StartRequest("calls", "demo", "s-1", False)
    return await deliverer.deliver(hold, pool(), request, SERVER, Errand()), hold


@pytest.mark.parametrize(
    ("outcome", "code"), [(NotReached(), "NOT_REACHED"), (Refused("INVALID_ASSIGNMENT"), "INVALID_ASSIGNMENT")]
)
async def test_an_agent_that_certainly_has_no_letter_frees_the_session_at_once(outcome: Outcome, code: str) -> None:
    why, hold = await deliver(Scripted([outcome], ["parked"]))
    assert (why, hold.sent_until) == (code, None)


@pytest.mark.parametrize("second", [NotReached(), Refused("NOT_PARKED")])
async def test_what_becomes_of_a_second_letter_tells_nothing_of_the_first_which_may_still_be_read(
    second: Outcome,
) -> None:
    why, hold = await deliver(Scripted([Unknown(), second], ["parked"]))
    assert why == "TIMED_OUT"
    assert hold.sent_until is not None
    assert datetime.now(UTC) >= hold.sent_until, "the session was free while the first letter could be read"


async def test_a_first_letter_that_is_read_after_the_second_was_not_gets_the_session_there() -> None:
    agent = Scripted([Unknown(), NotReached()], ["parked", "accepted"])
    assert (await deliver(agent))[0] is None
    assert agent.brought == 2


async def test_an_agent_that_is_parked_is_brought_another_letter() -> None:
    agent = Scripted([Unknown(), Accepted()], ["parked"])
    assert (await deliver(agent))[0] is None
    assert agent.brought == 2
