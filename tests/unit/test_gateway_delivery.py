"""A connection to an agent that is made before its pod is bound, and what can come of it."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from tests.ports import free_port
from tests.unit.facts import warm

from voicepool.agents import make_agent_session
from voicepool.gateway.delivery import Accepted, Call, Courier, NotReached, Outcome, Refused, Unknown

ORDER = "an.order.signed"
POD = dataclasses.replace(warm(0), pod_ip="127.0.0.1")


@dataclass
class Agent:
    """What an agent hears on one connection, and what it says when it has heard the whole order."""

    answer: bytes = b"HTTP/1.1 202 Accepted\r\nContent-Length: 0\r\n\r\n"
    connected: asyncio.Event = field(default_factory=asyncio.Event)
    gone: asyncio.Event = field(default_factory=asyncio.Event)
    heard: bytes = b""
    closes_at_once: bool = False

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connected.set()
        try:
            while not self.closes_at_once and (piece := await reader.read(65536)):
                self.heard += piece
                if self.heard.endswith(ORDER.encode()) and self.answer:
                    writer.write(self.answer)
        finally:
            writer.close()
            self.gone.set()


@asynccontextmanager
async def calling(agent: Agent | None) -> AsyncIterator[Call]:
    """A call to an agent; None: nobody listens there."""
    port = free_port()
    server = await asyncio.start_server(agent.serve, "127.0.0.1", port) if agent else None
    async with make_agent_session() as http:
        courier = Courier(http, port=port, bind_timeout_seconds=0.5, status_timeout_seconds=0.5)
        call = courier.call(POD, ORDER)
        try:
            if agent is not None:
                await agent.connected.wait()
            yield call
        finally:
            call.hang_up()
    if server is not None:
        server.close()
        await server.wait_closed()


async def outcome_with(agent: Agent | None) -> Outcome:
    async with calling(agent) as call:
        return await call.bring()


async def test_an_order_goes_out_when_it_is_to_be_brought_and_not_one_byte_before() -> None:
    agent = Agent()
    async with calling(agent) as call:
        await asyncio.sleep(0.05)
        assert agent.heard == b""
        assert await call.bring() == Accepted()
    head, _, body = agent.heard.partition(b"\r\n\r\n")
    assert head.startswith(b"POST /bind HTTP/1.1\r\n")
    assert b"Content-Type: application/jwt" in head
    assert body == ORDER.encode()


async def test_an_agent_whose_pod_is_lost_sees_a_connection_that_goes_again() -> None:
    agent = Agent()
    async with calling(agent) as call:
        call.hang_up()
        async with asyncio.timeout(10):
            await agent.gone.wait()
    assert agent.heard == b""


async def test_where_nobody_listens_nothing_was_sent() -> None:
    assert await outcome_with(None) == NotReached()


async def test_where_the_connection_is_lost_before_the_bind_nothing_was_sent() -> None:
    agent = Agent(closes_at_once=True)
    async with calling(agent) as call:
        await agent.gone.wait()
        await asyncio.sleep(0.05)
        assert await call.bring() == NotReached()


async def test_an_agents_refusal_is_its_own_word() -> None:
    body = b'{"code":"ALREADY_BOUND"}'
    refusal = b"HTTP/1.1 409 Conflict\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
    assert await outcome_with(Agent(answer=refusal)) == Refused("ALREADY_BOUND")


async def test_of_an_agent_that_does_not_answer_it_is_not_known_whether_it_has_the_session() -> None:
    assert await outcome_with(Agent(answer=b"")) == Unknown()
